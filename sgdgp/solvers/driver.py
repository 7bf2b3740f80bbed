"""The loop of every stochastic solver: passes, checks, restarts, an honest end.

An ``Algorithm`` visits blocks of equations and moves its iterate; what it sees on the
way is an estimate of the residual for nothing. What they all have in common is here:

1. A pass visits blocks until all had their turn, the residual grows, or the budget
   is used up.
2. A residual that has grown makes the algorithm start again, more carefully, from the
   best it knows.
3. Where the estimate says that it is worth it, the true residual is checked
   (``stopping.py``). Only that can end a solve, and columns that are done are left
   alone from there on.
4. Of every column the best weights whose true residual is known are returned, with that
   residual. The check that this takes at the end is part of the budget.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_number, check_positive
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.base import (
    IterativeSolver,
    Reason,
    Recorder,
    Solution,
    Task,
    columns_above,
)
from sgdgp.solvers.blocks import Shuffled, in_random_order
from sgdgp.solvers.stopping import PATIENCE, Monitor
from sgdgp.solvers.system import believed_norms, true_residual

Settings = TypeVar("Settings", bound="StochasticSolver")

_FADED = 20.0  # times its memory after which momentum has faded: to exp(-20)


class BestChecked:
    """Weights (n, k) with the best true relative residual of every column so far."""

    def __init__(self, start: Tensor, norms: Tensor) -> None:
        self.weights = start.clone()
        self.norms = norms.to(torch.float64, copy=True)

    def offer(self, weights: Tensor, norms: Tensor) -> None:
        """Take the columns whose true residual (k,) is better; NaN never is."""
        better = norms < self.norms
        self.weights[:, better] = weights[:, better]
        self.norms = torch.where(better, norms, self.norms)

    def is_within(self, tolerance: float) -> bool:
        """Whether all columns have reached a tolerance."""
        return float(self.norms.max()) <= tolerance


class Algorithm(ABC, Generic[Settings]):
    """An algorithm at work on one system; ``run`` asks it for the rest.

    Args:
        solver: Its settings.
        task: What the solve was given.
        data: The system in the order of rows that the algorithm works in, with blocks.
        passes: What it took to get here.

    Attributes:
        system: That of ``data``.
        num_blocks: Blocks of a pass.
        live: Columns that are still worked on (k',).
        residual: Their residuals, every row as it was last seen (n, k').
        norms: Residuals of all columns as they are known now (k,): the true ones at a
            check, running ones between.
        checked: What a check has found so far.
        monitor: Says when to check and when to stop.
        passes: Passes spent so far.
        restarts: How often the residual has grown.
        advice: What a user may do about columns above the tolerance.
        is_verified: Whether the true residual of the present weights is known.
    """

    check_cost: float = 1.0  # passes that a check takes
    # Whether a pass, once begun, is finished whatever the budget.
    whole_passes: ClassVar[bool] = False
    # Whether the last weights are returned, rather than the best that were checked;
    # unless they are worse than the start.
    returns_last: ClassVar[bool] = False
    # What is warned of restarts, with the number of them.
    restart_warning: ClassVar[str] = (
        "{title} met a growing residual and halved its step size {restarts} times."
    )
    # Before a solve counts as diverged: what grows with a millionth of the step does
    # not grow because of the step.
    max_restarts: ClassVar[int] = 20
    monitor: Monitor

    def __init__(
        self, solver: Settings, task: Task, data: Shuffled, passes: float = 0.0
    ) -> None:
        self.solver, self.generator = solver, task.generator
        self.advice = solver.advice
        self.data, self.system = data, data.system
        self.num_blocks = len(data.blocks)
        self.passes = passes
        self.restarts = 0
        self.is_verified = True
        start, residual = torch.zeros_like(self.system.rhs), self.system.rhs
        if task.initial is not None:
            start = task.initial[data.order]
            residual = true_residual(self.system, start)
            self.passes += 1.0 + self.adjoint_cost
        self.residual = residual.to(start.dtype, copy=True)
        self.checked = BestChecked(start, residual.norm(dim=0))
        self.norms = self.checked.norms.clone()
        self.live = torch.arange(start.shape[1], device=start.device)

    @property
    def adjoint_cost(self) -> float:
        """Passes for phi^T V, where K has features: one adjoint on all rows."""
        return 0.5 if self.system.operator.has_features else 0.0

    @property
    def reserve(self) -> float:
        """Passes that the end of a solve takes."""
        return self.check_cost

    def blocks(self) -> Iterator[RowIndex]:
        """The blocks of the next pass, one after the other: all, in random order."""
        return in_random_order(self.data.blocks, self.generator)

    @abstractmethod
    def visit(self, block: RowIndex) -> Tensor:
        """Evaluate a block; the residual on it (b, k'), up to its sign."""

    @abstractmethod
    def step(self, block: RowIndex) -> None:
        """Move the iterate by what the last visit has found."""

    def watch(self, memory: float = 0.0) -> None:
        """Set up the monitor, for momentum that remembers so many passes.

        There is no verdict before that has faded.
        """
        patience = max(PATIENCE, _FADED * memory)
        self.monitor = Monitor(self.solver.tolerance, self.norms, patience)

    def is_diverging(self, residual: Tensor) -> bool:
        """Whether what a visit has returned is a reason to break off."""
        return self.monitor.is_diverging(residual, self.num_blocks)

    def end_pass(self) -> None:
        """Bring ``norms`` up to date with what the pass has seen."""
        self.see(self.residual.norm(dim=0))

    def see(self, running: Float[Tensor, " _"]) -> None:
        """Take note of running residuals of the columns still worked on (k',)."""
        self.norms = self.norms.index_copy(0, self.live, running.double())

    def has_grown(self) -> bool:
        """Whether a pass has made it worse; a place to remember one that has not."""
        return not bool(torch.isfinite(self.norms[self.live]).all())

    def restart(self) -> None:
        """Start again from the best that is known, with smaller steps."""
        self.monitor.forget()

    @abstractmethod
    def weights(self) -> Float[Tensor, "n _"]:
        """What would be returned now, of the columns still worked on (n, k')."""

    def candidate(self) -> Float[Tensor, "n k"]:
        """What would be returned now, of all columns."""
        return self.checked.weights.index_copy(1, self.live, self.weights())

    def current(self) -> Float[Tensor, "n k"]:
        """What a callback sees."""
        return self.candidate()

    def wants_check(self, is_last: bool) -> bool:
        """Whether the true residual is worth its price; mostly so at the end."""
        return is_last or self.monitor.wants_check(self.norms[self.live], self.passes)

    def check(self) -> None:
        """Find the true residual of the present weights and remember the best."""
        candidate = self.candidate()
        self.take_note(candidate, true_residual(self.system, candidate))

    def take_note(self, candidate: Tensor, residual: Tensor) -> None:
        """Remember the true residual (n, k) of all columns."""
        self.norms = believed_norms(self.system, candidate, residual)
        if not self.returns_last:
            self.checked.offer(candidate, self.norms)
        self.passes += self.check_cost
        self.is_verified = True

    def verdict(self) -> Reason | None:
        """A reason to stop after a check, if there is one."""
        return self.monitor.verdict(self.norms, self.passes)

    def dismiss(self) -> None:
        """Leave the columns that a check has found to be done alone from now on."""
        self.go_on_with(~(self.norms[self.live] <= self.solver.tolerance))

    def go_on_with(self, rest: Tensor) -> None:
        """Go on with some of the columns still worked on (a mask)."""
        if not bool(rest.all()):
            self.keep(rest)
            self.live = self.live[rest]
            self.residual = self.residual[:, rest].contiguous()

    def keep(self, rest: Tensor) -> None:
        """Take the other columns out of the algorithm's own tensors."""

    def finish(self) -> None:
        """See to it that what is returned has a true residual."""
        if not self.is_verified:
            self.check()
        if self.returns_last:
            self.checked.offer(self.candidate(), self.norms)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the solution says of the settings chosen."""

    def warnings(self, reason: Reason) -> tuple[str, ...]:
        """What the solution warns of."""
        columns, title = self.column_warnings(reason), self.solver.title
        if not self.restarts or not self.restart_warning:
            return columns
        restarts = self.restart_warning.format(title=title, restarts=self.restarts)
        return (*columns, restarts)

    def column_warnings(self, reason: Reason) -> tuple[str, ...]:
        """What is said of columns above the tolerance, unless the solve converged."""
        norms, tolerance = self.checked.norms, self.solver.tolerance
        return columns_above(self.solver.title, reason, norms, tolerance, self.advice)


@dataclass(frozen=True)
class StochasticSolver(IterativeSolver, ABC):
    """Settings of a solver that works on blocks of equations."""

    title: ClassVar[str]  # its name in sentences
    advice: ClassVar[str]  # what a user may do about columns above the tolerance

    @abstractmethod
    def begin(self, task: Task) -> Algorithm[Any]:
        """The algorithm, ready for its first pass."""

    def _solve(self, task: Task) -> Solution:
        record = Recorder(task.callback)
        algorithm, system = self.begin(task), task.system
        reason = run(algorithm, record)
        return Solution(
            solver=self.name,
            operator=system.operator.name,
            weights=algorithm.data.unshuffled(algorithm.checked.weights) * system.scale,
            residuals=algorithm.checked.norms.to(system.rhs.dtype),
            passes=algorithm.passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=algorithm.warnings(reason),
            settings=algorithm.settings(),
        )


def run(algorithm: Algorithm[Any], record: Recorder) -> Reason:
    """Let an algorithm work until there is a reason to stop."""
    solver, system = algorithm.solver, algorithm.system

    def weights() -> Tensor:
        return algorithm.data.unshuffled(algorithm.current()) * system.scale

    paces: deque[float] = deque(maxlen=16)  # seconds of a pass, by the last blocks

    def is_out_of_budget() -> bool:
        reserve = algorithm.reserve
        if algorithm.passes + reserve >= solver.max_passes:
            return True
        # The first block alone says nothing: it may have filled a matrix.
        pace = min(paces) if len(paces) > 1 else 0.0
        ahead = pace * (reserve + algorithm.whole_passes)
        return record.is_past(solver.max_seconds, ahead)

    reason: Reason | None = None
    if algorithm.checked.is_within(solver.tolerance):
        reason = "converged"
    else:
        algorithm.dismiss()
    while reason is None:
        algorithm.is_verified, exact = False, False
        diverged = False
        for block in algorithm.blocks():
            began = record.seconds
            diverged = algorithm.is_diverging(algorithm.visit(block))
            if diverged or (not algorithm.whole_passes and is_out_of_budget()):
                break
            algorithm.step(block)
            paces.append((record.seconds - began) * algorithm.num_blocks)
        algorithm.end_pass()
        if diverged or algorithm.has_grown():
            algorithm.restarts += 1
            algorithm.restart()
            if algorithm.restarts > algorithm.max_restarts:
                reason = "diverged"
        elif algorithm.wants_check(is_out_of_budget()):
            exact = True
            algorithm.check()
            reason = algorithm.verdict()
        residuals = algorithm.norms.to(system.rhs.dtype, copy=True)
        if record(algorithm.passes, residuals, exact=exact, weights=weights):
            reason = reason or "interrupted"
        if exact:
            algorithm.dismiss()
        if is_out_of_budget():
            reason = reason or "budget"
    algorithm.finish()
    return "converged" if algorithm.checked.is_within(solver.tolerance) else reason


def check_steps(
    block_size: int | None,
    momentum: float | None = None,
    step_size: float | None = None,
) -> None:
    """Refuse settings of the steps that are out of range; None is always fine.

    Raises:
        ValueError: Names the one, with what was found.
    """
    if block_size is not None:
        check_count("block_size", block_size, 1)
    if momentum is not None:
        check_number("momentum", momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected [0, 1), found {momentum}")
    if step_size is not None:
        check_positive("step_size", step_size)
