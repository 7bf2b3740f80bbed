"""Step size and momentum of the stochastic solvers, from spectral estimates.

Dual descent (``sdd.py``)
-------------------------
Everything refers to the matrix scaled to unit diagonal, D^-1/2 H D^-1/2 with
D = diag(H) and H = K + Sigma: for stationary kernels a constant, for others what
keeps a few large rows from setting the step of all. With look-ahead momentum rho
and m = n / b blocks, random-coordinate descent with step beta is stable when

    beta < 2 (1 + rho) / ((1 + 2 rho) lambda_1)      (mean dynamics)
    beta < 2 (1 - rho) / ((m - 1) tau)               (sampling noise)

and half the harmonic mean of the two is safe where both matter. With independent
blocks tau is the mean diagonal, 1. Blocks that are all visited once in a pass sample
the leading eigenvectors without noise, so only the rest counts:
tau = (1 / n) sum_i min(lambda_i, 0.2 m).

Long memory 1 / (1 - rho) pays late in a solve and costs early. Sweeps over step and
momentum on fourteen problems with lambda_1 / m from 1 to 32 agree on a memory, in
passes p, of 0.06 sqrt(p lambda_1 / ((m - 1) tau)), and few blocks want no less than
1.5 lambda_1 / (m - 1) steps; never beyond the (t + 3) / 3 steps of Nesterov's
schedule nor the optimum of deterministic acceleration, rho = (1 - q) / (1 + q) with
q = sqrt(lambda_n / lambda_1).

Primal descent (``sgd.py``)
---------------------------
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

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.seeds import standard_normal
from sgdgp.operators.arguments import whole_points
from sgdgp.operators.base import KernelOperator
from sgdgp.operators.feature import FeatureOperator
from sgdgp.solvers.system import System

_SUBSET = 1000  # points of an estimate: eigenvalues in a fraction of a second
_FEATURE_ROWS = 512  # the same where rows are features: few of the largest networks
_POWER_ITERATIONS = 20  # the residual that they leave is added as a margin
_LANCZOS_STEPS = 30  # products, where the features of those rows exceed the memory
_LANCZOS_END = 1e-6  # of the largest eigenvalue: a next vector like that is rounding
_PROBES = 16  # random functions, for a diagonal to a third: enough for a scale
_MOST_OUTPUTS = 32  # of a point, up to which each is worth a sweep of its own
_SWEEP = 0.5  # passes for the features of all rows

# Dual descent. Swept on fourteen problems, see above:
_MEMORY, _LEAST_MEMORY = 0.06, 1.5
# Eigenvalues above 0.2 m, or 8 if that is more, count as sampled without noise.
_WELL_SAMPLED, _LEAST_CUT = 0.2, 8.0
# Parts of the two limits that are used: both are estimates, the second by a model.
_MEAN_FRACTION, _NOISE_FRACTION = 0.8, 0.6
_LESS_WITH_NOISE = 0.35  # how much shorter a step is on equations that are all noise
_MOST_DUAL_MOMENTUM = 0.9999  # few solves are long enough to use more memory

# Primal descent.
_FRESH = 8.0  # times that the features' noise is kept below its stability limit
_MOST_MOMENTUM = 0.999  # solves wait for its memory to fade before they give up


@dataclass(frozen=True)
class Spectrum:
    """What the step rules need to know of H = K + Sigma scaled to unit diagonal.

    Attributes:
        leading: Estimates of the m leading eigenvalues, ascending (m,).
        rest: Mean of the other n - m.
        smallest: Lower bound of the smallest.
        diagonal: The diagonal of H itself (n, 1).
        passes: What the estimates cost.
    """

    leading: Tensor
    rest: float
    smallest: float
    diagonal: Tensor
    passes: float = 0.0

    @functools.cached_property
    def largest(self) -> float:
        """Estimate of the largest eigenvalue: at least the mean of all, 1."""
        return max(float(self.leading[-1]), 1.0)

    def tail(self, threshold: float) -> float:
        """Mean eigenvalue, with those above a threshold cut down to it."""
        others = len(self.diagonal) - len(self.leading)
        cut = float(self.leading.clamp_max(threshold).sum())
        return (cut + others * self.rest) / len(self.diagonal)


@dataclass(frozen=True)
class StepRule:
    """Step size and momentum for one block size."""

    step_size: float
    momentum: float

    def halved(self) -> StepRule:
        """Half the step."""
        return StepRule(self.step_size / 2.0, self.momentum)

    def with_step(self, step_size: float | None) -> StepRule:
        """Another step size, unless None."""
        return StepRule(step_size or self.step_size, self.momentum)


def estimate_spectrum(system: System, generator: torch.Generator) -> Spectrum:
    """Estimate the spectrum from a random subset of at most 1,000 points.

    The leading eigenvalues of K are close to n / m times those of K_mm; the others
    are taken to be zero, so that H has the noise there.
    """
    operator = system.operator
    if isinstance(operator, FeatureOperator):
        diagonal = scale_diagonal(operator, generator).unsqueeze(1) + system.noise
        leading, passes = leading_eigenvalues(operator, diagonal.rsqrt(), generator)
        passes += _SWEEP
    else:
        subset, diagonal, matrix = _scaled_subset(system, generator)
        leading = torch.linalg.eigvalsh(matrix).double().clamp_min(0.0)
        leading *= system.n / len(subset)
        passes = len(subset) ** 2 / system.n**2
    ratio = system.noise / diagonal
    return Spectrum(
        leading=leading + float(ratio.max()),
        rest=float(ratio.double().mean()),
        smallest=float(ratio.min()),
        diagonal=diagonal,
        passes=passes,
    )


def _scaled_subset(
    system: System, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows Z (m,), D = diag(K + Sigma) (n, 1), and D^-1/2 K D^-1/2 on Z."""
    diagonal = system.operator.diagonal().unsqueeze(1) + system.noise
    subset = random_rows(system.n, _SUBSET, generator).to(diagonal.device)
    scale = diagonal[subset].rsqrt()
    return subset, diagonal, system.operator.block(subset, subset) * scale * scale.mT


