"""Solves of a matrix that was solved with before: more rows, or other columns.

What the earlier solve left behind (``recycling.py``) is used where there is any: its
residuals save the pass that would find them again, its preconditioner the passes that
built it, and its leading directions most of the iterations. Weights of a system that
has gained rows are corrected where these are (``subset_solve.py``), then iterated on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import Callback, Solution, Solver, Watch
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.recycling import (
    Directions,
    ExtendedInverse,
    Recycled,
    directions_to_keep,
    extend_inverse,
)
from sgdgp.solvers.solutions import continued
from sgdgp.solvers.subset_solve import solve_on_subset
from sgdgp.solvers.system import System, as_system


@torch.no_grad()
def warm_start(
    solver: Solver,
    operator: KernelOperator,
    noise: Float[Tensor, " n"],
    rhs: Float[Tensor, "n k"],
    before: Solution,
    *,
    factor_passes: float,
    memory_budget: int,
    callback: Callback | None = None,
) -> Solution:
    """A solution that starts from that of fewer rows; it may not have converged.

    Args:
        solver: Whose limits count, among them a tolerance.
        operator: K (n, n), its new rows last, with entries it may have stored.
        noise: Noise variances.
        rhs: Right-hand sides.
        before: The solution of the old rows.
        factor_passes: Passes in whose time a part of the system may be factorised.
        memory_budget: Bytes that may be used.
        callback: Called as it advances; True stops it.
    """
    system = as_system(operator, noise, rhs)
    num_new = system.n - len(before.weights)
    recycled = before.recycled
    known, residual, passes = None, None, 0.0
    if recycled is not None:
        known, residual = _extended_to_new_rows(rhs, operator, before.weights, recycled)
        passes = num_new / system.n
    corrected = solve_on_subset(
        system,
        pad(before.weights, (0, 0, 0, num_new)),
        num_new,
        solver.limits,
        factor_passes=factor_passes,
        memory_budget=memory_budget,
        callback=callback,
        residual=residual,
        known=known,
        passes=passes,
    )
    corrected = replace(corrected, settings={"local_rows": corrected.settings["rows"]})
    if recycled is None or not solver.resumes:
        return replace(corrected, recycled=None)
    assert corrected.recycled is not None
    left = replace(recycled, residual=corrected.recycled.residual)
    start = _with_recycled(corrected, left, system, num_new, known)
    if corrected.reason != "budget":
        return start
    found = _resumed(solver, system, start, memory_budget, callback)
    return found or replace(start, recycled=None)


@torch.no_grad()
def solve_new_columns(
    solver: Solver,
    operator: KernelOperator,
    noise: Float[Tensor, " n"],
    rhs: Float[Tensor, "n k"],
    before: Solution,
    *,
    memory_budget: int,
    callback: Callback | None = None,
) -> Solution | None:
    """A solution whose columns are new but for the first, and perhaps some rows.

    Nothing is known of the new columns, so there is nothing to correct on a subset;
    the preconditioner and the directions serve them as well.

    Args:
        solver: Whose limits count.
        operator: K (n, n), its new rows last.
        noise: Noise variances.
        rhs: Right-hand sides, the first continuing that of ``before``.
        before: The solution of the old rows and columns.
        memory_budget: Bytes that may be used.
        callback: Called as it advances; True stops it.

    Returns:
        None where the earlier solve left nothing to start from.
    """
    recycled = before.recycled
    if (
        recycled is None
        or recycled.residual.shape != before.weights.shape
        or not solver.resumes
    ):
        return None
    system = as_system(operator, noise, rhs)
    num_new = system.n - len(before.weights)
    mean = before.weights[:, :1]
    recycled = replace(recycled, residual=recycled.residual[:, :1])
    known, residual = _extended_to_new_rows(rhs[:, :1], operator, mean, recycled)
    assert residual is not None
    residual = torch.cat([residual, rhs[:, 1:]], dim=1)
    start = Solution(
        solver="renewed",
        operator=operator.name,
        weights=pad(mean, (0, rhs.shape[1] - 1, 0, num_new)),
        residuals=(residual / system.scale).norm(dim=0),
        passes=num_new / system.n,
        seconds=0.0,
        reason="budget",
    )
    recycled = replace(recycled, residual=residual)
    start = _with_recycled(start, recycled, system, num_new, known)
    return _resumed(solver, system, start, memory_budget, callback)


@torch.no_grad()
def solve_again(
    solver: Solver,
    operator: KernelOperator,
    noise: Float[Tensor, " n"],
    rhs: Float[Tensor, "n k"],
    recycled: Recycled,
    callback: Callback | None = None,
) -> Solution:
    """Other right-hand sides, with preconditioner and directions of an earlier solve.

    Args:
        solver: Whose limits count; it ``resumes``.
        operator: K (n, n).
        noise: Noise variances.
        rhs: Right-hand sides.
        recycled: What a solve with the same rows has left.
        callback: Called as it advances; True stops it.
    """
    system = as_system(operator, noise, rhs)
    cg = CG(preconditioner=None).with_limits(solver.limits)
    return cg.resume(
        system,
        torch.zeros_like(rhs),
        system.rhs,
        recycled.inverse,
        recycled.leading(),
        callback,
    )


def _with_recycled(
    start: Solution,
    recycled: Recycled,
    system: System,
    num_new: int,
    known: Directions | None,
) -> Solution:
    """A start with all it may go on from, of which ``recycled`` has the residual."""
    inverse = recycled.inverse
    if inverse is not None and num_new:
        inverse = extend_inverse(inverse, system, num_new)
        start = replace(start, passes=start.passes + inverse.passes)
    pairs = () if known is None else ((known.directions, known.images),)
    return replace(start, recycled=Recycled(recycled.residual, inverse, pairs))


def _extended_to_new_rows(
    rhs: Tensor, operator: KernelOperator, weights: Tensor, recycled: Recycled
) -> tuple[Directions | None, Float[Tensor, "n k"] | None]:
    """Directions and residuals that were known, with the new rows K(new, old) adds.

    The residuals are None where they belong to other columns.
    """
    first, columns = weights.shape
    known = recycled.leading()
    both = weights
    if known is not None:
        both = torch.cat([both, known.directions], dim=1)
    new = slice(first, len(rhs))
    rows = operator.rows(new).matmul(pad(both, (0, 0, 0, new.stop - first)))
    if known is not None:
        known = known.with_rows(rows[:, columns:])
    if recycled.residual.shape != weights.shape:
        return known, None
    return known, torch.cat([recycled.residual, rhs[new] - rows[:, :columns]])


def _resumed(
    solver: Solver,
    system: System,
    start: Solution,
    memory_budget: int,
    callback: Callback | None,
) -> Solution | None:
    """Conjugate gradients with the earlier preconditioner and directions.

    None where so many rows are new that the solver should build a preconditioner again.
    """
    recycled = start.recycled
    assert recycled is not None
    if isinstance(recycled.inverse, ExtendedInverse) and recycled.inverse.is_outgrown:
        return None
    kept = directions_to_keep(system.rhs, memory_budget)
    cg = CG(preconditioner=None, recycle=kept)
    solution = cg.with_limits(solver.limits.less(start.passes, start.seconds)).resume(
        system,
        start.weights / system.scale,
        recycled.residual / system.scale,
        recycled.inverse,
        recycled.leading(),
        Watch.after(start.passes, start.seconds, callback),
    )
    return replace(
        continued(start, solution),
        solver=f"{start.solver}+{solution.solver}",
        settings={**start.settings, **solution.settings},
    )
