"""How some functions of networks map derivatives of their arguments to their value's.

A rule is called as ``rule(of, func, *args, **kwargs)`` with the arguments of the
function, and ``of`` to look derivatives up. It returns those of the value, or None
where it does not fit. Derivatives in k directions come in parts, so that those of one
part stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Chunks = list[Tensor]
"""Derivatives of a tensor in k directions: parts (c, *shape) of them."""

Known = Callable[[Any], Chunks | None]
"""Derivatives of an argument, None for a constant."""


def _addition(
    of: Known, func: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Chunks | None:
    """Residual connections."""
    both = [of(a) for a in args]
    if len(both) != 2 or kwargs or None in both or args[0].shape != args[1].shape:
        return None
    return [a + b for a, b in zip(*both, strict=True)]


def _rectifier(
    of: Known, func: Callable[..., Tensor], input: Tensor, inplace: bool = False
) -> Chunks | None:
    inputs = of(input)
    if inputs is None:
        return None
    return [torch.ops.aten.threshold_backward(t, input.detach(), 0) for t in inputs]


def _convolution(
    of: Known,
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Chunks | None:
    """Directions become examples for the input's part, channels for the weights'."""
    inputs, weights, biases = of(input), of(weight), of(bias)
    if input.ndim != weight.ndim or groups != 1:
        return None
    x, w = input.detach(), weight.detach()
    rest = (None, stride, padding, dilation, groups)
    out = []
    for j in range(len(inputs or weights or biases or [])):
        total = None
        if inputs is not None:
            shape = inputs[j].shape[:2]
            total = func(inputs[j].flatten(0, 1), w, *rest).unflatten(0, shape)
        if weights is not None:
            found = func(x, weights[j].flatten(0, 1), *rest)
            found = found.unflatten(1, (-1, w.shape[0])).transpose(0, 1)
            total = found.contiguous() if total is None else total.add_(found)
        if total is None:
            return None
        if biases is not None:
            total.add_(biases[j].unflatten(1, (-1,) + (1,) * (x.ndim - 2))[:, None])
        out.append(total)
    return out


def _linear(
    of: Known,
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Chunks | None:
    inputs, weights, biases = of(input), of(weight), of(bias)
    if weights is None or input.ndim < 2:
        return None
    x, w = input.detach(), weight.detach()
    out = []
    for j, directions in enumerate(weights):
        total = x.flatten(0, -2) @ directions.mT
        if biases is not None:
            total.add_(biases[j][:, None])
        total = total.unflatten(1, x.shape[:-1])
        out.append(total if inputs is None else total.add_(func(inputs[j], w)))
    return out


def _batch_norm(
    of: Known,
    func: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Chunks | None:
    """With constant statistics: a scale and a shift of each channel."""
    inputs, weights, biases = of(input), of(weight), of(bias)
    if training or inputs is None:
        return None
    shape = (-1,) + (1,) * (input.ndim - 2)
    scale = (running_var + eps).rsqrt()
    if weights is not None:
        normed = torch.addcmul(
            (-running_mean * scale).view(shape), input.detach(), scale.view(shape)
        )
    if weight is not None:
        scale = scale * weight.detach()
    out = []
    for j in range(len(inputs)):
        total = inputs[j] * scale.view(shape)
        if weights is not None:
            total.addcmul_(normed, weights[j].unflatten(1, shape)[:, None])
        if biases is not None:
            total.add_(biases[j].unflatten(1, shape)[:, None])
        out.append(total)
    return out


RULES: dict[Callable[..., Any], Callable[..., Chunks | None]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), _addition),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _rectifier),
}
