"""What a fit has found, as tensors and JSON, and back; nothing is executed.

Objects are stored by a name from a table and by the arguments of their constructor,
which every class in it keeps as attributes of the same names. Classes are never looked
up by what a file says, only in the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sgdgp.core.errors import NotStorableError
from sgdgp.networks.expectation_maximisation import EMStep, PrecisionUpdate
from sgdgp.networks.fitting import RunState
from sgdgp.networks.likelihoods import Categorical, Gaussian
from sgdgp.networks.priors.base import WeightPrior, prior_from

C = TypeVar("C", bound=type)

_STORED: dict[str, type] = {
    cls.__name__: cls
    for cls in (Categorical, EMStep, Gaussian, PrecisionUpdate, RunState)
}


def register_stored_class(cls: C) -> C:
    """Let objects of a class be stored, such as a likelihood; usable as a decorator.

    The class must keep each argument of its constructor as an attribute of the same
    name. To load a file, it must have been registered in that process too.

    Args:
        cls: The class; files know it by its name.

    Raises:
        ValueError: Another class of that name is registered.
    """
    if _STORED.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"another class named {cls.__name__} is registered")
    return cls


def encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON needs to know of a value; its tensors are put into ``tensors``.

    Args:
        value: None, a number, a string, a tensor, a weight prior, an object of a
            registered class, or a list, tuple or dictionary (by strings) of those.
        name: Prefix of the names of its tensors.
        tensors: Where they go.

    Raises:
        NotStorableError: There is something else in it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        # Blocks of weights lie as transposes, and come back so.
        turned = value.ndim == 2 and not value.is_contiguous()
        tensors[name] = value.mT if turned else value
        return {"tensor": name, "turned": turned}
    if isinstance(value, WeightPrior):
        own, state = value.state()
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        return {"prior": name, "names": list(own), "state": state}
    if isinstance(value, list | tuple):
        items = [encoded(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise NotStorableError(f"{name}: expected strings as keys, found {value!r}")
        return {
            "dict": {k: encoded(v, f"{name}.{k}", tensors) for k, v in value.items()}
        }
    cls = type(value)
    if _STORED.get(cls.__name__) is not cls:
        raise NotStorableError(
            f"{name} is a {cls.__name__}, which cannot be stored; register the class "
            "with sgdgp.networks.stored_values.register_stored_class"
        )
    arguments = {
        argument: encoded(getattr(value, argument), f"{name}.{argument}", tensors)
        for argument in inspect.signature(cls).parameters
    }
    return {"class": cls.__name__, "arguments": arguments}


def decoded(state: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value behind ``encoded``, its tensors on ``device``.

    Raises:
        ValueError: An object is of a class that is not registered in this process, or
            the state is none of ``encoded``.
        KeyError: A tensor is missing.
    """
    if state is None or isinstance(state, bool | int | float | str):
        return state
    if not isinstance(state, dict):
        raise ValueError(f"unknown state {state!r}")
    if "tensor" in state:
        value = tensors[state["tensor"]].to(device)
        return value.mT if state["turned"] else value
    if "prior" in state:
        own = {n: tensors[f"{state['prior']}.{n}"].to(device) for n in state["names"]}
        return prior_from(own, state["state"])
    for kind in (list, tuple):
        if kind.__name__ in state:
            return kind(decoded(v, tensors, device) for v in state[kind.__name__])
    if "dict" in state:
        return {k: decoded(v, tensors, device) for k, v in state["dict"].items()}
    cls = _STORED.get(state["class"])
    if cls is None:
        raise ValueError(
            f"it holds a {state['class']}, which is not registered here; import what "
            "calls register_stored_class for it first"
        )
    return cls(
        **{k: decoded(v, tensors, device) for k, v in state["arguments"].items()}
    )
