"""Solver settings, the solution they return, and the progress they report.

A solver is a frozen dataclass of settings with one verb,
``solve(operator, noise, rhs, ...) -> Solution``, for (K + Sigma) V = B.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.core.checks import check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.core.summary import Summarised
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.recycling import Recycled
from sgdgp.solvers.system import (
    System,
    as_system,
    float64_rounding,
    initial_weights,
)

Reason: TypeAlias = Literal[
    "converged", "budget", "stagnated", "diverged", "interrupted"
]

S = TypeVar("S", bound="IterativeSolver")

# What a solve is given at least: its first residual takes a pass.
_LEAST_PASSES = 1.0
_LEAST_SECONDS = 1e-3

_SURE = 3.0  # times what rounding is known to leave: one draw of it
_DIRECT_TOLERANCE = 1e-3  # of solvers without one, as far as float64 itself ends them


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


class Watch:
    """Everyone who follows a solve, told of what went before it too.

    A callback itself, so that it can be handed to a solver; of a watch, ``after``
    makes another one of the same listeners, and nothing is ever wrapped twice.

    Args:
        listeners: Callbacks, called in this order; those that are None are left out.
        passes: What earlier solves took.
        seconds: What they took in seconds.
    """

    def __init__(
        self, *listeners: Callback | None, passes: float = 0.0, seconds: float = 0.0
    ) -> None:
        self._listeners = tuple(each for each in listeners if each is not None)
        self._passes, self._seconds = passes, seconds

    def __call__(self, progress: Progress) -> bool:
        """Tell everyone; True if one of them asks to stop."""
        if self._passes or self._seconds:
            progress = replace(
                progress,
                passes=self._passes + progress.passes,
                seconds=self._seconds + progress.seconds,
            )
        # First all, then any: whoever asks to stop, the others are told as well.
        wishes = [bool(listener(progress)) for listener in self._listeners]
        return any(wishes)

    @classmethod
    def after(
        cls, passes: float, seconds: float, callback: Callback | None
    ) -> Callback | None:
        """The callback, told of the passes and seconds of earlier work too."""
        if callback is None:
            return None
        if isinstance(callback, Watch):
            passes, seconds = callback._passes + passes, callback._seconds + seconds
            return cls(*callback._listeners, passes=passes, seconds=seconds)
        return cls(callback, passes=passes, seconds=seconds)


@contextmanager
def progress_bar(
    show: bool | None,
    title: str,
    *listeners: Callback | None,
    passes: float = 0.0,
    seconds: float = 0.0,
) -> Iterator[Callback | None]:
    """A bar beside all others who follow a solve, as one callback.

    Args:
        show: Whether to show it. Default: only on a terminal.
        title: Name on the left of the bar.
        *listeners: Callbacks; None is left out.
        passes: What went before, of which everyone is told too.
        seconds: The same in seconds.
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        others = any(listener is not None for listener in listeners)
        yield Watch(*listeners, passes=passes, seconds=seconds) if others else None
        return
    with tqdm(
        desc=title,
        unit="pass",
        bar_format="{desc}: {n:.0f} passes [{elapsed}{postfix}]",
        delay=1e-9,  # no zero before it is known what went before
    ) as bar:
        bar.delay = 0  # for its last line
        if not bar.disable:
            bar.display(f"{title}: begins")

        def move(progress: Progress) -> None:
            bar.n = progress.passes
            bar.start_t = time.time() - progress.seconds
            kind = "residual" if progress.exact else "running residual"
            bar.set_postfix_str(f"{kind} {float(progress.residuals.max()):.1e}")

        yield Watch(move, *listeners, passes=passes, seconds=seconds)


@dataclass(frozen=True)
class HistoryEntry:
    """What is kept of a ``Progress``: no tensors of size n."""

    passes: float
    seconds: float
    residuals: tuple[float, ...]
    exact: bool


class Factor(NamedTuple):
    """K + Sigma = L L^T.

    Attributes:
        operator: K (n, n), streaming.
        lower: L (n, n), whose strict upper triangle is not to be read.
    """

    operator: KernelOperator
    lower: Tensor


