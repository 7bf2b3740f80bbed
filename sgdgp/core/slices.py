"""Row and feature chunks: bounded memory, and recomputation instead of storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CPU_TILE = 2**19
"""Elements of one temporary on a CPU: two of them stay in the cache."""

DEVICE_TILE = 2**22
"""Elements of one temporary elsewhere: 16 MB in float32, enough to fill a GPU."""


def tile_size(device: torch.device) -> int:
    """Elements of one temporary on a device."""
    return CPU_TILE if device.type == "cpu" else DEVICE_TILE


def tile_shape(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a tile of at most the device's tile size.

    Tiles twice as high as wide measured fastest for a product with a few dozen
    right-hand sides; few rows leave room for wide tiles and the other way round.
    """
    size = tile_size(device)
    height = max(1, min(rows, int((2 * size) ** 0.5)))
    width = max(1, min(columns, size // height))
    return max(1, min(rows, size // width)), width


def slices(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover range(start, stop)."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def tracks_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will want a derivative with respect to any of them."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)`` that keeps only its inputs for the backward pass.

    The temporaries of ``function`` are computed again when a gradient is asked
    for, and the backward pass is itself differentiable (double gradients).

    Args:
        function: A function of tensors with one tensor as its value; it must
            not close over tensors that require a gradient.
        *inputs: Its arguments.
    """
    if not tracks_gradient(*inputs) or torch._C._are_functorch_transforms_active():
        # Function transforms have derivatives of their own.
        return function(*inputs)
    return _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    """Gradient by a second evaluation of the function."""

    @staticmethod
    def forward(ctx, function, *inputs):  # type: ignore[no-untyped-def]
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        again = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # A view is a new node of the graph: a path from one input to another
            # outside of the function is then not counted a second time.
            inputs = [
                (t.view_as(t) if again else t.detach().requires_grad_())
                if wanted
                else t.detach()
                for t, wanted in zip(ctx.saved_tensors, needed, strict=True)
            ]
            value = ctx.function(*inputs)
            grads = iter(
                torch.autograd.grad(
                    value,
                    [t for t, wanted in zip(inputs, needed, strict=True) if wanted],
                    grad,
                    create_graph=again,
                    allow_unused=True,
                )
            )
        return None, *(next(grads) if wanted else None for wanted in needed)


def check_product(name: str, matrix: Tensor, rows: int) -> None:
    """Raise ValueError unless ``matrix`` is a matrix with ``rows`` rows."""
    if matrix.ndim != 2 or matrix.shape[0] != rows:
        raise ValueError(
            f"{name} must be a matrix with {rows} rows, found shape "
            f"{tuple(matrix.shape)}"
        )


def check_width(x: Tensor, columns: int) -> None:
    """Raise ValueError unless ``x`` is a matrix with ``columns`` columns."""
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(
            f"x must be a matrix with {columns} columns, found shape {tuple(x.shape)}"
        )
