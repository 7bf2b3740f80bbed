"""Solver settings, the solution they return, and the progress they report.

A solver is a frozen dataclass of settings with one verb,
``solve(operator, noise, rhs, ...) -> Solution``, for (K + Sigma) V = B.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_positive
from sgdgp.operators.base import KernelOperator

if TYPE_CHECKING:
    from sgdgp.solvers.recycling import Carried

Reason: TypeAlias = Literal[
    "converged", "budget", "stagnated", "diverged", "interrupted"
]


@dataclass(frozen=True)
class Progress:
    """One line of a solver's history, handed to callbacks.

    Attributes:
        passes: Kernel entries evaluated so far, divided by n^2.
        seconds: Wall time since the solve started.
        residuals: Relative residual of each column (k,).
        exact: Whether ``residuals`` is the true residual (else the running estimate).
        weights: Returns the current weights (n, k) in the caller's row order and scale.
    """

    passes: float
    seconds: float
    residuals: Tensor
    exact: bool
    weights: Callable[[], Tensor] = field(repr=False, compare=False)


Callback: TypeAlias = Callable[[Progress], bool | None]
"""Called as the solve advances; returning True stops it ("interrupted")."""


def told_of(
    passes: float, seconds: float, callback: Callback | None
) -> Callback | None:
    """The callback, told of the passes and seconds of earlier work too."""
    if callback is None:
        return None

    def moved(progress: Progress) -> bool | None:
        return callback(
            replace(
                progress,
                passes=passes + progress.passes,
                seconds=seconds + progress.seconds,
            )
        )

    return moved


@dataclass(frozen=True)
class HistoryEntry:
    """What is kept of a ``Progress``: no tensors of size n."""

    passes: float
    seconds: float
    residuals: tuple[float, ...]
    exact: bool


@dataclass(frozen=True)
class Solution:
    """Representer weights and an honest account of how they were found.

    Attributes:
        solver: Name of the solver, with the one that "auto" chose.
        operator: Name of the operator it ran on.
        weights: V (n, k), in the scale of the right-hand sides.
        residuals: True relative residuals ||b - (K + Sigma) v|| / ||b|| (k,).
        passes: Kernel entries evaluated / n^2, the checks included.
        seconds: Wall time of the solve.
        reason: Why it stopped.
        history: Residuals against passes and seconds.
        warnings: Sentences that say what a user may want to do about it.
        settings: Everything the solver chose by itself (step size, block size, ...).
        carried: What a solve of the same matrix with more rows may start from; held
            in memory only.
    """

    solver: str
    operator: str
    weights: Tensor = field(repr=False)
    residuals: Tensor
    passes: float
    seconds: float
    reason: Reason
    history: tuple[HistoryEntry, ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    carried: Carried | None = field(default=None, repr=False, compare=False)


class Solver(ABC):
    """Settings of an algorithm for (K + Sigma) V = B."""

    name: str

    @abstractmethod
    def solve(
        self,
        operator: KernelOperator,
        noise: Float[Tensor, " n"] | float,
        rhs: Float[Tensor, "n k"],
        *,
        initial: Float[Tensor, "n k"] | None = None,
        noise_draws: Float[Tensor, "n k"] | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve (K + Sigma) V = B for all columns of ``rhs`` at once.

        Args:
            operator: Square kernel operator K (n, n).
            noise: Variances, the diagonal of Sigma: a scalar or one per row (n,).
            rhs: Right-hand sides B (n, k).
            initial: Starting point (n, k). Default: zero.
            noise_draws: The part of ``rhs`` that is drawn from N(0, Sigma) (n, k).
                Only solvers whose gradient noise depends on it (primal SGD) use it.
            generator: Source of all randomness. Default: a generator seeded with 0.
            callback: Called as the solve advances; True stops it.

        Returns:
            The solution; its ``reason`` says whether the tolerance was reached.

        Raises:
            ValueError: An argument does not fit; named, with what was found.
        """


def check_limits(
    tolerance: float, max_passes: float, max_seconds: float | None
) -> None:
    """Refuse a tolerance or budget that no solve could honour.

    Raises:
        ValueError: One of them is not positive and finite.
    """
    check_positive("tolerance", tolerance)
    check_positive("max_passes", max_passes)
    if max_seconds is not None:
        check_positive("max_seconds", max_seconds)


class Recorder:
    """Collects the history of one solve and passes it on to the callback."""

    def __init__(self, callback: Callback | None) -> None:
        self._callback = callback
        self._start = time.perf_counter()
        self.history: list[HistoryEntry] = []

    @property
    def seconds(self) -> float:
        """Wall time since the solve began."""
        return time.perf_counter() - self._start

    def is_past(self, max_seconds: float | None) -> bool:
        """Whether a budget in seconds, if there is one, is used up."""
        return max_seconds is not None and self.seconds >= max_seconds

    def __call__(
        self,
        passes: float,
        residuals: Tensor,
        *,
        exact: bool,
        weights: Callable[[], Tensor],
    ) -> bool:
        """Record one line; True if the callback asks to stop."""
        seconds = self.seconds
        self.history.append(
            HistoryEntry(passes, seconds, tuple(residuals.tolist()), exact)
        )
        if self._callback is None:
            return False
        progress = Progress(passes, seconds, residuals, exact, weights)
        return bool(self._callback(progress))