@register_stored_class
@dataclass(frozen=True, repr=False)
class Solution(Summarised):
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
        recycled: What a solve of the same matrix with more rows may start from; held
            in memory only.
        prediction_error: Estimated error of the mean in posterior standard deviations
            of a target (see ``solvers/prediction_error.py``), where there is a mean.
        factor: In float64, of few rows that were solved directly; in no file or pickle.
    """

    solver: str
    operator: str
    weights: Tensor
    residuals: Tensor
    passes: float
    seconds: float
    reason: Reason
    history: tuple[HistoryEntry, ...] = ()
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    recycled: Recycled | None = field(default=None, compare=False)
    prediction_error: float | None = None
    factor: Factor | None = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """All but the factor, which is soon made again and as large as the problem."""
        return {**self.__dict__, "factor": None}

    def _facts(self) -> dict[str, Any]:
        facts = {
            "weights": tuple(self.weights.shape),
            "solver": self.solver,
            "operator": self.operator,
            "passes": self.passes,
            "seconds": self.seconds,
            "largest_residual": max(self.residuals.tolist(), default=None),
            "prediction_error": self.prediction_error,
            "warnings": self.warnings,
            "reason": self.reason,
        }
        return {name: fact for name, fact in facts.items() if fact is not None}

    @property
    def carried(self) -> Recycled | None:
        """``recycled`` by its name in version 0.1.0."""
        warnings.warn(
            "Solution.carried is now called recycled; the old name goes with version "
            "0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.recycled

    def stored_parts(self) -> dict[str, Any]:
        """What a file holds: the history as tensors, since text has a limited size."""
        clock = [(entry.passes, entry.seconds, entry.exact) for entry in self.history]
        norms = [entry.residuals for entry in self.history]
        wide = torch.float64
        return {
            **{part.name: getattr(self, part.name) for part in fields(self)[:-1]},
            "history": {
                "clock": torch.tensor(clock, dtype=wide, device="cpu").reshape(-1, 3),
                "residuals": torch.tensor(norms, dtype=wide, device="cpu").reshape(
                    -1, len(self.residuals)
                ),
            },
            # A solver of the user's own may have chosen anything.
            "settings": json.loads(json.dumps(dict(self.settings), default=str)),
        }

    @classmethod
    def from_stored_parts(cls, **parts: Any) -> Solution:
        """The solution behind ``stored_parts``.

        Raises:
            ValueError: Shapes or values do not fit together.
        """
        found, history = cls(**{**parts, "history": ()}), parts["history"]
        weights, residuals = found.weights, found.residuals
        if weights.ndim != 2 or residuals.shape != weights.shape[1:]:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} with residuals of shape "
                f"{tuple(residuals.shape)}"
            )
        if not bool(torch.isfinite(weights).all() and torch.isfinite(residuals).all()):
            raise ValueError("weights or residuals are NaN or infinite")
        if found.reason not in get_args(Reason):
            raise ValueError(f"unknown reason {found.reason!r}")
        entries = zip(
            history["clock"].tolist(), history["residuals"].tolist(), strict=True
        )
        return replace(
            found,
            history=tuple(
                HistoryEntry(passes, seconds, tuple(norms), bool(exact))
                for (passes, seconds, exact), norms in entries
            ),
        )


@dataclass(frozen=True)
class Limits:
    """What ends a solve; None where the solver knows no such limit.

    ``with_limits`` keeps tolerance and passes for None, and removes ``max_seconds``.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds.
    """

    tolerance: float | None = None
    max_passes: float | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None:
                check_positive(limit.name, value)

    def until(self, deadline: float | None) -> Limits:
        """The same with no more seconds than are left, by ``time.perf_counter()``."""
        if deadline is None:
            return self
        left = max(_LEAST_SECONDS, deadline - time.perf_counter())
        own = self.max_seconds
        return replace(self, max_seconds=left if own is None else min(own, left))

    def less(self, passes: float, seconds: float) -> Limits:
        """The same tolerance, with what earlier work has left of the budgets.

        With nothing left, the least that is still allowed: a solver has to see the
        weights once to say how good they are.
        """
        return Limits(
            self.tolerance,
            _remaining(self.max_passes, passes, _LEAST_PASSES),
            _remaining(self.max_seconds, seconds, _LEAST_SECONDS),
        )


def _remaining(budget: float | None, used: float, least: float) -> float | None:
    return None if budget is None else max(least, budget - used)


@dataclass(frozen=True)
class Task:
    """What a solve is given.

    Attributes:
        system: The system, its columns of unit norm.
        initial: Starting point (n, k) in the system's scale, or None for zero.
        noise_draws: The part of the right-hand sides that is noise (n, k), in the
            caller's scale, or None.
        generator: Source of all randomness.
        callback: Called as the solve advances; True stops it.
    """

    system: System
    initial: Tensor | None
    noise_draws: Tensor | None
    generator: torch.Generator
    callback: Callback | None = None


class Solver:
    """Settings of an algorithm for (K + Sigma) V = B.

    A solver with a tolerance and budgets derives from ``IterativeSolver``, or says how
    it has them: ``limits`` and ``with_limits`` are all that others know of them.
    """

    name: str
    """What it is called. Default: its class in lower case."""

    def __getattr__(self, attribute: str) -> str:
        if attribute == "name":
            return type(self).__name__.lower()
        raise AttributeError(f"{type(self).__name__} has no attribute {attribute!r}")

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({settings})"

    @property
    def resumes(self) -> bool:
        """Whether CG with its limits may go on for it, from what CG has left.

        Any other solver is asked itself, also one that is derived from one that does.
        """
        return False

    @property
    def limits(self) -> Limits:
        """What ends a solve. Default: nothing that can be set from outside."""
        return Limits()

    def with_limits(self, limits: Limits) -> Solver:
        """The same solver with other limits, as far as it has them."""
        return self

    def with_recycling(self, directions: int) -> Solver:
        """The same solver, told to keep directions; see ``Solution.recycled``."""
        return self

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
        """Solve (K + Sigma) V = B for all columns of ``rhs`` at once.

        Args:
            operator: Square kernel operator K (n, n).
            noise: Variances, the diagonal of Sigma: a number, 0-dim, or (n,).
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
        generator = generator or torch.Generator().manual_seed(0)
        system = as_system(operator, noise, rhs)
        start = None if initial is None else initial_weights(system, initial)
        found = self._solve(Task(system, start, noise_draws, generator, callback))
        return _as_far_as_known(found, system, self.limits.tolerance)

    def _solve(self, task: Task) -> Solution:
        """``solve`` with its arguments checked; a solver has either of the two."""
        raise NotImplementedError(f"{type(self).__name__} has no method solve")


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """A solver that goes on until it is done or its budget is used up.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
    """

    tolerance: float = 1e-2
    max_passes: float = 1000.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)
        check_positive("max_passes", self.max_passes)
        if self.max_seconds is not None:
            check_positive("max_seconds", self.max_seconds)

    @property
    def limits(self) -> Limits:
        return Limits(self.tolerance, self.max_passes, self.max_seconds)

    def with_limits(self: S, limits: Limits) -> S:
        """See ``Solver.with_limits``; None leaves tolerance and passes as they are."""
        return replace(
            self,
            tolerance=limits.tolerance or self.tolerance,
            max_passes=limits.max_passes or self.max_passes,
            max_seconds=limits.max_seconds,
        )


