"""Accelerated sketch-and-project, ADASAP (Rathore et al., 2025, arXiv:2505.13723).

Nesterov's method on random blocks I of equations, preconditioned by P ~ H[I, I],
H = K + Sigma, with the step eta = 1 / lambda_max(P^-1 H[I, I]):

    d = P^-1 (H[I, :] Y - B[I])
    W <- Y - eta scatter_I(d)
    V <- beta V + (1 - beta) Y - gamma eta scatter_I(d)
    Y <- alpha V + (1 - alpha) W

    beta = 1 - sqrt(mu / nu), gamma = 1 / sqrt(mu nu), alpha = 1 / (1 + gamma nu)
    nu = n / b, mu = min(sigma^2, 1 / nu)

P is a randomised Nystrom approximation of the block, or the block itself (SAP).

Deviations from the paper:

1. Every pass is a new random partition of the equations: no row waits for more than
   two passes. Measured (n = 3,000, Matern-3/2, sigma^2 = 0.1, exact blocks of 50): a
   residual of 1e-2 after 10 passes, 15 with independent blocks as in the paper, more
   than 40 with one fixed partition.
2. sigma^2 in mu is the mean of the noise over the diagonal of H, so that no scale of
   the kernel matters, and mu is at least a tenth of 1 / nu. Measured (n = 2,000,
   lengthscale 3, sigma^2 = 1e-4): 15 passes to 1e-2 instead of 36.
3. W, V and Y are never updated densely. With q = sqrt(mu / nu), D = V - Y decays by
   (1 - q) / (1 + q) per step and Z = Y + (1 - q) / 2 D stands still, but for the block:
   Z <- Z - (gamma + 1) / 2 eta d,  D <- ... - (gamma - 1) / (1 + q) eta d.
4. Averaging over the tail (in the paper's theory, not in its experiments) needs no
   horizon: its weights favour the last ``averaging`` of the steps.
5. -P d is the residual on the block: kept, it is a running residual for nothing. It
   triggers a true residual; only that can end the solve, and dismisses columns.
6. Where K = phi phi^T with exact features, phi^T Z and phi^T D move with Z and D: a
   step evaluates b rows forward and b back, and the features of the block.
7. A residual that grows halves the step, raises mu tenfold (less momentum) and
   restarts from the best iterate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgdgp.core.checks import check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.blocks import BlockPreconditioner, NystromBlocks, Shuffled
from sgdgp.solvers.driver import Algorithm, StochasticSolver, Task, check_steps
from sgdgp.solvers.iterates import BlockIterate
from sgdgp.solvers.system import System, true_residual

_CALMER = 10.0  # factor of mu after a restart: a third of the memory 1 / q
_LEAST_MU = 0.1  # in units of 1 / nu: see deviation 2


@register_stored_class
@dataclass(frozen=True)
class ADASAP(StochasticSolver):
    """Accelerated sketch-and-project; nothing needs to be set.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        block_size: Equations per step. Default: n / 100, at least 64.
        preconditioner: ``NystromBlocks()`` (default) or ``ExactBlocks()``.
        mu: Strong convexity that is assumed. Default: from the noise.
        nu: Smoothness that it assumes, at least one. Default: the number of blocks.
        averaging: Last part of the steps that is averaged, in (0, 1]. Default: none.
    """

    block_size: int | None = None
    preconditioner: BlockPreconditioner = field(default_factory=NystromBlocks)
    mu: float | None = None
    nu: float | None = None
    averaging: float | None = None

    name = "adasap"
    title = "ADASAP"
    advice = (
        "Give it more passes (max_passes), ExactBlocks(), float64 data, or use CG or "
        "Cholesky."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.block_size)
        if not isinstance(self.preconditioner, BlockPreconditioner):
            raise TypeError(
                f"preconditioner: expected NystromBlocks(), found {self.preconditioner}"
            )
        for name in ("mu", "nu", "averaging"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.nu is not None and self.nu < 1:
            raise ValueError(f"nu: expected at least one, found {self.nu}")
        if self.averaging is not None and self.averaging > 1:
            raise ValueError(f"averaging: expected (0, 1], found {self.averaging}")

    def begin(self, task: Task) -> Algorithm[Any]:
        return _SketchAndProject(self, task)


def default_block_size(n: int) -> int:
    """Equations per step when none are asked for: the paper's n / 100.

    At least 64, below which a step costs more than its entries, and at most 10,000,
    of which the block itself takes 0.4 GB.
    """
    return min(10_000, max(64, n // 100))


@dataclass(frozen=True)
class Acceleration:
    """The paper's mu and nu, and what follows from them."""

    mu: float
    nu: float

    @property
    def q(self) -> float:
        """sqrt(mu / nu)."""
        return math.sqrt(self.mu / self.nu)

    @property
    def gamma(self) -> float:
        """1 / sqrt(mu nu)."""
        return 1.0 / math.sqrt(self.mu * self.nu)

    @property
    def decay(self) -> float:
        """(1 - q) / (1 + q), what a step leaves of D."""
        return (1.0 - self.q) / (1.0 + self.q)

    def calmer(self) -> Acceleration:
        """Ten times less memory in the momentum's square."""
        return Acceleration(min(_CALMER * self.mu, 1.0 / self.nu), self.nu)


