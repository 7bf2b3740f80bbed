"""Hashes of values and of what a module is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """A hash of a tensor's type, shape and bytes, or of what str() says."""
    found = hashlib.sha256()
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if value.numel() == 1:
            # An expanded element calls itself contiguous, whatever its strides.
            value = torch.empty(1, dtype=value.dtype).copy_(value.reshape(1))
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    else:
        found.update(str(value).encode())
    return found.hexdigest()[:32]


def structure_of(model: torch.nn.Module) -> dict[str, str]:
    """Hashes of the classes and plain attributes of a model's modules, by name."""
    return {
        f"structure of {name or 'the model'}": digest(_structure(module))
        for name, module in model.named_modules()
    }


def plain_attributes(module: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """Numbers, strings and sequences of them, such as a Matern kernel's nu."""
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and name != "training" and _is_plain(value):
            yield name, value


def _structure(module: torch.nn.Module) -> str:
    """Class and plain attributes, such as a Matern kernel's nu."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__} {list(plain_attributes(module))}"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
