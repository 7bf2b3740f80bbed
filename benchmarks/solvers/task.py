"""What a contender is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from benchmarks.solvers.problem import Problem
from benchmarks.solvers.stopwatch import Stopwatch
from benchmarks.solvers.trace import Trace


@dataclass(frozen=True)
class Task:
    """Solve a problem to a tolerance.

    Attributes:
        problem: The system; the contender builds K from it, on the clock.
        tolerance: Relative residual, of whatever the contender goes by.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds of the clock.
        memory_budget: Bytes for kernel entries and factors.
        seed: Of the contender's own randomness.
        clock: Already running; to be paused for anything that is not the solver's.
        trace: Where to note true residuals on the way, off the clock; or None.
    """

    problem: Problem
    tolerance: float
    max_passes: float
    max_seconds: float
    memory_budget: int
    seed: int
    clock: Stopwatch
    trace: Trace | None = None


@dataclass(frozen=True)
class Outcome:
    """Where a contender ended.

    Attributes:
        weights: (n, k).
        passes: Kernel entries it evaluated or multiplied with, over n^2.
        reason: Why it stopped.
        claimed: Relative residuals it says it has (k,); None if it says nothing.
        solver: Its name for itself, e.g. the solver that "auto" chose.
        operator: How K was held.
        settings: What it chose.
        warnings: What it warns of.
    """

    weights: Tensor = field(repr=False)
    passes: float
    reason: str
    claimed: Tensor | None
    solver: str
    operator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


Contender: TypeAlias = Callable[[Task], Outcome]
