"""Which solver: by name, or "auto", a plan of stages that go on from one another.

The plan depends on the size of the system, its noise and the memory only, see
``plan``; which stages were needed depends on how they end. A stage that stagnates or
runs out of its share hands its best iterate to the next. ``docs/solvers.md`` has the
measurements behind the rule, ``costs.py`` what it takes a step to cost.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.memory import resolve_budget
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.adasap import ADASAP
from sgdgp.solvers.alternating_projections import AlternatingProjections
from sgdgp.solvers.base import (
    Callback,
    IterativeSolver,
    Limits,
    Solution,
    Solver,
    Watch,
)
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.costs import costs_of
from sgdgp.solvers.inducing_sgd import InducingSGD
from sgdgp.solvers.preconditioners import PivotedCholesky, default_rank
from sgdgp.solvers.prediction_error import settle_means
from sgdgp.solvers.sdd import SDD
from sgdgp.solvers.sgd import SGD
from sgdgp.solvers.solutions import continued
from sgdgp.solvers.system import System, as_system
from sgdgp.solvers.two_level import (
    TwoLevel,
    default_neighbours,
    far_field_rank,
    neighbours_pay,
    noise_ratio,
)

DIRECT_ROWS = 2_000
"""Up to here a Cholesky factor takes less than a tenth of a second."""

SMALLEST_RANK = 100
"""A preconditioner of a lower rank is not worth choosing CG for."""

# With less noise CG takes more than these passes (4,000 rows: 25 to 35, 2.2 s against
# 1.1 s of the factor): a factor that costs no more comes first.
_SMALL_NOISE, _SURE_PASSES = 1e-3, 20.0
# With fewer, what SDD has by then predicts better than the first iterates of CG
# (``benchmarks/thompson_sampling``).
_FEW_PASSES = 15.0
# CG is left in peace for as long as so many of them take: a solve that the factor has
# to finish then takes at most three times what the factor alone would have.
_FACTORISATIONS = 2.0
_LEAST_SHARE = 50.0  # passes before a factor, however cheap: it takes much more memory
_TIMED_ROWS = 512  # of the timed product: enough for a clock, a small part of a pass
_BYTES_PER_RANK = 40  # per row: in float64 and in the data's dtype, and slack
_BYTES_PER_NEIGHBOUR = 64  # per row: indices, masks, two compressed copies


@register_stored_class
@dataclass(frozen=True)
class Stage:
    """One solver of a plan.

    Attributes:
        solver: The solver, its limits not yet set.
        share: Passes after which the next stage gets its turn. Default: no limit.
    """

    solver: Solver
    share: float = float("inf")


def plan(
    operator: KernelOperator,
    noise: Tensor | float,
    columns: int,
    memory_budget: int,
    passes: float = math.inf,
) -> tuple[Stage, ...]:
    """Which solvers, in which order.

    1. Up to 2,000 rows, if 8 n^2 bytes fit the budget: ``Cholesky``.
    2. Else, where the seconds are good for less than 15 passes, ``SDD``: what it has by
       then predicts better than the first iterates of CG.
    3. Where the noise is less than a thousandth of the prior variance and the
       factorisation costs less than 20 passes (some 6,000 rows with 65 columns):
       ``Cholesky``.
    4. Else ``CG``, if the memory allows a preconditioner of rank 100: two-level where
       neighbours tell something (noise less than a tenth of the prior variance) and
       its setup costs less than 25 of the passes that it saves (many columns, many
       rows or no K in memory), else pivoted Cholesky.
    5. Behind it ``Cholesky`` where its factor fits the budget, in seconds too, after
       the passes that cost twice as much as the factorisation, at least 50; else
       ``SDD``.

    Args:
        operator: The operator to solve with.
        noise: Variances, a number or one per row (n,).
        columns: Right-hand sides k.
        memory_budget: Bytes that the solver may use.
        passes: Passes that a budget in seconds is good for. Default: any number.
    """
    n = operator.shape[0]
    factor_fits = 8 * n * n <= memory_budget
    if n <= DIRECT_ROWS and factor_fits:
        return (Stage(Cholesky()),)
    if passes < _FEW_PASSES and operator.outputs_per_input == 1:
        return (Stage(SDD()),)
    costs = costs_of(operator)
    factorisation = costs.factor * n / costs.of_entry(columns)
    if (
        factor_fits
        and factorisation <= min(passes, _SURE_PASSES)
        and noise_ratio(operator, noise) < _SMALL_NOISE
    ):
        return (Stage(Cholesky()),)
    stages: list[Stage] = []
    share = float("inf")
    if factor_fits:
        share = max(_LEAST_SHARE, _FACTORISATIONS * factorisation)
    if (
        neighbours_pay(operator, noise, columns)
        and n
        * (
            _BYTES_PER_RANK * far_field_rank(n)
            + _BYTES_PER_NEIGHBOUR * default_neighbours(n)
        )
        <= memory_budget
    ):
        stages.append(Stage(CG(preconditioner=TwoLevel()), share))
    else:
        rank = min(default_rank(n), memory_budget // (_BYTES_PER_RANK * n))
        if rank >= SMALLEST_RANK or n <= DIRECT_ROWS:
            stages.append(
                Stage(CG(preconditioner=PivotedCholesky(rank=max(1, rank))), share)
            )
    if factor_fits and factorisation <= passes:
        stages.append(Stage(Cholesky()))
    elif operator.outputs_per_input == 1:
        stages.append(Stage(SDD()))
    return tuple(stages or (Stage(CG(preconditioner=None)),))


def _seconds_of_a_pass(system: System) -> float:
    """Measured on some rows, which takes a small part of one."""
    rows = min(system.n, _TIMED_ROWS)
    # A first product fills a matrix, or compiles, once.
    system.operator.rows(slice(0, 1)).matmul(system.rhs)
    start = time.perf_counter()
    system.operator.rows(slice(0, rows)).matmul(system.rhs)
    return max(1e-9, (time.perf_counter() - start) * system.n / rows)


@register_stored_class
@dataclass(frozen=True)
class Auto(IterativeSolver):
    """Solvers by the documented rule, with a fall-through; nothing needs to be set.

    Attributes:
        tolerance: Relative residual that every column must reach. Default: 1e-3; with
            preconditioners the last digit is cheap, and variances at small noise
            need it. Means go on until they are off by less than a tenth of a posterior
            deviation, see ``prediction_error``.
        max_passes: Budget in passes over K, of all stages together.
        max_seconds: Budget in seconds. Default: none.
        memory_budget: Bytes that the solver may use. Default: half of what is free.
        stages: The plan. Default: that of ``plan``.
        recycle: Directions that CG keeps for the same matrix with more rows.
    """

    tolerance: float = 1e-3
    memory_budget: int | None = field(default=None, repr=False)
    stages: tuple[Stage, ...] | None = None
    recycle: int = field(default=0, repr=False)

    name = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None and not self.stages:
            raise ValueError("stages: expected at least one Stage, found none")

    @property
    def resumes(self) -> bool:
        return type(self) is Auto

    def with_recycling(self, directions: int) -> Auto:
        return replace(self, recycle=directions)

    def solve(
        self,
        operator: KernelOperator,
        noise: Tensor | float,
        rhs: Float[Tensor, "n k"],
        *,
        initial: Tensor | None = None,
        noise_draws: Tensor | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve (K + Sigma) V = B; see ``Solver.solve``."""
        generator = generator or torch.Generator().manual_seed(0)
        stages = self.stages
        if stages is None:
            budget = resolve_budget(self.memory_budget, rhs.device)
            system = as_system(operator, noise, rhs)  # checks them before all else
            affordable = math.inf
            if self.max_seconds is not None:
                affordable = self.max_seconds / _seconds_of_a_pass(system)
            stages = plan(operator, system.noise, rhs.shape[1], budget, affordable)
        done: list[Solution] = []
        passes = seconds = 0.0
        for i, stage in enumerate(stages):
            solver = self._limited(stage, passes, seconds, last=i == len(stages) - 1)
            try:
                solution = solver.solve(
                    operator,
                    noise,
                    rhs,
                    initial=done[-1].weights if done else initial,
                    noise_draws=noise_draws,
                    generator=generator,
                    callback=Watch.after(passes, seconds, callback),
                )
            except RuntimeError:
                if not done:  # nothing to fall back on
                    raise
                break
            done.append(solution)
            passes = math.fsum(solution.passes for solution in done)
            seconds = math.fsum(solution.seconds for solution in done)
            if (
                solution.reason in ("converged", "interrupted")
                or _stopped_by_the_clock(solution, solver)
                or passes + 1.0 >= self.max_passes
                or (self.max_seconds is not None and seconds >= self.max_seconds)
            ):
                break
        found = _merged(done, self.tolerance)
        variances = torch.as_tensor(noise, dtype=rhs.dtype, device=rhs.device)
        return settle_means(
            found,
            operator,
            variances.expand(len(rhs)),
            rhs,
            noise_draws,
            self.limits,
            callback,
        )

    def _limited(
        self, stage: Stage, passes: float, seconds: float, *, last: bool
    ) -> Solver:
        """The stage's solver with this solver's tolerance and what is left to spend."""
        if stage.solver.limits.max_passes is None:
            return stage.solver  # a direct solve: no budget, a tolerance of its own
        remaining = self.max_passes - passes
        passes = remaining if last else min(remaining, stage.share)
        limits = replace(self.limits.less(0.0, seconds), max_passes=passes)
        return stage.solver.with_limits(limits).with_recycling(self.recycle)


