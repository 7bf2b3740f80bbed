"""When to check a true residual, and when to stop.

The running residual of a stochastic solver is stale by up to a pass and taken at
another point than the one returned: it may trigger a check, it may never end a
solve. A check costs one pass; the last one tells how far the running residual is
off, so that one that failed is repeated when it is likely to succeed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgdgp.solvers.base import Reason

PATIENCE = 300.0  # passes without any gain that end a solve
_STALLED_GAIN = 0.02  # less than that over all of them is none
_MARGIN = 0.97  # a running residual should promise a little more than it must
_TRIGGERS = (0.4, 2.0)  # bounds of what one check may tell of the running residual
_REARM, _REARM_SHARE = 2.0, 0.1  # passes, and part of all, between claims that fail
_PARTIAL = 10.0  # passes between checks that only dismiss columns
_REGULAR = 25.0  # passes between checks without any claim: 4 % of all
_GROWTH = 9.0  # of the squared residual, as a reason to restart: three of its norm


class Monitor:
    """Watches the residuals of one stochastic solve.

    Args:
        tolerance: Relative residual every column must reach.
        start: Relative residuals of the starting point (k,).
        patience: Passes without any gain after which a solve counts as stagnated.
    """

    def __init__(
        self, tolerance: float, start: Tensor, patience: float = PATIENCE
    ) -> None:
        self._tolerance = tolerance
        self._patience = patience
        self._start = float(start.square().mean())
        self._smoothed = self._start
        self._unseen: list[tuple[Tensor, int]] = []
        self._trigger = 1.0
        self._claimed: float | None = None
        self._is_claim = False
        self._refuted = -math.inf
        self._checked: tuple[float, Tensor] | None = None
        self._checks: list[tuple[float, float]] = []

    def is_diverging(self, gradient: Tensor, num_blocks: int) -> bool:
        """Whether residuals of blocks (b, k) have grown to three times the start's.

        A look at a number waits for all that a GPU still has to do: there only some
        calls look, at the blocks of all calls since.
        """
        self._unseen.append((gradient.square().sum(), gradient.shape[1]))
        if len(self._unseen) < _calls_per_look(gradient.device):
            return False
        squares = torch.stack([square for square, _ in self._unseen]).tolist()
        columns = [k for _, k in self._unseen]
        self._unseen = []
        return any(
            self._has_grown(square * num_blocks / k, num_blocks)
            for square, k in zip(squares, columns, strict=True)
        )

    def _has_grown(self, energy: float, num_blocks: int) -> bool:
        """Whether mean squares say so, with those of one more block."""
        if not math.isfinite(energy):
            return True
        # Smoothed over a tenth of a pass: a few unlucky blocks are no divergence.
        weight = max(1.0 / (1.0 + num_blocks / 10.0), 0.02)
        self._smoothed += weight * (energy - self._smoothed)
        return self._smoothed > _GROWTH * max(self._start, 1.0)

    def forget(self) -> None:
        """Start the divergence guard afresh after a restart."""
        self._unseen = []
        self._smoothed = self._start

    def wants_check(self, running: Tensor, passes: float) -> bool:
        """Whether running residuals (k,) after some passes are worth a true one."""
        since = passes - (self._checked[0] if self._checked else 0.0)
        # What the last check has told of the running residual wears off.
        relaxed = 1.0 + since / _REGULAR if self._checked else 1.0
        below = running <= relaxed * self._trigger * self._tolerance
        if bool(below.all()):
            pause = max(_REARM, _REARM_SHARE * passes)
            wanted = self._checked is None or (
                since >= _REARM and passes - self._refuted >= pause
            )
        else:
            # Half of the columns are worth dismissing.
            several = 2 * int(below.sum()) >= len(below) > 1
            pause = max(_PARTIAL, 2.0 * _REARM_SHARE * passes)
            wanted = since >= _REGULAR or (several and since >= pause)
        self._claimed = float(running.max()) if wanted else None
        self._is_claim = bool(below.all())
        return wanted

    def verdict(self, norms: Tensor, passes: float) -> Reason | None:
        """Take note of a true residual (k,); a reason to stop, if there is one."""
        self._checked = (passes, norms)
        worst = float(norms.max())
        if worst <= self._tolerance:
            return "converged"
        if self._claimed is not None:
            if self._is_claim:
                self._refuted = passes
            lowest, highest = _TRIGGERS
            claim = _MARGIN * self._claimed / worst
            self._trigger = min(max(claim, lowest), highest)
            self._claimed = None
        self._checks.append((passes, worst))
        earlier = [r for p, r in self._checks if p <= passes - self._patience]
        if earlier and worst > (1.0 - _STALLED_GAIN) * min(earlier):
            return "stagnated"
        return None


def _calls_per_look(device: torch.device) -> int:
    return 1 if device.type == "cpu" else 16


def rounding_floor(largest: float, diagonal: Tensor, weights: Tensor) -> float:
    """Relative residual that rounding of the weights leaves, eps ||H||_F ||v|| / n^1/2.

    Args:
        largest: lambda_1 of H scaled to unit diagonal; ||H||_F^2 <= lambda_1 tr H.
        diagonal: The diagonal of H (n, 1).
        weights: Weights (n, k) for right-hand sides of unit norm.
    """
    size = float(diagonal.mean()) * math.sqrt(largest)
    eps = torch.finfo(weights.dtype).eps
    return eps * size * float(weights.norm(dim=0).max())
