"""Stochastic dual descent with the papers' step size and momentum.

Algorithm 1 of Lin et al. (ICLR 2024, arXiv:2310.20581), transcribed:

    e = a + rho v
    g_I = K[I, :] e + s e_I - b_I
    v <- rho v - beta (n / b) scatter_I(g_I)
    a <- a + v
    average <- r a + (1 - r) average

with rho = 0.9, r = 100 / T over a horizon of T steps, blocks drawn uniformly without
replacement, and beta = k / n for k of {1, 10, 100} as Rathore et al. (2025,
arXiv:2505.13723) run it, with their b = n / 100. The paper tunes k in 5 .. 50.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.solvers.off_the_clock import operator_of, run_method, unit_columns
from benchmarks.solvers.task import Outcome, Task
from sgdgp.operators import KernelOperator

MOMENTUM = 0.9


class PublishedSDD:
    """The state of the published algorithm.

    Args:
        operator: K (n, n).
        noise: s.
        rhs: b, with unit columns (n, k).
        step: k, where beta = k / n.
        block_size: b.
        horizon: T.
        generator: Source of the blocks.
    """

    def __init__(
        self,
        operator: KernelOperator,
        noise: float,
        rhs: Tensor,
        *,
        step: float,
        block_size: int,
        horizon: int,
        generator: torch.Generator,
    ) -> None:
        self.operator, self.noise, self.rhs = operator, noise, rhs
        self.beta = step / rhs.shape[0]
        self.block_size = block_size
        self.averaging = min(1.0, 100.0 / horizon)
        self.a = torch.zeros_like(rhs)
        self.v = torch.zeros_like(rhs)
        self.weights = torch.zeros_like(rhs)
        self._generator = generator
        self._steps = 0

    @property
    def passes(self) -> float:
        """Kernel entries used so far, over n^2."""
        return self._steps * self.block_size / self.rhs.shape[0]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the rule comes to."""
        return {
            "step_size": self.beta,
            "momentum": MOMENTUM,
            "block_size": self.block_size,
            "averaging": self.averaging,
        }

    def step(self) -> None:
        """One step on a random block."""
        n = self.rhs.shape[0]
        self.step_on(torch.randperm(n, generator=self._generator)[: self.block_size])

    def step_on(self, block: Tensor) -> None:
        """One step on the coordinates ``block`` (b,)."""
        n = self.rhs.shape[0]
        ahead = self.a.add(self.v, alpha=MOMENTUM)
        gradient = self.operator.rows(block).matmul(ahead)
        gradient += self.noise * ahead[block] - self.rhs[block]
        self.v *= MOMENTUM
        self.v[block] -= self.beta * (n / len(block)) * gradient
        self.a += self.v
        self.weights.lerp_(self.a, self.averaging)
        self._steps += 1


def published_sdd(task: Task, step: float, block_size: int | None = None) -> Outcome:
    """Run the papers' rule until the true mean residual is below the tolerance.

    Args:
        task: What to solve; its ``max_passes`` is the horizon of the averaging.
        step: k of the step size k / n.
        block_size: Coordinates per step. Default: n / 100.
    """
    n = task.problem.n
    size = min(n, block_size or max(1, n // 100))
    rhs, scale = unit_columns(task)
    method = PublishedSDD(
        operator_of(task),
        task.problem.noise,
        rhs,
        step=step,
        block_size=size,
        horizon=max(1, math.ceil(task.max_passes * n / size)),
        generator=torch.Generator().manual_seed(task.seed),
    )
    return run_method(task, method, scale, f"published SDD, step {step:g}/n")
