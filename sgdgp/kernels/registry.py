"""Kernels that are evaluated tile by tile, in place: the contract and the algebra.

A ``TileKernel`` is a kernel with its hyperparameters frozen, written as
``factor * tile(x, x')``. The factor is peeled off, so that K V = factor * (tile V)
multiplies (n, k) numbers and not n^2. The leaves are in ``stationary`` and
``dot_product``; here are sums, products, scales, and the dispatch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, TypeAlias

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from torch import Tensor

Forms: TypeAlias = tuple[Tensor, ...]
"""Prepared inputs; every tensor has one leading dimension, the points."""

TileRule: TypeAlias = "Callable[[Any, Tensor | None], TileKernel | None]"
"""What ``register_tile_kernel`` takes: (kernel, dims) to a tile form."""


@dataclass(frozen=True)
class TileKernel(ABC):
    """k(x, x') = factor * tile(x, x') with frozen hyperparameters.

    Attributes:
        factor: What the tiles are to be multiplied by.
    """

    factor: float

    @property
    def scratch(self) -> int:
        """Buffers of the size of a tile that ``tile`` needs beside ``out``."""
        return 1

    @property
    def num_forms(self) -> int:
        """Length of the tuples that ``left`` and ``right`` return."""
        return 1

    @abstractmethod
    def left(self, x: Tensor, origin: Tensor) -> Forms:
        """What ``tile`` needs of row points x (n, d).

        ``origin`` (d,) is the same point for rows and columns; stationary kernels
        subtract it, so that inputs far from zero keep their digits.
        """

    @abstractmethod
    def right(self, x: Tensor, origin: Tensor) -> Forms:
        """What ``tile`` needs of column points x (n, d)."""

    @abstractmethod
    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        """Write the tile (a, b) of prepared rows (a, ...) and columns (b, ...)."""

    @abstractmethod
    def tile_diagonal(self, x: Tensor) -> Tensor:
        """tile(x_i, x_i) for every point, without rounding of distances: (n,)."""

    def diagonal(self, x: Tensor) -> Tensor:
        """k(x_i, x_i) for every point (n,)."""
        return self.factor * self.tile_diagonal(x)


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


@dataclass(frozen=True)
class SumTile(_CombinedTile):
    """A sum of kernels; its own factor multiplies those of the parts."""

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        term, *deeper = scratch
        for i, (part, rows, columns) in enumerate(self._part_forms(left, right)):
            if i == 0:
                part.tile(rows, columns, out, scratch)
                out.mul_(part.factor)
            else:
                part.tile(rows, columns, term, deeper)
                out.add_(term, alpha=part.factor)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return torch.stack([part.diagonal(x) for part in self.parts]).sum(0)


@dataclass(frozen=True)
class ProductTile(_CombinedTile):
    """A product of kernels; its factor already holds those of the parts."""

    def tile(
        self, left: Forms, right: Forms, out: Tensor, scratch: Sequence[Tensor]
    ) -> None:
        term, *deeper = scratch
        for i, (part, rows, columns) in enumerate(self._part_forms(left, right)):
            if i == 0:
                part.tile(rows, columns, out, scratch)
            else:
                part.tile(rows, columns, term, deeper)
                out.mul_(term)

    def tile_diagonal(self, x: Tensor) -> Tensor:
        return torch.stack([part.tile_diagonal(x) for part in self.parts]).prod(0)


@singledispatch
def _tile_body(kernel: Kernel, dims: Tensor | None) -> TileKernel | None:
    """The tile form of ``kernel.forward`` on the columns ``dims`` of the inputs."""
    return None


def tile_kernel(kernel: Kernel, dims: Tensor | None = None) -> TileKernel | None:
    """The tile form of a GPyTorch kernel, if it has one.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        dims: Columns of the inputs that the kernel sees, (d',). Default: all.

    Returns:
        The tile form with the present hyperparameters, detached, or None when the
        exact type of the kernel, or of one inside it, has not been registered. A
        subclass is never taken for its parent: it may override ``forward``.
    """
    return _tile_body(kernel, selected_dims(kernel.active_dims, dims))


def register_tile_kernel(
    kernel_type: type[Kernel], *, same_forward: bool = False
) -> Callable[[TileRule], TileRule]:
    """Give a kernel of your own a tile form.

    Args:
        kernel_type: The exact type that the rule is for.
        same_forward: Whether the rule also serves subclasses that leave ``forward``
            as it is; it must then read what they may override (a covariance, say)
            from the kernel. Default: no.

    Returns:
        A decorator for a function ``rule(kernel, dims) -> TileKernel | None``:
        ``dims`` are the columns of the inputs (d',) that the kernel sees, after its
        ``active_dims``, or None for all. Sums, products, scales and ``active_dims``
        around the kernel are taken care of.

    Example:
        >>> class Wide(gpytorch.kernels.RBFKernel): ...
        >>> @register_tile_kernel(Wide)
        ... def _(kernel, dims):
        ...     return RBFTile(1.0, dims, 1 / kernel.lengthscale.detach()[0])
    """

    def decorate(rule: TileRule) -> TileRule:
        def guarded(kernel: Kernel, dims: Tensor | None) -> TileKernel | None:
            serves = serves_type(kernel_type, type(kernel), same_forward)
            return rule(kernel, dims) if serves else None

        _tile_body.register(kernel_type, guarded)
        return rule

    return decorate


def serves_type(
    registered: type[Kernel], found: type[Kernel], same_forward: bool
) -> bool:
    """Whether a rule for one type is a rule for another, a subclass or itself."""
    if found is registered:
        return True
    return same_forward and found.forward is registered.forward


def selected_dims(active: Tensor | None, dims: Tensor | None) -> Tensor | None:
    """Columns of the full inputs behind ``active`` columns of ``dims``."""
    if active is None:
        return dims
    return active if dims is None else dims[active.to(dims.device)]


@register_tile_kernel(ScaleKernel)
def _(kernel: ScaleKernel, dims: Tensor | None) -> TileKernel | None:
    # ScaleKernel calls base_kernel.forward, not base_kernel(...): the active_dims of
    # its base are its own, and must not be applied a second time.
    base = _tile_body(kernel.base_kernel, dims)
    if base is None:
        return None
    return replace(base, factor=base.factor * kernel.outputscale.item())


@register_tile_kernel(AdditiveKernel)
def _(kernel: AdditiveKernel, dims: Tensor | None) -> TileKernel | None:
    parts = _parts(kernel, dims)
    return None if parts is None else SumTile(1.0, parts)


@register_tile_kernel(ProductKernel)
def _(kernel: ProductKernel, dims: Tensor | None) -> TileKernel | None:
    parts = _parts(kernel, dims)
    if parts is None:
        return None
    return ProductTile(math.prod(part.factor for part in parts), parts)


def _parts(
    kernel: AdditiveKernel | ProductKernel, dims: Tensor | None
) -> tuple[TileKernel, ...] | None:
    parts = [tile_kernel(part, dims) for part in kernel.kernels]
    found = tuple(part for part in parts if part is not None)
    return found if found and len(found) == len(parts) else None
