"""Run a published rule, which has no end of its own, until its true residual is low.

Residuals are looked at twice per pass with the clock stopped, so a rule is given the
first moment at which a tolerance is met without paying for finding out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from benchmarks.solvers.task import Outcome, Task
from sgdgp.operators import KernelOperator, choose_operator

_LOOKS_PER_PASS = 2
_HOPELESS = 1e3
_ROUNDING = 1.1


class Method(Protocol):
    """An iteration on (K + s I) V = B, B with unit columns."""

    operator: KernelOperator
    noise: float
    rhs: Tensor

    @property
    def passes(self) -> float:
        """Kernel entries used so far, over n^2."""

    @property
    def weights(self) -> Tensor:
        """What it would return now (n, k)."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was chosen."""

    def step(self) -> None:
        """One step."""


def operator_of(task: Task) -> KernelOperator:
    """The operator that the library would choose for the task."""
    problem = task.problem
    return choose_operator(
        problem.build_kernel(), problem.x, memory_budget=task.memory_budget
    )


def unit_columns(task: Task) -> tuple[Tensor, Tensor]:
    """The right-hand sides with unit columns (n, k), and their norms (k,)."""
    scale = task.problem.rhs.norm(dim=0)
    return task.problem.rhs / scale, scale


def run_method(task: Task, method: Method, scale: Tensor, name: str) -> Outcome:
    """Step until the true mean residual is below the tolerance, or a budget is spent.

    Args:
        task: Whose tolerance and budgets count.
        method: What is run.
        scale: Norms of the right-hand sides (k,).
        name: Of the method, for the record.
    """
    reason, next_look = "budget", 0.0
    while method.passes < task.max_passes and task.clock.seconds < task.max_seconds:
        method.step()
        if method.passes >= next_look:
            with task.clock.paused():
                found = _look(task, method, scale)
            next_look = method.passes + 1.0 / _LOOKS_PER_PASS
            if found is not None:
                reason = found
                break
    return Outcome(
        weights=method.weights * scale,
        passes=method.passes,
        reason=reason,
        claimed=None,
        solver=name,
        operator=method.operator.name,
        settings=method.settings,
    )


def _look(task: Task, method: Method, scale: Tensor) -> str | None:
    """Say "converged" or "diverged" if it has; the clock is paused meanwhile."""
    weights = method.weights
    if task.trace is not None:
        task.trace(method.passes, lambda: weights * scale)
    # A product in the operator's own precision says whether float64 is worth while.
    residual = method.rhs - method.operator.matmul(weights) - method.noise * weights
    rough = float(residual.norm(dim=0).mean())
    if not rough < _HOPELESS:
        return "diverged"
    if rough <= _ROUNDING * task.tolerance:
        true = task.problem.true_residuals(weights * scale)
        if float(true.mean()) <= task.tolerance:
            return "converged"
    return None
