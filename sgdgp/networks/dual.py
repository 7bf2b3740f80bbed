"""The dual solvers as solvers in the weights.

    (phi^T phi + I) V = B   by   V = B + phi^T U,   (phi phi^T + I) U = -phi B.

U is as large as the data has outputs, and a step of SDD costs one minibatch. An error
in U is larger by up to the square root of the largest eigenvalue in the residual of V:
what is left is solved for again, to the tolerance that the last round has shown to be
needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.slices import slices
from sgdgp.features import FeatureMap
from sgdgp.networks.curvature import WeightSystem
from sgdgp.networks.weight_solvers import (
    Watch,
    WeightSolution,
    WeightSolver,
    first_residual,
    relative_errors,
    true_residual,
)
from sgdgp.operators import FeatureOperator
from sgdgp.solvers.base import Callback, Progress, Reason, Solution, Solver
from sgdgp.solvers.sdd import SDD


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


_TIGHTER = 0.3
_TIGHTEST = 1e-12
_MOST_ROUNDS = 20


@dataclass(frozen=True)
class DataRows:
    """Whitened features of a data set by the index of an example (``WhitenedRows``).

    Attributes:
        system: Data, prior and likelihood.
    """

    system: WeightSystem

    @property
    def num_examples(self) -> int:
        """N."""
        return self.system.data.stream.num_rows

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.system.outputs.shape[1]

    @property
    def num_weights(self) -> int:
        """D."""
        return self.system.num_weights

    def forward(self, indices: Tensor, w: Float[Tensor, "D k"]) -> Tensor:
        """L^T J R w, (b C, k)."""
        system = self.system
        at = system.data.tangent.at(system.data.stream.take(indices).x)
        images = at.jvp(system.prior.root(w))
        outputs = system.outputs[indices]
        return system.likelihood.hessian_root_transpose(outputs, images).flatten(0, 1)

    def adjoint(self, indices: Tensor, u: Tensor) -> Float[Tensor, "D k"]:
        """R^T J^T L u, (D, k)."""
        system = self.system
        at = system.data.tangent.at(system.data.stream.take(indices).x)
        u = u.unflatten(0, (len(indices), self.num_outputs))
        pulled = at.vjp(system.likelihood.hessian_root(system.outputs[indices], u))
        return system.prior.root_adjoint(pulled)


@dataclass(frozen=True)
class Dual(WeightSolver):
    """Any solver of ``sgdgp.solvers`` on the whitened tangent kernel.

    Worth it where there are fewer outputs in the data than weights in the network, and
    a pass over the data is dear. The data must be readable by index, in one process.

    Attributes:
        solver: Solver of the dual; its tolerance and passes are set here.
        tolerance: Relative error that every column must reach.
        max_passes: Budget in passes over the data.
        batch_size: Examples at a time in a pass over the data.
    """

    solver: Solver = field(default_factory=SDD)
    tolerance: float = field(default=0.05, kw_only=True)
    max_passes: float = field(default=500.0, kw_only=True)
    batch_size: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver: expected SDD(), found {self.solver!r}")

    def solve(
        self,
        system: WeightSystem,
        rhs: Float[Tensor, "D k"],
        initial: Float[Tensor, "D k"],
        *,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> WeightSolution:
        """Solve (phi^T phi + I) V = B; see ``WeightSolver.solve``.

        Raises:
            TypeError: The data cannot be read by index.
            ValueError: Several processes share the data.
        """
        processes = system.data.stream.processes
        if processes.size > 1:
            raise ValueError(
                f"solver: Dual() works in one process, found {processes.size}; use "
                "WeightCG() or WeightSGD()"
            )
        rows, generator = DataRows(system), torch.Generator().manual_seed(seed)
        weights = initial
        residual, passes = first_residual(system, rhs, initial)
        errors = relative_errors(rhs, weights, residual)
        inner, reason = 0.1 * self.tolerance, self._verdict(errors, passes)
        rounds = 0

        def told(progress: Progress) -> bool:
            return watch is not None and watch(
                passes + progress.passes, errors, lambda: weights
            )

        while reason is None:
            solver = self._limited(inner, self.max_passes - passes - 2.0)
            found = solve_dual(
                rows,
                residual,
                rhs.new_zeros(rows.num_examples * rows.num_outputs, rhs.shape[1]),
                solver,
                batch_size=self.batch_size,
                generator=generator,
                callback=told,
            )
            candidate = weights + found.weights
            left = true_residual(system, rhs, candidate)
            passes += found.passes + 1.0
            rounds += 1
            better = left.norm(dim=0) < residual.norm(dim=0)
            weights = torch.where(better, candidate, weights)
            residual = torch.where(better, left, residual)
            errors = relative_errors(rhs, weights, residual)
            reason = self._verdict(errors, passes)
            if reason is None and found.solution.reason == "interrupted":
                reason = "interrupted"
            if reason is None and rounds >= _MOST_ROUNDS:
                reason = "stagnated"
            # To what the worst column needs beyond what this round has gained.
            needed = float((self.tolerance / errors).nan_to_num(0.0).min())
            if not bool(better.all()) or needed < _TIGHTER:
                inner = max(inner * _TIGHTER, _TIGHTEST)
        return WeightSolution(weights, residual, errors, passes, reason)

    def _verdict(self, errors: Tensor, passes: float) -> Reason | None:
        if not bool((errors > self.tolerance).any()) and not bool(errors.isnan().any()):
            return "converged"
        return "budget" if passes + 4.0 >= self.max_passes else None

    def _limited(self, tolerance: float, passes: float) -> Solver:
        """The solver with a tolerance and what is left to spend, where it has such."""
        limits = replace(self.solver.limits, tolerance=tolerance, max_passes=passes)
        return self.solver.with_limits(limits)
