"""Digits of some classes, turned: images of a source and of its targets."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from benchmarks.learned_priors.training import trained
from benchmarks.networks.data import Images, read_images, rotate
from benchmarks.networks.network import perceptron

TEST = 1000
HEAD = "5.*"
"""Weights of the last layer."""

_SOURCE = 500
"""Images of each class that are the source's."""

_VIEWS = 3
"""Angles at which the source's network sees each of its images."""


def digits(classes: int, seed: int) -> tuple[Images, Images, Images]:
    """Of classes drawn by the seed: the source's, those of targets, and for testing."""
    first = classes * _SOURCE
    source, target, test = _drawn(
        "mnist_10k.npz", slice(classes), seed, slice(first), slice(first, -TEST)
    )
    return source, target, test


def others(name: str, classes: int, seed: int) -> tuple[Images, Images]:
    """Of other classes: targets, and for testing.

    Args:
        name: "classes", digits that are not of the source, or "fashion".
        classes: How many.
        seed: As of ``digits``.
    """
    file = "mnist_10k.npz" if name == "classes" else "fashion_mnist_part.npz"
    target, test = _drawn(file, slice(classes, 2 * classes), seed, slice(-TEST))
    return target, test


def _drawn(file: str, some: slice, seed: int, *parts: slice) -> Iterator[Images]:
    """Parts of the images of some classes, in random order, and those for testing."""
    generator = torch.Generator().manual_seed(seed)
    every = read_images(file, "images", "labels")
    drawn = torch.randperm(10, generator=generator)[some]
    number = torch.full((10,), -1)
    number[drawn] = torch.arange(len(drawn))
    rows = torch.isin(every.y, drawn).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)]
    for part in (*parts, slice(-TEST, None)):
        chosen = rows[part]
        yield Images(every.x[chosen], number[every.y[chosen]])


def with_new_head(network: nn.Sequential, classes: int, seed: int) -> nn.Sequential:
    """A copy with another last layer, as one begins: zeros would hide the body."""
    *body, head = copy.deepcopy(network)
    assert isinstance(head, nn.Linear)
    torch.manual_seed(seed)
    found = nn.Linear(head.in_features, classes)
    return nn.Sequential(*body, found).eval()


def few(images: Images, each: int, classes: int, skip: int = 0) -> Images:
    """The first of each class, by class, after those that are skipped."""
    of_class = [torch.where(images.y == c)[0] for c in range(classes)]
    rows = torch.cat([rows[skip : skip + each] for rows in of_class])
    return Images(images.x[rows], images.y[rows])


def turned(images: Images, low: float, high: float, seed: int) -> Images:
    """At 14 x 14 pixels, each by an angle in degrees drawn between two."""
    generator = torch.Generator().manual_seed(seed)
    angles = low + (high - low) * torch.rand(len(images), generator=generator)
    x = [rotate(x, a) for x, a in zip(images.x.split(1), angles.tolist(), strict=True)]
    return Images(functional.avg_pool2d(torch.cat(x), 2), images.y)


def source_network(
    images: Images, low: float, high: float, seed: int
) -> tuple[nn.Sequential, Images]:
    """A perceptron, and the turned images that it was trained on."""
    # At one angle all views are the same image, which counts once.
    views = _VIEWS if low < high else 1
    seen = [turned(images, low, high, 10 * seed + view) for view in range(views)]
    source = Images(torch.cat([s.x for s in seen]), torch.cat([s.y for s in seen]))
    torch.manual_seed(seed)
    network = perceptron(14 * 14, (32, 32), int(images.y.max()) + 1)
    steps = 15 * _VIEWS * len(images) // 100
    network = trained(
        network,
        source.x,
        source.y,
        steps=steps,
        rate=3e-3,
        batch=100,
        decay=1e-4,
        seed=seed,
    )
    return network.eval(), source