def _as_far_as_known(
    solution: Solution, system: System, tolerance: float | None
) -> Solution:
    """Not converged, where even float64 cannot tell a residual from its rounding."""
    if solution.reason != "converged":
        return solution
    tolerance = tolerance or _DIRECT_TOLERANCE
    weights = solution.weights.double() / system.scale
    floor = _SURE * float64_rounding(system, weights, tolerance)
    floor = floor.to(solution.residuals.dtype)
    unknown = floor > tolerance
    if not bool(unknown.any()):
        return solution
    sentence = (
        f"Residuals below {float(floor.max()):.1e} are rounding here, even in float64, "
        f"the tolerance is {tolerance:g}: take a larger noise, or center and scale x."
    )
    return replace(
        solution,
        reason="stagnated",
        residuals=torch.where(unknown, floor, solution.residuals),
        warnings=(*solution.warnings, sentence),
    )


def columns_above(
    title: str, reason: Reason, norms: Tensor, tolerance: float, advice: str
) -> tuple[str, ...]:
    """What is said of columns above the tolerance, unless the solve converged.

    A user who stopped it needs no advice.
    """
    if reason == "converged":
        return ()
    sentence = (
        f"{title} stopped ({reason}) with {int((norms > tolerance).sum())} of "
        f"{len(norms)} columns above the tolerance {tolerance:g}; the largest relative "
        f"residual is {float(norms.max()):.2e}."
    )
    return (sentence if reason == "interrupted" else f"{sentence} {advice}",)


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

    def is_past(self, max_seconds: float | None, ahead: float = 0.0) -> bool:
        """Whether a budget in seconds is used up, or will be by what is ahead."""
        return max_seconds is not None and self.seconds + ahead >= max_seconds

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
