"""Models in files: ``model.save(path)`` and ``PathwiseModel.load(path, definition)``.

One file holds the hyperparameters, the data, and the posterior of every output. What
code they belong to is not in it: the definition is given on loading.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sgdgp.botorch.conditioned_model import Conditioned, SolveSettings, state_of
from sgdgp.botorch.definition import Observations
from sgdgp.botorch.outputs import Outputs
from sgdgp.core.errors import StorageError, UnusableFileError
from sgdgp.core.files import FileKind, read_file, write_file
from sgdgp.posterior.solution_state import solver_from, solver_state
from sgdgp.posterior.storage import contents_of, place_of, posterior_from
from sgdgp.solvers import Solver

if TYPE_CHECKING:
    from sgdgp.botorch.model import PathwiseModel

KIND = FileKind("sgdgp.botorch", 1, "PathwiseModel")


def save(model: PathwiseModel, path: str | os.PathLike[str]) -> None:
    """Write a model into a file, in one step: see ``PathwiseModel.save``."""
    place = place_of(path)
    outputs = model.all_outputs()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    posteriors = []
    for index, (part, seen) in enumerate(zip(outputs, model.observations, strict=True)):
        tensors |= {
            f"data.{index}.{name}": value for name, value in seen.named_buffers()
        }
        own, state = contents_of(part.posterior)
        tensors |= {f"posterior.{index}.{name}": own[name] for name in own}
        posteriors.append(state)
    settings = model.settings
    everything = {
        "posteriors": posteriors,
        "parameters": list(model.state_dict()),
        "columns": model.columns,
        "cursor": model.cursor.position,
        "settings": {**asdict(settings), "solver": _solver_state(settings.solver)},
    }
    write_file(place, KIND, tensors, everything)


def restored(
    empty: PathwiseModel,
    path: str | os.PathLike[str],
    definition: nn.Module,
    transforms: Mapping[str, nn.Module | None],
    solver: Solver | str | None,
) -> PathwiseModel:
    """A model filled from a file; see ``PathwiseModel.load``.

    Args:
        empty: A model whose ``build`` was not called.
        path: The file.
        definition: A definition built like the one that was saved; it is copied.
        transforms: The model's own transforms by name, as it was made with.
        solver: Of later solves. Default: the stored one.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path, found {path!r}")
    place = Path(path)
    try:
        tensors, state = read_file(place, KIND)
    except UnusableFileError as error:
        raise StorageError(str(error)) from error
    try:
        _fill(empty, copy.deepcopy(definition), transforms, tensors, state, solver)
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise StorageError(f"{place} does not fit this definition: {error}") from error
    return empty


def _fill(
    model: PathwiseModel,
    definition: nn.Module,
    transforms: Mapping[str, nn.Module | None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    solver: Solver | str | None,
) -> None:
    parameter = next(definition.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    settings = dict(state["settings"])
    settings["solver"] = _solver(settings["solver"]) if solver is None else solver
    count = len(state["posteriors"])
    data = tuple(
        Observations(**_below(tensors, f"data.{index}.", device))
        for index in range(count)
    )
    model.build(
        definition,
        data,
        {name: copy.deepcopy(value) for name, value in transforms.items()},
        SolveSettings(**settings),
    )
    saved = _below(tensors, "model.", device)
    model.load_state_dict({name: saved[name] for name in state["parameters"]})
    outputs = []
    for index, problem in enumerate(model.problems()):
        own = _below(tensors, f"posterior.{index}.", None)
        own_state = state["posteriors"][index]
        posterior = posterior_from(problem.model, own, own_state, solver)
        columns = tuple(range(problem.y.shape[1]))
        outputs.append(Outputs(posterior, columns, problem.units, posterior.functions))
    model.keep(Conditioned(tuple(outputs), state_of(model)))
    model.cursor.position = int(state["cursor"])
    columns = state["columns"]
    model.columns = None if columns is None else tuple(columns)


def _below(
    tensors: Mapping[str, Tensor], prefix: str, device: torch.device | None
) -> dict[str, Tensor]:
    """Tensors whose names begin so, without it."""
    return {
        name.removeprefix(prefix): value if device is None else value.to(device)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _solver_state(solver: Solver | str) -> Any:
    return solver if isinstance(solver, str) else solver_state(solver)


def _solver(state: Any) -> Solver | str:
    if state is None:
        # A solver that is not of this package is in no file.
        return "auto"
    return state if isinstance(state, str) else solver_from(state)
