"""Files of tensors and a JSON text: written atomically, read with suspicion.

The format is safetensors; nothing in a file is ever executed. A checksum over both
parts tells damage from data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgdgp.core.errors import UnusableFileError
from sgdgp.core.hashes import digest

_ALIGNED = 8  # a header is padded with blanks to a multiple of it


@dataclass(frozen=True)
class FileKind:
    """What a file is, to the reader and to the user.

    Attributes:
        mark: Key of the metadata by which such files are known.
        version: Newest format that this version of sgdgp reads, and the one it writes.
        words: What users call it, such as "checkpoint".
    """

    mark: str
    version: int
    words: str


def check_place_of(path: Path) -> None:
    """Refuse a path where no file can be written, by writing one beside it.

    Raises:
        UnusableFileError: A directory, or in one that is missing or not writable.
    """
    if path.is_dir():
        raise UnusableFileError(f"expected a file, found directory {path}")
    if not path.parent.is_dir():
        raise UnusableFileError(f"expected an existing directory, found {path.parent}")
    # What a killed run left half-written.
    for stale in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            stale.unlink()
    temporary = temporary_of(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UnusableFileError(f"cannot write into {path.parent}: {error}") from error


def write_file(
    path: Path, kind: FileKind, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Put a new file in the place of an old one; at any moment one of them is there.

    Args:
        path: The file; its directory must exist.
        kind: What it is.
        tensors: Tensors by name.
        state: Everything else, as JSON can hold it (what it cannot becomes text).

    Raises:
        OSError: The file could not be written; the old one is untouched.
    """
    # A copy of each: safetensors refuses tensors that share memory. One element that
    # was expanded calls itself contiguous: only a new tensor has strides to rely on.
    stored = {name: _copied(tensor.detach().cpu()) for name, tensor in tensors.items()}
    text = json.dumps(dict(state), default=str)
    metadata = {
        kind.mark: str(kind.version),
        "state": text,
        "checksum": _checksum(text, stored),
    }
    temporary = temporary_of(path)
    try:
        save_file(stored, temporary, metadata)
        _flush(temporary)
        temporary.replace(path)
        # Not every file system can flush a directory, and the file is there.
        with contextlib.suppress(OSError):
            _flush(path.parent)
    except SafetensorError as error:
        raise OSError(f"cannot write {temporary}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_file(path: Path, kind: FileKind) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a file.

    Raises:
        UnusableFileError: Not of that kind, damaged, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if kind.mark not in metadata:
                raise UnusableFileError(f"{path} is not a {kind.words} of sgdgp")
            _check_version(path, kind, metadata[kind.mark])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = metadata["state"]
        if metadata["checksum"] != _checksum(text, tensors):
            raise UnusableFileError(
                f"{path} is damaged: its checksum does not fit its content"
            )
        _check_header(path)
        state = json.loads(text)
        if not isinstance(state, dict):
            raise TypeError("the state is no JSON object")
    except UnusableFileError:
        raise
    except OSError as error:
        raise UnusableFileError(f"cannot read {path}: {error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UnusableFileError(
            f"{path} is damaged, or not a {kind.words} of sgdgp ({error})"
        ) from error
    return tensors, state


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def temporary_of(path: Path) -> Path:
    """Where a file is written before it is moved into place."""
    # In the same directory: only within one file system is a move atomic.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _check_header(path: Path) -> None:
    """Refuse a header with anything in it that is not needed, such as odd blanks.

    The checksum covers what the header says, not how: this covers the rest.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size).decode()
    text = json.dumps(json.loads(header), separators=(",", ":"), ensure_ascii=False)
    if header.rstrip(" ") != text or len(header) - len(header.rstrip(" ")) >= _ALIGNED:
        raise UnusableFileError(f"{path} is damaged: its header is not as written")


def _check_version(path: Path, kind: FileKind, found: str) -> None:
    if not found.isdecimal() or int(found) < 1:
        raise UnusableFileError(f"{path} has an unknown format {found!r}")
    if int(found) > kind.version:
        raise UnusableFileError(
            f"{path} has format {found}, this version of sgdgp reads up to "
            f"{kind.version}; use a newer sgdgp"
        )


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"{name} {digest(tensors[name])}".encode())
    return found.hexdigest()


def _flush(path: Path) -> None:
    """Wait until the disk has it; for a directory that means its new names."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
