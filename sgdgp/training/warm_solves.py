"""The solves of one system, each going on where the one before it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.core.memory import resolve_budget
from sgdgp.gpytorch_adapter import TracedProblem
from sgdgp.operators import KernelOperator
from sgdgp.solvers.auto import Auto, choose_solver, plan
from sgdgp.solvers.base import Solution, Solver
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.preconditioners import CachedPreconditioner
from sgdgp.training.gradient import residual
from sgdgp.training.probes import Probes, StandardProbes

_PRECONDITIONER_USES = 5
"""Systems that one preconditioner serves: the kernel changes by a step in each, and a
few more iterations are less than a setup."""


@dataclass(frozen=True)
class SolveSettings:
    """How the solves are made.

    Attributes:
        solver: A solver, its name, or "auto".
        probes: The probe vectors, or "auto": ``StandardProbes()``.
        tolerance: Relative residual that ends a solve, for solvers given by name.
        passes: Budget of each solve in passes over K.
        warm_start: Whether a solve starts at the last solution.
        seed: Seed of the probes, which stay the same from solve to solve.
        memory_budget: Bytes that the solver may use. Default: half of what is free.
    """

    solver: Solver | str
    probes: Probes | str
    tolerance: float
    passes: float
    warm_start: bool
    seed: int
    memory_budget: int | None = None


@dataclass
class WarmSolves:
    """Settings, and what each solve leaves to the next.

    Attributes:
        settings: How the solves are made.
        weights: Solutions of targets and probes (n, c + s), in the end of the last
            solve.
        preconditioner: The last one that conjugate gradients made.
    """

    settings: SolveSettings
    weights: Float[Tensor, "n k"] | None = None
    preconditioner: CachedPreconditioner | None = None

    @torch.no_grad()
    def __call__(
        self,
        problem: TracedProblem,
        operator: KernelOperator,
        evaluation: int,
        deadline: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Solution]:
        """Solve for the targets and the probes.

        Args:
            problem: The system.
            operator: K over its inputs.
            evaluation: Number of the solve, for randomness of its own.
            deadline: When by ``time.perf_counter()`` the solve has to end, if at all.

        Returns:
            H^-1 (y - m) (n, c), left and right probe vectors (n, s), and the account
            of the solve, without its weights.
        """
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        noise = problem.noise.detach()
        probes = settings.probes
        if not isinstance(probes, Probes):
            probes = StandardProbes()
        drawn = probes.draw(problem.kernel, operator.x, noise, generator)
        columns = problem.targets.shape[1]
        rhs = torch.cat([residual(problem), drawn.rhs], dim=1)
        initial = self.weights if settings.warm_start else None
        if initial is not None and initial.shape != rhs.shape:
            initial = None
        solver = self._solver(operator, noise, rhs.shape[1], deadline)
        solution = solver.solve(
            operator,
            noise,
            rhs,
            initial=initial,
            noise_draws=pad(drawn.noise_draws, (columns, 0)),
            generator=generator.manual_seed(settings.seed + 1 + evaluation),
        )
        self.weights = solution.weights
        v, a = solution.weights[:, :columns], solution.weights[:, columns:]
        # A copy, as a view of no columns would keep all of them alive.
        account = replace(solution, weights=solution.weights[:, :0].clone())
        return v, a, drawn.right(a), account

    def _solver(
        self,
        operator: KernelOperator,
        noise: Tensor,
        columns: int,
        deadline: float | None,
    ) -> Solver:
        """The solver with the limits of a step and the preconditioner that is kept."""
        settings = self.settings
        memory = resolve_budget(settings.memory_budget, operator.device)
        solver = choose_solver(settings.solver, operator, memory)
        limits = solver.limits
        if isinstance(settings.solver, str):
            limits = replace(limits, tolerance=settings.tolerance)
        if limits.max_passes is not None:
            limits = replace(limits, max_passes=min(settings.passes, limits.max_passes))
        solver = solver.with_limits(limits.until(deadline))
        if isinstance(solver, Auto):
            stages = solver.stages or plan(operator, noise, columns, memory)
            solver = replace(
                solver,
                stages=tuple(
                    replace(stage, solver=self._with_cached(stage.solver))
                    for stage in stages
                ),
            )
        return self._with_cached(solver)

    def _with_cached(self, solver: Solver) -> Solver:
        """Conjugate gradients with a preconditioner that outlives the solve."""
        if not isinstance(solver, CG) or solver.preconditioner is None:
            return solver
        cached = self.preconditioner
        if cached is None or cached.recipe != solver.preconditioner:
            cached = CachedPreconditioner(solver.preconditioner, _PRECONDITIONER_USES)
            self.preconditioner = cached
        return replace(solver, preconditioner=cached)