def _stopped_by_the_clock(solution: Solution, solver: Solver) -> bool:
    """Whether a solver with a limit in seconds gave up with passes left to it."""
    limits = solver.limits
    return (
        limits.max_seconds is not None
        and solution.reason == "budget"
        and (limits.max_passes is None or solution.passes + 2.0 <= limits.max_passes)
    )


def _merged(done: Sequence[Solution], tolerance: float) -> Solution:
    """One account of all stages; the columns of whichever ended better."""
    last = done[-1]
    if len(done) == 1:
        return last
    weights, residuals = done[0].weights, done[0].residuals
    for solution in done[1:]:
        better = solution.residuals <= residuals
        weights = torch.where(better, solution.weights, weights)
        residuals = torch.where(better, solution.residuals, residuals)
    reason = last.reason
    if float(residuals.max()) <= tolerance:
        reason = "converged"
    earlier = ", then ".join(f"{s.solver} ({s.reason})" for s in done[:-1])
    return replace(
        reduce(continued, done),
        solver="+".join(solution.solver for solution in done),
        weights=weights,
        residuals=residuals,
        reason=reason,
        warnings=(f"auto went on from {earlier} to {last.solver}.", *last.warnings),
        recycled=None,
        settings={
            **last.settings,
            "stages": tuple((s.solver, s.reason, dict(s.settings)) for s in done),
        },
    )


SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (ADASAP, AlternatingProjections, CG, Cholesky, InducingSGD, SDD, SGD)
}
"""Every solver that can be asked for by name, beside "auto"."""


def choose_solver(
    solver: Solver | str, operator: KernelOperator | None, memory_budget: int
) -> Solver:
    """Turn "auto" or a name into a solver.

    Args:
        solver: A solver, "auto" (see ``auto.plan``), or a name in ``SOLVERS``.
        operator: The operator to solve with; no rule needs it so far.
        memory_budget: Bytes that may be used.

    Raises:
        TypeError: Neither a solver nor a name.
        ValueError: Unknown name.
    """
    if isinstance(solver, Solver):
        return solver
    check_solver_name(solver)
    if solver == "auto":
        return Auto(memory_budget=memory_budget)
    return SOLVERS[solver]()


def check_solver_name(solver: Solver | str) -> None:
    """Refuse what is no solver, and a name that none has.

    Raises:
        TypeError: Neither a solver nor a name.
        ValueError: Unknown name.
    """
    if not isinstance(solver, Solver | str):
        raise TypeError(
            f"solver: expected a Solver such as SDD(), or a name, found {solver!r}"
        )
    if not isinstance(solver, Solver) and solver not in ("auto", *SOLVERS):
        raise ValueError(
            f"solver: expected a Solver, 'auto' or one of {sorted(SOLVERS)}, found "
            f"{solver!r}"
        )


def Refined(
    solver: Solver | None = None,
    tolerance: float = 1e-8,
    max_refinements: int = 50,
    max_passes: float = 1000.0,
    max_seconds: float | None = None,
) -> Solver:
    """The solver, or ``CG()``, with these limits; deprecated.

    It solved in float32 and corrected with residuals in float64, which took longer than
    to solve in float64.
    """
    solver = CG() if solver is None else solver
    warnings.warn(
        f"Refined goes with version 0.3: {type(solver).__name__}(tolerance="
        f"{tolerance:g}) with float64 data reaches the same in less time.",
        DeprecationWarning,
        stacklevel=2,
    )
    return solver.with_limits(Limits(tolerance, max_passes, max_seconds))
