"""Weights of a system that has gained rows: correct them locally, then iterate on.

What the earlier solve left behind (``sgdgp.solvers.recycling``) is used where there is
any: its residuals save the pass that would find them again, its preconditioner the
passes that built it, and its leading directions most of the iterations.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.operators.base import KernelOperator
from sgdgp.posterior.problem import Problem
from sgdgp.solvers.auto import resuming
from sgdgp.solvers.base import Callback, Solution, Watch
from sgdgp.solvers.recycling import (
    Appended,
    Carried,
    Directions,
    appended,
    directions_to_keep,
)
from sgdgp.solvers.solutions import continued
from sgdgp.solvers.subset_solve import LocalCorrection
from sgdgp.solvers.system import System, as_system


def warm_start(
    problem: Problem,
    operator: KernelOperator,
    before: Solution,
    initial: Float[Tensor, "n k"],
    worth_passes: float,
    callback: Callback | None,
) -> Solution:
    """A solution that starts from that of fewer rows; it may not have converged.

    Args:
        problem: The problem, its new rows last.
        operator: Its operator, with entries it may have stored.
        before: The solution of the old rows.
        initial: Its weights, zero in the new rows (n, k).
        worth_passes: Passes in whose time a part of the system may be factorised.
        callback: Called as it advances; True stops it.
    """
    num_new = len(initial) - len(before.weights)
    system = as_system(operator, problem.noise, problem.rhs)
    left = before.carried
    known, residual, passes = None, None, 0.0
    if left is not None:
        known, residual = _seen_from_new_rows(problem.rhs, operator, before, left)
        passes = num_new / system.n
    solver = problem.solver
    local = LocalCorrection(solver.limits, worth_passes).start(
        operator,
        problem.noise,
        problem.rhs,
        initial,
        num_new,
        memory_budget=problem.settings.memory_budget,
        callback=callback,
        residual=residual,
        known=known,
        passes=passes,
    )
    local = replace(local, settings={"local_rows": local.settings["rows"]})
    if left is None or resuming(solver) is None:
        return replace(local, carried=None)
    assert local.carried is not None
    started = _carrying(local, left, system, num_new, known, local.carried.residual)
    if local.reason != "budget":
        return started
    if _is_outgrown(started):  # the solver will build a preconditioner again
        return replace(started, carried=None)
    return _iterated(problem, system, started, known, callback)


def renewed(
    problem: Problem, before: Solution, callback: Callback | None = None
) -> Solution | None:
    """A solution whose columns are new but for the first, and perhaps some rows.

    Nothing is known of the new columns, so there is nothing to correct locally; the
    preconditioner and the directions serve them as well.

    Args:
        problem: The problem, its new rows last.
        before: The solution of the old rows and columns.
        callback: Called as it advances; True stops it.

    Returns:
        None where the earlier solve left nothing to start from.
    """
    left = before.carried
    if (
        left is None
        or left.residual.shape != before.weights.shape
        or resuming(problem.solver) is None
    ):
        return None
    rhs, operator = problem.rhs, problem.operator.unfilled()
    num_new = len(rhs) - len(before.weights)
    system = as_system(operator, problem.noise, rhs)
    first = replace(
        before,
        weights=before.weights[:, :1],
        carried=replace(left, residual=left.residual[:, :1]),
    )
    assert first.carried is not None
    with torch.no_grad():
        known, residual = _seen_from_new_rows(
            rhs[:, :1], operator, first, first.carried
        )
        assert residual is not None
        weights = torch.zeros_like(rhs)
        weights[: len(first.weights), :1] = first.weights
        residual = torch.cat([residual, rhs[:, 1:]], dim=1)
        start = Solution(
            solver="renewed",
            operator=operator.name,
            weights=weights,
            residuals=(residual / system.scale).norm(dim=0),
            passes=num_new / system.n,
            seconds=0.0,
            reason="budget",
        )
        started = _carrying(start, left, system, num_new, known, residual)
        if _is_outgrown(started):
            return None
        return _iterated(problem, system, started, known, callback)


def _carrying(
    start: Solution,
    left: Carried,
    system: System,
    num_new: int,
    known: Directions | None,
    residual: Float[Tensor, "n k"],
) -> Solution:
    """A start with all it may go on from."""
    inverse = left.inverse
    if inverse is not None and num_new:
        inverse = appended(inverse, system, num_new)
        start = replace(start, passes=start.passes + inverse.passes)
    pairs = () if known is None else ((known.directions, known.images),)
    return replace(start, carried=Carried(residual, inverse, pairs))


def _is_outgrown(started: Solution) -> bool:
    assert started.carried is not None
    inverse = started.carried.inverse
    return isinstance(inverse, Appended) and inverse.is_outgrown


def _seen_from_new_rows(
    rhs: Tensor, operator: KernelOperator, before: Solution, left: Carried
) -> tuple[Directions | None, Float[Tensor, "n k"] | None]:
    """Directions and residuals that were known, with the new rows K(new, old) adds.

    The residuals are None where they belong to other columns.
    """
    first, columns = before.weights.shape
    known = left.leading()
    both = before.weights
    if known is not None:
        both = torch.cat([both, known.directions], dim=1)
    new = slice(first, len(rhs))
    padded = torch.cat([both, both.new_zeros(new.stop - first, both.shape[1])])
    rows = operator.rows(new).matmul(padded)
    if known is not None:
        known = known.extended(rows[:, columns:])
    if left.residual.shape != before.weights.shape:
        return known, None
    return known, torch.cat([left.residual, rhs[new] - rows[:, :columns]])


def _iterated(
    problem: Problem,
    system: System,
    local: Solution,
    known: Directions | None,
    callback: Callback | None,
) -> Solution:
    """Conjugate gradients with the earlier preconditioner and directions."""
    carried = local.carried
    assert carried is not None
    remaining = problem.solver.limits.less(local.passes, local.seconds)
    solver = resuming(problem.solver.with_limits(remaining))
    assert solver is not None
    kept = directions_to_keep(system.rhs, problem.settings.memory_budget)
    solver = solver.with_recycling(kept)
    solution = solver.resume(
        system,
        local.weights / system.scale,
        carried.residual / system.scale,
        carried.inverse,
        known,
        Watch.after(local.passes, local.seconds, callback),
    )
    return replace(
        continued(local, solution),
        solver=f"{local.solver}+{solution.solver}",
        settings={**local.settings, **solution.settings},
    )
