"""The two files of DOCKSTRING: where they are, and how to get them."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.uci.download import (
    DataUnavailableError,
    cache_folder,
    cached_download,
)

DATASET = "dockstring-dataset.tsv"
SPLIT = "cluster_split.tsv"

_SOURCES = {
    DATASET: "https://figshare.com/ndownloader/files/35948138",
    SPLIT: "https://figshare.com/ndownloader/files/35948123",
}
CHECKSUMS = {
    DATASET: "md5:d0553abd8563bfbbe862eb1d7ec6be6d",
    SPLIT: "md5:46660336fbc138d5429c3137f081a423",
}
"""As figshare publishes them for version 1 of article 16511577."""


def locate(folder: Path | None = None, *, download: bool = False) -> tuple[Path, Path]:
    """Paths of the data set and of its split, whose checksums are right.

    Args:
        folder: A folder that holds both. Default: ``SGDGP_DATA/dockstring``, else the
            cache.
        download: Load what is missing into the folder.

    Raises:
        DamagedFileError: A file is not the published one.
        DataUnavailableError: A file is missing and was not, or could not be, loaded.
    """
    folder = _folder() if folder is None else folder
    paths = folder / DATASET, folder / SPLIT
    missing = [path for path in paths if not path.exists()]
    if missing and not download:
        raise DataUnavailableError(
            f"{_names(missing)} not found in {folder}. Give the folder that holds "
            f"{DATASET} and {SPLIT} (--folder), load them from figshare (--download), "
            "or try --generated 10000, which needs no files"
        )
    try:
        for path in paths:
            cached_download(path, [_SOURCES[path.name]], CHECKSUMS[path.name])
    except DataUnavailableError as error:
        raise DataUnavailableError(
            f"{error} Or try --generated 10000, which needs no files"
        ) from error
    return paths


def _folder() -> Path:
    data = os.environ.get("SGDGP_DATA")
    if data and (Path(data).expanduser() / "dockstring").is_dir():
        return Path(data).expanduser() / "dockstring"
    return cache_folder() / "dockstring"


def _names(paths: list[Path]) -> str:
    return " and ".join(path.name for path in paths)
