"""Feature maps and prior draws as tensors and JSON, and back; nothing is executed.

A map is stored by a name from a table and by the arguments of its constructor, which
every map here keeps as attributes of the same names. Classes are never looked up by
what a file says, only in the table.

An exact map that is not in the table, such as that of a network's tangent kernel, is
not in the file: on loading it is made anew from the kernel, which is given then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.core.errors import NotStorableError
from sgdgp.features.base import FeatureMap
from sgdgp.features.compose import (
    RestrictedFeatures,
    ScaledFeatures,
    SumFeatures,
    TensorFeatures,
)
from sgdgp.features.dispatch import random_features
from sgdgp.features.finite import ConstantFeatures, LinearFeatures, PolynomialFeatures
from sgdgp.features.fourier import FourierFeatures
from sgdgp.features.prior_draws import DrawGroup, ExactDraws, PriorDraws
from sgdgp.features.tasks import IndexFeatures, PairFeatures, TaskFeatures

_STORED: dict[str, type[FeatureMap]] = {
    cls.__name__: cls
    for cls in (
        ConstantFeatures,
        FourierFeatures,
        IndexFeatures,
        LinearFeatures,
        PairFeatures,
        PolynomialFeatures,
        RestrictedFeatures,
        ScaledFeatures,
        SumFeatures,
        TaskFeatures,
        TensorFeatures,
    )
}


def register_stored_features(cls: type[FeatureMap]) -> type[FeatureMap]:
    """Let a feature map be saved and loaded; usable as a decorator.

    The map must keep each argument of its constructor as an attribute of the same
    name: a tensor, a number, a string, None, a feature map, or a sequence of maps.
    To load a file, the class must have been registered in that process too.

    Args:
        cls: The class; files know it by its name.

    Raises:
        ValueError: Another class of that name is registered.
    """
    if _STORED.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"another class named {cls.__name__} is registered")
    return cls


Path = tuple[str | int, ...]
"""Names of arguments and positions in sequences that lead to a part of a map."""


def state_of_features(
    features: FeatureMap, name: str, tensors: dict[str, Tensor], path: Path = ()
) -> dict[str, Any]:
    """What JSON needs to know of a map; its tensors are put into ``tensors``.

    Args:
        features: The map.
        name: Prefix of the names of its tensors.
        tensors: Where they go.
        path: Where the map is in that of the kernel.

    Raises:
        NotStorableError: The map, or a part of it, is of an unregistered class and not
            exact.
    """
    cls = type(features)
    if _STORED.get(cls.__name__) is not cls:
        if features.exact:
            return {"of_kernel": list(path)}
        raise NotStorableError(
            f"{cls.__name__} cannot be stored: register the class with "
            "sgdgp.features.storage.register_stored_features"
        )
    arguments = {
        argument: _state(
            getattr(features, argument),
            f"{name}.{argument}",
            tensors,
            (*path, argument),
        )
        for argument in inspect.signature(cls).parameters
    }
    return {"map": cls.__name__, "arguments": arguments}


def features_from(
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    of_kernel: Callable[[], FeatureMap] | None = None,
) -> FeatureMap:
    """The map behind ``state_of_features``.

    Args:
        state: What was returned.
        tensors: What was put there.
        of_kernel: Makes a map of the kernel, for parts that are not in the file.

    Raises:
        ValueError: The map is of a class that is not registered in this process, or
            the kernel has another one.
        KeyError: A tensor is missing.
    """
    if "of_kernel" in state:
        return _part_of(of_kernel, state["of_kernel"])
    cls = _STORED.get(state["map"])
    if cls is None:
        raise ValueError(
            f"it holds features {state['map']!r}, which are not registered here; "
            "import what calls register_stored_features for them first"
        )
    arguments = {
        name: _restored(value, tensors, of_kernel)
        for name, value in state["arguments"].items()
    }
    return cls(**arguments)


def state_of_draws(
    draws: PriorDraws | ExactDraws, name: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """What JSON needs to know of prior draws; their tensors are put into ``tensors``.

    Raises:
        NotStorableError: A feature map is of an unregistered class.
    """
    if isinstance(draws, ExactDraws):
        tensors[f"{name}.points"] = draws._points
        tensors[f"{name}.factor"] = draws._factor
        tensors[f"{name}.normals"] = draws._normals
        tensors[f"{name}.values"] = draws._values
        tensors[f"{name}.generator"] = draws._generator.get_state()
        return {
            "draws": "exact",
            "name": name,
            "num_samples": draws.num_samples,
            "dim": draws.dim,
            "max_points": draws.max_points,
        }
    groups = []
    for i, group in enumerate(draws.groups):
        tensors[f"{name}.{i}.weights"] = group.weights
        groups.append(
            state_of_features(group.feature_map, f"{name}.{i}.features", tensors)
        )
    return {"draws": "features", "name": name, "dim": draws.dim, "groups": groups}


def draws_from(
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kernel: Kernel,
    like: Tensor,
) -> PriorDraws | ExactDraws:
    """The draws behind ``state_of_draws``.

    Args:
        state: What was returned.
        tensors: What was put there, on the device of ``like``.
        kernel: The prior's kernel, for draws that are revealed point by point.
        like: A tensor of the draws' dtype and device.

    Raises:
        ValueError: A feature map is not registered, or the state is none of draws.
        KeyError: Something is missing.
    """
    name = state["name"]
    if state["draws"] == "exact":
        return _exact_draws(state, tensors, kernel, like)
    if state["draws"] != "features":
        raise ValueError(f"unknown prior draws {state['draws']!r}")

    def of_kernel() -> FeatureMap:
        return random_features(
            kernel,
            dim=int(state["dim"]),
            num_features=2,
            generator=torch.Generator(),
            dtype=like.dtype,
            device=like.device,
        )

    groups = tuple(
        DrawGroup(
            features_from(group, tensors, of_kernel), tensors[f"{name}.{i}.weights"]
        )
        for i, group in enumerate(state["groups"])
    )
    return PriorDraws(groups, int(state["dim"]), like.dtype, like.device)


def _exact_draws(
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kernel: Kernel,
    like: Tensor,
) -> ExactDraws:
    name = state["name"]
    draws = ExactDraws(
        kernel,
        int(state["num_samples"]),
        like.new_empty(0, int(state["dim"])),
        generator=torch.Generator().manual_seed(0),
        max_points=int(state["max_points"]),
    )
    draws._points = tensors[f"{name}.points"]
    draws._factor = tensors[f"{name}.factor"]
    draws._normals = tensors[f"{name}.normals"]
    draws._values = tensors[f"{name}.values"]
    draws._generator.set_state(tensors[f"{name}.generator"].cpu())
    rows = draws._points.cpu().numpy()
    draws._index = {row.tobytes(): i for i, row in enumerate(rows)}
    return draws


def _part_of(
    of_kernel: Callable[[], FeatureMap] | None, path: Sequence[str | int]
) -> FeatureMap:
    """The part of the kernel's map that a path leads to."""
    if of_kernel is None:
        raise ValueError("it holds features of a kernel, which is not known here")
    found: Any = of_kernel()
    for step in path:
        if isinstance(found, FeatureMap):
            known = step in inspect.signature(type(found)).parameters
            found = getattr(found, str(step)) if known else None
        else:
            known = isinstance(found, tuple | list) and step in range(len(found))
            found = found[step] if known else None
    if not isinstance(found, FeatureMap) or not found.exact:
        raise ValueError("it holds features of a kernel, and the kernel has others")
    return found


def _state(value: Any, name: str, tensors: dict[str, Tensor], path: Path) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, FeatureMap):
        return state_of_features(value, name, tensors, path)
    if isinstance(value, tuple | list):
        return [
            _state(item, f"{name}.{i}", tensors, (*path, i))
            for i, item in enumerate(value)
        ]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise NotStorableError(
        f"{name} is a {type(value).__name__}, which cannot be stored; expected a "
        "tensor, a number, a string, None, a feature map or a sequence of them"
    )


def _restored(
    value: Any,
    tensors: Mapping[str, Tensor],
    of_kernel: Callable[[], FeatureMap] | None,
) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors, of_kernel) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return features_from(value, tensors, of_kernel)
