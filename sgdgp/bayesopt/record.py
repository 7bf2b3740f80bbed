"""What a Thompson sampling run keeps on disk: data, proposals, results so far.

Proposals are written before they are evaluated and results as soon as they are there,
each time as a whole file in the place of the old one. So whatever is killed, a run
that is called again has the same proposals and knows which have been evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.errors import CheckpointError, UnusableFileError
from sgdgp.core.files import FileKind, read_file, write_file

KIND = FileKind("sgdgp.thompson_sampling", 1, "record of a Thompson sampling run")


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


@dataclass(frozen=True, eq=False)
class Record:
    """The state of a run.

    Attributes:
        x: Observed points (n, d).
        y: Their values (n,).
        history: Finished steps.
        pending: The step that is under way, None between steps.
        settings: What a run must have in common with the one that goes on with it.
    """

    x: Float[Tensor, "n d"]
    y: Float[Tensor, " n"]
    history: tuple[Step, ...] = ()
    pending: Pending | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Number of the last finished step."""
        return self.history[-1].step if self.history else 0

    def observed(self, values: Float[Tensor, " k"], seconds: float) -> Record:
        """The record with values of the next proposals; with all, the step is done."""
        pending = self.pending
        if pending is None:
            raise ValueError("values: expected no values between steps")
        results = torch.cat([pending.results, values])
        taken = pending.step.objective_seconds + seconds
        step = replace(pending.step, objective_seconds=taken)
        if len(results) < len(pending.proposals):
            pending = replace(pending, step=step, results=results)
            return replace(self, pending=pending)
        y = torch.cat([self.y, results])
        step = replace(step, num_observations=len(y), best_y=float(y.max()))
        return Record(
            torch.cat([self.x, pending.proposals]),
            y,
            (*self.history, step),
            settings=self.settings,
        )


def write(path: Path, record: Record) -> None:
    """Put the record in the place of an older one.

    Raises:
        OSError: The file could not be written; the old one is untouched.
    """
    tensors = {"x": record.x, "y": record.y}
    pending = record.pending
    if pending is not None:
        tensors |= {"proposals": pending.proposals, "results": pending.results}
    state = {
        "history": [asdict(step) for step in record.history],
        "pending": None if pending is None else asdict(pending.step),
        "settings": dict(record.settings),
    }
    write_file(path, KIND, tensors, state)


def read(path: Path, device: torch.device) -> Record:
    """Read a record.

    Raises:
        CheckpointError: Not such a record, damaged, or of a newer format.
    """
    try:
        tensors, state = read_file(path, KIND)
        found = {name: value.to(device) for name, value in tensors.items()}
        pending = None
        if state["pending"] is not None:
            pending = Pending(
                Step(**state["pending"]), found["proposals"], found["results"]
            )
        return Record(
            found["x"],
            found["y"],
            tuple(Step(**step) for step in state["history"]),
            pending,
            dict(state["settings"]),
        )
    except UnusableFileError as error:
        raise CheckpointError(f"checkpoint: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {path} is damaged, or not a {KIND.words} of sgdgp ({error})"
        ) from error


def check_same_run(path: Path, record: Record, settings: Mapping[str, str]) -> None:
    """Refuse the record of another run.

    Raises:
        CheckpointError: Names what differs.
    """
    differing = [
        name for name, value in settings.items() if record.settings.get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint: {path} belongs to another run: {', '.join(differing)} "
            "differ. It is left as it is; delete it or give another path to start "
            "anew."
        )
