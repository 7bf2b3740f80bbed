"""Kernels of kernels: scales, sums and products."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from torch import Tensor

from sgdgp.features.base import FeatureMap
from sgdgp.features.compose import TooManyFeatures, add, multiply
from sgdgp.features.dispatch import (
    FeatureRequest,
    NoRandomFeatures,
    features_of,
    forward_features_of,
)
from sgdgp.kernels.registry import (
    BoundTile,
    Buffers,
    FactoredTile,
    Forms,
    Gradient,
    Lazies,
    Lazy,
    Scratch,
    TileKernel,
    register_kernel,
    scalar,
    tile_of,
    tile_of_forward,
)


def _scale_tile(kernel: ScaleKernel, dims: Tensor | None) -> TileKernel | None:
    # ScaleKernel calls base_kernel.forward, not base_kernel(...): the active_dims of
    # its base are its own, and must not be applied a second time.
    base = tile_of_forward(kernel.base_kernel, dims)
    if base is None:
        return None
    return replace(base, factor=base.factor * scalar(kernel.outputscale))


def _scale_features(kernel: ScaleKernel, request: FeatureRequest) -> FeatureMap:
    """The base kernel's map, scaled.

    GPyTorch's scale kernel calls ``forward`` of its base: it takes over the
    base's ``active_dims`` and those of the base are not applied a second time.
    """
    base = forward_features_of(kernel.base_kernel, request)
    return base.scaled(float(request.parameter(kernel.outputscale)))


register_kernel(
    ScaleKernel,
    tile=_scale_tile,
    features=_scale_features,
    parts=lambda kernel: [kernel.base_kernel],
)


@dataclass(frozen=True)
class _CombinedTile(TileKernel):
    """Several kernels over the same points, their forms laid end to end."""

    parts: tuple[TileKernel, ...]

    @property
    def scratch(self) -> int:
        return 1 + max(part.scratch for part in self.parts)

    @property
    def num_forms(self) -> int:
        return sum(part.num_forms for part in self.parts)

    def left(self, x: Tensor, origin: Tensor) -> Forms:
        return tuple(form for part in self.parts for form in part.left(x, origin))

    def right(self, x: Tensor, origin: Tensor) -> Forms:
        return tuple(form for part in self.parts for form in part.right(x, origin))

    def _part_forms(
        self, left: Forms, right: Forms
    ) -> Iterator[tuple[TileKernel, Forms, Forms]]:
        start = 0
        for part in self.parts:
            stop = start + part.num_forms
            yield part, left[start:stop], right[start:stop]
            start = stop

    def _bound_parts(self, x: Tensor, origin: Tensor) -> list[BoundTile] | None:
        bound = [part.bind(x, origin) for part in self.parts]
        found = [part for part in bound if part is not None]
        return found if len(found) == len(bound) else None

    def is_compiled(self, like: Tensor) -> bool:
        return all(part.is_compiled(like) for part in self.parts)

    @property
    def has_keops(self) -> bool:
        return all(part.has_keops for part in self.parts)

    @property
    def num_keops_inputs(self) -> int:
        return sum(part.num_keops_inputs for part in self.parts)

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        return tuple(
            form for part in self.parts for form in part.keops_inputs(x, origin)
        )

    def _keops_parts(
        self, rows: Lazies, columns: Lazies
    ) -> Iterator[tuple[TileKernel, Lazy]]:
        start = 0
        for part in self.parts:
            mine = slice(start, start + part.num_keops_inputs)
            yield part, part.keops_formula(rows[mine], columns[mine])
            start = mine.stop


@dataclass(frozen=True)
class SumTile(_CombinedTile):
    """A sum of kernels; its own factor multiplies those of the parts."""

    def tile(self, left: Forms, right: Forms, out: Tensor, scratch: Scratch) -> None:
        term, *deeper = scratch
        for i, (part, rows, columns) in enumerate(self._part_forms(left, right)):
            if i == 0:
                part.tile(rows, columns, out, scratch)
                out.mul_(part.factor)
            else:
                part.tile(rows, columns, term, deeper)
                out.add_(term, alpha=float(part.factor))

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return torch.stack([part.diagonal(x) for part in self.parts]).sum(0)

    def bind(self, x: Tensor, origin: Tensor) -> BoundTile | None:
        bound = self._bound_parts(x, origin)
        if bound is None:
            return None
        pairs = zip(self.parts, bound, strict=True)
        return _BoundSum([FactoredTile(part.factor, found, x) for part, found in pairs])

    def keops_formula(self, rows: Lazies, columns: Lazies) -> Lazy:
        terms = self._keops_parts(rows, columns)
        return reduce(operator.add, (term * part.factor for part, term in terms))


class _BoundSum(BoundTile):
    """A sum of bound tiles with factors of their own."""

    def __init__(self, parts: Sequence[FactoredTile]) -> None:
        self._parts = parts
        self._values: list[Tensor] = []
        self.buffers = 1 + sum(part.tile.buffers for part in parts)
        self.wants_gradient = any(part.wants_gradient for part in parts)

    def evaluate(self, rows: slice, columns: slice, buffers: Buffers) -> Tensor:
        self._values = [
            part.tile.evaluate(rows, columns, buffers) for part in self._parts
        ]
        total = buffers.take().zero_()
        for part, value in zip(self._parts, self._values, strict=True):
            total.add_(value, alpha=part.number)
        return total

    def pull(self, weight: Tensor, buffers: Buffers) -> None:
        for part, value in zip(self._parts, self._values, strict=True):
            if part.wants_gradient:
                part.pull(weight, value, buffers)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        for part in self._parts:
            yield from part.gradients(outer)


def _sum_tile(kernel: AdditiveKernel, dims: Tensor | None) -> TileKernel | None:
    parts = _tiles_of(kernel.kernels, dims)
    return None if parts is None else SumTile(1.0, parts)


def _sum_features(kernel: AdditiveKernel, request: FeatureRequest) -> FeatureMap:
    """The maps of all terms side by side, each with all of ``num_features``."""
    return add(*(features_of(term, request) for term in kernel.kernels))


register_kernel(
    AdditiveKernel,
    tile=_sum_tile,
    features=_sum_features,
    parts=lambda kernel: list(kernel.kernels),
)


@dataclass(frozen=True)
class ProductTile(_CombinedTile):
    """A product of kernels; its factor already holds those of the parts."""

    def tile(self, left: Forms, right: Forms, out: Tensor, scratch: Scratch) -> None:
        term, *deeper = scratch
        for i, (part, rows, columns) in enumerate(self._part_forms(left, right)):
            if i == 0:
                part.tile(rows, columns, out, scratch)
            else:
                part.tile(rows, columns, term, deeper)
                out.mul_(term)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return torch.stack([part.tile_diagonal(x) for part in self.parts]).prod(0)

    def bind(self, x: Tensor, origin: Tensor) -> BoundTile | None:
        bound = self._bound_parts(x, origin)
        return None if bound is None else _BoundProduct(bound)

    def keops_formula(self, rows: Lazies, columns: Lazies) -> Lazy:
        factors = (factor for _, factor in self._keops_parts(rows, columns))
        return reduce(operator.mul, factors)


class _BoundProduct(BoundTile):
    """A product of bound tiles; the factors of its parts are in its own."""

    def __init__(self, parts: Sequence[BoundTile]) -> None:
        self._parts = parts
        self._values: list[Tensor] = []
        self.buffers = 2 + sum(part.buffers for part in parts)
        self.wants_gradient = any(part.wants_gradient for part in parts)

    def evaluate(self, rows: slice, columns: slice, buffers: Buffers) -> Tensor:
        self._values = [part.evaluate(rows, columns, buffers) for part in self._parts]
        total = buffers.take().copy_(self._values[0])
        for value in self._values[1:]:
            total.mul_(value)
        return total

    def pull(self, weight: Tensor, buffers: Buffers) -> None:
        rest = buffers.take()
        for i, part in enumerate(self._parts):
            if not part.wants_gradient:
                continue
            # Never the product over the part's own value: that may be zero.
            rest.copy_(weight)
            for j, value in enumerate(self._values):
                if i != j:
                    rest.mul_(value)
            part.pull(rest, buffers)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        for part in self._parts:
            yield from part.gradients(outer)


def _product_tile(kernel: ProductKernel, dims: Tensor | None) -> TileKernel | None:
    parts = _tiles_of(kernel.kernels, dims)
    if parts is None:
        return None
    return ProductTile(math.prod(part.factor for part in parts), parts)


def _product_features(kernel: ProductKernel, request: FeatureRequest) -> FeatureMap:
    """The product of the factors' maps, each drawn independently.

    Raises:
        NoRandomFeatures: If a tensor product would be too large.
    """
    first, *rest = (features_of(factor, request) for factor in kernel.kernels)
    try:
        for factor in rest:
            first = multiply(first, factor, dim=request.dim)
    except TooManyFeatures as error:
        raise NoRandomFeatures(kernel, str(error)) from None
    return first


register_kernel(
    ProductKernel,
    tile=_product_tile,
    features=_product_features,
    parts=lambda kernel: list(kernel.kernels),
)


def _tiles_of(
    kernels: Iterable[Kernel], dims: Tensor | None
) -> tuple[TileKernel, ...] | None:
    """The tile forms of all parts, None where one has none."""
    parts = [tile_of(part, dims) for part in kernels]
    found = tuple(part for part in parts if part is not None)
    return found if found and len(found) == len(parts) else None
