"""Names on the command line -> what solves a task.

Every name that ``choose_solver`` of the library knows is a contender; the registry
adds variants of those and the peers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from gpytorch.kernels import RBFKernel

from benchmarks.solvers.gpytorch_cg import gpytorch_cg
from benchmarks.solvers.published import published_sdd
from benchmarks.solvers.published_blocks import published_adasap, published_ap
from benchmarks.solvers.task import Contender, Outcome, Task
from benchmarks.uci.memory import available_bytes
from sgdgp.operators import DenseOperator, KernelOperator, choose_operator
from sgdgp.solvers import (
    ADASAP,
    CG,
    Cholesky,
    ExactBlocks,
    Limits,
    Nystrom,
    PivotedCholesky,
    Solver,
)
from sgdgp.solvers.auto import choose_solver
from sgdgp.solvers.base import Progress

SolverFactory = Callable[[KernelOperator, int], Solver]
"""From the operator and the memory budget to a solver of the library."""

VARIANTS: Mapping[str, SolverFactory] = {
    "cg-none": lambda operator, budget: CG(preconditioner=None),
    "cg-pivoted": lambda operator, budget: CG(preconditioner=PivotedCholesky()),
    "cg-pivoted-100": lambda operator, budget: CG(
        preconditioner=PivotedCholesky(rank=100)
    ),
    "cg-nystrom": lambda operator, budget: CG(preconditioner=Nystrom(rank=100)),
    "adasap-exact": lambda operator, budget: ADASAP(preconditioner=ExactBlocks()),
    "cholesky-float32": lambda operator, budget: Cholesky(factor_dtype=torch.float32),
}
"""Solvers of the library with settings of their own."""

PEERS: Mapping[str, Contender] = {
    "gpytorch-cg": partial(gpytorch_cg, rank=15),
    "gpytorch-cg-100": partial(gpytorch_cg, rank=100),
    "published-ap": published_ap,
    "published-adasap": published_adasap,
}
"""Solvers of others."""

_PUBLISHED_SDD = re.compile(r"sdd-([\d.]+)(?:-b(\d+))?")


def contender(name: str) -> Contender:
    """The contender of that name.

    Raises:
        ValueError: There is none; with those that exist.
    """
    if name in PEERS:
        return PEERS[name]
    published = _PUBLISHED_SDD.fullmatch(name)
    if published and float(published[1]) > 0:
        block = int(published[2]) if published[2] else None
        return partial(published_sdd, step=float(published[1]), block_size=block)
    if name in VARIANTS:
        return partial(solve_with_library, factory=VARIANTS[name])
    try:
        choose_solver(name, _small_operator(), 2**30)
    except ValueError as error:
        peers = ", ".join([*VARIANTS, *PEERS])
        raise ValueError(
            f"solvers: found {name!r}; there are {peers}, sdd-K and sdd-K-bB (the "
            "papers' rule with step K/n and blocks of B), and what the library knows "
            f"({error})"
        ) from error
    return partial(solve_with_library, factory=partial(choose_solver, name))


def can_be_watched(name: str) -> bool:
    """Whether a contender shows its weights on the way (GPyTorch's CG does not)."""
    return not name.startswith("gpytorch-cg")


def solve_with_library(task: Task, factory: SolverFactory) -> Outcome:
    """Build the operator, choose the solver and solve, all of it on the clock.

    Raises:
        MemoryError: A direct solve whose factor does not fit the free memory.
    """
    problem = task.problem
    operator = choose_operator(
        problem.build_kernel(), problem.x, memory_budget=task.memory_budget
    )
    solver = factory(operator, task.memory_budget)
    if isinstance(solver, Cholesky) and 8 * problem.n**2 > available_bytes():
        raise MemoryError(
            f"a float64 factor of {8 * problem.n**2 / 1e9:.1f} GB does not fit the "
            f"{available_bytes() / 1e9:.1f} GB of memory that are free"
        )
    solution = with_limits(solver, task).solve(
        operator,
        problem.noise,
        problem.rhs,
        noise_draws=problem.noise_draws,
        generator=torch.Generator().manual_seed(task.seed),
        callback=_tracer(task),
    )
    return Outcome(
        weights=solution.weights,
        passes=solution.passes,
        reason=solution.reason,
        claimed=solution.residuals,
        solver=solution.solver,
        operator=solution.operator,
        settings=solution.settings,
        warnings=solution.warnings,
    )


def with_limits(solver: Solver, task: Task) -> Solver:
    """The solver with the tolerance and budgets of the task, where it has any."""
    # A trace pauses the benchmark's clock, not the solver's: there the callback
    # keeps the time.
    seconds = task.max_seconds if task.trace is None else None
    return solver.with_limits(Limits(task.tolerance, task.max_passes, seconds))


def _tracer(task: Task) -> Callable[[Progress], bool] | None:
    if task.trace is None:
        return None
    trace = task.trace

    def look(progress: Progress) -> bool:
        trace(progress.passes, progress.weights)
        return task.clock.seconds > task.max_seconds

    return look


def _small_operator() -> KernelOperator:
    return DenseOperator(RBFKernel(), torch.zeros(2, 1))
