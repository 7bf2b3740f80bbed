"""Accounts of a solve that goes on from earlier work: budgets, passes, history."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from sgdgp.solvers.base import Solution, Solver

_LEAST_PASSES = 1.0
_LEAST_SECONDS = 1e-3


def with_what_is_left(solver: Solver, passes: float, seconds: float) -> Solver:
    """The solver with its budgets less what earlier work has used."""
    if not is_dataclass(solver):
        return solver
    named = {field.name for field in fields(solver)}
    left: dict[str, Any] = {}
    # With nothing left, the least that is still allowed: the solver has to see the
    # weights once to say how good they are.
    for name, used, least in (
        ("max_passes", passes, _LEAST_PASSES),
        ("max_seconds", seconds, _LEAST_SECONDS),
    ):
        if name in named and getattr(solver, name) is not None:
            left[name] = max(least, getattr(solver, name) - used)
    return replace(solver, **left)


def continued(before: Solution, solution: Solution) -> Solution:
    """A solution whose accounts include what went before."""
    later = (
        replace(
            entry,
            passes=before.passes + entry.passes,
            seconds=before.seconds + entry.seconds,
        )
        for entry in solution.history
    )
    return replace(
        solution,
        passes=before.passes + solution.passes,
        seconds=before.seconds + solution.seconds,
        history=(*before.history, *later),
    )
