"""Stationary kernels: RBF, Matern, rational quadratic, periodic, spectral mixture.

Legend: l lengthscale, r = |(x - x') / l|, d2 squared distance of scaled inputs,
u = sqrt(d2).

Of each family there are its profile, the derivative of that, its formula for KeOps
(a tile class), and its random features (a spectral distribution).

Deviations from the textbook forms. Exponentials are taken to the base 2, because
vectorised exp2 costs about a quarter of exp: inputs are scaled by log2(e) beforehand
and what is left over goes into the factor. Square roots are d2 * rsqrt(d2), which
costs less than sqrt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from gpytorch.kernels import (
    Kernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RQKernel,
    SpectralMixtureKernel,
    keops,
)
from torch import Tensor

from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import FeatureRequest
from sgdgp.features.fourier import FourierFeatures
from sgdgp.kernels import fused
from sgdgp.kernels.distance import StationaryTile
from sgdgp.kernels.dot_product import InnerProductTile
from sgdgp.kernels.registry import (
    Forms,
    Lazies,
    Lazy,
    Scratch,
    register_kernel,
    scalar,
    select,
)

_LN_2 = math.log(2.0)
_LOG2_E = 1.0 / _LN_2

_TINY = 1e-30
"""Squared distances are at least this: rsqrt is finite there and d2 * rsqrt(d2) = 1e-15
is zero distance."""


def _minus_root(d2: Tensor, power: Tensor) -> Tensor:
    """Replace d2 by -sqrt(d2): rsqrt and one fused pass beat sqrt and a negation."""
    torch.rsqrt(d2.clamp_min_(_TINY), out=power)
    return torch.addcmul(d2.new_zeros(()), d2, power, value=-1.0, out=d2)


def _scaled(omega: Tensor, kernel: Kernel, request: FeatureRequest) -> FourierFeatures:
    lengthscale = request.parameter(kernel.lengthscale).reshape(-1, 1)
    return FourierFeatures((omega / lengthscale).to(request.like))


class RBFTile(StationaryTile):
    """exp(-r^2 / 2) = 2^(-d2) with d2 = r^2 log2(e) / 2."""

    input_scale = math.sqrt(_LOG2_E / 2.0)
    derivative_scale = -_LN_2

    def profile(self, d2: Tensor, scratch: Scratch) -> None:
        d2.clamp_min_(0).neg_().exp2_()

    def profile_with_derivative(
        self, d2: Tensor, derivative: Tensor, scratch: Tensor, same: Tensor
    ) -> None:
        self.profile(d2, ())
        derivative.copy_(d2)

    def keops_profile(self, d2: Lazy) -> Lazy:
        return (d2 * -_LN_2).exp()


def _rbf_tile(kernel: RBFKernel, dims: Tensor | None) -> RBFTile:
    return RBFTile(1.0, dims, kernel.lengthscale[0].reciprocal())


def _rbf_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Frequencies of exp(-r^2 / 2): standard normal over the lengthscales."""
    return _scaled(
        request.normal(request.dim, request.num_frequencies), kernel, request
    )


register_kernel(RBFKernel, tile=_rbf_tile, features=_rbf_features)
register_kernel(keops.RBFKernel, features=_rbf_features)


class Matern12Tile(StationaryTile):
    """exp(-r) = 2^(-u) with u = r log2(e).

    The derivative -ln 2 / 2 * 2^-u / u is taken as zero at distance zero. The kernel
    has a kink there: any direction is as good as its opposite, and rounding errors
    divided by rounding errors are worse than nothing.
    """

    input_scale = _LOG2_E
    derivative_scale = -0.5 * _LN_2

    def profile(self, d2: Tensor, scratch: Scratch) -> None:
        _minus_root(d2, scratch[0]).exp2_()

    def profile_with_derivative(
        self, d2: Tensor, derivative: Tensor, scratch: Tensor, same: Tensor
    ) -> None:
        zero = d2 <= same
        d2.masked_fill_(zero, 0)
        torch.rsqrt(d2.clamp_min_(_TINY), out=derivative)
        d2.mul_(derivative).neg_().exp2_()
        derivative.mul_(d2).masked_fill_(zero, 0)

    def keops_profile(self, d2: Lazy) -> Lazy:
        return (d2.sqrt() * -_LN_2).exp()


