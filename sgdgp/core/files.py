"""Files of tensors and a JSON text: written atomically, read with suspicion.

The format is safetensors; nothing in a file is ever executed. A checksum over both
parts tells damage from data.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib
import json
import os
import platform
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgdgp.core.errors import StorageError
from sgdgp.core.hashes import digest

_ALIGNED = 8  # a header is padded with blanks to a multiple of it
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
"""In names of temporary files: processes can be asked for on their own machine only."""
_PACKAGES = ("sgdgp", "torch", "gpytorch", "linear_operator")
_OPTIONAL = {mark: mark for mark in ("sgdgp.botorch", "sgdgp.sklearn")}
"""Kinds of rooms that are not imported with the package."""

F = TypeVar("F", bound=Callable[..., Any])

Upgrade: TypeAlias = Callable[[Mapping[str, Tensor], dict[str, Any]], dict[str, Any]]
"""(tensors, state) of format 1 to the state of format 2 with the same tensors."""

_KINDS: dict[str, FileKind] = {}
_READERS: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class FileKind:
    """What a file is, to the reader and to the user.

    Attributes:
        mark: Key of the metadata by which such files are known.
        version: Newest format that this version of sgdgp reads, and the one it writes.
        words: What users call it, such as "checkpoint".
        upgrade: Makes what a file of the format before says into what it would say now.
    """

    mark: str
    version: int
    words: str
    upgrade: Upgrade | None = None

    def __post_init__(self) -> None:
        _KINDS[self.mark] = self


def reads(kind: FileKind) -> Callable[[F], F]:
    """Decorator: the function by which ``load`` reads files of this kind."""

    def register(reader: F) -> F:
        _READERS[kind.mark] = reader
        return reader

    return register


def load(path: str | os.PathLike[str], *given: Any, **settings: Any) -> Any:
    """Read what was saved; it predicts the same numbers.

    Args:
        path: The file that ``save`` wrote.
        *given: What the file does not hold, since it holds no code. For a posterior
            ``model``, a ``gpytorch.models.ExactGP`` built like the one that was saved,
            for a ``PathwiseModel`` its definition; for that of a network ``network``.
        **settings: The same by name. For a posterior ``solver``; for that of a network
            ``output`` and ``memory_budget``; for a ``LearnedPrior`` or ``Draws``
            ``device``; for a ``PathwiseModel`` what ``PathwiseModel.load`` takes, for
            a ``SGDGPRegressor`` what its ``load`` does.

    Returns:
        The posterior, on the device of what is given, with all of its verbs; or the
        ``PathwiseModel``, ``SGDGPRegressor``, ``LearnedPrior`` or ``Draws``.

    Raises:
        StorageError: The file is missing, damaged, nothing that was saved, or of a
            newer format; or what is given is built otherwise (a ValueError).
        TypeError: An argument is of the wrong kind.

    Example:
        >>> posterior.save("posterior.safetensors")
        >>> same = sgdgp.load("posterior.safetensors", model)
    """
    place = path_of(path)
    if place.is_dir():
        raise StorageError(f"cannot read {place}: it is a directory")
    try:
        _check_regular(place, StorageError)
        with safe_open(place, framework="pt") as file:
            marks = file.metadata() or {}
    except OSError as error:
        raise StorageError(f"cannot read {place}: {error}") from error
    except SafetensorError as error:
        raise StorageError(
            f"{place} is damaged, or nothing that sgdgp has saved ({error})"
        ) from error
    for mark in _OPTIONAL.keys() & marks.keys():
        importlib.import_module(_OPTIONAL[mark])
    for mark in marks.keys() & _KINDS.keys():
        if mark in _READERS:
            return _READERS[mark](place, *given, **settings)
        raise StorageError(
            f"{place} is a {_KINDS[mark].words}, nothing that was saved: give it as "
            "checkpoint= to the call that wrote it"
        )
    raise StorageError(f"{place} is nothing that sgdgp has saved")


def path_of(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """A path; names the argument that is none.

    Raises:
        TypeError: No path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument}: expected a path, found {path!r}")
    return Path(path)


