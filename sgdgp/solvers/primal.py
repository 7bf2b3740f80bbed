"""What the primal solvers share: row blocks, the step rule, the averaged iterate.

The primal Hessian is A = K Sigma^-1 (K + Sigma), here with coordinates scaled by
D = diag(K + Sigma). Its estimator from a block of b rows has, for delocalised
eigenvectors, the noise covariance (n/b - 1) (tr A / n) in the units of A itself:
with noise injected along K, the second moments m_j of the modes obey

    m_j <- (1 - beta a_j)^2 m_j + beta^2 (n/b - 1) k_j^2 / (n s^4) sum_l h_l^2 m_l

(k, h, a: eigenvalues of K, K + Sigma and A, s^2 the noise), which decays when
beta (n/b - 1) tr(A) / n < 2. Blocks are fixed and each is visited once per pass, so
the noise of whole passes cancels: momentum that remembers 1 / (1 - rho) steps, more
than the n/b of a pass, sees only min(1, (1 - rho) n/b) of it. M random features
(sine and cosine pairs), drawn anew at each step, add tr(K)/M to it. So with
S = min(1, (1 - rho) n/b) (n/b - 1) tr(A)/n + tr(K)/M and look-ahead momentum rho

    beta < 2 (1 + rho) / ((1 + 2 rho) lambda_1(A))     (mean dynamics)
    beta < 2 (1 - rho) / S                             (sampling noise)

Both fall as rho grows. A has eigenvalues near zero, so momentum grows with the steps
as in Nesterov's method for convex functions, t / (t + 3), up to a limit that the
fresh noise of the features sets, 1 - 8 tr(K) / (M lambda_1(A)):
that noise stays at the solution, so it is kept well below its stability limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.step_size import StepRule
from sgdgp.solvers.system import System

_SUBSET = 1000
_POWER_ITERATIONS = 20
_LARGEST_BLOCK = 2**28
_MOST_MOMENTUM = 0.999
_FRESH = 8.0


@dataclass(frozen=True)
class Shuffled:
    """A system cut into blocks of random rows.

    Attributes:
        system: The system, reordered where its operator allows it.
        order: Position in the caller's order of every row of ``system`` (n,).
        blocks: Rows of each block: slices, or indices where a point has several
            rows (those of a point stay together).
    """

    system: System
    order: Tensor
    blocks: list[RowIndex]

    def visits(self, generator: torch.Generator) -> Iterator[RowIndex]:
        """Every block once, in random order."""
        order = torch.randperm(
            len(self.blocks), generator=generator, device=generator.device
        )
        for index in order.tolist():
            yield self.blocks[index]

    def unshuffled(self, v: Tensor) -> Tensor:
        """Rows (n, k) in the caller's order."""
        out = torch.empty_like(v)
        out[self.order] = v
        return out