class Matern32Tile(StationaryTile):
    """(1 + s) exp(-s), s = sqrt(3) r: 2^-u + ln 2 u 2^-u with u = s log2(e).

    Its derivative is -ln(2)^2 / 2 * 2^-u.
    """

    input_scale = math.sqrt(3.0) * _LOG2_E
    derivative_scale = -0.5 * _LN_2**2

    def profile(self, d2: Tensor, scratch: Scratch) -> None:
        power = scratch[0]
        minus_u = _minus_root(d2, power)
        torch.exp2(minus_u, out=power)
        torch.addcmul(power, power, minus_u, value=-_LN_2, out=minus_u)

    def profile_with_derivative(
        self, d2: Tensor, derivative: Tensor, scratch: Tensor, same: Tensor
    ) -> None:
        torch.rsqrt(d2.clamp_min_(_TINY), out=scratch)
        u = d2.mul_(scratch)
        torch.neg(u, out=derivative).exp2_()
        torch.addcmul(derivative, derivative, u, value=_LN_2, out=d2)

    def keops_profile(self, d2: Lazy) -> Lazy:
        u = d2.sqrt()
        return (u * _LN_2 + self.at_zero) * (u * -_LN_2).exp()


MATERN52_FACTOR = _LN_2**2 / 3.0
"""What the tiles of a Matern-5/2 kernel are to be multiplied by."""


class Matern52Tile(StationaryTile):
    """(1 + s + s^2 / 3) exp(-s), s = sqrt(5) r, with u = s log2(e).

    The tile is (u^2 + 3 u log2 e + 3 log2(e)^2) / 2^u; ln(2)^2 / 3 is in the factor.
    Its derivative is -(1 + u ln 2) / 2 / 2^u.
    """

    input_scale = math.sqrt(5.0) * _LOG2_E
    at_zero = 3.0 * _LOG2_E**2
    derivative_scale = -0.5

    def profile(self, d2: Tensor, scratch: Scratch) -> None:
        power = scratch[0]
        torch.rsqrt(d2.clamp_min_(_TINY), out=power).mul_(d2)
        d2.add_(power, alpha=3.0 * _LOG2_E).add_(self.at_zero)
        d2.div_(power.exp2_())

    def profile_with_derivative(
        self, d2: Tensor, derivative: Tensor, scratch: Tensor, same: Tensor
    ) -> None:
        u = torch.rsqrt(d2.clamp_min_(_TINY), out=scratch).mul_(d2)
        torch.neg(u, out=derivative).exp2_()
        d2.add_(u, alpha=3.0 / _LN_2).add_(3.0 / _LN_2**2).mul_(derivative)
        torch.addcmul(derivative, derivative, u, value=_LN_2, out=derivative)

    def keops_profile(self, d2: Lazy) -> Lazy:
        u = d2.sqrt()
        return (d2 + u * (3.0 / _LN_2) + self.at_zero) * (u * -_LN_2).exp()


fused.PROFILES.update(
    {
        RBFTile.profile: 0,
        Matern12Tile.profile: 1,
        Matern32Tile.profile: 2,
        Matern52Tile.profile: 3,
    }
)


def _matern_tile(kernel: MaternKernel, dims: Tensor | None) -> StationaryTile:
    inverse = kernel.lengthscale[0].reciprocal()
    if kernel.nu == 0.5:
        return Matern12Tile(1.0, dims, inverse)
    if kernel.nu == 1.5:
        return Matern32Tile(1.0, dims, inverse)
    return Matern52Tile(MATERN52_FACTOR, dims, inverse)


