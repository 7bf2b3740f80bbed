"""Images of the study: splits, wrong labels, other images, rotated digits.

The files lie in ``images/`` of the folder that ``SGDGP_DATA`` names.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks.settings import SETTINGS, Setting
from benchmarks.uci.data import data_folder
from benchmarks.uci.download import DamagedFileError, DataUnavailableError

ANGLES = tuple(range(0, 181, 15))
NUM_CLASSES = 10
_SOURCE = "SGDGP_DATA has to name the folder that holds images/{file}"


@dataclass(frozen=True)
class Images:
    """Images in the units of the network, and their classes.

    Attributes:
        x: Images (n, channels, height, width).
        y: Classes (n,).
    """

    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.y)

    def loader(self, batch: int = 100) -> DataLoader[tuple[Tensor, ...]]:
        """The images in order, in batches."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=batch)


@dataclass(frozen=True)
class Task:
    """What all methods are given, and what they are scored on.

    Attributes:
        setting: Which of ``SETTINGS``.
        seed: Of the split, the wrong labels, and everything that follows.
        train: Training images. Some labels of all three sets may be wrong.
        calibration: Images for choosing one number of a method.
        test: Test images.
        clean_y: Their right classes.
        ood: Images of clothes: no class is right.
        rotated: Test digits at each of ``ANGLES``, one set after the other
            (angles * r, c, h, w); None where there are no digits.
        rotated_y: Their right classes (r,).
    """

    setting: Setting
    seed: int
    train: Images
    calibration: Images
    test: Images
    clean_y: Int[Tensor, " n"]
    ood: Float[Tensor, "m c h w"]
    rotated: Float[Tensor, "a c h w"] | None
    rotated_y: Int[Tensor, " r"]


def load_task(
    name: str, seed: int, *, num_ood: int = 1000, num_rotated: int = 200
) -> Task:
    """The task of one setting and seed.

    Args:
        name: One of ``SETTINGS``.
        seed: Draws the split and the wrong labels.
        num_ood: Images of clothes.
        num_rotated: Test digits to rotate.

    Raises:
        ValueError: An unknown name.
        DataUnavailableError: The files are not there.
        DamagedFileError: They are not what they have to be.
    """
    if name not in SETTINGS:
        known = ", ".join(SETTINGS)
        raise ValueError(f"settings: found {name!r}, expected one of {known}")
    setting = SETTINGS[name]
    generator = torch.Generator().manual_seed(seed)
    if setting.source == "cifar10_part":
        pool, test = _cifar()
        order = torch.randperm(len(pool), generator=generator)
        kept, _ = order.split([len(order), 0])
    else:
        pool = read_images("mnist_10k.npz", "images", "labels")
        order = torch.randperm(len(pool), generator=generator)
        kept = order[: -setting.test]
        test = _take(pool, order[-setting.test :])
    calibration = _take(pool, kept[-setting.calibration :])
    train = _take(pool, kept[: -setting.calibration][: setting.train])
    mean = train.x.mean((0, 2, 3), keepdim=True)
    scale = train.x.std((0, 2, 3), keepdim=True)

    def scaled(x: Tensor) -> Tensor:
        x = (x - mean) / scale
        return functional.avg_pool2d(x, setting.pool) if setting.pool > 1 else x

    digits = setting.source == "mnist_10k"
    some = _take(test, torch.arange(min(num_rotated, len(test))))
    turned = torch.cat([rotate(some.x, angle) for angle in ANGLES]) if digits else None

    def prepared(images: Images) -> Images:
        y = _flipped(images.y, setting.wrong_labels, generator)
        return Images(scaled(images.x), y)

    return Task(
        setting,
        seed,
        prepared(train),
        prepared(calibration),
        prepared(test),
        test.y,
        scaled(clothes(train.x.shape[1:], num_ood)),
        None if turned is None else scaled(turned),
        some.y,
    )


def rotate(x: Float[Tensor, "n c h w"], degrees: float) -> Float[Tensor, "n c h w"]:
    """Images turned counter-clockwise, black where nothing was."""
    cosine = math.cos(math.radians(degrees))
    sine = math.sin(math.radians(degrees))
    turn = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], dtype=x.dtype)
    grid = functional.affine_grid(
        turn.expand(len(x), 2, 3), list(x.shape), align_corners=False
    )
    return functional.grid_sample(x, grid, align_corners=False)


def clothes(shape: Sequence[int], count: int) -> Float[Tensor, "m c h w"]:
    """Images of clothes in the shape of the training images, black around them."""
    x = read_images("fashion_mnist_part.npz", "images", "labels").x[:count]
    channels, height, width = shape
    missing = (height - x.shape[2], width - x.shape[3])
    top, left = missing[0] // 2, missing[1] // 2
    x = functional.pad(x, (left, missing[1] - left, top, missing[0] - top))
    return x.expand(-1, channels, -1, -1)


def _flipped(
    y: Int[Tensor, " n"], fraction: float, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Labels with a fraction of them replaced by one of the other classes."""
    count = round(fraction * len(y))
    rows = torch.randperm(len(y), generator=generator)[:count]
    shift = torch.randint(1, NUM_CLASSES, (count,), generator=generator)
    y = y.clone()
    y[rows] = (y[rows] + shift) % NUM_CLASSES
    return y


def _take(images: Images, rows: Int[Tensor, " m"]) -> Images:
    return Images(images.x[rows], images.y[rows])


def _cifar() -> tuple[Images, Images]:
    return (
        read_images("cifar10_part.npz", "train_images", "train_labels"),
        read_images("cifar10_part.npz", "test_images", "test_labels"),
    )


def read_images(file: str, images: str, labels: str) -> Images:
    """One set of images with values from 0 to 1."""
    path = locate(file)
    try:
        with np.load(path) as arrays:
            x: NDArray[np.uint8] = arrays[images]
            y: NDArray[np.int64] = arrays[labels].astype(np.int64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error
    if len(x) != len(y) or x.dtype != np.uint8 or x.ndim not in {3, 4}:
        raise DamagedFileError(
            f"{path}: found {images} {x.dtype} {x.shape} and {len(y)} {labels}, "
            "expected as many uint8 images"
        )
    tensor = torch.from_numpy(x).float() / 255
    return Images(
        tensor.unsqueeze(1) if tensor.ndim == 3 else tensor, torch.from_numpy(y)
    )


def locate(file: str) -> Path:
    """Where a file of images is.

    Raises:
        DataUnavailableError: Nowhere.
    """
    folder = data_folder()
    source = _SOURCE.format(file=file)
    if folder is None:
        raise DataUnavailableError(f"{source}; it is not set")
    path = folder / "images" / file
    if not path.is_file():
        raise DataUnavailableError(f"{source}; there is no {path}")
    return path
