"""The iterate of stochastic dual descent: sparse updates, momentum, averaging.

See ``sdd.py`` for the recurrence that this carries out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgdgp.solvers.step_size import StepRule
from sgdgp.solvers.system import System

_UNDERFLOW = 1e-12
_GROWTH = 5.0
_FEWEST_RECENT = 4


class DualIterate:
    """Iterate, velocity and average of the columns still worked on."""

    def __init__(
        self,
        system: System,
        diagonal: Tensor,
        start: Tensor,
        residual: Tensor,
        averaging: float,
    ) -> None:
        self._system = system
        self._averaging = averaging
        self._diagonal = diagonal
        self._rule = StepRule(0.0, 0.0)
        self._decay = 1.0
        self._steps = 0
        self.live = torch.arange(start.shape[1], device=start.device)
        self._rhs = system.rhs
        self._residual = residual.to(start.dtype, copy=True)
        self._z = system.operator.tracked(start)
        self._u = self._z.zeros_like()
        self._lookahead = self._z.clone()
        self.average = start.clone()
        self._best = start.clone()
        self._best_norms = self._residual.norm(dim=0)

    def dismiss(self, done: Tensor) -> None:
        """Leave the columns that are done."""
        if not bool(done.any()):
            return
        rest = ~done
        self.live = self.live[rest]
        for name in ("_rhs", "_residual", "average", "_best"):
            setattr(self, name, getattr(self, name)[:, rest].contiguous())
        for name in ("_z", "_u", "_lookahead"):
            setattr(self, name, getattr(self, name).columns(rest))
        self._best_norms = self._best_norms[rest]

    def adopt(self, rule: StepRule) -> None:
        """Go on with another step size and momentum; iterate and velocity stay."""
        old, new = self._rule.momentum, rule.momentum
        self._rule = rule
        if old == new:
            return
        self._u.scale(self._decay)
        self._decay = 1.0
        self._z.add(self._u, new / (1.0 - new) - old / (1.0 - old))
        self._look_ahead()

    def _look_ahead(self) -> None:
        rho = self._rule.momentum
        ahead = (rho / (1.0 - rho) - rho) * self._decay
        self._lookahead.set_to_difference(self._z, self._u, ahead)

    def gradient(self, block: slice) -> Tensor:
        """H[I, :] e - B[I], minus the residual of the block."""
        system, ahead = self._system, self._lookahead
        gradient = system.operator.rows_of_product(block, ahead)
        gradient.addcmul_(system.noise[block], ahead.values[block])
        gradient.sub_(self._rhs[block])
        self._residual[block] = -gradient
        return gradient

    def step(self, block: slice, gradient: Tensor, num_blocks: int) -> None:
        """One descent step from the gradient on a block."""
        rho, beta = self._rule.momentum, self._rule.step_size * num_blocks
        move = self._system.operator.move(block, gradient / self._diagonal[block])
        if self._decay < _UNDERFLOW:
            self._u.scale(self._decay)
            self._decay = 1.0
        self._decay *= rho or 1.0
        if rho == 0.0:
            self._lookahead.move(move, -beta)
            self._z.move(move, -beta)
        else:
            self._u.move(move, -beta / self._decay)
            self._z.move(move, -beta / (1.0 - rho))
            self._look_ahead()
        self._steps += 1
        # The window is t / k steps long: averaging every t / (4 k) loses nothing.
        k = 1.0 / self._averaging
        stride = max(1, int(self._steps / (4.0 * k)))
        if self._steps % stride == 0:
            weight = min(1.0, (k + 1.0) * stride / (self._steps + k))
            self.average.lerp_(self._lookahead.values, weight)

    def recent(self, visited: list[slice]) -> Tensor:
        """Residual norms (k,) as the last quarter of a pass has seen them."""
        last = visited[-max(_FEWEST_RECENT, len(visited) // 4) :]
        rows = sum(block.stop - block.start for block in last)
        squares = torch.stack([self._residual[i].square().sum(0) for i in last]).sum(0)
        return (squares * (len(self._residual) / rows)).sqrt()

    def has_grown(self) -> bool:
        """Whether the residual is far above the best; keeps the best iterate."""
        norms = self._residual.norm(dim=0)
        now, best = float(norms.norm()), float(self._best_norms.norm())
        if now < 0.9 * best:
            self._best_norms = norms
            self._best.copy_(self.average)
        return not now <= _GROWTH * best

    def restart(self) -> Tensor:
        """Go back to the best iterate, at rest; its residual norms (k,)."""
        self.average.copy_(self._best)
        self._z = self._system.operator.tracked(self._best)
        self._lookahead.copy(self._z)
        self._u = self._z.zeros_like()
        self._decay = 1.0
        return self._best_norms.double()
