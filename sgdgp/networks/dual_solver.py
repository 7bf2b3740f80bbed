"""The dual solvers as solvers in the weights.

    (phi^T phi + I) V = B   by   V = B + phi^T U,   (phi phi^T + I) U = -phi B.

U is as large as the data has outputs, and a step of SDD costs one minibatch. An error
in U is larger by up to the square root of the largest eigenvalue in the residual of V:
what is left is solved for again, to the tolerance that the last round has shown to be
needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.curvature import WeightSystem
from sgdgp.networks.dual import solve_dual
from sgdgp.networks.weight_solvers import (
    Watch,
    WeightSolution,
    WeightSolver,
    first_residual,
    relative_errors,
    true_residual,
)
from sgdgp.solvers.base import Progress, Reason, Solver
from sgdgp.solvers.sdd import SDD

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
        limits: dict[str, Any] = {"tolerance": tolerance, "max_passes": passes}
        known = {key: limits[key] for key in limits if hasattr(self.solver, key)}
        return replace(self.solver, **known)  # type: ignore[type-var]
