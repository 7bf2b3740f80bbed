"""Solvers by name."""

from __future__ import annotations

from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.adasap import ADASAP
from sgdgp.solvers.alternating_projections import AlternatingProjections
from sgdgp.solvers.auto import Auto
from sgdgp.solvers.base import Solver
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.inducing_sgd import InducingSGD
from sgdgp.solvers.sdd import SDD
from sgdgp.solvers.sgd import SGD

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (
        ADASAP,
        AlternatingProjections,
        CG,
        Cholesky,
        InducingSGD,
        SDD,
        SGD,
    )
}
"""Every solver that can be asked for by name, beside "auto"."""


def choose_solver(
    solver: Solver | str, operator: KernelOperator, memory_budget: int
) -> Solver:
    """Turn "auto" or a name into a solver.

    Args:
        solver: A solver, "auto" (see ``auto.plan``), or a name in ``SOLVERS``.
        operator: The operator to solve with.
        memory_budget: Bytes that may be used.

    Raises:
        ValueError: Unknown name.
    """
    if isinstance(solver, Solver):
        return solver
    if solver == "auto":
        return Auto(memory_budget=memory_budget)
    check_solver_name(solver)
    return SOLVERS[solver]()


def check_solver_name(solver: Solver | str) -> None:
    """Refuse a name that no solver has.

    Raises:
        ValueError: Unknown name.
    """
    if not isinstance(solver, Solver) and solver not in ("auto", *SOLVERS):
        raise ValueError(
            f"solver: expected a Solver, 'auto' or one of {sorted(SOLVERS)}, found "
            f"{solver!r}"
        )
