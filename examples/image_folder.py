"""Labelled images in folders, one folder per class, read as a network expects them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Of the colours of ImageNet: what pre-trained networks were trained with."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Images under root/<class>/..., without augmentation.

    An image's shorter side becomes ``resize`` pixels, its centre is cut out, and its
    colours are normalised. Classes are numbered in the order of their folders' names,
    as torchvision does it, so that the outputs of pre-trained networks fit.

    Args:
        root: Folder of the classes' folders.
        size: Height and width of what the network sees.
        resize: Length of the shorter side before cutting. Default: 256 / 224 of
            ``size``.

    Raises:
        FileNotFoundError: No folder, or no images in it.
    """

    def __init__(
        self, root: str | Path, size: int = 224, resize: int | None = None
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root: no folder {root}")
        self.size = size
        self.resize = round(size * 256 / 224) if resize is None else resize
        self.classes = sorted(place.name for place in root.iterdir() if place.is_dir())
        self.files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in _SUFFIXES
        ]
        if not self.files:
            raise FileNotFoundError(
                f"root: no images in {root}; expected {root}/<class>/<image>.jpg"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file, label = self.files[index]
        return self._read(file), torch.tensor(label)

    def _read(self, file: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"cannot read image {file}: {error}") from error
        factor = self.resize / min(image.size)
        width, height = (max(self.resize, int(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, deviation = (torch.tensor(c).view(3, 1, 1) for c in (MEAN, DEVIATION))
        return (pixels - mean) / deviation
