"""One output of a stored posterior: its tensors, what JSON holds of it, and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sgdgp.core.memory import resolve_budget
from sgdgp.features.storage import draws_from, state_of_draws
from sgdgp.gpytorch_adapter import Prior
from sgdgp.operators import KernelOperator
from sgdgp.operators.choose import operator_by_name
from sgdgp.posterior.model_state import OtherModelError
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.problem import Problem, Settings
from sgdgp.posterior.solution_state import (
    solution_from,
    solution_state,
    solution_tensors,
    solver_from,
    solver_state,
)
from sgdgp.solvers.auto import choose_solver
from sgdgp.solvers.base import Solver

CHECKED_ROWS = 16
"""Training inputs at which the model that is given on loading is compared."""

_TOLERANCE = 1e-3


def part_state(
    part: PathwisePosterior, name: str, rows: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """What JSON needs to know; tensors are put into ``tensors``.

    Args:
        part: Posterior of one output.
        name: Prefix of the names of its tensors.
        rows: That of the first output over the same rows, which stores those.
        tensors: Where they go.

    Raises:
        NotStorableError: A feature map is not registered for storage.
    """
    problem, settings = part.problem, part.problem.settings
    if rows == name:
        points = slice(0, CHECKED_ROWS)
        with torch.no_grad():
            mean, _ = problem.prior.evaluate(problem.x[points])
        tensors |= {
            f"{name}.x": problem.x,
            f"{name}.inputs": problem.operator.x,
            f"{name}.noise": problem.noise,
            f"{name}.check.mean": mean,
            f"{name}.check.kernel": _block(problem.operator, points),
        }
    tensors |= {
        f"{name}.rhs": problem.rhs,
        f"{name}.noise_draws": problem.noise_draws,
    }
    for key, value in solution_tensors(part.solution).items():
        tensors[f"{name}.solution.{key}"] = value
    return {
        "rows": rows,
        "num_samples": part.num_samples,
        "timings": part.timings,
        "solution": solution_state(part.solution),
        "solver": solver_state(problem.solver),
        "solver_in_words": repr(problem.solver),
        "draws": state_of_draws(problem.draws, f"{name}.draws", tensors),
        "operator": problem.operator.name,
        "settings": {
            "num_features": settings.num_features,
            "operator": settings.operator,
            "memory_budget": settings.memory_budget,
            "seed": settings.seed,
        },
    }


def part_from(
    name: str,
    state: Mapping[str, Any],
    prior: Prior,
    tensors: Mapping[str, Tensor],
    operators: dict[str, KernelOperator],
    solver: Solver | str | None,
) -> PathwisePosterior:
    """The posterior of one output behind ``part_state``.

    Args:
        name: Prefix of the names of its tensors.
        state: What was returned.
        prior: The prior of all outputs.
        tensors: What was put there, on the device that is wanted.
        operators: Operators of earlier outputs by their rows; extended.
        solver: Solver of later solves. Default: the stored one.

    Raises:
        OtherModelError: The prior gives other numbers than the one that was saved.
        KeyError: Something is missing.
        ValueError: Something does not fit.
    """
    rows = state["rows"]
    inputs = tensors[f"{rows}.inputs"]
    settings = Settings(**state["settings"])
    if rows not in operators:
        operators[rows] = _operator(state["operator"], prior, inputs, settings)
        _check_prior(prior, operators[rows], tensors, rows)
    operator = operators[rows]
    prefix = f"{name}.solution."
    solution = solution_from(
        state["solution"],
        {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        },
    )
    problem = Problem(
        prior=prior,
        operator=operator,
        x=tensors[f"{rows}.x"],
        noise=tensors[f"{rows}.noise"],
        rhs=tensors[f"{name}.rhs"],
        noise_draws=tensors[f"{name}.noise_draws"],
        draws=draws_from(state["draws"], tensors, prior.kernel, inputs),
        solver=_solver(state, solver, operator, settings),
        settings=settings,
    )
    return PathwisePosterior(
        solution,
        int(state["num_samples"]),
        dict(state["timings"]),
        problem.paths(solution.weights),
        problem,
    )


def _operator(
    name: str, prior: Prior, inputs: Tensor, settings: Settings
) -> KernelOperator:
    """The operator that was used; where it does not fit here, the chooser's."""
    here = resolve_budget(None, inputs.device)
    kernel, budget = prior.kernel, settings.memory_budget
    if name == "dense" and len(inputs) ** 2 * inputs.element_size() > here:
        return operator_by_name("auto", kernel, inputs, memory_budget=here)
    try:
        return operator_by_name(name, kernel, inputs, memory_budget=budget)
    except (ImportError, ValueError):
        return operator_by_name("auto", kernel, inputs, memory_budget=here)


def _solver(
    state: Mapping[str, Any],
    given: Solver | str | None,
    operator: KernelOperator,
    settings: Settings,
) -> Solver:
    if given is not None:
        return choose_solver(given, operator, settings.memory_budget)
    if state["solver"] is not None:
        return solver_from(state["solver"])
    warnings.warn(
        f"The posterior was solved by {state['solver_in_words']}, which is not a "
        "solver of sgdgp and not in the file; later draws and updates use 'auto'. "
        "Pass solver= to load for another.",
        stacklevel=2,
    )
    return choose_solver("auto", operator, settings.memory_budget)


def _check_prior(
    prior: Prior, operator: KernelOperator, tensors: Mapping[str, Tensor], rows: str
) -> None:
    """Refuse a model whose code gives other numbers with the same parameters."""
    points = slice(0, CHECKED_ROWS)
    with torch.no_grad():
        mean, inputs = prior.evaluate(tensors[f"{rows}.x"][points])
    for what, stored, here in (
        ("mean", tensors[f"{rows}.check.mean"], mean),
        ("kernel's inputs", tensors[f"{rows}.inputs"][points], inputs),
        ("kernel", tensors[f"{rows}.check.kernel"], _block(operator, points)),
    ):
        size = stored.abs().max() if stored.numel() else stored.new_ones(())
        same = stored.shape == here.shape and bool(
            ((stored - here).abs() <= _TOLERANCE * size).all()
        )
        if not same:
            raise OtherModelError(
                f"model: its {what} gives other values at the training inputs than "
                "that of the model that was saved"
            )


def _block(operator: KernelOperator, points: slice) -> Tensor:
    last = min(points.stop, operator.shape[0])
    rows = torch.arange(last, device=operator.device)
    return operator.streaming().block(rows, rows)
