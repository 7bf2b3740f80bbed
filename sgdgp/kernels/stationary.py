"""Tile forms of the stationary kernels: RBF, Matern, rational quadratic, periodic.

Legend: l lengthscale, r = |(x - x') / l|, d2 squared distance of scaled inputs.

Deviations from the textbook forms. Exponentials are taken to the base 2, because
vectorised exp2 costs about a quarter of exp: inputs are scaled by log2(e) beforehand
and what is left over goes into the factor. Square roots are d2 * rsqrt(d2), which
costs less than sqrt.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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
from sgdgp.features.dispatch import FeatureRequest, register_features
from sgdgp.features.fourier import FourierFeatures
from sgdgp.kernels.distance import left_form, right_form, squared_distances
from sgdgp.kernels.registry import Forms, TileKernel, register_tile_kernel

_LOG2_E = 1.0 / math.log(2.0)
MATERN52_FACTOR = math.log(2.0) ** 2 / 3.0
"""What the tiles of a Matern-5/2 kernel are to be multiplied by."""
_TINY = 1e-30  # rsqrt is finite there and d2 * rsqrt(d2) = 1e-15 is zero distance


def _minus_root(d2: Tensor, power: Tensor) -> Tensor:
    """Replace d2 by -sqrt(d2): rsqrt and one fused pass beat sqrt and a negation."""
    torch.rsqrt(d2.clamp_min_(_TINY), out=power)
    return torch.addcmul(d2.new_zeros(()), d2, power, value=-1.0, out=d2)


def select(x: Tensor, dims: Tensor | None) -> Tensor:
    """The columns ``dims`` of x (n, d), or all of them."""
    return x if dims is None else x.index_select(-1, dims.to(x.device))


@dataclass(frozen=True)
class StationaryTile(TileKernel):
    """A function of the squared distance d2 between scaled inputs.

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
        inverse_lengthscale: 1 / l, (d,) or (1,).
    """

    dims: Tensor | None
    inverse_lengthscale: Tensor

    @property
    def input_scale(self) -> float | Tensor:
        """Inputs are multiplied by input_scale / l before distances are taken."""
        return 1.0

    @property
    def at_zero(self) -> float:
        """The tile at distance zero."""
        return 1.0

    @abstractmethod
    def profile(self, d2: Tensor, scratch: Sequence[Tensor]) -> None:
        """Replace squared distances, some slightly negative, by tile values."""

    def scaled(self, x: Tensor, origin: Tensor) -> Tensor:
        """Centred inputs over the lengthscale, times ``input_scale``: (n, d')."""
        weight = self.inverse_lengthscale.to(x) * self.input_scale
        return (select(x, self.dims) - select(origin, self.dims)) * weight

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        return left_form(self.scaled(x, origin))

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return right_form(self.scaled(x, origin))

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        squared_distances(left[0], right[0], out, scratch)
        self.profile(out, scratch)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_full((x.shape[0],), self.at_zero)


class RBFTile(StationaryTile):
    """exp(-r^2 / 2) = 2^(-d2) with d2 = r^2 log2(e) / 2."""

    @property
    def input_scale(self) -> float:
        return math.sqrt(_LOG2_E / 2.0)

    def profile(self, d2: Tensor, scratch: Sequence[Tensor]) -> None:
        d2.clamp_min_(0).neg_().exp2_()


class Matern12Tile(StationaryTile):
    """exp(-r) = 2^(-u) with u = r log2(e)."""

    @property
    def input_scale(self) -> float:
        return _LOG2_E

    def profile(self, d2: Tensor, scratch: Sequence[Tensor]) -> None:
        _minus_root(d2, scratch[0]).exp2_()


class Matern32Tile(StationaryTile):
    """(1 + s) exp(-s), s = sqrt(3) r: 2^-u + ln 2 u 2^-u with u = s log2(e)."""

    @property
    def input_scale(self) -> float:
        return math.sqrt(3.0) * _LOG2_E

    def profile(self, d2: Tensor, scratch: Sequence[Tensor]) -> None:
        power = scratch[0]
        minus_u = _minus_root(d2, power)
        torch.exp2(minus_u, out=power)
        torch.addcmul(power, power, minus_u, value=-math.log(2.0), out=minus_u)


class Matern52Tile(StationaryTile):
    """(1 + s + s^2 / 3) exp(-s), s = sqrt(5) r, with u = s log2(e).

    The tile is (u^2 + 3 u log2 e + 3 log2(e)^2) / 2^u; ln(2)^2 / 3 is in the factor.
    """

    @property
    def input_scale(self) -> float:
        return math.sqrt(5.0) * _LOG2_E

    @property
    def at_zero(self) -> float:
        return 3.0 * _LOG2_E**2

    def profile(self, d2: Tensor, scratch: Sequence[Tensor]) -> None:
        power = scratch[0]
        torch.rsqrt(d2.clamp_min_(_TINY), out=power).mul_(d2)
        d2.add_(power, alpha=3.0 * _LOG2_E).add_(self.at_zero)
        d2.div_(power.exp2_())


@dataclass(frozen=True)
class RationalQuadraticTile(StationaryTile):
    """(1 + r^2 / (2 alpha))^(-alpha) = 2^(-alpha log2(1 + d2))."""

    alpha: float | Tensor

    @property
    def input_scale(self) -> float | Tensor:
        return (0.5 / self.alpha) ** 0.5

    def profile(self, d2: Tensor, scratch: Sequence[Tensor]) -> None:
        d2.clamp_min_(0).log1p_().mul_(-self.alpha * _LOG2_E).exp2_()


@dataclass(frozen=True)
class PeriodicTile(TileKernel):
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

    def features(self, x: Tensor, origin: Tensor) -> Tensor:
        """Features (n, 2 d') whose inner product is sum_i cos(...) log2(e) / l_i."""
        shifted = select(x, self.dims) - select(origin, self.dims)
        angle = shifted * (2.0 * math.pi / self.period.to(x))
        weight = (self.inverse_lengthscale.to(x) * _LOG2_E).sqrt()
        return torch.cat([angle.cos() * weight, angle.sin() * weight], 1)

    def _squared_norm(self, features: Tensor) -> Tensor:
        """sum_i log2(e) / l_i as a column (n, 1): the same number for all points."""
        total = self.inverse_lengthscale.to(features) * _LOG2_E
        total = total.expand(features.shape[1] // 2).sum()
        return total.expand(features.shape[0], 1)

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        features = self.features(x, origin)
        return (torch.cat([features, -self._squared_norm(features)], 1),)

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        features = self.features(x, origin)
        return (torch.cat([features, features.new_ones(x.shape[0], 1)], 1),)

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        torch.mm(left[0], right[0].T, out=out).clamp_max_(0).exp2_()

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0])


