"""GPyTorch's own conjugate gradients with its pivoted-Cholesky preconditioner.

``linear_operator.utils.linear_cg`` on GPyTorch's K + s I with the preconditioner
of ``AddedDiagLinearOperator``, which is what a GPyTorch model does in ``eval()`` mode.
Where GPyTorch could be meant to be slowed down, it gets the better of it:

- K is evaluated by GPyTorch's kernel once and kept in memory, in slabs of rows, so
  that it needs no more than K itself;
- the preconditioner is used at every size (GPyTorch: from 2,000 rows);
- nothing is checked inside its clock: its tolerance is the mean recursive residual,
  as always. Where that claims the tolerance and the true residual is a little above,
  the run is repeated with a tighter one, and only the last run counts (``race.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from linear_operator import settings
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    to_linear_operator,
)
from linear_operator.utils import linear_cg
from torch import Tensor

from benchmarks.solvers.problem import dense_kernel
from benchmarks.solvers.task import Outcome, Task

MAX_ITERATIONS = 1000
"""GPyTorch's default."""


def gpytorch_cg(task: Task, rank: int) -> Outcome:
    """Solve by GPyTorch's preconditioned CG.

    Args:
        task: What to solve; of its budgets only the seconds count, since GPyTorch
            has its own limit of 1,000 iterations.
        rank: Size of the preconditioner (GPyTorch's default: 15).
    """
    problem = task.problem
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        settings.max_preconditioner_size(rank),
        settings.min_preconditioning_size(1),
    ):
        warnings.simplefilter("ignore")  # NumericalWarning: it did not converge
        system = AddedDiagLinearOperator(
            to_linear_operator(dense_kernel(problem.build_kernel(), problem.x)),
            ConstantDiagLinearOperator(
                problem.x.new_tensor([problem.noise]), diag_shape=problem.n
            ),
        )
        apply, _, _ = system._preconditioner()
        product = _Product(
            system._matmul,
            lambda: task.clock.seconds > task.max_seconds,
        )
        weights = linear_cg(
            product,
            problem.rhs,
            tolerance=task.tolerance,
            max_iter=MAX_ITERATIONS,
            max_tridiag_iter=0,
            preconditioner=apply,
        )
    # One product more than iterations: that of the starting point.
    stopped_early = product.calls <= MAX_ITERATIONS
    reason = "converged" if stopped_early and not product.expired else "budget"
    return Outcome(
        weights=weights,
        passes=product.calls + rank / problem.n,
        reason=reason,
        claimed=None,
        solver="linear_operator linear_cg",
        operator="dense",
        settings={"preconditioner": f"pivoted Cholesky, rank {rank}"},
    )


class _Product:
    """Counts products, and stands still when the time is up.

    ``linear_cg`` cannot be stopped, and an exception would lose the iterate. A
    product of zero makes it take a step of length zero.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        is_over: Callable[[], bool],
    ) -> None:
        self._product = product
        self._is_over = is_over
        self.calls = 0
        self.expired = False

    def __call__(self, v: Tensor) -> Tensor:
        if self.expired or self._is_over():
            self.expired = True
            return torch.zeros_like(v)
        self.calls += 1
        return self._product(v)
