"""Posteriors in files: ``posterior.save(path)`` and ``sgdgp.load(path, model)``.

A file holds numbers: data, parameters, prior draws, weights, settings. Which code they
belong to is never in it: the model is given on loading, and must be built like the one
that was saved; everything else comes from the tables of this package.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core import format_1
from sgdgp.core.codec import Contents, can_be_stored, write_values
from sgdgp.core.errors import StorageError, warn_user
from sgdgp.core.files import FileKind, place_of
from sgdgp.core.hashes import differences, in_words, plain_attributes
from sgdgp.core.memory import resolve_budget
from sgdgp.features.storage import given_by_kernel, parts_of_kernel
from sgdgp.gpytorch_adapter import MultitaskPrior, Prior, prior_of
from sgdgp.operators import KernelOperator
from sgdgp.operators.choose import operator_by_name
from sgdgp.posterior.problem import Part, Problem, Settings, groups_of
from sgdgp.solvers.auto import choose_solver
from sgdgp.solvers.base import Solver

KIND = FileKind("sgdgp.posterior", 2, "posterior", format_1.posterior)

_CHECKED_ROWS = 16
"""Training inputs at which the model that is given on loading is compared: enough to
tell kernels apart, few enough to cost nothing."""

_TOLERANCE = 1e-3
"""Of that comparison: another device or thread count is no other model."""


def save(parts: Sequence[Part], path: str | os.PathLike[str]) -> None:
    """Write a posterior into a file, in one step; errors as ``Posterior.save``."""
    write_values(place_of(path), KIND, contents_of(parts), given_by_kernel)


def without_recycled(parts: Sequence[Part]) -> list[Part]:
    """The parts without what their solves leave for the next ones.

    That is several times as large as all else, and only saves passes of a later
    ``update``.
    """
    return [
        replace(part, solution=replace(part.solution, recycled=None)) for part in parts
    ]


def contents_of(parts: Sequence[Part]) -> dict[str, Any]:
    """What a file of a posterior holds, by name."""
    prior = parts[0].problem.prior
    # Outputs that were observed in the same rows share what belongs to the rows.
    groups = groups_of(parts)
    system_of = {part: i for i, group in enumerate(groups) for part in group}
    return {
        "kind": _kind_of(parts),
        "structure": structure_in_words(prior.model),
        "model": dict(prior.model.state_dict()),
        "widths": list(prior.layout.widths),
        "dtypes": list(prior.layout.dtypes),
        "systems": [_system(parts[group[0]].problem) for group in groups],
        "parts": [{"system": system_of[i], **_part(p)} for i, p in enumerate(parts)],
    }


def _kind_of(parts: Sequence[Part]) -> str:
    if isinstance(parts[0].problem.prior, MultitaskPrior):
        return "multitask"
    return "single" if len(parts) == 1 else "independent"


def _system(problem: Problem) -> dict[str, Any]:
    """What the outputs of a solve have in common."""
    with torch.no_grad():
        mean, _ = problem.prior.evaluate(problem.x[:_CHECKED_ROWS])
    return {
        "x": problem.x,
        "inputs": problem.operator.x,
        "noise": problem.noise,
        "operator": problem.operator.name,
        "mean": mean,
        "kernel": _corner(problem.operator),
    }


def _part(part: Part) -> dict[str, Any]:
    problem, settings = part.problem, part.problem.settings
    return {
        "rhs": problem.rhs,
        "noise_draws": problem.noise_draws,
        "draws": problem.draws,
        "solution": part.solution,
        "solver": problem.solver if can_be_stored(problem.solver) else None,
        "solver_in_words": repr(problem.solver),
        "timings": part.timings,
        "passes_from_zero": part.passes_from_zero,
        "settings": {
            "num_features": settings.num_features,
            "operator": settings.operator,
            "memory_budget": settings.memory_budget,
            "seed": settings.seed,
        },
    }


def parts_from(
    contents: Contents, model: ExactGP, solver: Solver | str | None = None
) -> list[Part]:
    """The parts behind ``contents_of``, on the model's device.

    Args:
        contents: What the file holds.
        model: A model built like the one that was saved; it is copied.
        solver: Solver of later solves. Default: the stored one.

    Raises:
        StorageError: The model is built otherwise, or gives other numbers.
        KeyError: Something is missing; other errors where something does not fit.
    """
    parameter = next(model.parameters(), None)
    contents.device = torch.device("cpu") if parameter is None else parameter.device
    kind = contents["kind"]
    own = model_with(model, contents["structure"], contents["model"])
    systems = contents["systems"]
    points = systems[0]["x"][:_CHECKED_ROWS]
    if kind == "multitask":
        points = points[:, :-1]
    prior = _prior(own, points, contents["widths"], contents["dtypes"])
    given = parts_of_kernel(prior.kernel, systems[0]["inputs"])
    operators: dict[int, KernelOperator] = {}
    parts = []
    for part in contents.value("parts", given):
        number, settings = part["system"], _settings(part, solver)
        system = systems[number]
        if number not in operators:
            operators[number] = _operator(system, prior, settings)
            _check_prior(prior, operators[number], system)
        problem = Problem(
            prior,
            operators[number],
            system["x"],
            system["noise"],
            part["draws"],
            part["rhs"],
            part["noise_draws"],
            settings,
        )
        parts.append(
            Part(problem, part["solution"], part["timings"], part["passes_from_zero"])
        )
    if kind not in ("single", "multitask", "independent"):
        raise ValueError(f"unknown kind {kind!r}")
    return parts


def _prior(
    model: ExactGP, points: Tensor, widths: list[int], dtypes: list[torch.dtype]
) -> Prior:
    """The prior of the model, traced at a few of the training inputs."""
    if len(widths) == 1:
        return prior_of(model, points)
    inputs = points.split(widths, dim=1)
    return prior_of(
        model,
        tuple(part.to(dtype) for part, dtype in zip(inputs, dtypes, strict=True)),
    )


def _operator(
    system: Mapping[str, Any], prior: Prior, settings: Settings
) -> KernelOperator:
    """The operator that was used; where it does not fit here, the chooser's."""
    name, inputs, kernel = system["operator"], system["inputs"], prior.kernel
    here, budget = resolve_budget(None, inputs.device), settings.memory_budget
    if name == "dense" and len(inputs) ** 2 * inputs.element_size() > here:
        return operator_by_name("auto", kernel, inputs, memory_budget=here)
    try:
        return operator_by_name(name, kernel, inputs, memory_budget=budget)
    except (ImportError, ValueError):
        return operator_by_name("auto", kernel, inputs, memory_budget=here)