def random_rows(n: int, most: int, generator: torch.Generator) -> Tensor:
    """Numbers of at most so many of n rows, on the generator's device."""
    return torch.randperm(n, generator=generator, device=generator.device)[:most]


def step_rule(
    spectrum: Spectrum,
    block_size: int,
    passes: float = math.inf,
    *,
    momentum: float | None = None,
    fraction: float | None = None,
) -> StepRule:
    """Momentum and step size for a block size, from the two stability limits.

    Args:
        spectrum: Spectral estimates of H.
        block_size: Coordinates per step.
        passes: Passes since the start, on which the momentum depends.
        momentum: Fixed momentum in [0, 1). Default: set from the spectrum.
        fraction: Part of the joint stability limit that is used. Default: 0.8 where
            the mean dynamics set it, 0.6 where sampling noise does, less where Sigma
            makes up much of H.
    """
    spread = len(spectrum.diagonal) / block_size - 1.0
    tail = spectrum.tail(max(_LEAST_CUT, _WELL_SAMPLED * (spread + 1.0)))
    if momentum is None:
        memory = (passes * (spread + 1.0) + 3.0) / 3.0
        if spread > 0:
            worth = math.sqrt(passes * spectrum.largest / (spread * tail))
            least = _LEAST_MEMORY * spectrum.largest / spread
            memory = min(memory, max(_MEMORY * (spread + 1.0) * worth, least))
        q = math.sqrt(min(1.0, spectrum.smallest / spectrum.largest))
        momentum = min(
            1.0 - 1.0 / max(1.0, memory), (1.0 - q) / (1.0 + q), _MOST_DUAL_MOMENTUM
        )
    mean = (1.0 + 2.0 * momentum) * spectrum.largest / (2.0 * (1.0 + momentum))
    noise = spread * tail / (2.0 * (1.0 - momentum))
    if fraction is not None:
        return StepRule(fraction / (mean + noise), momentum)
    # Equations that are all noise converge fastest at half of their limit.
    whole = 1.0 - _LESS_WITH_NOISE * spectrum.smallest
    step_size = whole / (mean / _MEAN_FRACTION + noise / _NOISE_FRACTION)
    return StepRule(step_size, momentum)


@dataclass(frozen=True)
class PrimalSpectrum:
    """What the step rule needs to know of A, scaled by D = diag(K + Sigma).

    Attributes:
        largest: Estimate of lambda_1(A); errs on the high side.
        mean_diagonal: Estimate of tr(A) / n.
        kernel_diagonal: tr(K) / n, scaled.
        diagonal: D itself (n, 1).
        passes: What the estimates cost.
    """

    largest: float
    mean_diagonal: float
    kernel_diagonal: float
    diagonal: Tensor
    passes: float = 0.0


