"""A solution and a solver as tensors and JSON, and back.

Solvers are stored by a name from a table and their settings; classes are never looked
up by what a file says, only in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor

from sgdgp.solvers.auto import SOLVERS, Auto, Stage
from sgdgp.solvers.base import HistoryEntry, Reason, Solution, Solver
from sgdgp.solvers.blocks import ExactBlocks, NystromBlocks
from sgdgp.solvers.preconditioners import Nystrom, PivotedCholesky
from sgdgp.solvers.refinement import Refined
from sgdgp.solvers.selection import Greedy, RandomOrder
from sgdgp.solvers.two_level import TwoLevel

_CLASSES: tuple[type, ...] = (
    *SOLVERS.values(),
    Auto,
    ExactBlocks,
    Greedy,
    Nystrom,
    NystromBlocks,
    PivotedCholesky,
    RandomOrder,
    Refined,
    Stage,
    TwoLevel,
)
_SETTINGS: dict[str, Any] = {cls.__name__: cls for cls in _CLASSES}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def solution_tensors(solution: Solution) -> dict[str, Tensor]:
    """Weights, residuals and history."""
    clock = [(entry.passes, entry.seconds, entry.exact) for entry in solution.history]
    norms = [entry.residuals for entry in solution.history]
    # Tensors, not JSON: the header of a safetensors file has a limited size.
    return {
        "weights": solution.weights,
        "residuals": solution.residuals,
        "history.clock": torch.tensor(clock, dtype=torch.float64).reshape(-1, 3),
        "history.residuals": torch.tensor(norms, dtype=torch.float64).reshape(
            -1, len(solution.residuals)
        ),
    }


def solution_state(solution: Solution) -> dict[str, Any]:
    """Everything else, for JSON."""
    return {
        "solver": solution.solver,
        "operator": solution.operator,
        "passes": solution.passes,
        "seconds": solution.seconds,
        "reason": solution.reason,
        "warnings": solution.warnings,
        "settings": dict(solution.settings),
    }


def solution_from(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Solution:
    """The solution behind ``solution_state`` and ``solution_tensors``.

    Raises:
        ValueError: Shapes or values do not fit together.
        KeyError: Something is missing.
    """
    weights, residuals = tensors["weights"], tensors["residuals"]
    if weights.ndim != 2 or residuals.shape != weights.shape[1:]:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} with residuals of shape "
            f"{tuple(residuals.shape)}"
        )
    if not bool(torch.isfinite(weights).all() and torch.isfinite(residuals).all()):
        raise ValueError("weights or residuals are NaN or infinite")
    if state["reason"] not in get_args(Reason):
        raise ValueError(f"unknown reason {state['reason']!r}")
    clock, norms = tensors["history.clock"], tensors["history.residuals"]
    return Solution(
        solver=str(state["solver"]),
        operator=str(state["operator"]),
        weights=weights,
        residuals=residuals,
        passes=float(state["passes"]),
        seconds=float(state["seconds"]),
        reason=state["reason"],
        history=tuple(
            HistoryEntry(passes, seconds, tuple(entry), bool(exact))
            for (passes, seconds, exact), entry in zip(
                clock.tolist(), norms.tolist(), strict=True
            )
        ),
        warnings=tuple(state["warnings"]),
        settings=dict(state["settings"]),
    )


def solver_state(solver: Solver) -> dict[str, Any] | None:
    """A solver of this package with its settings; None for any other."""
    try:
        state: dict[str, Any] = _settings_state(solver)
    except TypeError:
        return None
    return state


def solver_from(state: Any) -> Solver:
    """The solver behind ``solver_state``.

    Raises:
        ValueError: There is no such solver, or a setting is out of range.
        TypeError: There is no such setting.
    """
    solver = _settings_from(state)
    if not isinstance(solver, Solver):
        raise ValueError(f"expected a solver, found {state!r}")
    return solver


def _settings_state(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return [_settings_state(item) for item in value]
    name = type(value).__name__
    if _SETTINGS.get(name) is not type(value):
        raise TypeError(f"{name} is not a setting of this package")
    return {
        "type": name,
        "settings": {
            item.name: _settings_state(getattr(value, item.name))
            for item in fields(_SETTINGS[name])
            if item.init
        },
    }


def _settings_from(state: Any) -> Any:
    if isinstance(state, list):
        return tuple(_settings_from(item) for item in state)
    if not isinstance(state, dict):
        return state
    if "dtype" in state:
        return _DTYPES[state["dtype"]]
    if state["type"] not in _SETTINGS:
        raise ValueError(f"unknown solver setting {state['type']!r}")
    settings = state["settings"].items()
    return _SETTINGS[state["type"]](
        **{name: _settings_from(value) for name, value in settings}
    )