def default_mu(system: System, nu: float) -> float:
    """The noise over the diagonal of H, between 0.1 / nu and 1 / nu."""
    ratio = system.noise[:, 0] / (system.operator.diagonal() + system.noise[:, 0])
    return min(max(float(ratio.double().mean()), _LEAST_MU / nu), 1.0 / nu)


class _SketchAndProject(Algorithm[ADASAP]):
    """The recurrence of this module at work, in Z and U = D / ((1 - q) / (1 + q))^t."""

    restart_warning = (
        "{title} met a growing residual, halved its step size {restarts} times and "
        "lowered its momentum. A larger mu or block_size avoids it."
    )

    def __init__(self, solver: ADASAP, task: Task) -> None:
        system = task.system
        everything = torch.arange(system.n, device=system.rhs.device)
        super().__init__(solver, task, Shuffled(system, everything, ()))
        self.passes += self.adjoint_cost  # the diagonal is made from features
        self._size = min(system.n, solver.block_size or default_block_size(system.n))
        self.num_blocks = math.ceil(system.n / self._size)
        nu = solver.nu or float(self.num_blocks)
        mu = min(solver.mu or default_mu(system, nu), 1.0 / nu)
        self._acceleration = Acceleration(mu, nu)
        self._scale = 1.0
        self.watch(0.5 / self._acceleration.q / self.num_blocks)
        self._iterate = BlockIterate(system, self.checked.weights)

    def blocks(self) -> Iterator[RowIndex]:
        """A new random partition of the equations."""
        order = self.system.operator.random_order(self.generator)
        return iter(order.tensor_split(self.num_blocks))

    def visit(self, block: RowIndex) -> Tensor:
        self._gradient = self._iterate.gradient(block)
        self.residual[block] = -self._gradient
        return self._gradient

    def step(self, block: RowIndex) -> None:
        """See ``Algorithm.step``; the passes count when the step is made."""
        precondition = self.solver.preconditioner.step
        inverse, eta = precondition(self.system, block, self.generator)
        q, gamma = self._acceleration.q, self._acceleration.gamma
        self._iterate.step(
            block,
            inverse(self._gradient).mul_(eta * self._scale),
            z_step=(gamma + 1.0) / 2.0,
            u_step=(gamma - 1.0) / (1.0 + q),
            momentum=self._acceleration.decay,
            lag=(1.0 - q) / 2.0,
        )
        averaging = self.solver.averaging
        if averaging is not None:
            self._iterate.accumulate(averaging, power=1.0 / averaging - 1.0)
        part = len(self._gradient) / self.system.n
        self.passes += part * (1.0 + (self.adjoint_cost or part))

    def restart(self) -> None:
        """Half the step and less momentum from the best weights that were checked."""
        super().restart()
        self._scale /= 2.0
        self._acceleration = self._acceleration.calmer()
        best = self.checked.weights
        self.residual = true_residual(self.system, best).to(best.dtype)
        self.passes += 1.0 + self.adjoint_cost
        self._iterate = BlockIterate(self.system, best)
        self.live = torch.arange(len(self.norms), device=best.device)
        self.norms = self.checked.norms.clone()
        self.dismiss()
        self.is_verified = True

    def weights(self) -> Tensor:
        if self.solver.averaging is None:
            return self._iterate.point.values
        return self._iterate.average

    def keep(self, rest: Tensor) -> None:
        self._iterate.keep(rest)

    def settings(self) -> dict[str, Any]:
        return {
            "block_size": self._size,
            "preconditioner": repr(self.solver.preconditioner),
            "mu": self._acceleration.mu,
            "nu": self._acceleration.nu,
            "averaging": self.solver.averaging,
            "step_scale": self._scale,
            "restarts": self.restarts,
        }
