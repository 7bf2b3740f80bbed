"""One solve in one file: written atomically, read with suspicion.

The file is safetensors: tensors, and a JSON text as metadata; nothing in it is ever
executed. A checksum over both tells damage from data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgdgp.posterior.fingerprint import digest
from sgdgp.solvers.base import HistoryEntry, Reason, Solution

FORMAT = 1
"""Version of the file's layout."""

_MARK = "sgdgp.checkpoint"


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint file holds.

    Attributes:
        solution: The solve so far; a run that has not ended is "interrupted".
        solver: The solver's settings as text.
        components: Hashes of the problem, see ``fingerprint.components``.
        probe: Numbers of the problem, see ``fingerprint.probe``.
    """

    solution: Solution
    solver: str
    components: Mapping[str, str] = field(repr=False)
    probe: Mapping[str, Tensor] = field(repr=False)


def check_place(path: Path) -> None:
    """Refuse a path where no file can be written, by writing one beside it.

    Raises:
        CheckpointError: A directory, or in one that is missing or not writable.
    """
    if path.is_dir():
        raise CheckpointError(f"checkpoint: expected a file, found directory {path}")
    if not path.parent.is_dir():
        raise CheckpointError(
            f"checkpoint: expected an existing directory, found {path.parent}"
        )
    # What a killed run left half-written.
    for stale in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            stale.unlink()
    temporary = _temporary(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: cannot write into {path.parent}: {error}"
        ) from error


def write(path: Path, saved: Saved) -> None:
    """Put a new file in the place of the old one; at any moment one of them is there.

    Raises:
        OSError: The file could not be written; the old one is untouched.
    """
    solution = saved.solution
    tensors = {
        "weights": solution.weights,
        "residuals": solution.residuals,
        **_history_tensors(solution.history, len(solution.residuals)),
        **{f"probe.{name}": value for name, value in saved.probe.items()},
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    state = json.dumps(
        {
            "solver": saved.solver,
            "components": dict(saved.components),
            "solution": {
                "solver": solution.solver,
                "operator": solution.operator,
                "passes": solution.passes,
                "seconds": solution.seconds,
                "reason": solution.reason,
                "warnings": solution.warnings,
                "settings": dict(solution.settings),
            },
        },
        default=str,
    )
    metadata = {
        _MARK: str(FORMAT),
        "state": state,
        "checksum": _checksum(state, tensors),
    }
    temporary = _temporary(path)
    try:
        save_file(tensors, temporary, metadata)
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


def read(path: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        CheckpointError: Not a checkpoint, damaged, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if _MARK not in metadata:
                raise _unusable(path, "is not a checkpoint of sgdgp")
            _check_format(path, metadata[_MARK])
            tensors = {name: file.get_tensor(name).clone() for name in names}
        if metadata["checksum"] != _checksum(metadata["state"], tensors):
            raise _unusable(path, "is damaged: its checksum does not fit its content")
        return _saved(json.loads(metadata["state"]), tensors)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot read {path}: {error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unusable(
            path, f"is damaged, or not a checkpoint of sgdgp ({error})"
        ) from error


def _unusable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: {path} {what}. It is left as it is; delete it or give another "
        "path to start anew."
    )


def _check_format(path: Path, found: str) -> None:
    if not found.isdecimal() or int(found) < 1:
        raise _unusable(path, f"has an unknown format {found!r}")
    if int(found) > FORMAT:
        raise CheckpointError(
            f"checkpoint: {path} has format {found}, this version of sgdgp reads up to "
            f"{FORMAT}; use a newer sgdgp, or give another path to start anew."
        )


def _saved(state: dict[str, Any], tensors: dict[str, Tensor]) -> Saved:
    told = state["solution"]
    weights, residuals = tensors["weights"], tensors["residuals"]
    if weights.ndim != 2 or residuals.shape != weights.shape[1:]:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} with residuals of shape "
            f"{tuple(residuals.shape)}"
        )
    if not bool(torch.isfinite(weights).all() and torch.isfinite(residuals).all()):
        raise ValueError("weights or residuals are NaN or infinite")
    if told["reason"] not in get_args(Reason):
        raise ValueError(f"unknown reason {told['reason']!r}")
    solution = Solution(
        solver=str(told["solver"]),
        operator=str(told["operator"]),
        weights=weights,
        residuals=residuals,
        passes=float(told["passes"]),
        seconds=float(told["seconds"]),
        reason=told["reason"],
        history=_history(tensors),
        warnings=tuple(told["warnings"]),
        settings=dict(told["settings"]),
    )
    probes = {
        name.removeprefix("probe."): value
        for name, value in tensors.items()
        if name.startswith("probe.")
    }
    return Saved(solution, str(state["solver"]), dict(state["components"]), probes)


def _history_tensors(
    history: tuple[HistoryEntry, ...], columns: int
) -> dict[str, Tensor]:
    # Tensors, not JSON: the header of a safetensors file has a limited size.
    clock = [(entry.passes, entry.seconds, entry.exact) for entry in history]
    residuals = [entry.residuals for entry in history]
    return {
        "history.clock": torch.tensor(clock, dtype=torch.float64).reshape(-1, 3),
        "history.residuals": torch.tensor(residuals, dtype=torch.float64).reshape(
            -1, columns
        ),
    }


def _history(tensors: dict[str, Tensor]) -> tuple[HistoryEntry, ...]:
    clock, residuals = tensors["history.clock"], tensors["history.residuals"]
    return tuple(
        HistoryEntry(passes, seconds, tuple(norms), bool(exact))
        for (passes, seconds, exact), norms in zip(
            clock.tolist(), residuals.tolist(), strict=True
        )
    )


def _checksum(state: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        found.update(f"{name} {digest(tensors[name])}".encode())
    return found.hexdigest()


def _temporary(path: Path) -> Path:
    # In the same directory: only within one file system is a move atomic.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush(path: Path) -> None:
    """Wait until the disk has it; for a directory that means its new names."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
