"""Files from the internet into a cache, and proof that they are the right ones."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30


class DamagedFileError(OSError):
    """A file whose content is not what it has to be."""


class DataUnavailableError(OSError):
    """A file that is neither on this machine nor to be had from the internet."""


def cache_folder() -> Path:
    """Where downloads are kept: ``SGDGP_CACHE``, else ``~/.cache/sgdgp`` (XDG)."""
    if "SGDGP_CACHE" in os.environ:
        return Path(os.environ["SGDGP_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sgdgp"


def checksum(path: Path, kind: str) -> str:
    """The checksum of a file as ``kind:hex``: ``sha256``, ``md5`` or ``git-blob``.

    Raises:
        ValueError: An unknown kind.
    """
    if kind in ("sha256", "md5"):
        digest = hashlib.new(kind, usedforsecurity=False)
    elif kind == "git-blob":
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(f"blob {path.stat().st_size}\0".encode())
    else:
        raise ValueError(
            f"kind: found {kind!r}, expected 'sha256', 'md5' or 'git-blob'"
        )
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def verify(path: Path, expected: str) -> None:
    """Check a file against its pinned checksum ``kind:hex``.

    Raises:
        DamagedFileError: The file has another content.
    """
    found = checksum(path, expected.partition(":")[0])
    if found != expected:
        raise DamagedFileError(
            f"{path} is damaged: its checksum is {found}, expected {expected}. "
            "Delete it and load it again."
        )


def cached_download(path: Path, urls: Sequence[str], expected: str) -> Path:
    """The file at ``path``, downloaded from the first of ``urls`` that has it.

    A file that is there already is only verified. A new one appears under its name
    after its checksum was found to be right, so a broken transfer leaves nothing.

    Raises:
        DamagedFileError: The file at ``path`` is not the expected one.
        DataUnavailableError: No address delivered the expected file.
    """
    if path.exists():
        verify(path, expected)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                _copy(url, file, path.name)
            verify(part, expected)
            part.replace(path)
            return path
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"  {url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise DataUnavailableError(
        f"could not download {path.name}:\n"
        + "\n".join(failures)
        + f"\nWithout internet, put the file at {path}, or into the folder SGDGP_DATA."
    )


def _copy(url: str, file: IO[bytes], label: str) -> None:
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
        tqdm(
            total=int(response.headers.get("Content-Length") or 0) or None,
            unit="B",
            unit_scale=True,
            desc=label,
            disable=None,
            leave=False,
        ) as bar,
    ):
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
