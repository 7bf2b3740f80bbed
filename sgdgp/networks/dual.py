"""The dual of the linearised network: a Gaussian process solve with unit noise.

With whitened features phi~ (N C, D), the rows L_n^T J_n R of all examples, the weights

    v = p + phi~^T u,    (phi~ phi~^T + I) u = t - phi~ p

solve (phi~^T phi~ + I) v = p + phi~^T t. With p ~ N(0, I) and t ~ N(0, I) v is a draw
of the posterior of the weights; with p = 0 and t = phi~ vbar + z it is the mean after
one Newton step from vbar. The kernel phi~ phi~^T is the network's tangent kernel,
whitened: every solver of ``sgdgp.solvers`` runs on it, those that move on blocks with
phi~^T u at their side, at the cost of one minibatch a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.slices import slices
from sgdgp.features import FeatureMap
from sgdgp.operators import FeatureOperator
from sgdgp.solvers.base import Callback, Solution, Solver


@runtime_checkable
class WhitenedRows(Protocol):
    """Whitened features of the examples of a data set, by their index.

    Row c of example n is that of its output c. Only a minibatch is asked for at a time,
    of distinct examples in any order.
    """

    @property
    def num_examples(self) -> int:
        """N."""

    @property
    def num_outputs(self) -> int:
        """C."""

    @property
    def num_weights(self) -> int:
        """D."""

    def forward(self, indices: Tensor, w: Tensor) -> Tensor:
        """L^T J R w of some examples, (b C, k) from (D, k)."""

    def adjoint(self, indices: Tensor, u: Tensor) -> Tensor:
        """R^T J^T L u of some examples, (D, k) from (b C, k)."""


class WhitenedFeatures(FeatureMap):
    """phi~ as a feature map over a column of example indices.

    Args:
        rows: Features of the examples.
        batch_size: Examples that are asked for at a time.
    """

    exact = True

    def __init__(self, rows: WhitenedRows, batch_size: int = 256) -> None:
        check_count("batch_size", batch_size, 1)
        self.rows = rows
        self.batch_size = batch_size
        self.num_features = rows.num_weights

    def features(self, x: Float[Tensor, "n 1"]) -> Float[Tensor, "nC D"]:
        """The features of each example by one adjoint with C columns."""
        outputs = self.rows.num_outputs
        unit = torch.eye(outputs, dtype=x.dtype, device=x.device)
        out = x.new_empty(len(x) * outputs, self.num_features)
        for row, index in enumerate(_indices(x).split(1)):
            mine = slice(row * outputs, (row + 1) * outputs)
            out[mine] = self.rows.adjoint(index, unit).mT
        return out

    def forward(
        self, x: Float[Tensor, "n 1"], w: Float[Tensor, "D k"]
    ) -> Float[Tensor, "nC k"]:
        """phi~ w, batch by batch."""
        out = w.new_empty(len(x) * self.rows.num_outputs, w.shape[1])
        for indices, mine in self._batches(x):
            out[mine] = self.rows.forward(indices, w)
        return out

    def adjoint(
        self, x: Float[Tensor, "n 1"], v: Float[Tensor, "nC k"]
    ) -> Float[Tensor, "D k"]:
        """phi~^T v, batch by batch."""
        out = v.new_zeros(v.shape[1], self.num_features).mT
        for indices, mine in self._batches(x):
            out.add_(self.rows.adjoint(indices, v[mine]))
        return out

    def _batches(self, x: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Indices of a batch of examples, and their rows."""
        indices, outputs = _indices(x), self.rows.num_outputs
        for batch in slices(len(x), self.batch_size):
            yield indices[batch], slice(batch.start * outputs, batch.stop * outputs)


@dataclass(frozen=True)
class DualSolution:
    """Weights found in the dual, and how.

    Attributes:
        weights: v (D, k).
        coefficients: u (N C, k), to start a similar solve from.
        solution: The solve for u; its residuals are those of the dual.
        passes: Forward and adjoint sweeps over the data set, two of them a pass; those
            from and to the weights included.
    """

    weights: Float[Tensor, "D k"] = field(repr=False)
    coefficients: Float[Tensor, "N k"] = field(repr=False)
    solution: Solution
    passes: float


@torch.no_grad()
def solve_dual(
    rows: WhitenedRows,
    prior: Float[Tensor, "D k"],
    targets: Float[Tensor, "N k"],
    solver: Solver,
    *,
    start: Float[Tensor, "N k"] | None = None,
    batch_size: int = 256,
    memory_budget: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> DualSolution:
    """Solve (phi~^T phi~ + I) v = prior + phi~^T targets through the dual.

    Args:
        rows: Whitened features of the examples.
        prior: p: prior draws of the weights (D, k), zero for a mean.
        targets: t: noise draws, or the targets of a mean (N C, k), example by example.
        solver: Any solver of ``sgdgp.solvers``.
        start: u to start from (N C, k). Default: zero.
        batch_size: Examples at a time in a sweep over the data set.
        memory_budget: Bytes for features, where a solver asks for entries of the kernel
            (alternating projections). Default: half of what is free.
        generator: Source of all randomness. Default: a generator seeded with 0.
        callback: Called as the solve advances; True stops it.

    Returns:
        The weights; ``solution.reason`` says whether the tolerance was reached.

    Raises:
        ValueError: A shape does not fit, or an index is not exact in the dtype.
    """
    examples, outputs, weights = rows.num_examples, rows.num_outputs, rows.num_weights
    if prior.ndim != 2 or prior.shape[0] != weights:
        raise ValueError(
            f"prior: expected shape ({weights}, k), found {tuple(prior.shape)}"
        )
    expected = (examples * outputs, prior.shape[1])
    if targets.shape != expected:
        raise ValueError(
            f"targets: expected shape {expected}, found {tuple(targets.shape)}"
        )
    largest = 2 / torch.finfo(prior.dtype).eps
    if examples > largest:
        raise ValueError(
            f"rows: expected at most {int(largest)} examples in {prior.dtype}, found "
            f"{examples}"
        )
    features = WhitenedFeatures(rows, batch_size)
    x = torch.arange(examples, device=prior.device).to(prior.dtype).unsqueeze(1)
    operator = FeatureOperator.of_map(
        features, x, outputs=outputs, memory_budget=memory_budget
    )
    rhs, swept = targets, 0.5
    if bool(prior.any()):
        rhs, swept = targets - features.forward(x, prior), 1.0
    solution = solver.solve(
        operator,
        1.0,
        rhs,
        initial=start,
        noise_draws=targets,
        generator=generator,
        callback=callback,
    )
    found = features.adjoint(x, solution.weights).add_(prior)
    return DualSolution(found, solution.weights, solution, solution.passes + swept)


def _indices(x: Float[Tensor, "n 1"]) -> Int[Tensor, " n"]:
    return x[:, 0].round().long()
