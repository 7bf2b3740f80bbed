"""Primal SGD where K = phi phi^T with exact features: the same objective in weights.

With W = phi^T V, the objective of ``sgd.py`` is that of ridge regression,

    1/2 ||B - phi W||^2_{Sigma^-1} + 1/2 ||W||^2,

up to the split of B, which does not change the gradient. At the minimum
V = Sigma^-1 (B - phi W). That V is kept for every row as of its last visit, and so is
U = phi^T V, and a step on a block I of rows is

    D = Sigma_I^-1 (B[I] - phi_I W) - V[I],   G = W - U - (n / b) phi_I^T D,
    V[I] <- V[I] + D,                         U <- U + phi_I^T D:

one forward and one adjoint on the block. G is the gradient of all rows in expectation
(SAGA; Defazio, Bach & Lacoste-Julien, 2014, arXiv:1407.0202), and its noise dies out at
the solution, where plain SGD would need ever smaller steps. The Hessian
phi^T Sigma^-1 phi + I has the condition number of K + Sigma, not its square.

Sigma_I D is the residual of V on the block with W for U: its norm over a pass triggers
a true residual, which alone can end the solve.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgdgp.operators.base import RowIndex
from sgdgp.operators.feature import FeatureOperator
from sgdgp.solvers.base import Reason, Recorder, Solution
from sgdgp.solvers.feature_spectrum import leading_eigenvalues, scale_diagonal
from sgdgp.solvers.primal import (
    AveragedIterate,
    default_block_size,
    primal_step_rule,
    shuffle,
)
from sgdgp.solvers.step_size import StepRule
from sgdgp.solvers.stopping import Monitor
from sgdgp.solvers.system import System, accurate_residual

if TYPE_CHECKING:
    from sgdgp.solvers.sgd import SGD

_MAX_RESTARTS = 20
_POWER = 100.0
_MOST_MOMENTUM = 0.999
_CHECK_COST = 1.5
_FRACTION = 0.125  # swept on five problems: a half diverges at small noise
_PATIENCE = 300.0


def solve_with_features(
    settings: SGD,
    given: System,
    start: Tensor | None,
    generator: torch.Generator,
    record: Recorder,
) -> Solution:
    """Primal SGD on a system whose operator has features.

    Args:
        settings: Limits, block size, momentum and step size.
        given: The system.
        start: Starting point V (n, k). Default: zero.
        generator: Source of all randomness.
        record: History of the solve.
    """
    outputs = given.operator.outputs_per_input
    size = settings.block_size or outputs * default_block_size(given.n // outputs)
    data = shuffle(given, size, generator)
    system, n = data.system, given.n
    first = torch.zeros_like(system.rhs) if start is None else start[data.order]
    work = _Weights(system, first, len(data.blocks))
    rule, passes, largest = _rule(settings, work, generator)
    start_norms = system.rhs.norm(dim=0).double()
    if start is not None:
        start_norms = accurate_residual(system, first)
        passes += 1.5
    iterate = _iterate(settings, work, start_norms, rule)
    best, best_norms = first.clone(), start_norms.clone()
    monitor = Monitor(settings.tolerance, start_norms, _PATIENCE)
    restarts = 0

    def current() -> Tensor:
        return data.unshuffled(best) * system.scale

    def is_out_of_budget() -> bool:
        left = settings.max_passes - passes
        return left <= _CHECK_COST or record.is_past(settings.max_seconds)

    norms = start_norms
    reason: Reason | None = None
    if float(norms.max()) <= settings.tolerance:
        reason = monitor.verdict(norms, passes)
    while reason is None:
        diverged = False
        for block in data.visits(generator):
            gradient = work.gradient(block, iterate.lookahead)
            passes += len(work.residual[block]) / n
            diverged = monitor.is_diverging(work.residual[block], len(data.blocks))
            if diverged or is_out_of_budget():
                break
            iterate.step(gradient)
        norms = work.residual.norm(dim=0).double()
        diverged = diverged or not bool(torch.isfinite(norms).all())
        exact = False
        if diverged:
            restarts += 1
            rule = StepRule(rule.step_size / 2, rule.momentum)
            work = _Weights(system, best, len(data.blocks))
            iterate = _iterate(settings, work, best_norms, rule)
            passes += 0.5 if bool(best.any()) else 0.0
            norms = best_norms
            monitor.forget()
            if restarts > _MAX_RESTARTS:
                reason = "diverged"
        elif is_out_of_budget() or monitor.wants_check(norms, passes):
            exact = True
            candidate = work.dual(iterate.average)
            norms = accurate_residual(system, candidate)
            passes += _CHECK_COST
            better = norms < best_norms
            best[:, better] = candidate[:, better]
            best_norms = torch.where(better, norms, best_norms)
            reason = monitor.verdict(norms, passes)
        if record(passes, norms.to(best.dtype), exact=exact, weights=current):
            reason = reason or "interrupted"
        if is_out_of_budget():
            reason = reason or "budget"

    if float(best_norms.max()) <= settings.tolerance:
        reason = "converged"
    return Solution(
        solver=settings.name,
        operator=given.operator.name,
        weights=current(),
        residuals=best_norms.to(best.dtype),
        passes=passes,
        seconds=record.seconds,
        reason=reason,
        history=tuple(record.history),
        warnings=settings._warnings(reason, best_norms, restarts, False),
        settings={
            "block_size": -(-n // len(data.blocks)),
            "momentum": rule.momentum,
            "momentum_grows": settings.momentum is None,
            "step_size": rule.step_size,
            "restarts": restarts,
            "largest_eigenvalue": largest,
            "regulariser": "exact features",
            "num_features": work.operator.features.num_features,
        },
    )


class _Weights:
    """V of every row as of its last visit with U = phi^T V, and the gradients in W."""

    def __init__(self, system: System, start: Tensor, num_blocks: int) -> None:
        operator = system.operator
        assert isinstance(operator, FeatureOperator)
        self.operator = operator
        self.system = system
        self.residual = system.rhs.clone()
        self._num_blocks = num_blocks
        self._dual = operator.tracked(start)

    @property
    def start(self) -> Tensor:
        """U (M, k)."""
        assert self._dual.phi_t_v is not None
        return self._dual.phi_t_v

    def gradient(self, block: RowIndex, at: Tensor) -> Tensor:
        """G (M, k) from a block at W."""
        system, dual = self.system, self._dual
        misfit = system.rhs[block] - self.operator.rows_of_weights(block, at)
        change = misfit / system.noise[block] - dual.values[block]
        self.residual[block] = change * system.noise[block]
        move = self.operator.move(block, change)
        assert move.phi_t_v is not None
        gradient = at - self.start
        gradient.sub_(move.phi_t_v, alpha=self._num_blocks)
        dual.move(move)
        return gradient

    def dual(self, weights: Tensor) -> Tensor:
        """V = Sigma^-1 (B - phi W) (n, k), half a pass."""
        fitted = self.operator.rows_of_weights(slice(0, self.system.n), weights)
        return (self.system.rhs - fitted) / self.system.noise


def _iterate(
    settings: SGD, work: _Weights, norms: Tensor, rule: StepRule
) -> AveragedIterate:
    """A descent that starts where V is."""
    return AveragedIterate(
        work.start.clone(), norms, rule, power=_POWER, grows=settings.momentum is None
    )


def _rule(
    settings: SGD, work: _Weights, generator: torch.Generator
) -> tuple[StepRule, float, float]:
    """Step size and momentum; what their estimates cost; and the largest eigenvalue."""
    system = work.system
    prior, swept = scale_diagonal(work.operator, generator)
    leading, passes = leading_eigenvalues(
        work.operator, system.noise.rsqrt(), generator
    )
    rows = (prior / system.noise[:, 0]).double()
    # Rows of a large norm are as rare as others but move the iterate further.
    spread = float(rows.square().sum() / rows.sum().clamp_min(1e-300))
    largest = 1.0 + max(float(leading[-1]), float(rows.mean()))
    momentum = settings.momentum
    if momentum is None:
        q = math.sqrt(1.0 / largest)
        momentum = min((1.0 - q) / (1.0 + q), _MOST_MOMENTUM)
    rule = primal_step_rule(
        largest, spread, work._num_blocks, momentum=momentum, fraction=_FRACTION
    )
    if settings.step_size is not None:
        rule = StepRule(settings.step_size, rule.momentum)
    return rule, swept + passes, largest