def _matern_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Frequencies of the Matern kernel: multivariate Student t with 2 nu degrees.

    One chi-square variable divides the whole frequency vector. Independent
    Student t entries would instead give the product of one-dimensional Matern
    kernels, which is not the isotropic kernel in more than one dimension.
    """
    omega = request.normal(request.dim, request.num_frequencies)
    # chi-square with 2 nu degrees of freedom = 2 Gamma(nu, 1)
    chi2 = 2 * request.gamma(kernel.nu, request.num_frequencies)
    return _scaled(omega * (2 * kernel.nu / chi2).sqrt(), kernel, request)


register_kernel(MaternKernel, tile=_matern_tile, features=_matern_features)
register_kernel(keops.MaternKernel, features=_matern_features)


@dataclass(frozen=True)
class RationalQuadraticTile(StationaryTile):
    """(1 + r^2 / (2 alpha))^(-alpha) = 2^(-alpha log2(1 + d2)).

    With respect to alpha its derivative at given d2 is -log(1 + d2) times the tile.
    """

    alpha: float | Tensor

    @property
    def input_scale(self) -> float | Tensor:
        return (0.5 / self.alpha) ** 0.5

    @property
    def shape_parameter(self) -> float | Tensor:
        return self.alpha

    @cached_property
    def derivative_scale(self) -> float:
        """Minus alpha: see ``StationaryTile.derivative_scale``."""
        return -float(self.alpha)

    def profile(self, d2: Tensor, scratch: Scratch) -> None:
        d2.clamp_min_(0).log1p_().mul_(-self.alpha * _LOG2_E).exp2_()

    def profile_with_derivative(
        self, d2: Tensor, derivative: Tensor, scratch: Tensor, same: Tensor
    ) -> None:
        torch.log1p(d2.clamp_min_(0), out=scratch)
        exponent = (self.derivative_scale - 1.0) / _LN_2
        torch.mul(scratch, exponent, out=derivative).exp2_()
        d2.add_(1).mul_(derivative)
        torch.addcmul(d2.new_zeros(()), scratch, d2, value=-1.0, out=scratch)

    def keops_profile(self, d2: Lazy) -> Lazy:
        return ((d2 + 1.0).log() * -self.alpha).exp()


def _rational_quadratic_tile(
    kernel: RQKernel, dims: Tensor | None
) -> RationalQuadraticTile:
    inverse = kernel.lengthscale[0].reciprocal()
    return RationalQuadraticTile(1.0, dims, inverse, scalar(kernel.alpha))


def _rational_quadratic_features(
    kernel: RQKernel, request: FeatureRequest
) -> FeatureMap:
    """Frequencies of (1 + r^2 / (2 alpha))^-alpha: a Gamma mixture of normals.

    The kernel is the mean of exp(-u r^2 / 2) over u ~ Gamma(alpha, rate alpha).
    """
    alpha = float(request.parameter(kernel.alpha))
    omega = request.normal(request.dim, request.num_frequencies)
    u = request.gamma(alpha, request.num_frequencies) / alpha
    return _scaled(omega * u.sqrt(), kernel, request)


register_kernel(
    RQKernel, tile=_rational_quadratic_tile, features=_rational_quadratic_features
)


@dataclass(frozen=True)
class PeriodicTile(InnerProductTile):
    """exp(-2 sum_i sin^2(pi (x_i - x'_i) / p_i) / l_i), as GPyTorch defines it.

    The lengthscale is not squared. Because 2 sin^2(u) = 1 - cos(2 u), the exponent
    is one matrix product of the features cos(2 pi x / p) / sqrt(l) and
    sin(2 pi x / p) / sqrt(l), less sum_i 1 / l_i.

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
        inverse_lengthscale: 1 / l, (d,) or (1,).
        period: p, (d,) or (1,).
    """

    dims: Tensor | None
    inverse_lengthscale: Tensor
    period: Tensor

    derivative_scale = _LN_2

    def features(self, x: Tensor, origin: Tensor) -> Tensor:
        """Features (n, 2 d') whose inner product is sum_i cos(...) log2(e) / l_i."""
        shifted = select(x, self.dims) - select(origin, self.dims)
        angle = shifted * (2.0 * math.pi / self.period.to(x))
        weight = (self.inverse_lengthscale.to(x) * _LOG2_E).sqrt()
        return torch.cat([angle.cos() * weight, angle.sin() * weight], 1)

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        features = self.features(x, origin)
        # sum_i log2(e) / l_i, the squared norm of all points' features.
        total = self.inverse_lengthscale.to(features) * _LOG2_E
        total = total.expand(features.shape[1] // 2).sum()
        return (torch.cat([features, -total.expand(len(features), 1)], 1),)

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        features = self.features(x, origin)
        return (torch.cat([features, features.new_ones(x.shape[0], 1)], 1),)

    def profile(self, u: Tensor) -> None:
        u.clamp_max_(0).exp2_()

    def profile_with_derivative(self, u: Tensor, derivative: Tensor) -> None:
        self.profile(u)
        derivative.copy_(u)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0])

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        return (self.features(x, origin).contiguous(),)

    def keops_formula(self, rows: Lazies, columns: Lazies) -> Lazy:
        # |f - f'|^2 = 2 sum_i (1 - cos(...)) log2(e) / l_i for the features.
        return (rows[0].sqdist(columns[0]) * (-0.5 * _LN_2)).exp()


def _periodic_tile(kernel: PeriodicKernel, dims: Tensor | None) -> PeriodicTile:
    inverse = kernel.lengthscale[0].reciprocal()
    return PeriodicTile(1.0, dims, inverse, kernel.period_length[0])


def _periodic_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    r"""Frequencies of GPyTorch's exp(-2 sum_i sin^2(pi r_i / p_i) / l_i).

    With 2 sin^2(t / 2) = 1 - cos t each factor is exp((cos t_i - 1) / l_i),
    t_i = 2 pi r_i / p_i: the characteristic function of a difference of two
    Poisson(1 / (2 l_i)) variables (a Skellam variable), the harmonic's number.
    """
    shape = (request.dim, request.num_frequencies)
    lengthscale = request.parameter(kernel.lengthscale).reshape(-1, 1)
    period = request.parameter(kernel.period_length).reshape(-1, 1)
    rate = (0.5 / lengthscale).expand(shape)
    harmonic = request.poisson(rate) - request.poisson(rate)
    return FourierFeatures((2 * math.pi * harmonic / period).to(request.like))


register_kernel(PeriodicKernel, tile=_periodic_tile, features=_periodic_features)
register_kernel(keops.PeriodicKernel, features=_periodic_features)


def _spectral_mixture_features(
    kernel: SpectralMixtureKernel, request: FeatureRequest
) -> FeatureMap:
    """Frequencies of GPyTorch's spectral mixture: one mixture for each dimension.

    GPyTorch sums over the mixture inside the product over dimensions, so every
    dimension draws its own component and k(x, x) = (sum of weights)^d.
    """
    count = request.num_frequencies
    weights = request.parameter(kernel.mixture_weights).reshape(-1)
    means = request.parameter(kernel.mixture_means)[:, 0, :].T
    scales = request.parameter(kernel.mixture_scales)[:, 0, :].T
    component = torch.multinomial(
        weights, request.dim * count, replacement=True, generator=request.generator
    ).view(request.dim, count)
    sign = torch.where(request.uniform(request.dim, count) < 0.5, -1.0, 1.0)
    omega = sign * means.gather(1, component)
    omega = omega + scales.gather(1, component) * request.normal(request.dim, count)
    return FourierFeatures(
        (2 * math.pi * omega).to(request.like), float(weights.sum() ** request.dim)
    )


register_kernel(SpectralMixtureKernel, features=_spectral_mixture_features)