def _inverse_lengthscale(kernel: Kernel) -> Tensor:
    return kernel.lengthscale.detach()[0].reciprocal()


@register_tile_kernel(RBFKernel)
def _(kernel: RBFKernel, dims: Tensor | None) -> TileKernel:
    return RBFTile(1.0, dims, _inverse_lengthscale(kernel))


@register_tile_kernel(MaternKernel)
def _(kernel: MaternKernel, dims: Tensor | None) -> TileKernel:
    inverse = _inverse_lengthscale(kernel)
    if kernel.nu == 0.5:
        return Matern12Tile(1.0, dims, inverse)
    if kernel.nu == 1.5:
        return Matern32Tile(1.0, dims, inverse)
    return Matern52Tile(MATERN52_FACTOR, dims, inverse)


@register_tile_kernel(RQKernel)
def _(kernel: RQKernel, dims: Tensor | None) -> TileKernel:
    alpha = kernel.alpha.item()
    return RationalQuadraticTile(1.0, dims, _inverse_lengthscale(kernel), alpha)


@register_tile_kernel(PeriodicKernel)
def _(kernel: PeriodicKernel, dims: Tensor | None) -> TileKernel:
    period = kernel.period_length.detach()[0]
    return PeriodicTile(1.0, dims, _inverse_lengthscale(kernel), period)


def _scaled(omega: Tensor, kernel: Kernel, request: FeatureRequest) -> FourierFeatures:
    lengthscale = request.parameter(kernel.lengthscale).reshape(-1, 1)
    return FourierFeatures((omega / lengthscale).to(request.like))


@register_features(keops.RBFKernel)
@register_features(RBFKernel)
def rbf_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Frequencies of exp(-r^2 / 2): standard normal over the lengthscales."""
    return _scaled(
        request.normal(request.dim, request.num_frequencies), kernel, request
    )


@register_features(keops.MaternKernel)
@register_features(MaternKernel)
def matern_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Frequencies of the Matern kernel: multivariate Student t with 2 nu degrees.

    One chi-square variable divides the whole frequency vector. Independent
    Student t entries would instead give the product of one-dimensional Matern
    kernels, which is not the isotropic kernel in more than one dimension.
    """
    omega = request.normal(request.dim, request.num_frequencies)
    # chi-square with 2 nu degrees of freedom = 2 Gamma(nu, 1)
    chi2 = 2 * request.gamma(kernel.nu, request.num_frequencies)
    return _scaled(omega * (2 * kernel.nu / chi2).sqrt(), kernel, request)


@register_features(RQKernel)
def rational_quadratic_features(
    kernel: RQKernel, request: FeatureRequest
) -> FeatureMap:
    """Frequencies of (1 + r^2 / (2 alpha))^-alpha: a Gamma mixture of normals.

    The kernel is the mean of exp(-u r^2 / 2) over u ~ Gamma(alpha, rate alpha).
    """
    alpha = float(request.parameter(kernel.alpha))
    omega = request.normal(request.dim, request.num_frequencies)
    u = request.gamma(alpha, request.num_frequencies) / alpha
    return _scaled(omega * u.sqrt(), kernel, request)


@register_features(keops.PeriodicKernel)
@register_features(PeriodicKernel)
def periodic_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
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


@register_features(SpectralMixtureKernel)
def spectral_mixture_features(
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
