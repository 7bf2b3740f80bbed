"""One split of one data set, in the units in which the papers report.

Inputs and target are z-scored with the statistics of the training rows of the
split; every RMSE and NLL is in those units.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.uci.download import (
    DamagedFileError,
    DataUnavailableError,
    cache_folder,
    cached_download,
    verify,
)
from benchmarks.uci.registry import DATASETS, MASK, NUM_SPLITS

_Number = TypeVar("_Number", np.float64, np.uint8)

_COMMIT = "f0737523712fe66a1640e4b980b927e8490b58eb"
_SOURCES = (
    "https://raw.githubusercontent.com/treforevans/uci_datasets/"
    + _COMMIT
    + "/uci_datasets/{name}/{file}",
    "https://media.githubusercontent.com/media/treforevans/uci_datasets/master/"
    "uci_datasets/{name}/{file}",
)


@dataclass(frozen=True)
class Split:
    """A train/test split in z-scored units.

    Attributes:
        name: The data set.
        index: Which of the ten splits.
        x: Training inputs (n, d).
        y: Training targets (n,).
        x_test: Test inputs (m, d).
        y_test: Test targets (m,).
    """

    name: str
    index: int
    x: Float[Tensor, "n d"]
    y: Float[Tensor, " n"]
    x_test: Float[Tensor, "m d"]
    y_test: Float[Tensor, " m"]


def data_folder() -> Path | None:
    """The folder ``SGDGP_DATA`` points at, or None where it is not set.

    Raises:
        DataUnavailableError: The variable is set, and there is no such folder.
    """
    value = os.environ.get("SGDGP_DATA")
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataUnavailableError(
            f"SGDGP_DATA: found {value!r}, which is no folder; expected the folder "
            "that holds uci/ and images/"
        )
    return folder


def locate(name: str) -> list[Path]:
    """The verified files of a data set, data files first and the mask last.

    They are looked for in ``SGDGP_DATA/uci/NAME``, then in the cache, then on the
    internet. A folder of the user's own below ``SGDGP_DATA/uci`` with
    ``data.csv.gz`` and ``test_mask.csv.gz`` is a data set as well.

    Raises:
        ValueError: Nobody knows a data set of that name.
        DamagedFileError: A file has not the pinned checksum.
        DataUnavailableError: A file is missing and cannot be downloaded.
    """
    folder = data_folder()
    info = DATASETS.get(name)
    if info is None:
        return _own_files(name, folder)
    if folder is not None and (folder / "uci" / name).is_dir():
        paths = [folder / "uci" / name / file for file in info.files]
        for path, expected in zip(paths, info.files.values(), strict=True):
            if not path.exists():
                raise DataUnavailableError(f"{path} is missing from SGDGP_DATA")
            verify(path, expected)
        return paths
    return [
        cached_download(
            cache_folder() / "uci" / name / file,
            [source.format(name=name, file=file) for source in _SOURCES],
            expected,
        )
        for file, expected in info.files.items()
    ]


def _own_files(name: str, folder: Path | None) -> list[Path]:
    paths = []
    if folder is not None and name:
        paths = [folder / "uci" / name / file for file in ("data.csv.gz", MASK)]
    if not paths or not all(path.exists() for path in paths):
        raise ValueError(
            f"dataset: found {name!r}, expected one of {', '.join(DATASETS)}"
            + (f", or a folder in {folder / 'uci'}" if folder else "")
        )
    return paths


def load_split(
    name: str,
    split: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | None = None,
) -> Split:
    """Read one split of a data set and z-score it.

    Args:
        name: A data set of the papers, or a folder in ``SGDGP_DATA/uci``.
        split: Which split, 0 to 9.
        dtype: Of the returned tensors; the statistics are taken in float64.
        device: Of the returned tensors.

    Raises:
        ValueError: An unknown name or split.
        DamagedFileError: A file is not what it has to be.
        DataUnavailableError: A file is missing and cannot be downloaded.
    """
    if split not in range(NUM_SPLITS):
        raise ValueError(f"split: found {split}, expected 0 to {NUM_SPLITS - 1}")
    *data_paths, mask_path = locate(name)
    table = np.concatenate([_read(path, np.float64) for path in data_paths])
    mask = _read(mask_path, np.uint8)
    _check(name, table, mask)
    test = mask[:, split].astype(bool)
    columns = standardise(table[~test], table[test])
    train, held_out = (torch.from_numpy(part).to(device, dtype) for part in columns)
    return Split(
        name,
        split,
        x=train[:, :-1].contiguous(),
        y=train[:, -1].contiguous(),
        x_test=held_out[:, :-1].contiguous(),
        y_test=held_out[:, -1].contiguous(),
    )


def standardise(
    train: NDArray[np.float64], test: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Z-score columns with the mean and standard deviation of the training rows.

    A column that is constant on the training rows is only centred: its standard
    deviation counts as 1. The deviation of a constant column is rounding noise
    and not always exactly 0, so constancy is read off its extremes.
    """
    mean = train.mean(axis=0)
    constant = train.max(axis=0) == train.min(axis=0)
    mean = np.where(constant, train[0], mean)
    deviation = np.where(constant, 1.0, train.std(axis=0))
    return (train - mean) / deviation, (test - mean) / deviation


def _read(path: Path, dtype: type[_Number]) -> NDArray[_Number]:
    try:
        return np.loadtxt(path, dtype=dtype, delimiter=",", ndmin=2)
    except (EOFError, zlib.error, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


def _check(name: str, table: NDArray[np.float64], mask: NDArray[np.uint8]) -> None:
    """Refuse files that do not fit each other or what is known of the set."""
    info = DATASETS.get(name)
    if info is not None and table.shape != (info.n, info.d + 1):
        raise DamagedFileError(
            f"{name}: data has shape {table.shape}, not {(info.n, info.d + 1)}"
        )
    if mask.shape != (len(table), NUM_SPLITS):
        raise DamagedFileError(
            f"{name}: mask has shape {mask.shape}, not {(len(table), NUM_SPLITS)}"
        )
    if not np.isin(mask, (0, 1)).all():
        raise DamagedFileError(f"{name}: the mask has entries other than 0 and 1")
    if table.shape[1] < 2:
        raise DamagedFileError(f"{name}: data has no input column")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise DamagedFileError(
            f"{name}: {np.count_nonzero(~np.isfinite(table))} entries of the data are "
            f"NaN or infinite, the first in row {row}, column {column}"
        )
    if not (mask.any(axis=0) & ~mask.all(axis=0)).all():
        raise DamagedFileError(f"{name}: a split has no training or no test rows")
