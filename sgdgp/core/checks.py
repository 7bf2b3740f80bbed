"""Argument checks shared by the public functions: clear errors before long work."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_not_mapped(name: str, value: Tensor) -> None:
    """Refuse what ``torch.func.vmap`` makes of a tensor: its values cannot be checked.

    Raises:
        TypeError: Says what to do instead.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            raise TypeError(
                f"{name}: torch.func.vmap is not supported; give all batches at once, "
                f"{name} (..., n, d)"
            )
        value = functorch.get_unwrapped(value)


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


def check_targets(name: str, value: Tensor) -> None:
    """Refuse infinities, and nothing but NaN: that is a target not observed.

    Raises:
        ValueError: Says how many infinities there are and where the first is.
    """
    missing = torch.isnan(value)
    if missing.all():
        raise ValueError(f"{name}: expected targets, found NaN in every row")
    check_finite(name, value.masked_fill(missing, 0.0))


def check_matrix(name: str, value: Tensor, columns: int | None = None) -> None:
    """Refuse anything but a non-empty matrix in float32 or float64.

    Raises:
        TypeError: Not a tensor, or of another dtype.
        ValueError: Not two-dimensional, empty, or the wrong number of columns.
    """
    if not torch.is_tensor(value):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(value)}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, found {value.dtype}")
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


def check_count(name: str, value: Any, minimum: int) -> None:
    """Refuse anything but an integer (NumPy's will do) of at least ``minimum``.

    Raises:
        TypeError: Not an integer.
        ValueError: Too small.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, found {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, found {value}")


def check_number(name: str, value: Any, kind: str = "a number") -> None:
    """Refuse anything but a real number.

    Raises:
        TypeError: Says what was found.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {kind}, found {value!r}")


def check_followers(progress: Any, callback: Any = None) -> None:
    """Refuse what can neither show work nor follow it.

    Raises:
        TypeError: ``progress`` is neither a bool nor None, or ``callback`` no function.
    """
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress: expected a bool or None, found {progress!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a function or None, found {callback!r}")


def check_positive(name: str, value: Any) -> None:
    """Refuse anything but a positive finite number.

    Raises:
        TypeError: No number.
        ValueError: Says what was found.
    """
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, found {value}")


def check_variances(name: str, value: Tensor) -> None:
    """Refuse variances that are not positive and finite.

    Raises:
        ValueError: Says how many there are and where the first is.
    """
    bad = ~(torch.isfinite(value) & (value > 0))
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        index = first[0] if len(first) == 1 else first
        raise ValueError(
            f"{name}: expected positive finite variances, found {int(bad.sum())} that "
            f"are not, the first at index {index}: {float(value[first])}"
        )


def check_finite_parameters(name: str, module: torch.nn.Module) -> None:
    """Refuse NaN or infinite parameters, by name.

    A value that sits on the bound of its constraint is fine, although GPyTorch keeps
    it as minus infinity: ``likelihood.noise = 1e-4`` is one.

    Args:
        name: What the module is to the caller, such as "model".
        module: Module whose parameters may have GPyTorch constraints.

    Raises:
        ValueError: Names the first offending parameter.
    """
    for path, parameter in module.named_parameters():
        if torch.isfinite(parameter).all():
            continue
        owner, _, local = path.rpartition(".")
        constraint = getattr(
            module.get_submodule(owner), f"{local}_constraint", torch.nn.Identity()
        )
        value = getattr(constraint, "transform", constraint)(parameter)
        if not (torch.isfinite(value) & (value > 0)).all():
            raise ValueError(
                f"{name}: parameter {path!r} must be finite, found "
                f"{parameter.detach().flatten()[:4].tolist()}"
            )
