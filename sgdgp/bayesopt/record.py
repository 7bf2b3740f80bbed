"""What a Thompson sampling run keeps on disk: a record, and a posterior beside it.

The record has the data, the proposals and the results so far.

Proposals are written before they are evaluated and results as soon as they are there,
each time as a whole file in the place of the old one. So whatever is killed, a run
that is called again has the same proposals and knows which have been evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core import format_1
from sgdgp.core.checkpoint import Checkpoint
from sgdgp.core.codec import can_be_stored, read_values, register_stored_class
from sgdgp.core.errors import CheckpointError, StorageError, warn_user
from sgdgp.core.files import FileKind
from sgdgp.posterior import PathwisePosterior, load
from sgdgp.posterior.storage import save
from sgdgp.solvers.base import Solver
from sgdgp.solvers.recycling import Recycled

KIND = FileKind(
    "sgdgp.thompson_sampling", 2, "record of a Thompson sampling run", format_1.thompson
)

_FORMER_KIND = FileKind("sgdgp_carried", 2, "solver state", format_1.recycled)
"""In version 0.1.0 a file of its own, named by the number of rows."""

_AT_ONCE = 1e-9
"""Seconds between two writes that are both made."""


@register_stored_class
@dataclass(frozen=True)
class Step:
    """One step of a run; the evaluation of an initial design is step 0.

    Attributes:
        step: Its number.
        num_observations: Observations after it.
        best_y: Largest of them.
        passes: Passes over K that the posterior of this step took.
        solver: Solver that found it.
        reason: How its solve ended.
        solve_seconds: Seconds for the posterior, with learning where that was done.
        maximise_seconds: Seconds for the proposals.
        objective_seconds: Seconds in the objective, calls that were cut off apart.
    """

    step: int
    num_observations: int
    best_y: float
    passes: float = 0.0
    solver: str = ""
    reason: str = ""
    solve_seconds: float = 0.0
    maximise_seconds: float = 0.0
    objective_seconds: float = 0.0


@register_stored_class
@dataclass(frozen=True, eq=False)
class Pending:
    """A step that is under way.

    Attributes:
        step: What is known of it so far.
        proposals: Its points (b, d).
        results: Values of the first of them (r,).
    """

    step: Step
    proposals: Float[Tensor, "b d"]
    results: Float[Tensor, " r"]


@register_stored_class
@dataclass(frozen=True, eq=False)
class Record:
    """The state of a run.

    Attributes:
        x: Observed points (n, d).
        y: Their values (n,).
        history: Finished steps.
        pending: The step that is under way, None between steps.
    """

    x: Float[Tensor, "n d"]
    y: Float[Tensor, " n"]
    history: tuple[Step, ...] = ()
    pending: Pending | None = None

    @property
    def done(self) -> int:
        """Number of the last finished step."""
        return self.history[-1].step if self.history else 0

    def with_values(self, values: Float[Tensor, " k"], seconds: float) -> Record:
        """The record with values of the next proposals; with all, the step is done."""
        pending = self.pending
        assert pending is not None
        results = torch.cat([pending.results, values])
        taken = pending.step.objective_seconds + seconds
        step = replace(pending.step, objective_seconds=taken)
        if len(results) < len(pending.proposals):
            pending = replace(pending, step=step, results=results)
            return replace(self, pending=pending)
        y = torch.cat([self.y, results])
        step = replace(step, num_observations=len(y), best_y=float(y.max()))
        return Record(torch.cat([self.x, pending.proposals]), y, (*self.history, step))


class RunCheckpoint(Checkpoint):
    """The file of a run: its record.

    Args:
        path: The file; its directory must exist.
        every: Seconds between two writes of results, at least; 0 for all at once.
    """

    kind = KIND
    work = "run"

    def __init__(self, path: str | os.PathLike[str], every: int | float) -> None:
        super().__init__(path, every or _AT_ONCE)

    def open_for(
        self, settings: Mapping[str, str], width: int, device: torch.device
    ) -> Record | None:
        """Where the run was, or None if it has not begun.

        Args:
            settings: What two runs must have in common to be the same one.
            width: Columns of the points.
            device: Where tensors go.

        Raises:
            CheckpointError: Not such a record, damaged, of a newer format, or of
                another run.
        """
        found = self.open(settings, device=device)
        if found is None:
            return None
        with self.reading():
            record = found["record"]
            if not isinstance(record, Record):
                raise TypeError(f"found {type(record).__name__}")
            x, y, history = record.x, record.y, record.history
            pending = record.pending
            if x.shape != (len(y), width) or y.ndim != 1:
                raise ValueError("points and values of other shapes")
            if pending is not None and (
                pending.proposals.shape[1:] != (width,)
                or pending.results.ndim != 1
                or len(pending.results) >= len(pending.proposals)
            ):
                raise ValueError("a step under way of other shapes")
            if history and history[-1].num_observations != len(y):
                raise ValueError(
                    f"{len(y)} values after {history[-1].num_observations} observations"
                )
            return record

    def keep(self, record: Record) -> None:
        """Write where the run is.

        A full disk does not end a run: what it has found so far would be lost.
        """
        self.write(record=record)
        if self.problem is not None:
            warn_user(self.problem)


def posterior_file(place: Path) -> Path:
    """Where the posterior is kept that belongs to a record."""
    return place.with_name(place.name + ".posterior")


def store_posterior(posterior: PathwisePosterior, place: Path) -> PathwisePosterior:
    """Write a posterior with what its solve leaves to the next one.

    It comes back as it would be read: a preconditioner that cannot be stored is left
    out, and so are all but the leading directions. The next solve then is the same
    whether it starts from memory or from the file.
    """
    recycled = posterior.solution.recycled
    if recycled is not None:
        recycled = recycled.reduced() if can_be_stored(recycled.inverse) else None
    posterior = _with_recycled(posterior, recycled)
    try:
        save(posterior.parts, place)
    except OSError as error:
        warn_user(
            f"The posterior {place} could not be written ({error}); it is an earlier "
            "one, or none."
        )
    for path in _former_files(place):
        path.unlink(missing_ok=True)
    return posterior


def _with_recycled(
    posterior: PathwisePosterior, recycled: Recycled | None
) -> PathwisePosterior:
    (part,) = posterior.parts
    solution = replace(part.solution, recycled=recycled)
    return replace(posterior, solved=(replace(part, solution=solution),), later=None)


def read_posterior(
    place: Path, model: ExactGP, solver: Solver | str
) -> PathwisePosterior:
    """Read what ``store_posterior`` wrote.

    Raises:
        CheckpointError: A file is damaged, or not of a posterior of one output.
    """
    found = load(place, model, solver=solver)
    if not isinstance(found, PathwisePosterior):
        raise CheckpointError(f"checkpoint: {place} has several outputs, expected one")
    former = place.with_name(f"{place.name}.carried.{len(found.problem.x)}")
    if found.solution.recycled is not None or not former.exists():
        return found
    try:
        left = read_values(former, _FORMER_KIND, found.problem.x.device)["recycled"]
    except StorageError as error:
        raise CheckpointError(f"checkpoint: {error}; it may be deleted") from error
    return _with_recycled(found, left)


def remove_posterior(place: Path) -> None:
    """Delete what was stored there, if anything."""
    for path in (place, *_former_files(place)):
        path.unlink(missing_ok=True)


def _former_files(place: Path) -> Iterator[Path]:
    """What version 0.1.0 kept of solves, beside posteriors."""
    start = f"{place.name}.carried."
    for path in list(place.parent.iterdir()):
        if path.name.startswith(start) and path.name.removeprefix(start).isdecimal():
            yield path
