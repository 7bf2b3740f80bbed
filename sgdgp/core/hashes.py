"""Hashes of values and of what a module is made of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_NAMED = 5  # differences that a message names: what is wrong shows in the first few
_HASH = re.compile(r" ?[0-9a-f]{32}$")

_FORMER_MODULES = {
    "TanimotoKernel": "sgdgp.kernels.tanimoto",
    "NeuralTangentKernel": "sgdgp.kernels.neural_tangent",
    "MaternModel": "sgdgp.bayesopt.default_model",
    "GPModel": "sgdgp.sklearn.model",
    "WeightedGPModel": "sgdgp.sklearn.model",
}
"""Where classes of sgdgp that a user's model may have stood in version 0.1.0."""


def digest(value: Any) -> str:
    """A hash of a tensor's type, shape and bytes, or of what str() says."""
    found = hashlib.sha256()
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if value.numel() == 1:
            # An expanded element calls itself contiguous, whatever its strides.
            value = value.new_empty(1).copy_(value.reshape(1))
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    else:
        found.update(str(value).encode())
    return found.hexdigest()[:32]


def structure_of(model: torch.nn.Module) -> dict[str, str]:
    """Hashes of the classes and plain attributes of a model's modules, by name.

    Of a class the name, not the module where it is defined: that may be a script.
    """
    return _structure(model, lambda cls: cls.__qualname__)


def former_structure_of(model: torch.nn.Module) -> dict[str, str]:
    """The same as version 0.1.0 hashed it, with the modules where classes stood."""
    return _structure(model, _former_name)


def differences(stored: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What is not the same, in words: first what can be read, then what was hashed.

    Args:
        stored: Words, hashes, or words and a hash behind them, by name.
        here: The same of what is at hand.
    """
    said, hashed = [], []
    for name in [*stored, *(name for name in here if name not in stored)]:
        before, now = stored.get(name), here.get(name)
        if before == now:
            continue
        if before is None or now is None:
            said.append(f"{name} is only {'here' if before is None else 'in the file'}")
        elif _HASH.sub("", before) != _HASH.sub("", now):
            words = _HASH.sub("", now), _HASH.sub("", before)
            said.append(f"{name} is {words[0]}, expected {words[1]}")
        else:
            hashed.append(name)
    return [*said, *hashed]


def in_words(differing: list[str]) -> str:
    """The first few of them in a line."""
    more = len(differing) - _NAMED
    return "; ".join(differing[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def plain_attributes(module: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """Numbers, strings and sequences of them, such as a Matern kernel's nu."""
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and name != "training" and _is_plain(value):
            yield name, value


def _structure(
    model: torch.nn.Module, name_of: Callable[[type], str]
) -> dict[str, str]:
    return {
        f"structure of {name or 'the model'}": digest(
            f"{name_of(type(module))} {list(plain_attributes(module))}"
        )
        for name, module in model.named_modules()
    }


def _former_name(cls: type) -> str:
    module = cls.__module__
    if module.partition(".")[0] == "sgdgp":
        module = _FORMER_MODULES.get(cls.__qualname__, module)
    return f"{module}.{cls.__qualname__}"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
