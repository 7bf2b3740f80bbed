"""Inference mode ends at the door of whatever keeps tensors or differentiates.

A tensor that was made in inference mode can never take part in a derivative, and a
kept one would spoil those of later calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def outside_inference_mode(function: F) -> F:
    """The same function; in inference mode it runs without gradients instead."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def with_gradients(function: F) -> F:
    """The same function; it records gradients whatever its caller has switched off."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
