"""When to check a true residual, and when to stop.

The running residual of a stochastic solver is stale by up to a pass: it may
trigger a check, it may never end a solve. A check costs one pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgdgp.solvers.base import Reason

_TRIGGER = 0.7
_REARM = 5.0
_REGULAR = 25.0
_STALLED_GAIN = 0.02
_GROWTH = 9.0


class Monitor:
    """Watches the residuals of one stochastic solve.

    Args:
        tolerance: Relative residual every column must reach.
        start: Relative residuals of the starting point (k,).
        patience: Passes without any gain after which a solve counts as stagnated.
    """

    def __init__(
        self, tolerance: float, start: Tensor, patience: float = 300.0
    ) -> None:
        self._tolerance = tolerance
        self._patience = patience
        self._start = float(start.square().mean())
        self._smoothed = self._start
        self._checked: tuple[float, Tensor] | None = None
        self._checks: list[tuple[float, float]] = []

    def is_diverging(self, gradient: Tensor, num_blocks: int) -> bool:
        """Whether the block residual has grown to three times the start's.

        Args:
            gradient: Minus the residual on the block (b, k).
            num_blocks: Blocks in a pass.
        """
        energy = float(gradient.square().sum()) * num_blocks / gradient.shape[1]
        if not math.isfinite(energy):
            return True
        # Smoothed over a tenth of a pass: a few unlucky blocks are no divergence.
        weight = max(1.0 / (1.0 + num_blocks / 10.0), 0.02)
        self._smoothed += weight * (energy - self._smoothed)
        return self._smoothed > _GROWTH * max(self._start, 1.0)

    def forget(self) -> None:
        """Start the divergence guard afresh after a restart."""
        self._smoothed = self._start

    def wants_check(self, running: Tensor, passes: float) -> bool:
        """Whether a true residual is worth a pass now."""
        since = passes - (self._checked[0] if self._checked else 0.0)
        if float(running.max()) <= _TRIGGER * self._tolerance:
            return self._checked is None or since >= _REARM
        return since >= _REGULAR

    def verdict(self, norms: Tensor, passes: float) -> Reason | None:
        """Take note of a true residual (k,); a reason to stop, if there is one."""
        self._checked = (passes, norms)
        worst = float(norms.max())
        if worst <= self._tolerance:
            return "converged"
        self._checks.append((passes, worst))
        earlier = [r for p, r in self._checks if p <= passes - self._patience]
        if earlier and worst > (1.0 - _STALLED_GAIN) * min(earlier):
            return "stagnated"
        return None

    def checked_at(self, passes: float) -> Tensor | None:
        """The true residual, if it was checked at exactly this point."""
        if self._checked is not None and self._checked[0] == passes:
            return self._checked[1].to(torch.float64)
        return None
