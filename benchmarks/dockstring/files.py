"""The two files of DOCKSTRING: where they are, and how to get them."""

from __future__ import annotations

import http.client
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path

from benchmarks.uci.download import DataUnavailableError, cache_folder

DATASET = "dockstring-dataset.tsv"
SPLIT = "cluster_split.tsv"

_SOURCES = {
    DATASET: "https://figshare.com/ndownloader/files/35948138",
    SPLIT: "https://figshare.com/ndownloader/files/35948123",
}
_TIMEOUT_SECONDS = 30


def locate(folder: Path | None = None, *, download: bool = False) -> tuple[Path, Path]:
    """Paths of the data set and of its split.

    Args:
        folder: A folder that holds both. Default: ``SGDGP_DATA/dockstring``, else the
            cache.
        download: Load what is missing into the folder.

    Raises:
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
    for path in missing:
        _load(path)
    return paths


def _folder() -> Path:
    data = os.environ.get("SGDGP_DATA")
    if data and (Path(data).expanduser() / "dockstring").is_dir():
        return Path(data).expanduser() / "dockstring"
    return cache_folder() / "dockstring"


def _load(path: Path) -> None:
    """Load one file; it appears under its name when it is complete."""
    url = _SOURCES[path.name]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    part = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
        ):
            shutil.copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
        found = part.stat().st_size
        if expected is not None and found != int(expected):
            raise OSError(f"{found} bytes of {expected} arrived")
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise DataUnavailableError(
            f"could not load {url}: {error}. Without internet, put {DATASET} and "
            f"{SPLIT} into {path.parent}, or try --generated 10000"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _names(paths: list[Path]) -> str:
    return " and ".join(path.name for path in paths)
