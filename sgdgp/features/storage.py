"""What a file leaves out of prior draws, because their kernel gives it on loading.

That is the kernel itself, and every exact feature map of a class that is not registered
for storage, such as that of a network's tangent kernel: it is made anew.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.core.codec import Finder, is_stored_class, register_stored_class
from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import random_features

register_stored_features = register_stored_class
"""What version 0.1.0 called it, for feature maps."""

_KERNEL = "kernel"
_MAP = ".feature_map"


def given_by_kernel(value: Any, name: str) -> Any:
    """A mark for what the kernel gives, see ``codec.encode``; None for all else."""
    if isinstance(value, Kernel):
        return _KERNEL
    if (
        isinstance(value, FeatureMap)
        and value.exact
        and not is_stored_class(type(value))
    ):
        # Names of arguments and positions in sequences that lead from the kernel's map
        # to this part of it.
        return {"features": name.partition(_MAP)[2].lstrip(".")}
    return None  # the codec refuses it


def parts_of_kernel(kernel: Kernel, like: Tensor) -> Finder:
    """Finds what ``given_by_kernel`` has marked, for kernel inputs like (n, d)."""

    def find(mark: Any) -> Any:
        if mark == _KERNEL:
            return kernel
        features = random_features(
            kernel,
            dim=like.shape[1],
            num_features=2,
            generator=torch.Generator(),
            dtype=like.dtype,
            device=like.device,
        )
        return _part_of(features, mark["features"])

    return find


def _part_of(features: FeatureMap, path: str) -> FeatureMap:
    """The part of a kernel's map that a path leads to.

    Raises:
        ValueError: The kernel has no such part.
    """
    found: Any = features
    for step in filter(None, path.split(".")):
        if isinstance(found, FeatureMap):
            known = step in inspect.signature(type(found)).parameters
            found = getattr(found, step) if known else None
        else:
            known = isinstance(found, tuple | list) and int(step) < len(found)
            found = found[int(step)] if known else None
    if not isinstance(found, FeatureMap) or not found.exact:
        raise ValueError("it holds features of a kernel, and the kernel has others")
    return found
