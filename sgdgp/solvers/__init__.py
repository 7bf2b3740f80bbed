"""Solvers of (K + Sigma) V = B: settings in, an honest solution out."""

from sgdgp.solvers.adasap import ADASAP
from sgdgp.solvers.alternating_projections import (
    AlternatingProjections,
    Greedy,
    RandomOrder,
)
from sgdgp.solvers.auto import Auto, Refined, Stage, choose_solver, plan
from sgdgp.solvers.base import (
    Callback,
    HistoryEntry,
    IterativeSolver,
    Limits,
    Progress,
    Solution,
    Solver,
)
from sgdgp.solvers.blocks import ExactBlocks, NystromBlocks
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.inducing_sgd import InducingSGD
from sgdgp.solvers.preconditioners import Nystrom, PivotedCholesky, Preconditioner
from sgdgp.solvers.sdd import SDD
from sgdgp.solvers.sgd import SGD
from sgdgp.solvers.two_level import TwoLevel

__all__ = [
    "ADASAP",
    "CG",
    "SDD",
    "SGD",
    "AlternatingProjections",
    "Auto",
    "Callback",
    "Cholesky",
    "ExactBlocks",
    "Greedy",
    "HistoryEntry",
    "InducingSGD",
    "IterativeSolver",
    "Limits",
    "Nystrom",
    "NystromBlocks",
    "PivotedCholesky",
    "Preconditioner",
    "Progress",
    "RandomOrder",
    "Refined",
    "Solution",
    "Solver",
    "Stage",
    "TwoLevel",
    "choose_solver",
    "plan",
]
