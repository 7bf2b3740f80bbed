"""Checks of what callers pass to an operator: cheap, and errors that name it."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def check_inputs(x: Tensor, x_rows: Tensor | None) -> None:
    """Raise unless x is a tensor (n, d) and floating, and x_rows (m, d) like it."""
    for name, points in (("x", x), ("x_rows", x_rows)):
        if points is None:
            continue
        if not isinstance(points, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, found {type(points)}")
        if points.ndim != 2:
            raise ValueError(
                f"{name} must have shape (n, d), found {tuple(points.shape)}"
            )
        if not points.is_floating_point():
            raise ValueError(f"{name} must be floating point, found {points.dtype}")
    if x_rows is None:
        return
    if x_rows.shape[1] != x.shape[1]:
        raise ValueError(
            f"x_rows must have {x.shape[1]} columns like x, found {x_rows.shape[1]}"
        )
    if x_rows.dtype != x.dtype or x_rows.device != x.device:
        raise ValueError(
            f"x_rows must be {x.dtype} on {x.device} like x, "
            f"found {x_rows.dtype} on {x_rows.device}"
        )


def resolve_index(
    index: Tensor | slice, size: int, name: str = "index"
) -> Tensor | slice:
    """Bring a row or column index into one of two forms.

    Args:
        index: An integer tensor (b,) or a slice with step 1.
        size: Number of rows (or columns) that it selects from.
        name: What to call it in errors.

    Returns:
        A slice with explicit start and stop, or an int64 tensor (b,).

    Raises:
        TypeError: ``index`` is neither a slice nor an integer tensor.
        ValueError: A slice with another step, or a tensor that is not 1-D.
    """
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step != 1:
            raise ValueError(f"{name} must be a slice with step 1, found step {step}")
        return slice(start, max(start, stop))
    if not isinstance(index, Tensor):
        raise TypeError(
            f"{name} must be a slice or an integer tensor, found {type(index).__name__}"
        )
    if index.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, found {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"{name} must have shape (b,), found {tuple(index.shape)}")
    return index if index.dtype == torch.int64 else index.long()


def index_length(index: Tensor | slice) -> int:
    """Number of rows that a resolved index selects."""
    if isinstance(index, slice):
        return index.stop - index.start
    return index.shape[0]


def take(points: Tensor, index: Tensor | slice) -> Tensor:
    """The rows of ``points`` at a resolved index; a view when it is a slice."""
    if isinstance(index, slice):
        return points[index]
    return points.index_select(0, index)


def piece(index: Tensor | slice, rows: slice) -> Tensor | slice:
    """The part ``rows`` of a resolved index, itself resolved."""
    if isinstance(index, slice):
        return slice(index.start + rows.start, min(index.start + rows.stop, index.stop))
    return index[rows]


def points_behind(
    index: Tensor | slice, outputs: int
) -> tuple[Tensor | slice, Tensor | slice | None]:
    """The points that hold the rows ``index``, and the rows among theirs.

    The second is None when the rows of those points are just what was asked for. Row r
    belongs to point r // outputs.
    """
    if outputs == 1:
        return index, None
    if isinstance(index, slice):
        first = index.start // outputs
        points = slice(first, max(first, -(-index.stop // outputs)))
        offset = first * outputs
        return points, slice(index.start - offset, index.stop - offset)
    points, position = torch.unique(index // outputs, return_inverse=True)
    return points, position * outputs + index % outputs


def whole_points(order: Tensor, outputs: int) -> Tensor:
    """The points behind rows (m,) that hold all rows of a point, one after another.

    Raises:
        ValueError: The rows of a point are torn apart, or in another order.
    """
    if outputs == 1:
        return order
    if len(order) % outputs == 0:
        rows = order.reshape(-1, outputs)
        points = rows[:, 0] // outputs
        within = torch.arange(outputs, device=order.device)
        if torch.equal(rows, points.unsqueeze(1) * outputs + within):
            return points
    raise ValueError(
        f"order: expected the {outputs} rows of each point beside each other, as "
        "random_order gives them"
    )


def check_vectors(v: Tensor, size: int, dtype: torch.dtype, name: str = "v") -> None:
    """Raise ValueError unless v is (size, k) and of the operator's dtype."""
    if v.ndim != 2 or v.shape[0] != size:
        raise ValueError(f"{name} must have shape ({size}, k), found {tuple(v.shape)}")
    if v.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} like the operator, found {v.dtype}")
