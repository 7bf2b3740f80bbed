"""Gradient steps of many functions, each at points of its own, inside a box.

Adam (Kingma & Ba, ICLR 2015) with a step that falls to zero along a cosine. Most of
the points a function starts from lead to lower maxima, and which ones shows early:
all but the best are given up on the way, so that thirty starts cost about as much as
six that go on to the end. The last one goes on from the best point it has been at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.bayesopt.candidates import picked
from sgdgp.bayesopt.functions import Functions

_DECAY, _SECOND_DECAY = 0.9, 0.95

_GIVEN_UP = ((0.1, 3), (0.25, 10), (0.5, 1000))
"""After this share of the steps one of so many points goes on."""


class Ascent(NamedTuple):
    """Where gradient steps led.

    Attributes:
        x: The best point of every function (s, d).
        values: The functions there (s,).
        start_values: The largest values where they started (s,).
    """

    x: Float[Tensor, "s d"]
    values: Float[Tensor, " s"]
    start_values: Float[Tensor, " s"]


def ascend(
    functions: Functions,
    x: Float[Tensor, "s q d"],
    bounds: Float[Tensor, "2 d"],
    rates: Float[Tensor, " d"],
    *,
    steps: int,
) -> Ascent:
    """Follow the gradient of every function from all of its points.

    Args:
        functions: s functions.
        x: Where to start (s, q, d).
        bounds: Lower and upper corner (2, d).
        rates: Length of the first step along each input (d,).
        steps: Gradient steps; with zero the functions are only evaluated.

    Returns:
        The best of all points that were visited.
    """
    lower, upper = bounds
    survivors = _survivors(x.shape[1], steps)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    values, slope = value_and_slope(functions, x, wanted=steps > 0)
    best, best_values, best_slope, start = x, values, slope, values.amax(1)
    for step in range(steps):
        if step in survivors:
            best_values, index = best_values.topk(survivors[step], 1)
            x, best, slope, best_slope, first, second = (
                picked(points, index)
                for points in (x, best, slope, best_slope, first, second)
            )
            if survivors[step] == 1:
                x, slope, first = best, best_slope, torch.zeros_like(first)
        first = first.lerp(slope, 1 - _DECAY)
        second = second.lerp(slope.square(), 1 - _SECOND_DECAY)
        mean = first / (1 - _DECAY ** (step + 1))
        size = (second / (1 - _SECOND_DECAY ** (step + 1))).sqrt()
        direction = mean / size.clamp_min(torch.finfo(x.dtype).tiny)
        length = 0.5 * (1 + math.cos(math.pi * step / steps))
        x = torch.clamp(x + length * rates * direction, lower, upper)
        values, slope = value_and_slope(functions, x, wanted=step + 1 < steps)
        better = values > best_values
        best_values = torch.where(better, values, best_values)
        best = torch.where(better.unsqueeze(-1), x, best)
        best_slope = torch.where(better.unsqueeze(-1), slope, best_slope)
    top = best_values.argmax(1, keepdim=True)
    return Ascent(picked(best, top)[:, 0], best_values.gather(1, top)[:, 0], start)


def value_and_slope(
    functions: Functions, x: Float[Tensor, "s q d"], *, wanted: bool = True
) -> tuple[Float[Tensor, "s q"], Float[Tensor, "s q d"]]:
    """Every function at its own points, and its gradients; x in their place if not."""
    if not wanted:
        with torch.no_grad():
            return functions.each(x), x
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = functions.each(x)
        (slope,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), slope


def _survivors(count: int, steps: int) -> dict[int, int]:
    """How many points of each function go on from which step."""
    found: dict[int, int] = {}
    for share, one_of in _GIVEN_UP:
        left = math.ceil(count / one_of)
        if left < min(found.values(), default=count):
            found[max(1, round(share * steps))] = left
    return found