def shuffle(system: System, block_size: int, generator: torch.Generator) -> Shuffled:
    """Cut a system into blocks of about ``block_size`` random rows."""
    outputs = system.operator.outputs_per_input
    points = system.n // outputs
    size = max(1, min(block_size // outputs, points))
    count = math.ceil(points / size)
    cuts = list(slices(points, math.ceil(points / count)))
    if outputs == 1 or system.operator.has_features:
        order = system.operator.random_order(generator)
        whole = [slice(cut.start * outputs, cut.stop * outputs) for cut in cuts]
        return Shuffled(system.permuted(order), order, list(whole))
    order = torch.randperm(points, generator=generator, device=generator.device)
    order = order.to(system.rhs.device)
    rows = torch.arange(outputs, device=order.device)
    blocks: list[RowIndex] = [
        (order[cut].unsqueeze(1) * outputs + rows).flatten() for cut in cuts
    ]
    return Shuffled(system, torch.arange(system.n, device=order.device), blocks)


def default_block_size(n: int) -> int:
    """Rows per step when none are asked for; a block of them stays below 2^28."""
    return max(1, min(512, max(64, n // 64), _LARGEST_BLOCK // n))


@dataclass(frozen=True)
class PrimalSpectrum:
    """What the step rule needs to know of A, scaled by D = diag(K + Sigma).

    Attributes:
        largest: Estimate of lambda_1(A); errs on the high side.
        mean_diagonal: Estimate of tr(A) / n.
        kernel_diagonal: tr(K) / n, scaled.
        diagonal: D itself (n, 1).
    """

    largest: float
    mean_diagonal: float
    kernel_diagonal: float
    diagonal: Tensor


def primal_spectrum(system: System, generator: torch.Generator) -> PrimalSpectrum:
    """Estimate the spectrum of A from at most 1,000 random rows.

    Off-diagonal entries of the subset stand for n - 1 of the whole, diagonal ones
    for themselves: scaling those too would square the overestimate.
    """
    n = system.n
    size = min(n, _SUBSET)
    subset = torch.randperm(n, generator=generator, device=generator.device)[:size]
    subset = subset.to(system.rhs.device)
    kernel_diagonal = system.operator.diagonal().unsqueeze(1)
    diagonal = kernel_diagonal + system.noise
    scale = diagonal[subset].rsqrt()
    matrix = system.operator.block(subset, subset) * scale * scale.mT
    precision = diagonal[subset] / system.noise[subset]
    own = matrix.diagonal().clone()
    ratio = (n - 1) / max(1, size - 1)
    squares = (matrix.square() * precision.mT).sum(1) - own.square() * precision[:, 0]
    trace = ratio * squares + own.square() * precision[:, 0] + own
    matrix = ratio * matrix
    matrix.diagonal().copy_(own)
    largest = largest_eigenvalue(
        lambda v: matrix @ (precision * (matrix @ v) + v), size, matrix, generator
    )
    mean = float(trace.mean())
    return PrimalSpectrum(
        largest=max(largest, mean),
        mean_diagonal=mean,
        kernel_diagonal=float((kernel_diagonal / diagonal).mean()),
        diagonal=diagonal,
    )


def largest_eigenvalue(
    apply: Callable[[Tensor], Tensor],
    size: int,
    like: Tensor,
    generator: torch.Generator,
) -> float:
    """Power iteration plus its residual as a margin."""
    vector = torch.randn(
        size, 1, generator=generator, device=generator.device, dtype=like.dtype
    ).to(like.device)
    vector /= vector.norm()
    eigenvalue, image = 0.0, apply(vector)
    for _ in range(_POWER_ITERATIONS):
        vector = image / image.norm().clamp_min(torch.finfo(like.dtype).tiny)
        image = apply(vector)
        eigenvalue = float((vector * image).sum())
    return eigenvalue + float((image - eigenvalue * vector).norm())


def primal_step_rule(
    largest: float,
    mean_diagonal: float,
    num_blocks: int,
    *,
    fresh_noise: float = 0.0,
    momentum: float | None = None,
    fraction: float = 0.5,
) -> StepRule:
    """Largest momentum, and the step size from the two stability limits.

    Args:
        largest: lambda_1(A).
        mean_diagonal: tr(A) / n.
        num_blocks: Blocks in a pass, n / b.
        fresh_noise: tr(K) / M of the random features.
        momentum: Fixed momentum in [0, 1). Default: set from the noise.
        fraction: Part of the smaller limit that is used.
    """
    if momentum is None:
        balanced = 1.0 - _FRESH * fresh_noise / largest
        momentum = min(max(balanced, 0.0), _MOST_MOMENTUM)
    limit = 2.0 * (1.0 + momentum) / ((1.0 + 2.0 * momentum) * largest)
    cancelled = min(1.0, num_blocks * (1.0 - momentum))
    level = cancelled * (num_blocks - 1.0) * mean_diagonal + fresh_noise
    if level > 0:
        limit = min(limit, 2.0 * (1.0 - momentum) / level)
    return StepRule(fraction * limit, momentum)


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
        self,
        start: Tensor,
        norms: Tensor,
        rule: StepRule,
        *,
        power: float,
        grows: bool,
    ) -> None:
        self._grows = grows
        self.average = start.clone()
        self._best = start.clone()
        self._best_norm = float(norms.max())
        self._power = power
        self._start_from(rule)

    def _start_from(self, rule: StepRule) -> None:
        self._rule = rule
        self._steps = 0
        self._momentum = torch.zeros_like(self._best)
        self.lookahead = self._best.clone()

    @property
    def weight(self) -> float:
        """Averaging weight of the next step."""
        return (self._power + 1.0) / (self._steps + 1.0 + self._power)

    def step(self, gradient: Tensor) -> None:
        """One descent step; ``gradient`` (m, k) is overwritten."""
        rho, beta = self._rule.momentum, self._rule.step_size
        if self._grows:
            rho = min(rho, self._steps / (self._steps + 3.0))
        self._momentum.mul_(rho).add_(gradient)
        self.lookahead.sub_(gradient.add_(self._momentum, alpha=rho), alpha=beta)
        self._average()

    def _average(self) -> None:
        # The window is t / power steps long: averaging every t / 400 loses nothing.
        weight = self.weight
        self._steps += 1
        stride = max(1, self._steps // 400)
        if self._steps % stride == 0:
            self.average.lerp_(self.lookahead, min(1.0, weight * stride))

    def remember(self, norms: Tensor) -> bool:
        """Keep the average if it is the best so far; whether it was."""
        norm = float(norms.max())
        if norm < 0.9 * self._best_norm:
            self._best_norm = norm
            self._best.copy_(self.average)
            return True
        return False

    def restart(self, rule: StepRule) -> None:
        """Go back to the best average, at rest."""
        self.average.copy_(self._best)
        self._start_from(rule)
