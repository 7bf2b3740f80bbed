"""The loop of a fit: evaluate, step, recover, stop, keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from gpytorch.models import ExactGP
from torch import Tensor
from torch.optim import Optimizer

from sgdgp.gpytorch_adapter import Inputs, prior_at
from sgdgp.training.history import (
    FitCallback,
    FitEntry,
    FitReason,
    Fitted,
    parameter_values,
)
from sgdgp.training.marginal_likelihood import StochasticMarginalLogLikelihood
from sgdgp.training.plateau import Plateau

_MOST_RECOVERIES = 5
_COLLAPSE = 1.0
"""A loss of log p(y | X) / n that no step of a fit that converges makes."""


@dataclass(frozen=True)
class Limits:
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

    def after(self, earlier: Sequence[Fitted]) -> Limits:
        """The limits of a fit whose budgets earlier ones have drawn on."""

        def left(budget: float | None, used: int | float) -> float | None:
            return None if budget is None else max(0.0, budget - used)

        return replace(
            self,
            max_passes=left(self.max_passes, sum(run.passes for run in earlier)),
            max_seconds=left(self.max_seconds, sum(run.seconds for run in earlier)),
        )

    def reason(self, run: Run) -> FitReason | None:
        """Why the run has to end now, or None."""
        if len(run.history) >= self.steps:
            return "steps"
        if self.max_passes is not None and run.mll.passes >= self.max_passes:
            return "budget"
        if self.max_seconds is not None and run.seconds >= self.max_seconds:
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
        parameters: What is learned.
        history: One entry per step made.
        recoveries: How often the learning rate was halved.
        before: The parameters that the last step started from, to come back to.
        problem: What went wrong beside the fit itself, if anything.
        earlier_seconds: Wall time of the runs that this one goes on from.
    """

    model: ExactGP
    mll: StochasticMarginalLogLikelihood
    optimiser: Optimizer
    parameters: Sequence[torch.nn.Parameter]
    history: list[FitEntry] = field(default_factory=list)
    recoveries: int = 0
    before: list[Tensor] = field(default_factory=list)
    problem: str | None = None
    earlier_seconds: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return self.earlier_seconds + time.perf_counter() - self._start

    def go(
        self,
        x: Inputs,
        y: Tensor,
        limits: Limits,
        callback: FitCallback | None,
        keep: Callable[[Run], None],
    ) -> FitReason:
        """Make steps until the limits, the callback or divergence end it.

        A step diverged if the objective after it is not finite or far below the best.

        Args:
            x: Training inputs.
            y: Targets in the model's units.
            limits: When to end.
            callback: Called after every step.
            keep: Called after every step with this run, to write it down.

        Raises:
            ValueError: The objective is not finite where the fit starts.
        """
        while True:
            reason = limits.reason(self)
            if reason is not None:
                return reason
            entry = self._evaluate(x, y)
            if entry is None or self._has_collapsed(entry):
                self._go_back()
                if self.recoveries == _MOST_RECOVERIES:
                    return "diverged"
                self._slow_down()
                continue
            self.before = [p.detach().clone() for p in self.parameters]
            self.optimiser.step()
            self.history.append(entry)
            keep(self)
            if callback is not None and callback(entry):
                return "interrupted"

    def _has_collapsed(self, entry: FitEntry) -> bool:
        best = max((earlier.value for earlier in self.history), default=entry.value)
        return entry.value < best - _COLLAPSE

    def _evaluate(self, x: Inputs, y: Tensor) -> FitEntry | None:
        """Value and gradient where the parameters are; None if not finite."""
        self.optimiser.zero_grad()
        try:
            loss = -self.mll(prior_at(self.model, x), y, x)
            loss.backward()
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

    def _go_back(self) -> None:
        """To the last parameters that were good, with nothing known of the others."""
        with torch.no_grad():
            for parameter, before in zip(self.parameters, self.before, strict=True):
                parameter.copy_(before)
        self.mll.forget()

    def _slow_down(self) -> None:
        """Go on with half the learning rate."""
        self.recoveries += 1
        self.history.pop()  # the step is made again
        for group in self.optimiser.param_groups:
            group["lr"] *= 0.5
        # Moments that led astray would do so again.
        self.optimiser.state.clear()
