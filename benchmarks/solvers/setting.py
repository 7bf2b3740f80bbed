"""The synthetic system that is timed: Gaussian inputs, a Matern-3/2 kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from gpytorch.kernels import MaternKernel
from torch import Tensor

import sgdgp
from benchmarks.solvers.clock import Clock, median
from sgdgp.operators import TiledOperator

NOISE = 0.1


@dataclass(frozen=True)
class Setting:
    """A tiled operator over n random points in d dimensions, and right-hand sides.

    Attributes:
        operator: K (n, n), float32, streamed in tiles.
        rhs: (n, k).
        lengthscale: sqrt(d), so that neighbours have a correlation worth solving for.
    """

    operator: TiledOperator
    rhs: Tensor
    lengthscale: float

    @property
    def scaled_inputs(self) -> Tensor:
        """Inputs over the lengthscale (n, d)."""
        return self.operator.x / self.lengthscale


def make_setting(
    n: int, d: int, columns: int = 1, memory_budget: int | None = None
) -> Setting:
    """Draw the inputs and right-hand sides with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    smooth = torch.sin(x[:, :1]) + 0.5 * x[:, -1:].cos()
    rhs = smooth + math.sqrt(NOISE) * torch.randn(n, columns, generator=generator)
    kernel = MaternKernel(nu=1.5)
    kernel.lengthscale = math.sqrt(d)
    operator = TiledOperator(kernel, x, memory_budget=memory_budget)
    return Setting(operator, rhs, math.sqrt(d))


def pass_seconds(
    setting: Setting, block_size: int | None, passes: int, clock: Clock
) -> float:
    """Seconds that one pass of ``sgdgp.SDD`` takes, everything in it included.

    The clock is read whenever the solver reports a finished pass; what comes before
    the first pass (spectral estimates) and after the last (the true residual) is
    left out. Steps in a pass: n over the block size.

    Args:
        setting: The system.
        block_size: Coordinates per step. Default: the solver's own.
        passes: Passes that are timed; one more is run first.
        clock: Which seconds.
    """
    solver = sgdgp.SDD(block_size=block_size, tolerance=1e-12)
    readings: list[float] = []

    def read(progress: sgdgp.solvers.Progress) -> bool:
        readings.append(clock())
        return len(readings) > passes

    solver.solve(setting.operator, NOISE, setting.rhs, callback=read)
    return median([after - before for before, after in pairwise(readings)])
