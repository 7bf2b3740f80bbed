"""The loop of a fit: evaluate, step, recover, stop, keep; and what it tells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from gpytorch.models import ExactGP
from torch import Tensor
from torch.optim import Optimizer

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.core.summary import Summarised
from sgdgp.gpytorch_adapter import Inputs, prior_at
from sgdgp.training.marginal_likelihood import StochasticMarginalLogLikelihood
from sgdgp.training.parameters import Image, parameter_values

FitReason: TypeAlias = Literal["plateau", "steps", "budget", "interrupted", "diverged"]

_MOST_RECOVERIES = 5
"""Halvings of the learning rate before a fit gives up: 32 times slower is no fit."""

_COLLAPSE = 1.0
"""A loss of log p(y | X) / n that no step of a fit that converges makes."""


@register_stored_class
@dataclass(frozen=True)
class FitEntry:
    """One step of a fit, before the parameters move.

    Attributes:
        step: Steps made before this one.
        passes: Passes over K so far.
        seconds: Wall time so far.
        value: log p(y | X) and log priors over n; above 1,000 rows counted from the
            first step (integrated along the path).
        residual: Largest relative residual of the step's solve.
        parameters: Values in the user's units, by GPyTorch's names without "raw_";
            of networks none.
    """

    step: int
    passes: float
    seconds: float
    value: float
    residual: float
    parameters: Mapping[str, tuple[float, ...]] = field(repr=False)


FitCallback: TypeAlias = Callable[[FitEntry], bool | None]
"""Called after every step with what was found before it; True stops the fit."""


@register_stored_class
@dataclass(frozen=True, repr=False)
class Fitted(Summarised):
    """How a fit went; the parameters themselves are in the model.

    Attributes:
        reason: "plateau", "steps", "budget", "interrupted" or "diverged".
        steps: Steps of the optimiser.
        passes: Passes over K of all solves.
        seconds: Wall time, of all runs together where a checkpoint was gone on from.
        history: One entry per step.
        warnings: Sentences that say what a user may want to do about it.
        first_steps: Steps made before them on some of the rows.
    """

    reason: FitReason
    steps: int
    passes: float
    seconds: float
    history: tuple[FitEntry, ...]
    warnings: tuple[str, ...] = ()
    first_steps: int = 0

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self.first_steps:
            facts["first_steps"] = self.first_steps
        facts |= {"steps": self.steps, "passes": self.passes, "seconds": self.seconds}
        if self.history:
            first, last = self.history[0], self.history[-1]
            # Of exact values (of no solve) the best one's parameters are kept.
            kept = last if last.residual else max(self.history, key=lambda e: e.value)
            facts |= {"gain": kept.value - first.value, "residual": last.residual}
        return {**facts, "warnings": self.warnings, "reason": self.reason}


@dataclass(frozen=True)
class Plateau:
    """Stop when the last steps together gained next to nothing.

    Attributes:
        patience: Number of steps looked at.
        gain: Least gain of log p(y | X) / n over them.
    """

    patience: int = 10
    gain: float = 1e-3

    def __post_init__(self) -> None:
        check_count("patience", self.patience, 1)
        check_positive("gain", self.gain)

    def is_reached(self, values: Sequence[float]) -> bool:
        """Whether a series of values has come to rest.

        Compared are the best value before and among the last ``patience``: a fit that
        oscillates around its optimum gains nothing.
        """
        if len(values) <= self.patience:
            return False
        earlier, recent = values[: -self.patience], values[-self.patience :]
        return max(recent) - max(earlier) < self.gain


@dataclass(frozen=True)
class FitLimits:
    """When a fit ends.

    Attributes:
        steps: Most steps.
        max_passes: Budget in passes over K, if any.
        max_seconds: Budget in seconds, if any.
        plateau: Rule for stopping early, if any.
    """

    steps: int
    max_passes: float | None
    max_seconds: float | None
    plateau: Plateau | None

    def after(self, earlier: Sequence[Fitted]) -> FitLimits:
        """The limits of a fit whose budgets earlier ones have drawn on."""

        def left(budget: float | None, used: int | float) -> float | None:
            return None if budget is None else max(0.0, budget - used)

        return replace(
            self,
            max_passes=left(self.max_passes, sum(run.passes for run in earlier)),
            max_seconds=left(self.max_seconds, sum(run.seconds for run in earlier)),
        )

    def reason(self, run: Run, ahead: float = 0.0) -> FitReason | None:
        """Why the run has to end before a step of ``ahead`` seconds, or None."""
        if len(run.history) >= self.steps:
            return "steps"
        if self.max_passes is not None and run.mll.passes >= self.max_passes:
            return "budget"
        if self.max_seconds is not None and run.seconds + ahead >= self.max_seconds:
            return "budget"
        values = [entry.value for entry in run.history]
        if self.plateau is not None and self.plateau.is_reached(values):
            return "plateau"
        return None


@dataclass
class Run:
    """A fit in progress.

    Attributes:
        model: The model, its parameters changed in place.
        mll: The objective, which carries the solves on.
        optimiser: Over ``parameters``.
        parameters: What is learned, as the optimiser moves it.
        images: Those of ``parameters`` that stand for bounded values.
        history: One entry per step made.
        recoveries: How often it diverged, which halved the learning rate.
        falls: How often it fell to what was no plateau, which did too.
        before: The parameters that the last step started from, to come back to.
        best: Those of the largest value of an exact evaluation.
        first_steps: Steps that were made on some of the rows, before the history.
        problem: What went wrong beside the fit itself, if anything.
        earlier_seconds: Wall time of the runs that this one goes on from.
        last_step: Seconds that the last step took.
    """

    model: ExactGP
    mll: StochasticMarginalLogLikelihood
    optimiser: Optimizer
    parameters: Sequence[torch.nn.Parameter]
    images: Sequence[Image] = ()
    history: list[FitEntry] = field(default_factory=list)
    recoveries: int = 0
    falls: int = 0
    before: list[Tensor] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)
    first_steps: int = 0
    problem: str | None = None
    earlier_seconds: float = 0.0
    last_step: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return self.earlier_seconds + time.perf_counter() - self._start

    def go(
        self,
        x: Inputs,
        y: Tensor,
        limits: FitLimits,
        callback: FitCallback | None,
        keep: Callable[[Run], None] | None,
    ) -> FitReason:
        """Make steps until the limits, the callback or divergence end it.

        A step diverged if the objective after it is not finite or far below the best.
        Where it is exact, a fit that has fallen to what would be a plateau goes back
        to the best, with half the learning rate; see ``settle`` for the end.
        None begins that would not end in time if it took as long as the one before,
        and a solve ends when the time is up.

        Args:
            x: Training inputs.
            y: Targets in the model's units.
            limits: When to end.
            callback: Called after every step.
            keep: Called after every step with this run, to write it down.

        Raises:
            ValueError: The objective is not finite where the fit starts.
        """
        if limits.max_seconds is not None:
            left = limits.max_seconds - self.seconds
            self.mll.deadline = time.perf_counter() + left
        while True:
            reason = limits.reason(self, self.last_step)
            if reason == "plateau" and limits.plateau is not None and self._is_exact:
                values = [entry.value for entry in self.history]
                fall, gain = max(values) - values[-1], limits.plateau.gain
                if fall > gain and self.best and self.falls < _MOST_RECOVERIES:
                    self.falls += 1
                    del self.history[values.index(max(values)) + 1 :]
                    self._go_back_to(self.best)
                    self._slow_down()
                    continue
                late = values[-3:]
                if all(now - before > gain for before, now in pairwise(late)):
                    reason = None  # back from a fall, and it climbs
            if reason is not None:
                return reason
            began = self.seconds
            entry = self._evaluate(x, y)
            self.last_step = self.seconds - began
            if entry is None or self._has_collapsed(entry):
                self._go_back_to(self.before)
                if self.recoveries == _MOST_RECOVERIES:
                    return "diverged"
                self.recoveries += 1
                self._slow_down()
                continue
            self.before = [p.detach().clone() for p in self.parameters]
            if self._is_exact and entry.value > self._best_value:
                self.best = self.before
            with torch.device("cpu"):  # where some of torch's make counters of steps
                self.optimiser.step()
            for image in self.images:
                image.put_value()
            self.history.append(entry)
            if keep is not None:
                keep(self)
            if callback is not None and callback(entry):
                return "interrupted"

    def settle(self, x: Inputs, y: Tensor) -> None:
        """At the end: where values are exact, go back to the best if it was better.

        By more than what is a plateau: steps around an optimum are all as good.
        """
        if self._is_exact and self.best and self.history:
            last = self._evaluate(x, y)
            if last is None or last.value < self._best_value - Plateau().gain:
                self._go_back_to(self.best)

    @property
    def _is_exact(self) -> bool:
        """Whether values are, and not integrated from stochastic gradients."""
        return self.mll.solution is None

    @property
    def _best_value(self) -> float:
        return max((entry.value for entry in self.history), default=-math.inf)

    def _has_collapsed(self, entry: FitEntry) -> bool:
        return entry.value < self._best_value - _COLLAPSE

    def _evaluate(self, x: Inputs, y: Tensor) -> FitEntry | None:
        """Value and gradient where the parameters are; None if not finite."""
        self.optimiser.zero_grad()
        for image in self.images:
            image.parameter.grad = None
        try:
            loss = -self.mll(prior_at(self.model, x), y, x)
            loss.backward()
            for image in self.images:
                image.take_gradient()
        except (torch.linalg.LinAlgError, ValueError):
            # Parameters far out make covariances that nothing can be done with; where
            # the fit starts, that is the caller's to know.
            if not self.before:
                raise
            return None
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        finite = all(bool(torch.isfinite(g).all()) for g in [loss.detach(), *gradients])
        if not finite:
            if not self.before:
                raise ValueError(
                    "model: the marginal likelihood or its gradient is not finite at "
                    "the initial parameters"
                )
            return None
        solution = self.mll.solution
        return FitEntry(
            step=len(self.history),
            passes=self.mll.passes,
            seconds=self.seconds,
            value=-float(loss.detach()),
            residual=0.0 if solution is None else float(solution.residuals.max()),
            parameters=parameter_values(self.model),
        )

    def _go_back_to(self, earlier: Sequence[Tensor]) -> None:
        """To parameters that were good, with nothing known of the others."""
        with torch.no_grad():
            for parameter, good in zip(self.parameters, earlier, strict=True):
                parameter.copy_(good)
        for image in self.images:
            image.put_value()
        self.mll.forget()

    def _slow_down(self) -> None:
        """Go on with half the learning rate."""
        self.history.pop()  # the step is made again
        for group in self.optimiser.param_groups:
            group["lr"] *= 0.5
        # Moments that led astray would do so again.
        self.optimiser.state.clear()