def primal_spectrum(system: System, generator: torch.Generator) -> PrimalSpectrum:
    """Estimate the spectrum of A from at most 1,000 random rows.

    Off-diagonal entries of the subset stand for n - 1 of the whole, diagonal ones
    for themselves: scaling those too would square the overestimate.
    """
    n = system.n
    subset, diagonal, matrix = _scaled_subset(system, generator)
    precision = diagonal[subset] / system.noise[subset]
    own = matrix.diagonal().clone()
    ratio = (n - 1) / max(1, len(subset) - 1)
    squares = (matrix.square() * precision.mT).sum(1) - own.square() * precision[:, 0]
    trace = ratio * squares + own.square() * precision[:, 0] + own
    matrix = ratio * matrix
    matrix.diagonal().copy_(own)
    largest = largest_eigenvalue(
        lambda v: matrix @ (precision * (matrix @ v) + v), matrix, generator
    )
    mean = float(trace.mean())
    return PrimalSpectrum(
        largest=max(largest, mean),
        mean_diagonal=mean,
        kernel_diagonal=float((1.0 - system.noise / diagonal).mean()),
        diagonal=diagonal,
        passes=len(subset) ** 2 / n**2,
    )


def largest_eigenvalue(
    apply: Callable[[Tensor], Tensor], like: Tensor, generator: torch.Generator
) -> float:
    """That of a matrix ``like`` another, by its products; the error is added."""
    vector = standard_normal(len(like), 1, like=like, generator=generator)
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


def scale_diagonal(
    operator: FeatureOperator, generator: torch.Generator
) -> Float[Tensor, " n"]:
    """The diagonal of K, or what stands for it in a scale; half a pass.

    With many outputs per point the mean over the outputs, estimated from the squares of
    random functions phi(x) w: the exact one would take a sweep for each output.
    """
    outputs = operator.outputs_per_input
    if outputs <= _MOST_OUTPUTS:
        return operator.diagonal()
    draws = standard_normal(
        _PROBES, operator.features.num_features, like=operator.x, generator=generator
    )
    values = operator.features.forward(operator.x, draws.mT)
    means = values.square().mean(1).unflatten(0, (-1, outputs)).mean(1)
    return means.repeat_interleave(outputs)


def leading_eigenvalues(
    operator: FeatureOperator, scale: Float[Tensor, "n 1"], generator: torch.Generator
) -> tuple[Float[Tensor, " m"], float]:
    """Leading eigenvalues of S K S, S = diag(scale), ascending; and the passes."""
    n, outputs = operator.shape[0], operator.outputs_per_input
    size = min(n, outputs * max(1, math.ceil(_FEATURE_ROWS / outputs)))
    rows = operator.random_order(generator)[:size]
    part, scale = operator.permuted(whole_points(rows, outputs)), scale[rows]
    needed = 2 * size * operator.features.num_features * scale.element_size()
    if needed <= operator.memory_budget:
        block = part.block(slice(0, size), slice(0, size)) * scale * scale.mT
        values = torch.linalg.eigvalsh(block).double().clamp_min(0.0)
        return values * (n / size), _SWEEP * size / n
    values, sweeps = _lanczos(part, scale, generator)
    return values * (n / size), sweeps * size / n


def _lanczos(
    part: KernelOperator, scale: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Leading eigenvalues of S K S, ascending, and the products that it took."""
    size = len(scale)
    vector = standard_normal(size, 1, like=scale, generator=generator)
    basis = vector.new_zeros(min(_LANCZOS_STEPS, size) + 1, size)
    basis[0] = vector[:, 0] / vector.norm()
    diagonal: list[float] = []
    off: list[float] = []
    for step in range(len(basis) - 1):
        image = (scale * part.matmul(scale * basis[step].unsqueeze(1)))[:, 0]
        diagonal.append(float(image @ basis[step]))
        for _ in range(2):  # Gram and Schmidt, twice
            image -= basis[: step + 1].mT @ (basis[: step + 1] @ image)
        off.append(float(image.norm()))
        if off[-1] <= _LANCZOS_END * max(diagonal):
            break
        basis[step + 1] = image / off[-1]
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    beside = torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64, device="cpu")
    matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    values = torch.linalg.eigvalsh(matrix).clamp_min(0.0)
    return values.to(part.device), len(diagonal)
