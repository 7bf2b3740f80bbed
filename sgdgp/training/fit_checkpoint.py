"""Fits that survive the end of their process."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from sgdgp.core import format_1
from sgdgp.core.checkpoint import Checkpoint
from sgdgp.core.codec import Contents
from sgdgp.core.files import FileKind
from sgdgp.core.hashes import digest, former_structure_of, structure_of
from sgdgp.gpytorch_adapter import Inputs
from sgdgp.training.parameters import Image, like_all, put_state
from sgdgp.training.run import FitReason, Run

KIND = FileKind("sgdgp.fit", 2, "checkpoint of a fit", format_1.fit)


class FitCheckpoint(Checkpoint):
    """The file of one fit."""

    kind = KIND
    work = "fit"

    def open_for(self, run: Run, x: Inputs, y: Tensor) -> FitReason | None:
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
        device = next(run.model.parameters()).device
        found = self.open(
            _components(run, x, y), former_structure_of(run.model), device
        )
        if found is None:
            return None
        with self.reading():
            return _restore(run, found)

    def keep(self, run: Run) -> None:
        """Write, if it is time."""
        if self.is_due:
            self.close(run, "interrupted")

    def close(self, run: Run, reason: FitReason) -> None:
        """Write where the run is; a full disk does not end a fit of hours."""
        self.write(
            reason=reason,
            seconds=run.seconds,
            last_step=run.last_step,
            recoveries=run.recoveries,
            first_steps=run.first_steps,
            history=run.history,
            model=dict(run.model.state_dict()),
            before=run.before,
            best=run.best,
            images=[image.leaf.detach() for image in run.images],
            falls=run.falls,
            optimiser=_moments(run),
            groups=_groups(run),
            mll=run.mll.state(),
        )
        run.problem = self.problem


def _components(run: Run, x: Inputs, y: Tensor) -> dict[str, str]:
    """Hashes of what makes two fits the same one: not where the parameters are."""
    found = {
        f"the training inputs x{i or ''}": digest(part)
        for i, part in enumerate((x,) if torch.is_tensor(x) else x)
    }
    found["the training targets y"] = digest(y)
    found["settings of the fit"] = digest(run.mll.settings)
    found["optimizer"] = digest(type(run.optimiser).__name__)
    for name, parameter in run.model.named_parameters():
        if not parameter.requires_grad:
            found[f"parameter {name}"] = digest(parameter)
    return {**found, **structure_of(run.model)}


def _moments(run: Run) -> dict[str, dict[str, Tensor]]:
    """The optimiser's tensors of each parameter that has some, by its number."""
    found = {}
    for i, parameter in enumerate(run.parameters):
        state = run.optimiser.state.get(parameter, {})
        own = {name: v for name, v in state.items() if torch.is_tensor(v)}
        if own:
            found[str(i)] = own
    return found


def _groups(run: Run) -> list[dict[str, Any]]:
    """The optimiser's settings that a file can hold, learning rates above all."""
    return [
        {
            name: value
            for name, value in group.items()
            if isinstance(value, int | float | bool)
        }
        for group in run.optimiser.param_groups
    ]


def _restore(run: Run, found: Contents) -> FitReason | None:
    reason: FitReason = found["reason"]
    if reason not in get_args(FitReason):
        raise ValueError(f"unknown reason {reason!r}")
    put_state(run.model, found["model"])
    images = found["images"]
    # Files of format 1 know values where these are images: moments of no use.
    is_older = len(images) != len(run.images)
    for i, moments in ({} if is_older else found["optimiser"]).items():
        parameter = run.parameters[int(i)]
        for name, value in moments.items():
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} of parameter {i} has another shape")
            # Step counters live on the CPU, moments beside the parameter.
            on = value.cpu() if name == "step" else value.to(parameter)
            run.optimiser.state[parameter][name] = on
    for group, stored in zip(run.optimiser.param_groups, found["groups"], strict=True):
        group.update(stored)
    run.mll.restore(found["mll"])
    run.history[:] = found["history"]
    run.recoveries = int(found["recoveries"])
    run.first_steps = int(found["first_steps"])
    run.earlier_seconds = float(found["seconds"])
    run.last_step = float(found["last_step"])
    run.falls = int(found["falls"])
    with torch.no_grad():
        for i, image in enumerate(run.images):
            now = Image.of(image.parameter, image.constraint).leaf
            image.leaf.copy_(now if is_older else images[i])
    if is_older:
        return reason if reason == "diverged" else None
    run.before = found["before"] and like_all(found["before"], run.parameters)
    run.best = found["best"] and like_all(found["best"], run.parameters)
    return reason if reason == "diverged" else None
