"""True residuals on the way to the solution, looked at off the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor

from benchmarks.solvers.problem import Problem
from benchmarks.solvers.stopwatch import Stopwatch

_GROWTH = 1.2
_FIRST = 1.0


@dataclass(frozen=True)
class TracePoint:
    """True relative residual, float64, at one moment of a solve."""

    passes: float
    seconds: float
    mean: float
    worst: float


class Trace:
    """Notes the residual at passes that grow geometrically.

    Args:
        problem: What is being solved.
        clock: Paused while the residual is computed.
    """

    def __init__(self, problem: Problem, clock: Stopwatch) -> None:
        self._problem = problem
        self._clock = clock
        self._due = 0.0
        self.points: list[TracePoint] = []

    def __call__(self, passes: float, weights: Callable[[], Tensor]) -> None:
        """Look at the weights if it is time to."""
        if passes >= self._due:
            with self._clock.paused():
                self.note(passes, weights())

    def note(self, passes: float, weights: Tensor) -> None:
        """Look at the weights; the clock has to be paused."""
        residuals = self._problem.true_residuals(weights)
        self.points.append(
            TracePoint(
                passes,
                self._clock.seconds,
                float(residuals.mean()),
                float(residuals.max()),
            )
        )
        self._due = max(passes + _FIRST, _GROWTH * passes)

    def to_list(self) -> list[dict[str, float]]:
        """Plain values for JSON."""
        return [asdict(point) for point in self.points]
