"""Posteriors in files: ``posterior.save(path)`` and ``sgdgp.load(path, model)``.

A file holds numbers: data, parameters, prior draws, weights, settings. Which code they
belong to is never in it: the model is given on loading, everything else comes from
tables of this package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.errors import StorageError, UnusableFileError
from sgdgp.core.files import FileKind, check_place_of, read_file, write_file
from sgdgp.gpytorch_adapter import Prior, prior_of
from sgdgp.operators import KernelOperator
from sgdgp.posterior.independent import IndependentPosterior
from sgdgp.posterior.model_state import OtherModelError, structure_in_words, with_state
from sgdgp.posterior.multitask import MultitaskPosterior
from sgdgp.posterior.outputs import MultiOutputPosterior
from sgdgp.posterior.part_state import CHECKED_ROWS, part_from, part_state
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.solvers.base import Solver

Posterior: TypeAlias = PathwisePosterior | MultiOutputPosterior

KIND = FileKind("sgdgp.posterior", 1, "posterior")

_PACKAGES = ("sgdgp", "torch", "gpytorch", "linear_operator")


def save(posterior: Posterior, path: str | os.PathLike[str]) -> None:
    """Write a posterior into a file, in one step: see ``PathwisePosterior.save``."""
    write_file(place_of(path), KIND, *contents_of(posterior))


def place_of(path: str | os.PathLike[str]) -> Path:
    """Where a file is to be written, once that is known to be possible.

    Raises:
        StorageError: There is no such directory, or the path is one.
        TypeError: No path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path, found {path!r}")
    place = Path(path).resolve()
    try:
        check_place_of(place)
    except UnusableFileError as error:
        raise StorageError(f"path: {error}") from error
    return place


def contents_of(posterior: Posterior) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file of a posterior holds: tensors by name, and everything else.

    Raises:
        NotStorableError: A feature map is not registered for storage.
    """
    parts = posterior.parts
    prior = parts[0].problem.prior
    state_dict = prior.model.state_dict()
    tensors = {f"model.{name}": value for name, value in state_dict.items()}
    systems: dict[int, int] = {}
    stored = []
    for index, part in enumerate(parts):
        # Outputs that were observed in the same rows share what belongs to the rows.
        rows = systems.setdefault(id(part.problem.operator), index)
        stored.append(part_state(part, f"part.{index}", f"part.{rows}", tensors))
    return tensors, {
        "kind": _kind_of(posterior),
        "versions": _versions(),
        "structure": structure_in_words(prior.model),
        "parameters": list(state_dict),
        "widths": prior.layout.widths,
        "dtypes": [_name_of(dtype) for dtype in prior.layout.dtypes],
        "parts": stored,
    }


def load(
    path: str | os.PathLike[str],
    model: ExactGP,
    *,
    solver: Solver | str | None = None,
) -> Posterior:
    """Read a posterior that was saved; it predicts the same numbers.

    Args:
        path: The file.
        model: A model built like the one that was saved: it gives the structure, the
            file the parameters. It is copied and never changed. What a model keeps
            outside its ``state_dict`` comes from it as well.
        solver: Solver of later draws and updates. Default: the one that was saved; a
            solver that is not of this package is not in the file, and "auto" takes
            its place with a warning.

    Returns:
        The posterior, on the model's device, with all of its verbs.

    Raises:
        StorageError: The file is missing, damaged, not a posterior of sgdgp, or of a
            newer format; or the model is built otherwise (a ValueError).
        TypeError: An argument is of the wrong kind.

    Example:
        >>> posterior.save("posterior.safetensors")
        >>> same = sgdgp.load("posterior.safetensors", model)
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path, found {path!r}")
    if not isinstance(model, ExactGP):
        raise TypeError(
            f"model: expected a gpytorch.models.ExactGP, found {type(model).__name__}"
        )
    if solver is not None and not isinstance(solver, Solver | str):
        raise TypeError(
            f"solver: expected a Solver such as SDD(), or a name, found {solver!r}"
        )
    place = Path(path)
    try:
        tensors, state = read_file(place, KIND)
    except UnusableFileError as error:
        raise StorageError(str(error)) from error
    try:
        return posterior_from(model, tensors, state, solver)
    except OtherModelError as error:
        raise StorageError(f"{error}; the file is {place}") from error
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise StorageError(f"{place} does not fit this model: {error}") from error


def _kind_of(posterior: Posterior) -> str:
    if isinstance(posterior, MultitaskPosterior):
        return "multitask"
    return "single" if isinstance(posterior, PathwisePosterior) else "independent"


def posterior_from(
    model: ExactGP,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    solver: Solver | str | None = None,
) -> Posterior:
    """The posterior behind ``contents_of``, on the model's device.

    Args:
        model: A model built like the one that was saved; it is copied.
        tensors: Tensors by name.
        state: Everything else.
        solver: Solver of later solves. Default: the stored one.

    Raises:
        OtherModelError: The model is built otherwise.
        KeyError: Something is missing; other errors where something does not fit.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    # Generators keep their state on the CPU.
    tensors = {
        name: value if name.endswith(".generator") else value.to(device)
        for name, value in tensors.items()
    }
    own = with_state(
        model,
        state["structure"],
        {name: tensors[f"model.{name}"] for name in state["parameters"]},
    )
    prior = _prior(own, tensors["part.0.x"], state)
    operators: dict[str, KernelOperator] = {}
    parts = [
        part_from(f"part.{i}", part, prior, tensors, operators, solver)
        for i, part in enumerate(state["parts"])
    ]
    if state["kind"] == "multitask":
        return MultitaskPosterior.of(parts[0])
    if state["kind"] == "independent":
        return IndependentPosterior.of(parts)
    if state["kind"] != "single":
        raise ValueError(f"unknown kind {state['kind']!r}")
    return parts[0]


def _prior(model: ExactGP, x: Tensor, state: Mapping[str, Any]) -> Prior:
    """The prior of the model, traced at a few of the training inputs."""
    points = x[:CHECKED_ROWS]
    if state["kind"] == "multitask":
        points = points[:, :-1]
    widths = [int(width) for width in state["widths"]]
    if len(widths) == 1:
        return prior_of(model, points)
    dtypes = [getattr(torch, name) for name in state["dtypes"]]
    return prior_of(
        model,
        tuple(
            part.to(dtype)
            for part, dtype in zip(points.split(widths, dim=1), dtypes, strict=True)
        ),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
