"""A tiny folder of images and a setting that lives on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.networks.settings import Recipe, Setting

TINY = Setting(
    "mlp",
    "Tiny",
    "mnist_10k",
    60,
    20,
    30,
    Recipe(epochs=15, batch=10, learning_rate=0.1),
    network="mlp",
    widths=(6,),
    pool=4,
    prior="isotropic",
)
"""Named as the setting that has the exact posterior too."""


def write_images(folder: Path) -> None:
    """Images whose class is the place of a bright bar, and others without one."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    labels = rng.integers(0, 10, 110)
    images = rng.integers(0, 60, (110, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label + 4 : 2 * label + 7] += 180
    other = rng.integers(0, 255, (12, 28, 28))
    colour = rng.integers(0, 255, (40, 3, 32, 32))
    np.savez(
        folder / "images/mnist_10k.npz", images=images.astype(np.uint8), labels=labels
    )
    np.savez(
        folder / "images/fashion_mnist_part.npz",
        images=other.astype(np.uint8),
        labels=labels[:12],
    )
    np.savez(
        folder / "images/cifar10_part.npz",
        train_images=colour.astype(np.uint8),
        train_labels=labels[:40],
        test_images=colour[:10].astype(np.uint8),
        test_labels=labels[:10],
    )
