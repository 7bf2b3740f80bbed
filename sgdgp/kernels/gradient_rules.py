"""Which GPyTorch kernels have analytic gradients: the leaves, one rule for each."""

from __future__ import annotations

from gpytorch.kernels import (
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
)
from torch import Tensor

from sgdgp.kernels.dot_product import LinearTile, PolynomialTile
from sgdgp.kernels.gradient_terms import (
    LiveConstant,
    LiveInnerProduct,
    LiveStationary,
)
from sgdgp.kernels.slopes import (
    Identity,
    Matern12Slope,
    Matern32Slope,
    Matern52Slope,
    PeriodicSlope,
    PowerSlope,
    RationalQuadraticSlope,
    RBFSlope,
)
from sgdgp.kernels.stationary import (
    MATERN52_FACTOR,
    Matern12Tile,
    Matern32Tile,
    Matern52Tile,
    PeriodicTile,
    RationalQuadraticTile,
    RBFTile,
)
from sgdgp.kernels.tile_gradients import LiveTile, register_tile_gradient


def _inverse_lengthscale(kernel: Kernel) -> Tensor:
    return kernel.lengthscale[0].reciprocal()


@register_tile_gradient(RBFKernel)
def _(kernel: RBFKernel, dims: Tensor | None) -> LiveTile:
    tile = RBFTile(1.0, dims, _inverse_lengthscale(kernel))
    return LiveStationary(1.0, tile, RBFSlope())


@register_tile_gradient(MaternKernel)
def _(kernel: MaternKernel, dims: Tensor | None) -> LiveTile:
    inverse = _inverse_lengthscale(kernel)
    if kernel.nu == 0.5:
        return LiveStationary(1.0, Matern12Tile(1.0, dims, inverse), Matern12Slope())
    if kernel.nu == 1.5:
        return LiveStationary(1.0, Matern32Tile(1.0, dims, inverse), Matern32Slope())
    tile = Matern52Tile(1.0, dims, inverse)
    return LiveStationary(MATERN52_FACTOR, tile, Matern52Slope())


@register_tile_gradient(RQKernel)
def _(kernel: RQKernel, dims: Tensor | None) -> LiveTile:
    alpha = kernel.alpha.reshape(())
    tile = RationalQuadraticTile(1.0, dims, _inverse_lengthscale(kernel), alpha)
    return LiveStationary(1.0, tile, RationalQuadraticSlope(alpha))


@register_tile_gradient(PeriodicKernel)
def _(kernel: PeriodicKernel, dims: Tensor | None) -> LiveTile:
    period = kernel.period_length[0]
    tile = PeriodicTile(1.0, dims, _inverse_lengthscale(kernel), period)
    return LiveInnerProduct(1.0, tile, PeriodicSlope())


@register_tile_gradient(LinearKernel)
def _(kernel: LinearKernel, dims: Tensor | None) -> LiveTile:
    return LiveInnerProduct(1.0, LinearTile(1.0, dims, kernel.variance[0]), Identity())


@register_tile_gradient(PolynomialKernel)
def _(kernel: PolynomialKernel, dims: Tensor | None) -> LiveTile:
    power = float(kernel.power)
    tile = PolynomialTile(1.0, dims, kernel.offset.reshape(()), power)
    return LiveInnerProduct(1.0, tile, PowerSlope(power))


@register_tile_gradient(ConstantKernel)
def _(kernel: ConstantKernel, dims: Tensor | None) -> LiveTile:
    return LiveConstant(kernel.constant.reshape(()))
