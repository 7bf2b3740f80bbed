"""Solvers of (K + Sigma) V = B: settings in, an honest solution out."""

from sgdgp.solvers.base import (
    Callback,
    HistoryEntry,
    Progress,
    Solution,
    Solver,
)
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.choose import choose_solver
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.preconditioners import Nystrom, PivotedCholesky, Preconditioner
from sgdgp.solvers.sdd import SDD

__all__ = [
    "CG",
    "SDD",
    "Callback",
    "Cholesky",
    "HistoryEntry",
    "Nystrom",
    "PivotedCholesky",
    "Preconditioner",
    "Progress",
    "Solution",
    "Solver",
    "choose_solver",
]
