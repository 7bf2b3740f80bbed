"""Argument checks shared by the public functions: clear errors before long work."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinities.

    Raises:
        ValueError: Says how many there are and where the first is.
    """
    bad = ~torch.isfinite(value)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: expected finite values, found {int(bad.sum())} NaN or infinite "
            f"of {value.numel()}, the first at index {first}"
        )


def check_matrix(name: str, value: Tensor, columns: int | None = None) -> None:
    """Refuse anything but a non-empty floating-point matrix.

    Raises:
        TypeError: Not a tensor, or not floating point.
        ValueError: Not two-dimensional, empty, or the wrong number of columns.
    """
    if not torch.is_tensor(value):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(value)}")
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"{name}: expected a floating-point tensor, found {value.dtype}"
        )
    if value.ndim != 2:
        raise ValueError(f"{name}: expected shape (n, d), found {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name}: expected data, found shape {tuple(value.shape)}")
    if columns is not None and value.shape[1] != columns:
        raise ValueError(f"{name}: expected {columns} columns, found {value.shape[1]}")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse tensors of different dtype or device.

    Raises:
        ValueError: Names both.
    """
    if value.dtype != other.dtype:
        raise ValueError(
            f"{name}: expected the dtype of {other_name}, {other.dtype}, "
            f"found {value.dtype}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, "
            f"found {value.device}"
        )


def check_count(name: str, value: int, minimum: int) -> None:
    """Refuse anything but an integer of at least ``minimum``.

    Raises:
        TypeError: Not an integer.
        ValueError: Too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, found {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, found {value}")


def check_positive(name: str, value: float) -> None:
    """Refuse anything but a positive finite number.

    Raises:
        ValueError: Says what was found.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, found {value}")
