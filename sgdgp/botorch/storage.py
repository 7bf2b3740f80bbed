"""Models in files: ``model.save(path)`` and ``PathwiseModel.load(path, definition)``.

One file holds the hyperparameters, the data, and the posterior of every output. What
code they belong to is not in it: the definition is given on loading.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from sgdgp.botorch.conditioned_model import Conditioned, ConditionedModel, state_of
from sgdgp.botorch.definition import Observations
from sgdgp.botorch.outputs import Outputs
from sgdgp.core import format_1
from sgdgp.core.codec import Contents, can_be_stored, fitting, read_values, write_values
from sgdgp.core.files import FileKind, path_of, place_of
from sgdgp.features.storage import given_by_kernel
from sgdgp.posterior.posterior import posterior_of
from sgdgp.posterior.storage import contents_of, parts_from
from sgdgp.solvers import Solver

KIND = FileKind("sgdgp.botorch", 2, "PathwiseModel", format_1.botorch)

M = TypeVar("M", bound=ConditionedModel)


def save(model: ConditionedModel, path: str | os.PathLike[str]) -> None:
    """Write a model into a file, in one step: see ``PathwiseModel.save``."""
    place = place_of(path)
    settings = model.settings
    if not can_be_stored(settings.solver):
        # A solver that is not of this package is in no file.
        settings = replace(settings, solver="auto")
    values: dict[str, Any] = {
        "model": dict(model.state_dict()),
        "data": [dict(seen.named_buffers()) for seen in model.observations],
        "columns": model.columns,
        "cursor": model.cursor.position,
        "settings": settings,
    }
    for index, part in enumerate(model.all_outputs()):
        for name, value in contents_of(part.posterior.parts).items():
            values[f"posterior.{index}.{name}"] = value
    write_values(place, KIND, values, given_by_kernel)


def restore(
    empty: M,
    path: str | os.PathLike[str],
    definition: nn.Module,
    transforms: Mapping[str, nn.Module | None],
    solver: Solver | str | None,
) -> M:
    """A model filled from a file; see ``PathwiseModel.load``.

    Args:
        empty: A model whose ``build`` was not called.
        path: The file.
        definition: A definition built like the one that was saved; it is copied.
        transforms: The model's own transforms by name, as it was made with.
        solver: Of later solves. Default: the stored one.
    """
    place = path_of(path)
    if not isinstance(definition, nn.Module):
        raise TypeError(
            f"model: expected a gpytorch.models.GP for {place}, a PathwiseModel, found "
            f"{type(definition).__name__}"
        )
    parameter = next(definition.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    found = read_values(place, KIND, device)
    with fitting(place, "definition"):
        _fill(empty, copy.deepcopy(definition), transforms, found, solver)
    return empty


def _fill(
    model: ConditionedModel,
    definition: nn.Module,
    transforms: Mapping[str, nn.Module | None],
    found: Contents,
    solver: Solver | str | None,
) -> None:
    settings = found["settings"]
    model.build(
        definition,
        tuple(Observations(**seen) for seen in found["data"]),
        {name: copy.deepcopy(value) for name, value in transforms.items()},
        settings if solver is None else replace(settings, solver=solver),
    )
    model.load_state_dict(found["model"])
    outputs = []
    for index, problem in enumerate(model.problems()):
        own = found.below(f"posterior.{index}.")
        posterior = posterior_of(parts_from(own, problem.model, solver))
        columns = tuple(range(problem.y.shape[1]))
        outputs.append(Outputs(posterior, columns, problem.units, posterior.functions))
    model.keep(Conditioned(tuple(outputs), state_of(model)))
    model.cursor.position = int(found["cursor"])
    model.columns = found["columns"]
