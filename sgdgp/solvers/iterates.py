"""Iterates of stochastic descent: momentum that touches only a block, and averages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from sgdgp.operators.arguments import index_length
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.step_size import StepRule
from sgdgp.solvers.system import System

PROGRESS = 0.9  # a residual this much below the best is worth a copy of the iterate
_UNDERFLOW = 1e-12  # where U is rescaled: far from the smallest float32
_PER_WINDOW = 4.0  # iterates of a window that its average sees: others are like them
_POINTS = 400.0  # iterates of all so far that an average sees: four of such a window
_BEFORE_RECORDING = 32  # steps: recording takes as long as some hundred of them


class _Recorded:
    """A function of a block of rows, whose launches a GPU repeats without Python.

    A step is over before Python has launched its dozen kernels one by one. After a few
    calls for a length of block they are recorded as a CUDA graph; from there on they
    are replayed. What the function reads has to stay in its place, and what is
    returned is overwritten by the next call.
    """

    def __init__(self, function: Callable[[RowIndex], Tensor]) -> None:
        self._function = function
        self.forget()

    def forget(self) -> None:
        """Record anew: something that the function reads has moved."""
        self._calls: Counter[int] = Counter()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, block: RowIndex, device: torch.device) -> Tensor:
        length = index_length(block)
        self._calls[length] += 1
        if self._calls[length] <= _BEFORE_RECORDING:
            return self._function(block)
        with torch.cuda.device(device):
            if length not in self._graphs:
                self._graphs[length] = self._record(length, device)
            graph, index, out = self._graphs[length]
            if isinstance(block, slice):
                torch.arange(block.start, block.stop, out=index)
            else:
                index.copy_(block)
            graph.replay()
        return out

    def _record(
        self, length: int, device: torch.device
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        index = torch.arange(length, device=device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._function(index)  # compiles, which cannot be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self._function(index)
        return graph, index, out


class BlockIterate:
    """A point Y = Z - l rho^t U of which a step changes only a block of rows.

    Nesterov's sequences move all rows in every step, but those outside of the block
    only by factors that all rows share. Z and U are the combinations that these
    factors leave alone: a step changes a block of them, and one number. Y, where
    gradients are taken, is made of them anew in every step.

    Args:
        system: The system.
        start: Z = Y (n, k); U is zero.

    Attributes:
        average: Average of the points (n, k').
        point: Y (n, k'), with phi^T Y.
        steps: Steps taken.
    """

    def __init__(self, system: System, start: Tensor) -> None:
        self._system = system
        self._rhs = system.rhs
        self.average = start.clone()
        self._z = system.operator.tracked(start)
        self.steps = 0
        self._recorded = _Recorded(self._gradient)
        self._rest()

    def _rest(self) -> None:
        """Take away all momentum."""
        self.point = self._z.clone()
        self._u = self._z.zeros_like()
        self._decay = 1.0
        self._recorded.forget()

    def keep(self, rest: Tensor) -> None:
        """Go on with some of the columns (a mask)."""
        self._rhs = self._rhs[:, rest].contiguous()
        self.average = self.average[:, rest].contiguous()
        self._z = self._z.columns(rest)
        self._u = self._u.columns(rest)
        self.point = self.point.columns(rest)
        self._recorded.forget()

    def restart(self, start: Tensor) -> None:
        """Go back to a point (n, k'), at rest."""
        self.average.copy_(start)
        self._z = self._system.operator.tracked(start)
        self._rest()

    def gradient(self, block: RowIndex) -> Tensor:
        """H[I, :] Y - B[I] (b, k'), minus the residual of the block, until the next."""
        if self._system.operator.is_recordable:
            return self._recorded(block, self._rhs.device)
        return self._gradient(block)

    def _gradient(self, block: RowIndex) -> Tensor:
        system = self._system
        gradient = system.operator.rows_of_product(block, self.point)
        gradient.addcmul_(system.noise[block], self.point.values[block])
        return gradient.sub_(self._rhs[block])

    def step(
        self,
        block: RowIndex,
        direction: Tensor,
        *,
        z_step: float,
        u_step: float,
        momentum: float,
        lag: float,
    ) -> None:
        """Z[I] -= z_step d, U[I] -= u_step d / rho^t, Y = Z - lag rho^t U.

        I is the block, d (b, k') the direction and rho the momentum.
        """
        move = self._system.operator.move(block, direction)
        self._z.move(move, -z_step)
        if momentum == 0.0:
            self.point.move(move, -z_step)
        else:
            if self._decay < _UNDERFLOW:
                self.rescale()
            self._decay *= momentum
            if u_step:
                self._u.move(move, -u_step / self._decay)
            self.look_ahead(lag)
        self.steps += 1

    def rescale(self) -> None:
        """Put the factor rho^t into U."""
        self._u.scale(self._decay)
        self._decay = 1.0

    def shift(self, factor: float, lag: float) -> None:
        """Z += factor rho^t U and Y anew."""
        self.rescale()
        self._z.add(self._u, factor)
        self.look_ahead(lag)

    def look_ahead(self, lag: float) -> None:
        """Y = Z - lag rho^t U."""
        self.point.set_to_difference(self._z, self._u, lag * self._decay)

    def accumulate(self, averaging: float, power: float) -> None:
        """Take Y into the average; see ``average_in``."""
        average_in(
            self.average,
            self.point.values,
            steps=self.steps,
            power=power,
            every=_PER_WINDOW / averaging,
        )


class AveragedIterate:
    """Look-ahead point, momentum and horizon-free average of one descent.

    Args:
        start: Starting point (m, k).
        norms: Relative residuals there (k,).
        rule: Step size and largest momentum.
        power: k of the averaging weights (k + 1) / (t + k).
        grows: Whether momentum grows as t / (t + 3), or is the same from the start.
    """

    def __init__(
        self, start: Tensor, norms: Tensor, rule: StepRule, *, power: float, grows: bool
    ) -> None:
        self.rule = rule
        self.average = start.clone()
        self._best, self._best_norm = start.clone(), float(norms.max())
        self._power, self._grows = power, grows
        self._rest()

    def _rest(self) -> None:
        """Take away all momentum."""
        self._steps = 0
        self._momentum = torch.zeros_like(self._best)
        self.lookahead = self._best.clone()

    @property
    def weight(self) -> float:
        """Averaging weight of the next step."""
        return (self._power + 1.0) / (self._steps + 1.0 + self._power)

    def step(self, gradient: Tensor) -> None:
        """One descent step; ``gradient`` (m, k) is overwritten."""
        rho, beta = self.rule.momentum, self.rule.step_size
        if self._grows:
            rho = min(rho, self._steps / (self._steps + 3.0))
        self._momentum.mul_(rho).add_(gradient)
        self.lookahead.sub_(gradient.add_(self._momentum, alpha=rho), alpha=beta)
        self._steps += 1
        average_in(
            self.average,
            self.lookahead,
            steps=self._steps,
            power=self._power,
            every=_POINTS,
        )

    @property
    def settings(self) -> dict[str, float | bool]:
        """Step size and momentum as a solution names them."""
        return {
            "momentum": self.rule.momentum,
            "momentum_grows": self._grows,
            "step_size": self.rule.step_size,
        }

    def remember(self, norms: Tensor) -> bool:
        """Keep the average if it is the best so far; whether it was."""
        norm = float(norms.max())
        if norm < PROGRESS * self._best_norm:
            self._best_norm = norm
            self._best.copy_(self.average)
            return True
        return False

    def restart(self) -> None:
        """Go back to the best average, at rest, with half the step."""
        self.rule = self.rule.halved()
        self.average.copy_(self._best)
        self._rest()


def average_in(
    average: Tensor, point: Tensor, *, steps: int, power: float, every: float
) -> None:
    """Move an average by w (point - average), w = (k + 1) / (t + k): no horizon.

    In place, for t steps and the power k: a window of t / k steps. Of all steps only
    every (t / ``every``)-th is taken, with as much more weight.
    """
    stride = max(1, int(steps / every))
    if steps % stride == 0:
        average.lerp_(point, min(1.0, (power + 1.0) * stride / (steps + power)))
