"""One solve in one file: what a checkpoint holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sgdgp.core.checks import check_positive
from sgdgp.core.errors import CheckpointError, UnusableFileError
from sgdgp.core.files import FileKind, check_place_of, read_file, write_file
from sgdgp.posterior.solution_state import (
    solution_from,
    solution_state,
    solution_tensors,
)
from sgdgp.solvers.base import Solution

FORMAT = 1
"""Version of the file's layout."""

KIND = FileKind("sgdgp.checkpoint", FORMAT, "checkpoint")


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


def checked_place(path: str | os.PathLike[str], every: int | float) -> Path:
    """Where a checkpoint goes, if one can be written there every so many seconds.

    Raises:
        CheckpointError: A directory, or in one that is missing or not writable.
        TypeError: ``path`` is no path or ``every`` no number.
        ValueError: ``every`` is not positive and finite.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"checkpoint: expected a path, found {path!r}")
    if not isinstance(every, int | float) or isinstance(every, bool):
        raise TypeError(f"every: expected seconds, found {every!r}")
    check_positive("every", float(every))
    # Neither a change of directory nor a link may lead a later write astray.
    place = Path(path).resolve()
    try:
        check_place_of(place)
    except UnusableFileError as error:
        raise CheckpointError(f"checkpoint: {error}") from error
    return place


def write(path: Path, saved: Saved) -> None:
    """Put a new file in the place of the old one; at any moment one of them is there.

    Raises:
        OSError: The file could not be written; the old one is untouched.
    """
    tensors = {
        **solution_tensors(saved.solution),
        **{f"probe.{name}": value for name, value in saved.probe.items()},
    }
    state = {
        "solver": saved.solver,
        "components": dict(saved.components),
        "solution": solution_state(saved.solution),
    }
    write_file(path, KIND, tensors, state)


def read(path: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        CheckpointError: Not a checkpoint, damaged, or of a newer format.
    """
    try:
        tensors, state = read_file(path, KIND)
        solution = solution_from(state["solution"], tensors)
        probes = {
            name.removeprefix("probe."): value
            for name, value in tensors.items()
            if name.startswith("probe.")
        }
        return Saved(solution, str(state["solver"]), dict(state["components"]), probes)
    except UnusableFileError as error:
        raise _unusable(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _unusable(
            f"{path} is damaged, or not a checkpoint of sgdgp ({error})"
        ) from error


def _unusable(what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: {what}. It is left as it is; delete it or give another path to "
        "start anew."
    )