def _settings(part: Mapping[str, Any], given: Solver | str | None) -> Settings:
    """How to draw and solve from now on, with the solver that is given on loading."""
    stored, budget = part["solver"], part["settings"]["memory_budget"]
    if given is None and stored is None:
        warn_user(
            f"The posterior was solved by {part['solver_in_words']}, which is not a "
            "solver of sgdgp and not in the file; later draws and updates use 'auto'. "
            "Pass solver= to load for another."
        )
        given = "auto"
    elif given is None and not isinstance(stored, Solver):
        raise ValueError(f"expected a solver, found {stored!r}")
    solver = choose_solver(stored if given is None else given, None, budget)
    return Settings(solver, **part["settings"])


def _check_prior(
    prior: Prior, operator: KernelOperator, system: Mapping[str, Any]
) -> None:
    """Refuse a model whose code gives other numbers with the same parameters."""
    with torch.no_grad():
        mean, inputs = prior.evaluate(system["x"][:_CHECKED_ROWS])
    for what, stored, here in (
        ("mean", system["mean"], mean),
        ("kernel's inputs", system["inputs"][:_CHECKED_ROWS], inputs),
        ("kernel", system["kernel"], _corner(operator)),
    ):
        size = stored.abs().max() if stored.numel() else stored.new_ones(())
        same = stored.shape == here.shape and bool(
            ((stored - here).abs() <= _TOLERANCE * size).all()
        )
        if not same:
            raise StorageError(
                f"model: its {what} gives other values at the training inputs than "
                "that of the model that was saved"
            )


def _corner(operator: KernelOperator) -> Tensor:
    """K over the points that are compared."""
    rows = torch.arange(min(_CHECKED_ROWS, operator.shape[0]), device=operator.device)
    return operator.streaming().block(rows, rows)


def structure_in_words(model: torch.nn.Module) -> dict[str, str]:
    """Class and plain attributes of every module, by its name.

    The class without the module it is defined in, so that a script and a package may
    share a file; of the model itself no attributes, since they may count its calls.
    """
    return {
        name: type(module).__qualname__
        + "".join(
            f", {key}={value!r}"
            for key, value in (plain_attributes(module) if name else ())
        )
        for name, module in model.named_modules()
    }


def model_with(
    model: ExactGP, structure: Mapping[str, str], state: Mapping[str, Tensor]
) -> ExactGP:
    """A copy of a model in eval mode with the saved parameters and buffers.

    Args:
        model: Structure of the model; it stays as it is.
        structure: The saved ``structure_in_words``.
        state: The saved ``state_dict``; tensors are taken over as they are.

    Raises:
        StorageError: Modules, parameters or shapes differ; says which.
    """
    data = [t for t in (model.train_inputs or ()) if torch.is_tensor(t)]
    data += [model.train_targets] if torch.is_tensor(model.train_targets) else []
    own = copy.deepcopy(model, memo={id(t): t for t in data})
    own.prediction_strategy = None
    own.eval()
    differing = differences(
        _described(structure, state),
        _described(structure_in_words(own), own.state_dict()),
    )
    if differing:
        raise StorageError(
            "model: built otherwise than the one that was saved. Different here: "
            f"{in_words(differing)}"
        )
    # Past BoTorch's own, which would transform targets again that nobody reads.
    torch.nn.Module.load_state_dict(own, dict(state), strict=True, assign=True)
    return own.requires_grad_(False)


def _described(
    structure: Mapping[str, str], state: Mapping[str, Tensor]
) -> dict[str, str]:
    return {
        **{f"module {name or 'the model'}": words for name, words in structure.items()},
        **{f"parameter or buffer {n}": f"{tuple(t.shape)}" for n, t in state.items()},
    }
