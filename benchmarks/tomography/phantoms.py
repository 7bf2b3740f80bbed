"""Images that are known exactly: means of shapes over pixels, within [0, 1].

A pixel's value is the mean over a grid of points in it, so that sizes differ in detail
only. Coordinates are those of the square or cube [-1, 1], rows from the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.networks.data import read_images

_ELLIPSOIDS = torch.tensor(
    [
        # value, half axes (x, y, z), centre (x, y, z), degrees about z
        [1.0, 0.69, 0.92, 0.81, 0.0, 0.0, 0.0, 0.0],
        [-0.8, 0.6624, 0.874, 0.78, 0.0, -0.0184, 0.0, 0.0],
        [-0.2, 0.11, 0.31, 0.22, 0.22, 0.0, 0.0, -18.0],
        [-0.2, 0.16, 0.41, 0.28, -0.22, 0.0, 0.0, 18.0],
        [0.1, 0.21, 0.25, 0.41, 0.0, 0.35, -0.15, 0.0],
        [0.1, 0.046, 0.046, 0.05, 0.0, 0.1, 0.25, 0.0],
        [0.1, 0.046, 0.046, 0.05, 0.0, -0.1, 0.25, 0.0],
        [0.1, 0.046, 0.023, 0.05, -0.08, -0.605, 0.0, 0.0],
        [0.1, 0.023, 0.023, 0.02, 0.0, -0.606, 0.0, 0.0],
        [0.1, 0.023, 0.046, 0.02, 0.06, -0.605, 0.0, 0.0],
    ]
)
"""The phantom of Shepp and Logan with Toft's contrast, and its usual third axis."""

_FINE, _FINE_3D = 8, 3
"""Points of a pixel along each axis."""


def shepp_logan(size: int, slices: int | None = None) -> Tensor:
    """The head phantom (size, size), or as a volume (slices, size, size)."""
    flat = slices is None

    def value(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        total = torch.zeros(torch.broadcast_shapes(x.shape, y.shape, z.shape))
        for height, a, b, c, x0, y0, z0, degrees in _ELLIPSOIDS.tolist():
            cos, sin = (f(math.radians(degrees)) for f in (math.cos, math.sin))
            u = cos * (x - x0) + sin * (y - y0)
            v = cos * (y - y0) - sin * (x - x0)
            # The flat phantom has every ellipse at its widest.
            w = torch.zeros(()) if flat else (z - z0) / c
            total += height * ((u / a).square() + (v / b).square() + w.square() <= 1)
        return total

    return _means(value, size, slices).clamp(0.0, 1.0)


def rectangles(
    size: int,
    seed: int,
    count: int = 3,
    spread: float = 0.05,
    across: tuple[float, float] = (0.1, 0.25),
    along: tuple[float, float] = (0.25, 0.5),
) -> Tensor:
    """Rectangles that all lie one way (size, size), up to a spread in radians.

    Half their sides are drawn from ``across`` and ``along``.
    """
    random = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=random))

    mode = between(0.0, math.pi)
    shapes = [
        (
            mode + between(-spread, spread),
            (between(-0.5, 0.5), between(-0.5, 0.5)),
            (between(*across), between(*along)),
            between(0.3, 1.0),
        )
        for _ in range(count)
    ]

    def value(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        found = torch.zeros(torch.broadcast_shapes(x.shape, y.shape))
        for angle, (x0, y0), (a, b), height in shapes:
            u = math.cos(angle) * (x - x0) + math.sin(angle) * (y - y0)
            v = math.cos(angle) * (y - y0) - math.sin(angle) * (x - x0)
            found = torch.where((u.abs() <= a) & (v.abs() <= b), height, found)
        return found

    return _means(value, size, None)


def digit(index: int) -> Tensor:
    """A digit of MNIST (28, 28)."""
    return read_images("mnist_10k.npz", "images", "labels").x[index, 0]


def _means(
    value: Callable[[Tensor, Tensor, Tensor], Tensor], size: int, slices: int | None
) -> Tensor:
    """Means over pixels of a function of coordinates."""
    fine = _FINE if slices is None else _FINE_3D

    def points(count: int) -> Tensor:
        return (2 * torch.arange(count * fine) + 1) / (count * fine) - 1

    across = points(size)
    x, y = across, -across[:, None]
    if slices is None:
        found = value(x, y, torch.zeros(()))
        return found.reshape(size, fine, size, fine).mean((1, 3))
    layers = []
    for z in points(slices):  # one at a time, for memory
        found = value(x, y, z)
        layers.append(found.reshape(size, fine, size, fine).mean((1, 3)))
    return torch.stack(layers).reshape(slices, fine, size, size).mean(1)
