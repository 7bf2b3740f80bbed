"""Symbolic formulas of the tile kernels, for KeOps.

The same frozen kernels as in ``stationary`` and ``dot_product``, written
with lazy tensors: differences instead of augmented products, so distances are exact.
Factors are left out here as they are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sgdgp.kernels.dot_product import (
    ConstantTile,
    LinearTile,
    PolynomialTile,
    select,
)
from sgdgp.kernels.registry import Forms, ProductTile, SumTile, TileKernel
from sgdgp.kernels.stationary import (
    Matern12Tile,
    Matern32Tile,
    Matern52Tile,
    PeriodicTile,
    RationalQuadraticTile,
    RBFTile,
    StationaryTile,
)

Lazy: TypeAlias = Any
"""A pykeops ``LazyTensor``; pykeops is imported only where it is used."""

_LN2 = 0.6931471805599453


@singledispatch
def keops_inputs(tile: TileKernel, x: Tensor, origin: Tensor) -> Forms:
    """What the formula of a tile kernel needs of points x (n, d).

    Raises:
        ValueError: The tile kernel has no KeOps formula.
    """
    raise ValueError(f"{type(tile).__name__} has no KeOps formula")


@singledispatch
def keops_formula(
    tile: TileKernel, rows: tuple[Lazy, ...], columns: tuple[Lazy, ...]
) -> Lazy:
    """tile(x, x') as a lazy tensor of the inputs, wrapped as i and j variables."""
    raise ValueError(f"{type(tile).__name__} has no KeOps formula")


@keops_inputs.register
def _(tile: StationaryTile, x: Tensor, origin: Tensor) -> Forms:
    return (tile.scaled(x, origin).contiguous(),)


@keops_inputs.register
def _(tile: PeriodicTile, x: Tensor, origin: Tensor) -> Forms:
    return (tile.features(x, origin).contiguous(),)


@keops_inputs.register
def _(tile: LinearTile, x: Tensor, origin: Tensor) -> Forms:
    return ((select(x, tile.dims) * tile.variance.to(x).sqrt()).contiguous(),)


@keops_inputs.register
def _(tile: PolynomialTile, x: Tensor, origin: Tensor) -> Forms:
    offset = x.new_full((x.shape[0], 1), float(tile.offset) ** 0.5)
    return (torch.cat([select(x, tile.dims), offset], 1),)


@keops_inputs.register
def _(tile: ConstantTile, x: Tensor, origin: Tensor) -> Forms:
    return (x.new_ones(x.shape[0], 1),)


@keops_inputs.register(SumTile)
@keops_inputs.register(ProductTile)
def _(tile: SumTile | ProductTile, x: Tensor, origin: Tensor) -> Forms:
    return tuple(form for part in tile.parts for form in keops_inputs(part, x, origin))


_Formula: TypeAlias = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], Any]


def _stationary(profile: Callable[[Any, Any], Any]) -> _Formula:
    """A formula that is a profile of the squared distance."""

    def formula(tile: Any, rows: tuple[Any, ...], columns: tuple[Any, ...]) -> Any:
        return profile(tile, rows[0].sqdist(columns[0]))

    return formula


def _matern32(tile: Matern32Tile, d2: Lazy) -> Lazy:
    u = d2.sqrt()
    return (u * _LN2 + tile.at_zero) * (u * -_LN2).exp()


def _matern52(tile: Matern52Tile, d2: Lazy) -> Lazy:
    u = d2.sqrt()
    return (d2 + u * (3.0 / _LN2) + tile.at_zero) * (u * -_LN2).exp()


def _rational_quadratic(tile: RationalQuadraticTile, d2: Lazy) -> Lazy:
    return ((d2 + 1.0).log() * -tile.alpha).exp()


for _type, _profile in (
    (RBFTile, lambda tile, d2: (d2 * -_LN2).exp()),
    (Matern12Tile, lambda tile, d2: (d2.sqrt() * -_LN2).exp()),
    (Matern32Tile, _matern32),
    (Matern52Tile, _matern52),
    (RationalQuadraticTile, _rational_quadratic),
    # |f - f'|^2 = 2 sum_i (1 - cos(...)) log2(e) / l_i for the periodic features.
    (PeriodicTile, lambda tile, d2: (d2 * (-0.5 * _LN2)).exp()),
):
    keops_formula.register(_type, _stationary(_profile))


@keops_formula.register
def _(tile: LinearTile, rows: tuple[Lazy, ...], columns: tuple[Lazy, ...]) -> Lazy:
    return (rows[0] * columns[0]).sum(-1)


@keops_formula.register
def _(tile: PolynomialTile, rows: tuple[Lazy, ...], columns: tuple[Lazy, ...]) -> Lazy:
    inner = (rows[0] * columns[0]).sum(-1)
    # Whole powers are constants of the compiled formula and keep the sign.
    return inner ** (int(tile.power) if tile.power.is_integer() else tile.power)


@keops_formula.register
def _(tile: ConstantTile, rows: tuple[Lazy, ...], columns: tuple[Lazy, ...]) -> Lazy:
    return rows[0] * columns[0]


@keops_formula.register
def _(tile: SumTile, rows: tuple[Lazy, ...], columns: tuple[Lazy, ...]) -> Lazy:
    total = None
    for i, part in enumerate(tile.parts):
        term = _part(tile, i, rows, columns) * part.factor
        total = term if total is None else total + term
    return total


@keops_formula.register
def _(tile: ProductTile, rows: tuple[Lazy, ...], columns: tuple[Lazy, ...]) -> Lazy:
    product = None
    for i in range(len(tile.parts)):
        term = _part(tile, i, rows, columns)
        product = term if product is None else product * term
    return product


def has_formula(tile: TileKernel) -> bool:
    """Whether a tile kernel and everything in it has a KeOps formula."""
    if isinstance(tile, SumTile | ProductTile):
        return all(has_formula(part) for part in tile.parts)
    return keops_formula.dispatch(type(tile)) is not keops_formula.dispatch(object)


def num_inputs(tile: TileKernel) -> int:
    """How many tensors ``keops_inputs`` returns for a tile kernel."""
    if isinstance(tile, SumTile | ProductTile):
        return sum(num_inputs(part) for part in tile.parts)
    return 1


def _part(
    tile: SumTile | ProductTile,
    i: int,
    rows: tuple[Lazy, ...],
    columns: tuple[Lazy, ...],
) -> Lazy:
    start = sum(num_inputs(part) for part in tile.parts[:i])
    mine = slice(start, start + num_inputs(tile.parts[i]))
    return keops_formula(tile.parts[i], rows[mine], columns[mine])