def place_of(
    path: str | os.PathLike[str],
    argument: str = "path",
    error: type[Exception] = StorageError,
) -> Path:
    """Where a file is to be written, once that is known to be possible.

    Args:
        path: The file; it is tried to write one beside it.
        argument: What the caller's user knows the path by.
        error: What is raised.

    Raises:
        StorageError: Or ``error``: a directory, or in one that is missing or cannot be
            written.
        TypeError: No path.
    """
    # Neither a change of directory nor a link may lead a later write astray.
    given = path_of(path, argument)
    try:
        place = given.resolve()
        if place.is_dir():
            raise error(f"{argument}: expected a file, found directory {place}")
        _check_regular(place, error, argument)
        if not place.parent.is_dir():
            raise error(
                f"{argument}: expected an existing directory, found {place.parent}"
            )
        _remove_stale(place)
        with _beside(place):
            return place
    # A name too long, without rights, with a zero byte, or a link to itself.
    except (OSError, RuntimeError, ValueError) as found:
        if isinstance(found, error):
            raise
        raise error(f"{argument}: cannot write into {given.parent}: {found}") from found


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
    with _beside(path) as folder:
        temporary = Path(folder, "file")
        try:
            save_file(stored, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {temporary}: {error}") from error
        _flush(temporary)
        temporary.replace(path)
    # Not every file system can flush a directory, and the file is there.
    with contextlib.suppress(OSError):
        _flush(path.parent)


def read_file(path: Path, kind: FileKind) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a file.

    Raises:
        StorageError: Not of that kind, damaged, or of a newer format.
    """
    try:
        _check_regular(path, StorageError)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if kind.mark not in metadata:
                raise StorageError(f"{path} is not a {kind.words} of sgdgp")
            _check_version(path, kind, metadata[kind.mark])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = metadata["state"]
        if metadata["checksum"] != _checksum(text, tensors):
            raise StorageError(
                f"{path} is damaged: its checksum does not fit its content"
            )
        _check_header(path)
        state = json.loads(text)
        if not isinstance(state, dict):
            raise TypeError("the state is no JSON object")
        if kind.upgrade is not None and int(metadata[kind.mark]) < kind.version:
            state = kind.upgrade(tensors, state)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{path} is damaged, or not a {kind.words} of sgdgp ({error})"
        ) from error
    return tensors, state


def package_versions() -> dict[str, str]:
    """Versions of what a file was made with, for people who look into it."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _copied(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape).copy_(tensor)


def _beside(path: Path) -> TemporaryDirectory[str]:
    """Where a file is written before it is moved into place, one for each writer.

    Beside it: only within one file system is a move atomic. A directory, since
    safetensors has temporary files of its own.
    """
    return TemporaryDirectory(
        prefix=f".{path.name}.{_MACHINE}.{os.getpid()}.",
        suffix=".tmp",
        dir=path.parent,
        ignore_cleanup_errors=True,
    )


def _remove_stale(path: Path) -> None:
    """Remove what killed processes of this machine left half-written."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.{_MACHINE}.*.*.tmp"):
        pid = stale.name.rsplit(".", 3)[1]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)


def _is_running(pid: int) -> bool:
    """Whether there may be such a process."""
    try:
        # Signal 0 is none; Windows has no such thing.
        if os.name == "posix":
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's
    return True


def _check_regular(path: Path, error: type[Exception], argument: str = "path") -> None:
    """Refuse pipes, which nobody may ever write into, and devices."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise error(f"{argument}: expected a file, found {path}, a pipe or device")


def _check_header(path: Path) -> None:
    """Refuse a header with anything in it that is not needed, such as odd blanks.

    The checksum covers what the header says, not how: this covers the rest.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size).decode()
    text = json.dumps(json.loads(header), separators=(",", ":"), ensure_ascii=False)
    if header.rstrip(" ") != text or len(header) - len(header.rstrip(" ")) >= _ALIGNED:
        raise StorageError(f"{path} is damaged: its header is not as written")


def _check_version(path: Path, kind: FileKind, found: str) -> None:
    if not found.isdecimal() or int(found) < 1:
        raise StorageError(f"{path} has an unknown format {found!r}")
    if int(found) > kind.version:
        raise StorageError(
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
