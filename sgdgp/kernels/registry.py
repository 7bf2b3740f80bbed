"""What is known of a kernel: the contract of its tiles, and the table of all kernels.

A kernel matrix is evaluated tile by tile, in place. A ``TileKernel`` is a kernel with
the hyperparameters of a moment, written as ``factor * tile(x, x')``. The factor is
peeled off, so that K V = factor * (tile V) multiplies (n, k) numbers and not n^2. It
may also know its derivative (``bind``) and its formula for KeOps (``keops_formula``);
what it does not know is left to GPyTorch's own evaluation, or refused.

With gradients, a tile kernel is bound to points. A ``BoundTile`` evaluates a tile
together with its derivative, and pulls dS/dtile back to tensors of size (n, p) (scaled
inputs, features) and to factors. From there autograd carries on to lengthscales, to
inputs, to a network.

``register_kernel`` says all that is known of a kernel in one call. Families of tiles
that one may build on are ``StationaryTile`` and ``InnerProductTile``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import (
    FeatureRequest,
    check_kernel_class,
    register_features,
)

Forms: TypeAlias = tuple[Tensor, ...]
"""Prepared inputs; every tensor has one leading dimension, the points."""

Lazy: TypeAlias = Any
"""A pykeops ``LazyTensor``; pykeops is imported only where it is used."""

Lazies: TypeAlias = tuple[Any, ...]
"""Prepared inputs as variables of KeOps."""

Scratch: TypeAlias = Sequence[Tensor]
"""Buffers of the size of a tile, to write into."""

Gradient: TypeAlias = tuple[Tensor, Tensor]
"""A tensor with a graph, and dS with respect to it."""

TileRule: TypeAlias = "Callable[[Any, Tensor | None], TileKernel | None]"
"""From a kernel, and the columns of the inputs that it sees, to its tile form."""


@dataclass(frozen=True)
class TileKernel(ABC):
    """k(x, x') = factor * tile(x, x').

    Attributes:
        factor: What the tiles are to be multiplied by: a number, or 0-dim with a graph
            where gradients are wanted.
    """

    factor: float | Tensor

    def __init_subclass__(cls) -> None:
        # Scales replace the factor, and that needs the constructor of a dataclass.
        if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls):
            raise TypeError(
                f"{cls.__name__}: expected a frozen dataclass, whose attributes are "
                "fields, found a constructor of its own"
            )

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
    def tile(self, left: Forms, right: Forms, out: Tensor, scratch: Scratch) -> None:
        """Write the tile (a, b) of prepared rows (a, ...) and columns (b, ...)."""

    @abstractmethod
    def tile_diagonal(self, x: Tensor) -> Tensor:
        """tile(x_i, x_i) for every point, without rounding of distances: (n,)."""

    def diagonal(self, x: Tensor) -> Tensor:
        """k(x_i, x_i) for every point (n,)."""
        return self.factor * self.tile_diagonal(x)

    def bind(self, x: Tensor, origin: Tensor) -> BoundTile | None:
        """The tiles of points x (n, d) with derivatives; None if there are none."""
        return None

    def is_compiled(self, like: Tensor) -> bool:
        """Whether tiles of the dtype and on the device of ``like`` are compiled."""
        return False

    @property
    def has_keops(self) -> bool:
        """Whether there is a formula for KeOps."""
        return type(self).keops_inputs is not TileKernel.keops_inputs

    @property
    def num_keops_inputs(self) -> int:
        """Length of the tuple that ``keops_inputs`` returns."""
        return 1

    def keops_inputs(self, x: Tensor, origin: Tensor) -> Forms:
        """What ``keops_formula`` needs of points x (n, d), as rows or as columns.

        Raises:
            ValueError: There is no formula.
        """
        raise ValueError(f"{type(self).__name__} has no KeOps formula")

    def keops_formula(self, rows: Lazies, columns: Lazies) -> Lazy:
        """tile(x, x') as a lazy tensor of the inputs, as variables of KeOps."""
        raise ValueError(f"{type(self).__name__} has no KeOps formula")


class Buffers:
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


class BoundTile(ABC):
    """A tile kernel bound to the points of one form: values, and what they pull back.

    ``evaluate`` comes first, then ``pull`` for the same tile.
    """

    buffers: int
    """How many buffers ``evaluate`` and ``pull`` take for a tile."""

    wants_gradient: bool
    """Whether anything behind the tile values has a graph."""

    @abstractmethod
    def evaluate(self, rows: slice, columns: slice, buffers: Buffers) -> Tensor:
        """The tile (a, b), in a buffer that nobody overwrites until the next tile."""

    @abstractmethod
    def pull(self, weight: Tensor, buffers: Buffers) -> None:
        """Add what dS/dtile = ``weight`` (a, b), left as it is, means for inputs."""

    @abstractmethod
    def gradients(self, outer: float) -> Iterator[Gradient]:
        """``outer`` times the gradients that were pulled so far."""


class BoundValues(BoundTile):
    """Tiles whose only gradient is that of the factor in front of them.

    Hyperparameters and inputs are constants; ``scratch`` is how many buffers
    ``tile.tile`` really writes to.
    """

    wants_gradient = False

    def __init__(
        self, tile: TileKernel, x: Tensor, origin: Tensor, scratch: int = 1
    ) -> None:
        self._tile, self._scratch = tile, scratch
        self._left, self._right = tile.left(x, origin), tile.right(x, origin)
        self.buffers = 1 + scratch

    def evaluate(self, rows: slice, columns: slice, buffers: Buffers) -> Tensor:
        value = buffers.take()
        left = tuple(form[rows] for form in self._left)
        right = tuple(form[columns] for form in self._right)
        scratch = [buffers.take() for _ in range(self._scratch)]
        self._tile.tile(left, right, value, scratch)
        return value

    def pull(self, weight: Tensor, buffers: Buffers) -> None:
        """Nothing to pull."""

    def gradients(self, outer: float) -> Iterator[Gradient]:
        return iter(())


class FactoredTile:
    """A bound tile, its factor, and dS/dfactor: what sums and whole forms consist of.

    The factor is a number, or 0-dim, with a graph where it has one.
    """

    def __init__(self, factor: float | Tensor, tile: BoundTile, like: Tensor) -> None:
        self.tile = tile
        self.number = factor.item() if isinstance(factor, Tensor) else factor
        self._factor = factor
        self.wants_gradient = wants_gradient(factor) or tile.wants_gradient
        self.total = like.new_zeros((), dtype=torch.float64)

    def pull(self, weight: Tensor, value: Tensor, buffers: Buffers) -> None:
        """Like ``BoundTile.pull``; ``value`` is what the tile evaluated to."""
        self.total += torch.dot(weight.view(-1), value.view(-1))
        if self.tile.wants_gradient:
            self.tile.pull(weight, buffers)

    def gradients(self, outer: float) -> Iterator[Gradient]:
        """Those of the factor and of everything below."""
        if isinstance(self._factor, Tensor) and self._factor.requires_grad:
            yield self._factor, self.total * outer
        yield from self.tile.gradients(outer * self.number)


def wants_gradient(value: float | Tensor | None) -> bool:
    """Whether a hyperparameter has a graph, where graphs are made."""
    graph = isinstance(value, Tensor) and value.requires_grad
    return graph and torch.is_grad_enabled()


def select(x: Tensor, dims: Tensor | None) -> Tensor:
    """The columns ``dims`` of x (n, d), or all of them."""
    return x if dims is None else x.index_select(-1, dims.to(x.device))


def scalar(hyperparameter: Tensor) -> float | Tensor:
    """A hyperparameter of one element: 0-dim with its graph, or else a number.

    Products of numbers are taken in float64.
    """
    if torch.is_grad_enabled():
        return hyperparameter.reshape(())
    return hyperparameter.item()


_FOR_VALUES: dict[type[Kernel], tuple[TileRule, bool]] = {}
_FOR_GRADIENTS: dict[type[Kernel], tuple[TileRule, bool]] = {}


def register_kernel(
    kernel_type: type[Kernel],
    *,
    tile: TileRule | None = None,
    features: Callable[[Any, FeatureRequest], FeatureMap] | None = None,
    parts: Callable[[Any], Sequence[Kernel]] | None = None,
    same_forward: bool = False,
) -> None:
    """Say all that is known of a kernel, one of your own for instance.

    Sums, products, scales and ``active_dims`` around it are taken care of.

    Args:
        kernel_type: The kernel class. What is said of it is used for the exact type, as
            a subclass may have another ``forward``; features also serve subclasses
            that override nothing but their constructor.
        tile: ``tile(kernel, dims) -> TileKernel | None``: the fast form of
            ``kernel.forward`` on the columns ``dims`` of the inputs (d',), None for
            all. It makes the tiles from the kernel's hyperparameters as they are, with
            their graph (no ``detach`` and no ``item``; see ``scalar``). Default: the
            kernel is evaluated, and differentiated, through GPyTorch. Gradients come
            from there too where the tiles miss a parameter.
        features: ``features(kernel, request) -> FeatureMap``: random or exact features,
            see :func:`sgdgp.features.register_features`. Default: prior functions are
            drawn exactly, at a limited number of points.
        parts: For a kernel made of kernels: those that must have features.
        same_forward: Whether all this also serves subclasses that leave ``forward`` as
            it is; it must then be read from what they may override (a covariance, say).
            Default: no.

    Raises:
        TypeError: ``kernel_type`` is not a GPyTorch kernel class.
        ValueError: Neither tile nor features are given.

    Example:
        >>> class Wide(gpytorch.kernels.RBFKernel):
        ...     def forward(self, x1, x2, **params):
        ...         return super().forward(x1 / 2, x2 / 2, **params)
        >>> def tile(kernel, dims):
        ...     return RBFTile(1.0, dims, 0.5 / kernel.lengthscale[0])
        >>> def features(kernel, request):
        ...     omega = request.normal(request.dim, request.num_frequencies)
        ...     scale = 2 * request.parameter(kernel.lengthscale).T
        ...     return FourierFeatures((omega / scale).to(request.like))
        >>> register_kernel(Wide, tile=tile, features=features)
    """
    check_kernel_class(kernel_type)
    if tile is None and features is None:
        raise ValueError(f"{kernel_type.__name__}: expected tile or features, or both")
    if tile is not None:
        _FOR_VALUES[kernel_type] = _FOR_GRADIENTS[kernel_type] = tile, same_forward
    if features is not None:
        reads = {"forward"} if same_forward else None
        register_features(kernel_type, parts=parts, reads=reads)(features)


def register_tile_kernel(
    kernel_type: type[Kernel], *, same_forward: bool = False
) -> Callable[[TileRule], TileRule]:
    """Decorator for the tile form, ``rule(kernel, dims)``, that has no gradients.

    They come from GPyTorch's own forward, unless ``register_tile_gradient`` has been
    told how else. ``register_kernel``, whose arguments these are, does both in one.
    """
    return _registers(_FOR_VALUES, kernel_type, same_forward)


def register_tile_gradient(
    kernel_type: type[Kernel], *, same_forward: bool = False
) -> Callable[[TileRule], TileRule]:
    """Like ``register_tile_kernel``, for the form with the hyperparameters' graph."""
    return _registers(_FOR_GRADIENTS, kernel_type, same_forward)


def _registers(
    table: dict[type[Kernel], tuple[TileRule, bool]],
    kernel_type: type[Kernel],
    same_forward: bool,
) -> Callable[[TileRule], TileRule]:
    check_kernel_class(kernel_type)

    def register(rule: TileRule) -> TileRule:
        table[kernel_type] = rule, same_forward
        return rule

    return register


@torch.no_grad()
def tile_kernel(kernel: Kernel, dims: Tensor | None = None) -> TileKernel | None:
    """The tile form of a GPyTorch kernel, if it has one.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        dims: Columns of the inputs that the kernel sees, (d',). Default: all.

    Returns:
        The tile form with the present hyperparameters as constants, or None when the
        exact type of the kernel, or of one inside it, has not been registered. A
        subclass is never taken for its parent: it may override ``forward``.
    """
    return tile_of(kernel, dims)


@torch.enable_grad()
def differentiable_tile(
    kernel: Kernel, dims: Tensor | None = None
) -> TileKernel | None:
    """The same with hyperparameters that keep their graph, as ``bind`` needs them.

    Returns:
        The tile form, or None where gradients have to come from GPyTorch.
    """
    return tile_of(kernel, dims)


def tile_of(kernel: Kernel, dims: Tensor | None) -> TileKernel | None:
    """The tile form of a kernel inside another, for values or for gradients.

    Whether gradients are enabled says which of the two is being asked for.
    """
    active = kernel.active_dims
    if active is not None:
        dims = active if dims is None else dims[active.to(dims.device)]
    return tile_of_forward(kernel, dims)


def tile_of_forward(kernel: Kernel, dims: Tensor | None) -> TileKernel | None:
    """``tile_of`` without the kernel's own ``active_dims``."""
    table = _FOR_GRADIENTS if torch.is_grad_enabled() else _FOR_VALUES
    found = type(kernel)
    registered = next((cls for cls in found.__mro__ if cls in table), None)
    if registered is None:
        return None
    rule, same_forward = table[registered]
    serves = found is registered or (
        same_forward and found.forward is registered.forward
    )
    return rule(kernel, dims) if serves else None
