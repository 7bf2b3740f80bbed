"""Which solver "auto" means: decided by problem size, memory and device only."""

from __future__ import annotations

from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import Solver
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.preconditioners import PivotedCholesky, default_rank
from sgdgp.solvers.sdd import SDD

CHOLESKY_ROWS = 20_000
"""Largest n for which the direct solve is the default: n^3 / 3 stays in seconds."""

SMALLEST_RANK = 100
"""A preconditioner of a lower rank is not worth choosing CG for."""

_BYTES_PER_RANK = 40  # per row: two float64 copies while it is built, and slack


def choose_solver(
    solver: Solver | str, operator: KernelOperator, memory_budget: int
) -> Solver:
    """Turn "auto" or a name into a solver.

    The rule of "auto": Cholesky up to 20,000 rows when its float64 factor fits the
    memory budget; CG with a pivoted-Cholesky preconditioner of rank n / 20, at most
    1,000, or as much of it as fits the budget but no less than 100; SDD beyond.

    Args:
        solver: A solver, "auto", "cholesky", "cg" or "sdd".
        operator: The operator to solve with.
        memory_budget: Bytes that may be used.

    Raises:
        ValueError: Unknown name.
    """
    if isinstance(solver, Solver):
        return solver
    named: dict[str, Solver] = {"cholesky": Cholesky(), "cg": CG(), "sdd": SDD()}
    if solver in named:
        return named[solver]
    if solver != "auto":
        raise ValueError(
            f"solver: expected a Solver, 'auto' or one of {sorted(named)}, found "
            f"{solver!r}"
        )
    n = operator.shape[0]
    if n <= CHOLESKY_ROWS and 8 * n * n <= memory_budget:
        return Cholesky()
    rank = min(default_rank(n), memory_budget // (_BYTES_PER_RANK * n))
    if rank >= SMALLEST_RANK:
        return CG(preconditioner=PivotedCholesky(rank=rank))
    return SDD()
