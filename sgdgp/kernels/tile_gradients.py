"""Kernels with a tile form and a gradient: the contract, the algebra, the dispatch.

A ``LiveTile`` is the counterpart of ``TileKernel`` whose hyperparameters keep their
graph: ``factor * tile(x, x')``. Bound to points it becomes a ``Term``, which
evaluates a tile together with its derivative, and pulls dS/dtile back to tensors of
size (n, p) (scaled inputs, features) and to factors. From there autograd carries on
to lengthscales, to inputs, to a network. Leaves are in ``gradient_terms``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, TypeAlias

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from torch import Tensor

from sgdgp.kernels.registry import selected_dims, serves_type

Gradient: TypeAlias = tuple[Tensor, Tensor]
"""A tensor with a graph, and dS with respect to it."""

LiveRule: TypeAlias = "Callable[[Any, Tensor | None], LiveTile | None]"
"""What ``register_tile_gradient`` takes: (kernel, dims) to a live tile."""


class Pad:
    """Buffers of the size of a tile, handed out anew for every tile."""

    def __init__(self, like: Tensor, entries: int) -> None:
        self._like = like
        self._entries = entries
        self._flat: list[Tensor] = []
        self._taken = 0
        self._shape = (0, 0)

    def clear(self, rows: int, columns: int) -> None:
        """Take all buffers back; the next ones are (rows, columns)."""
        self._taken = 0
        self._shape = (rows, columns)

    def take(self) -> Tensor:
        """A contiguous buffer, its content arbitrary, until the next ``clear``."""
        if self._taken == len(self._flat):
            self._flat.append(self._like.new_empty(self._entries))
        flat = self._flat[self._taken]
        self._taken += 1
        rows, columns = self._shape
        return flat[: rows * columns].view(rows, columns)


class Term(ABC):
    """A node of a kernel's expression, bound to the points of one form.

    ``evaluate`` comes first, then ``pull`` for the same tile.
    """

    buffers: int
    """Buffers that ``evaluate`` and ``pull`` take from the pad for a tile."""

    wants_gradient: bool
    """Whether anything behind the tile values has a graph."""

    @abstractmethod
    def evaluate(self, rows: slice, columns: slice, pad: Pad) -> Tensor:
        """The tile (a, b), in a buffer that nobody overwrites until the next tile."""

    @abstractmethod
    def pull(self, weight: Tensor, pad: Pad) -> None:
        """Add what dS/dtile = ``weight`` (a, b), left as it is, means for inputs."""

    @abstractmethod
    def gradients(self, outer: float) -> Iterator[Gradient]:
        """``outer`` times the gradients that were pulled so far."""


@dataclass(frozen=True)
class LiveTile(ABC):
    """k(x, x') = factor * tile(x, x') with hyperparameters that keep their graph.

    Attributes:
        factor: What the tiles are to be multiplied by, a number or 0-dim.
    """

    factor: Tensor | float

    @abstractmethod
    def bind(self, x: Tensor, origin: Tensor) -> Term:
        """The term for points x (n, d); ``origin`` (d,) is what to centre them by."""


class WeightedTerm:
    """A term, its factor, and dS/dfactor: what sums and the whole form consist of."""

    def __init__(self, live: LiveTile, x: Tensor, origin: Tensor) -> None:
        self.term = live.bind(x, origin)
        self.factor = live.factor
        if isinstance(live.factor, Tensor):
            self.number = live.factor.item()
            self.factor_is_live = live.factor.requires_grad
        else:
            self.number = live.factor
            self.factor_is_live = False
        self.wants_gradient = self.factor_is_live or self.term.wants_gradient
        self.total = torch.zeros((), dtype=torch.float64, device=x.device)

    def pull(self, weight: Tensor, value: Tensor, pad: Pad) -> None:
        """Like ``Term.pull``; ``value`` is what the term evaluated to."""
        self.total += torch.dot(weight.view(-1), value.view(-1))
        if self.term.wants_gradient:
            self.term.pull(weight, pad)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        """Those of the factor and of everything below."""
        if isinstance(self.factor, Tensor) and self.factor_is_live:
            yield self.factor, self.total * outer
        yield from self.term.gradients(outer * self.number)


class SumTerm(Term):
    """A sum of terms with factors of their own."""

    def __init__(self, parts: Sequence[WeightedTerm]) -> None:
        self._parts = parts
        self._values: list[Tensor] = []
        self.buffers = 1 + sum(part.term.buffers for part in parts)
        self.wants_gradient = any(part.wants_gradient for part in parts)

    def evaluate(self, rows: slice, columns: slice, pad: Pad) -> Tensor:
        self._values = [part.term.evaluate(rows, columns, pad) for part in self._parts]
        total = pad.take().zero_()
        for part, value in zip(self._parts, self._values, strict=True):
            total.add_(value, alpha=part.number)
        return total

    def pull(self, weight: Tensor, pad: Pad) -> None:
        for part, value in zip(self._parts, self._values, strict=True):
            if part.wants_gradient:
                part.pull(weight, value, pad)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        for part in self._parts:
            yield from part.gradients(outer)


class ProductTerm(Term):
    """A product of terms; the factors of its parts are in its own."""

    def __init__(self, parts: Sequence[Term]) -> None:
        self._parts = parts
        self._values: list[Tensor] = []
        self.buffers = 2 + sum(part.buffers for part in parts)
        self.wants_gradient = any(part.wants_gradient for part in parts)

    def evaluate(self, rows: slice, columns: slice, pad: Pad) -> Tensor:
        self._values = [part.evaluate(rows, columns, pad) for part in self._parts]
        total = pad.take().copy_(self._values[0])
        for value in self._values[1:]:
            total.mul_(value)
        return total

    def pull(self, weight: Tensor, pad: Pad) -> None:
        rest = pad.take()
        for i, part in enumerate(self._parts):
            if not part.wants_gradient:
                continue
            # Never the product over the part's own value: that may be zero.
            rest.copy_(weight)
            for j, value in enumerate(self._values):
                if i != j:
                    rest.mul_(value)
            part.pull(rest, pad)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        for part in self._parts:
            yield from part.gradients(outer)


@dataclass(frozen=True)
class LiveSum(LiveTile):
    """A sum of kernels; its own factor multiplies those of the parts."""

    parts: tuple[LiveTile, ...]

    def bind(self, x: Tensor, origin: Tensor) -> Term:
        return SumTerm([WeightedTerm(part, x, origin) for part in self.parts])


@dataclass(frozen=True)
class LiveProduct(LiveTile):
    """A product of kernels; its factor already holds those of the parts."""

    parts: tuple[LiveTile, ...]

    def bind(self, x: Tensor, origin: Tensor) -> Term:
        return ProductTerm([part.bind(x, origin) for part in self.parts])


@singledispatch
def _live_body(kernel: Kernel, dims: Tensor | None) -> LiveTile | None:
    """The live form of ``kernel.forward`` on the columns ``dims`` of the inputs."""
    return None


def live_tile(kernel: Kernel, dims: Tensor | None = None) -> LiveTile | None:
    """The live tile of a GPyTorch kernel, if it has one.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        dims: Columns of the inputs that the kernel sees, (d',). Default: all.

    Returns:
        The live tile, or None when the exact type of the kernel, or of one inside
        it, has no gradient rule: its gradients then come from autograd.
    """
    return live_forward(kernel, selected_dims(kernel.active_dims, dims))


def live_forward(kernel: Kernel, dims: Tensor | None) -> LiveTile | None:
    """The live tile of ``kernel.forward``, without the kernel's own active_dims."""
    return _live_body(kernel, dims)


def register_tile_gradient(
    kernel_type: type[Kernel], *, same_forward: bool = False
) -> Callable[[LiveRule], LiveRule]:
    """Give a kernel with a tile form analytic gradients.

    Without a rule the kernel's own ``forward`` is differentiated by autograd.

    Args:
        kernel_type: The exact type that the rule is for.
        same_forward: Whether it also serves subclasses that leave ``forward`` as it
            is, as in ``register_tile_kernel``. Default: no.

    Returns:
        A decorator for a function ``rule(kernel, dims) -> LiveTile | None``, with
        ``dims`` as in ``register_tile_kernel``. Hyperparameters must keep their
        graph: no ``detach`` and no ``item``. ``LiveStationary`` serves functions of
        a distance, ``LiveInnerProduct`` those of an inner product of features.

    Example:
        >>> class Wide(gpytorch.kernels.RBFKernel): ...
        >>> @register_tile_gradient(Wide)
        ... def _(kernel, dims):
        ...     tile = RBFTile(1.0, dims, 1 / kernel.lengthscale[0])
        ...     return LiveStationary(1.0, tile, RBFSlope())
    """

    def decorate(rule: LiveRule) -> LiveRule:
        def guarded(kernel: Kernel, dims: Tensor | None) -> LiveTile | None:
            serves = serves_type(kernel_type, type(kernel), same_forward)
            return rule(kernel, dims) if serves else None

        _live_body.register(kernel_type, guarded)
        return rule

    return decorate


@register_tile_gradient(ScaleKernel)
def _(kernel: ScaleKernel, dims: Tensor | None) -> LiveTile | None:
    # As in tile_kernels: ScaleKernel calls base_kernel.forward.
    return scaled(live_forward(kernel.base_kernel, dims), kernel.outputscale)


def scaled(live: LiveTile | None, scale: Tensor) -> LiveTile | None:
    """``scale`` (one element, with its graph) times a live tile, None for None."""
    if live is None:
        return None
    return replace(live, factor=live.factor * scale.reshape(()))


@register_tile_gradient(AdditiveKernel)
def _(kernel: AdditiveKernel, dims: Tensor | None) -> LiveTile | None:
    parts = _parts(kernel, dims)
    return None if parts is None else LiveSum(1.0, parts)


@register_tile_gradient(ProductKernel)
def _(kernel: ProductKernel, dims: Tensor | None) -> LiveTile | None:
    parts = _parts(kernel, dims)
    if parts is None:
        return None
    factor: Tensor | float = 1.0
    for part in parts:
        factor = factor * part.factor
    return LiveProduct(factor, parts)


def _parts(
    kernel: AdditiveKernel | ProductKernel, dims: Tensor | None
) -> tuple[LiveTile, ...] | None:
    parts = [live_tile(part, dims) for part in kernel.kernels]
    found = tuple(part for part in parts if part is not None)
    return found if found and len(found) == len(parts) else None
