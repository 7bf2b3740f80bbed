"""Fits that survive the end of their process."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import Tensor

from sgdgp.core.errors import CheckpointError, UnusableFileError
from sgdgp.core.files import FileKind, read_file, write_file
from sgdgp.core.hashes import digest, structure_of
from sgdgp.gpytorch_adapter import Inputs
from sgdgp.posterior.checkpoint_file import checked_place
from sgdgp.posterior.fingerprint import differing_components
from sgdgp.training.parameters import put_state
from sgdgp.training.run import FitEntry, FitReason, Run

_KIND = FileKind("sgdgp.fit", 1, "checkpoint of a fit")


class FitCheckpoint:
    """The file of one fit.

    Args:
        path: The file; its directory must exist.
        every: Seconds between two writes, at least.

    Raises:
        CheckpointError: Nothing can be written at ``path``.
        TypeError: ``path`` is no path or ``every`` no number.
        ValueError: ``every`` is not positive and finite.
    """

    def __init__(self, path: str | os.PathLike[str], every: int | float) -> None:
        self.path = checked_place(path, every)
        self._every = every
        self._next = time.monotonic() + every
        self._components: dict[str, str] = {}

    def open(self, run: Run, x: Inputs, y: Tensor) -> FitReason | None:
        """Put a run where the file says it was.

        Args:
            run: A run that has not begun; it is changed.
            x: Training inputs.
            y: Targets in the model's units.

        Returns:
            "diverged" if the fit had ended so; what else ends a fit is asked anew.

        Raises:
            CheckpointError: The file is damaged, or belongs to another fit.
        """
        self._components = _components(run, x, y)
        if not self.path.exists():
            return None
        try:
            tensors, state = read_file(self.path, _KIND)
            differing = differing_components(state["components"], self._components)
            if differing:
                raise CheckpointError(
                    f"checkpoint: {self.path} belongs to another fit. Different here: "
                    f"{'; '.join(differing[:5])}. It is left as it is: delete it or "
                    "give another path to start anew."
                )
            return _restore(run, tensors, state)
        except CheckpointError:
            raise
        except UnusableFileError as error:
            raise CheckpointError(
                f"checkpoint: {error}. It is left as it is; delete it or give another "
                "path to start anew."
            ) from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint: {self.path} cannot be gone on from ({error}); delete it "
                "or give another path to start anew."
            ) from error

    def keep(self, run: Run) -> None:
        """Write, if it is time."""
        if time.monotonic() >= self._next:
            self.close(run, "interrupted")
            self._next = time.monotonic() + self._every

    def close(self, run: Run, reason: FitReason) -> None:
        """Write where the run is; a full disk does not end a fit of hours."""
        state = {
            "components": self._components,
            "reason": reason,
            "seconds": run.seconds,
            "recoveries": run.recoveries,
            "history": [asdict(entry) for entry in run.history],
            "groups": _groups(run),
            "mll": run.mll.progress(),
        }
        try:
            write_file(self.path, _KIND, _tensors(run), state)
        except OSError as error:
            run.problem = f"The checkpoint {self.path} could not be written ({error})."


def _components(run: Run, x: Inputs, y: Tensor) -> dict[str, str]:
    """Hashes of what makes two fits the same one: not where the parameters are."""
    found = {
        f"x{i or ''}": digest(part)
        for i, part in enumerate((x,) if torch.is_tensor(x) else x)
    }
    found["y"] = digest(y)
    found["settings of the fit"] = digest(run.mll.settings)
    found["optimiser"] = digest(type(run.optimiser).__name__)
    for name, parameter in run.model.named_parameters():
        if not parameter.requires_grad:
            found[f"parameter {name}"] = digest(parameter)
    return {**found, **structure_of(run.model)}


def _tensors(run: Run) -> dict[str, Tensor]:
    found = {f"model.{k}": value for k, value in run.model.state_dict().items()}
    for i, parameter in enumerate(run.parameters):
        for name, value in run.optimiser.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                found[f"optimiser.{i}.{name}"] = value
    before = {f"before.{i}": value for i, value in enumerate(run.before)}
    return {**found, **before, **run.mll.tensors()}


def _groups(run: Run) -> list[dict[str, Any]]:
    """The optimiser's settings that JSON can hold, learning rates above all."""
    return [
        {
            name: value
            for name, value in group.items()
            if isinstance(value, int | float | bool)
        }
        for group in run.optimiser.param_groups
    ]


def _restore(
    run: Run, tensors: dict[str, Tensor], state: dict[str, Any]
) -> FitReason | None:
    parts: dict[str, dict[str, Tensor]] = {
        part: {} for part in ("model", "optimiser", "before", "mll")
    }
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    reason = state["reason"]
    if reason not in get_args(FitReason):
        raise ValueError(f"unknown reason {reason!r}")
    put_state(run.model, parts["model"])
    for name, value in parts["optimiser"].items():
        i, _, key = name.partition(".")
        parameter = run.parameters[int(i)]
        # Step counters live on the CPU, moments beside the parameter.
        on = value if key == "step" else value.to(parameter)
        run.optimiser.state[parameter][key] = on
    for group, stored in zip(run.optimiser.param_groups, state["groups"], strict=True):
        group.update(stored)
    run.mll.restore(parts["mll"], state["mll"])
    run.history[:] = [
        FitEntry(
            **{
                **entry,
                "parameters": {k: tuple(v) for k, v in entry["parameters"].items()},
            }
        )
        for entry in state["history"]
    ]
    run.recoveries = int(state["recoveries"])
    run.earlier_seconds = float(state["seconds"])
    run.before = [
        parts["before"][str(i)].to(parameter)
        for i, parameter in enumerate(run.parameters)
    ]
    return reason if reason == "diverged" else None
