"""The dual of the linearised network: a Gaussian process solve with unit noise.

With phi (N C, D) the whitened features of all examples, the rows L_n^T J_n R,

    (phi^T phi + I) V = B   by   V = B + phi^T U,   (phi phi^T + I) U = -phi B.

The kernel phi phi^T is the network's tangent kernel, whitened: every solver of
``sgdgp.solvers`` runs on it, those that move on blocks with phi^T U at their side, at
the cost of one minibatch a step. U is as large as the data has outputs. An error in U
is larger by up to the square root of the largest eigenvalue in the residual of V: what
is left is solved for again, to the tolerance that the last round has shown to be
needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.slices import slices
from sgdgp.features import FeatureMap
from sgdgp.networks.curvature import Jacobian, WeightSystem
from sgdgp.networks.weight_solvers import WeightSolution, WeightSolver
from sgdgp.operators import FeatureOperator
from sgdgp.solvers.base import Reason, Solver
from sgdgp.solvers.sdd import SDD

_FIRST = 0.1
"""The dual's first tolerance over that of the weights: its errors come out larger."""

_TIGHTER = 0.3
"""The dual's tolerance over the last one's, where a round leaves more than this to do:
smaller steps would pay for passes over the data between them, larger ones overshoot."""

_TIGHTEST = 1e-12
"""The dual's smallest tolerance: float64 reaches nothing below it."""

_MOST_ROUNDS = 20
"""Cut in each of them, the tolerance is at its smallest long before."""


class WhitenedFeatures(FeatureMap):
    """phi as a feature map over a column of example numbers.

    Row c of an example is that of its output c. Only a minibatch of distinct examples
    is asked for at a time.

    Args:
        system: Data that can be read by index, prior and likelihood.
        batch_size: Examples that are asked for at a time.

    Attributes:
        num_outputs: C.
    """

    exact = True

    def __init__(self, system: WeightSystem, batch_size: int) -> None:
        self.system = system
        self.batch_size = batch_size
        self.num_features = system.num_weights
        self.num_outputs = system.outputs.shape[1]

    def examples(self) -> Float[Tensor, "n 1"]:
        """The numbers of all examples, as points of this map.

        Raises:
            ValueError: There are more than the dtype tells apart.
        """
        outputs, count = self.system.outputs, self.system.data.stream.num_rows
        largest = 2 / torch.finfo(outputs.dtype).eps
        if count > largest:
            raise ValueError(
                f"loader: Dual() takes at most {int(largest)} examples in "
                f"{outputs.dtype}, found {count}; use WeightCG() or WeightSGD()"
            )
        numbers = torch.arange(count, device=outputs.device)
        return numbers.to(outputs.dtype).unsqueeze(1)

    def features(self, x: Float[Tensor, "n 1"]) -> Float[Tensor, "nC D"]:
        """The features of each example by one adjoint with C columns."""
        unit = torch.eye(self.num_outputs, dtype=x.dtype, device=x.device)
        found = [self.adjoint(example, unit).mT for example in x.split(1) if len(x)]
        return torch.cat(found) if found else x.new_empty(0, self.num_features)

    def forward(
        self, x: Float[Tensor, "n 1"], w: Float[Tensor, "D k"]
    ) -> Float[Tensor, "nC k"]:
        """Products phi w = L^T J R w, batch by batch."""
        likelihood = self.system.likelihood
        out = w.new_empty(len(x) * self.num_outputs, w.shape[1])
        changes = self.system.prior.root(w)
        for at, outputs, rows in self._batches(x):
            images = likelihood.hessian_root_transpose(outputs, at.jvp(changes))
            out[rows] = images.flatten(0, 1)
        return out

    def adjoint(
        self, x: Float[Tensor, "n 1"], v: Float[Tensor, "nC k"]
    ) -> Float[Tensor, "D k"]:
        """Products phi^T v = R^T J^T L v, batch by batch."""
        system = self.system
        out = v.new_zeros(v.shape[1], self.num_features).mT
        for at, outputs, rows in self._batches(x):
            u = v[rows].unflatten(0, outputs.shape)
            pulled = at.vjp(system.likelihood.hessian_root(outputs, u))
            out.add_(system.prior.root_adjoint(pulled))
        return out

    def _batches(
        self, x: Float[Tensor, "n 1"]
    ) -> Iterator[tuple[Jacobian, Float[Tensor, "b C"], slice]]:
        """Some examples' Jacobian, outputs, and rows."""
        system, outputs = self.system, self.num_outputs
        for batch in slices(len(x), self.batch_size):
            numbers = x[batch, 0].round().long()
            at = system.data.at(system.data.stream.take(numbers))
            rows = slice(batch.start * outputs, batch.stop * outputs)
            yield at, system.outputs[numbers], rows


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
        check_count("batch_size", self.batch_size, 1)
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver: expected SDD(), found {self.solver!r}")

    @torch.no_grad()
    def _advance(self, found: WeightSolution, generator: torch.Generator) -> Reason:
        system = found.system
        processes = system.data.stream.processes
        if processes.size > 1:
            raise ValueError(
                f"solver: Dual() works in one process, found {processes.size}; use "
                "WeightCG() or WeightSGD()"
            )
        features = WhitenedFeatures(system, self.batch_size)
        x = features.examples()
        operator = FeatureOperator.of_map(features, x, outputs=features.num_outputs)
        # phi B is noise-free: there are no draws in the dual's right-hand sides.
        no_draws = system.outputs.new_zeros(operator.shape[0], found.rhs.shape[1])
        tolerance, rounds = _FIRST * self.tolerance, 0

        while (reason := self._verdict(found)) is None:
            if rounds >= _MOST_ROUNDS:
                return "stagnated"
            limits = replace(
                self.solver.limits,
                tolerance=tolerance,
                max_passes=self.max_passes - found.passes - 2.0,
            )
            solution = self.solver.with_limits(limits).solve(
                operator,
                1.0,
                no_draws - features.forward(x, found.residuals),
                noise_draws=no_draws,
                generator=generator,
                callback=lambda progress: found.report(progress.passes),
            )
            change = features.adjoint(x, solution.weights).add_(found.residuals)
            # The features of the residual, and of the solution, took half a pass each.
            found.passes += solution.passes + 1.0
            candidate = found.weights + change
            better = found.improve(candidate, found.residuals_of(candidate))
            rounds += 1
            if solution.reason == "interrupted":
                return self._verdict(found) or "interrupted"
            # To what the worst column needs beyond what this round has gained.
            needed = float((self.tolerance / found.errors).nan_to_num(0.0).min())
            if not bool(better.all()) or needed < _TIGHTER:
                tolerance = max(tolerance * _TIGHTER, _TIGHTEST)
        return reason

    def _verdict(self, found: WeightSolution) -> Reason | None:
        if bool((found.errors <= self.tolerance).all()):
            return "converged"
        # A round takes four passes but for the dual's own.
        return "budget" if found.passes + 4.0 >= self.max_passes else None
