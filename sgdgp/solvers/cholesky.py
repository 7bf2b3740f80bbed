"""Direct solution by a blocked Cholesky factorisation in float64.

    K + Sigma = L L^T,   V = L^-T L^-1 B.

The factor overwrites the matrix, so the memory is that of K in float64 and no
more. Left-looking blocks keep almost all of the work in matrix products and let
Ctrl-C in between them.

Deviations from the textbook: a matrix that is not positive definite in float64
gets the smallest of a short list of jitters; the solve is then refined against
the true matrix, and the jitter is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.checks import check_count, check_positive
from sgdgp.operators.base import KernelOperator, row_slices
from sgdgp.solvers.base import Callback, Reason, Recorder, Solution, Solver
from sgdgp.solvers.system import System, as_system, initial_weights

_BLOCK = 512
_JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)


@dataclass(frozen=True)
class Cholesky(Solver):
    """Exact solve in float64; memory 8 n^2 bytes, n^3 / 3 multiply-adds.

    Attributes:
        tolerance: Relative residual, of the weights rounded to the data's dtype, at
            which the solve counts as converged. Default: 1e-8, in float32 1e-3.
        max_refinements: Steps of iterative refinement against the true residual.
    """

    tolerance: float | None = None
    max_refinements: int = 3

    name = "cholesky"

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        check_count("max_refinements", self.max_refinements, 0)

    def solve(
        self,
        operator: KernelOperator,
        noise: Tensor | float,
        rhs: Float[Tensor, "n k"],
        *,
        initial: Tensor | None = None,
        noise_draws: Tensor | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve (K + Sigma) V = B; see ``Solver.solve``. ``initial`` is not needed."""
        given = as_system(operator, noise, rhs)
        initial_weights(given, initial)
        record = Recorder(callback)
        system = System(
            operator.streaming().to(torch.float64),
            given.noise.double(),
            given.rhs.double(),
            given.scale.double(),
        )
        untouched = torch.ones_like(given.scale)

        def advance() -> None:
            # Until the factor is there the solution is zero and its residual one.
            if record(1.0, untouched, exact=True, weights=lambda: 0.0 * rhs):
                raise _Stopped

        try:
            factor, jitter, passes = factorise(system, advance)
        except _Stopped:
            return Solution(
                solver=self.name,
                operator=operator.name,
                weights=0.0 * rhs,
                residuals=untouched,
                passes=1.0,
                seconds=record.seconds,
                reason="interrupted",
                history=tuple(record.history),
            )
        weights = solve_factored(factor, system.rhs)
        tolerance = self.tolerance or (1e-8 if rhs.dtype == torch.float64 else 1e-3)

        def rounded(v: Tensor) -> Tensor:
            # What the caller gets back is what the residual must be true of.
            return ((v * system.scale).to(rhs.dtype).double()) / system.scale

        def current() -> Tensor:
            return (weights * system.scale).to(rhs.dtype)

        weights = rounded(weights)
        residual = system.residual(weights)
        norms = residual.norm(dim=0)
        passes += 1.0
        refinements = 0
        interrupted = record(passes, norms, exact=True, weights=current)
        while (
            not interrupted
            and refinements < self.max_refinements
            and float(norms.max()) > tolerance
        ):
            refined = rounded(weights + solve_factored(factor, residual))
            refined_residual = system.residual(refined)
            refined_norms = refined_residual.norm(dim=0)
            passes += 1.0
            refinements += 1
            if float(refined_norms.max()) > 0.5 * float(norms.max()):
                break
            weights, residual, norms = refined, refined_residual, refined_norms
            interrupted = record(passes, norms, exact=True, weights=current)
        # Rounding the weights of a nearly singular system can undo the solve.
        lost = ~(norms <= 1.0)
        weights = torch.where(lost, 0.0, weights)
        norms = torch.where(lost, system.rhs.norm(dim=0), norms)
        reason: Reason = "stagnated"
        if float(norms.max()) <= tolerance:
            reason = "converged"
        elif interrupted:
            reason = "interrupted"
        warnings: tuple[str, ...] = ()
        if jitter:
            warnings += (
                "K + Sigma is not positive definite in float64; a jitter of "
                f"{jitter:.1e} was added to factorise it and the solve refined without"
                " it. The noise is very small against the kernel's amplitude.",
            )
        if reason == "stagnated":
            warnings += (
                f"The residual {float(norms.max()):.1e} stays above the tolerance "
                f"{tolerance:g}: it is what rounding to {rhs.dtype} leaves.",
            )
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=current(),
            residuals=norms.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=warnings,
            settings={"jitter": jitter, "refinements": refinements},
        )


class _Stopped(Exception):
    """The callback asked to stop while the factor was being computed."""


def factorise(
    system: System, advance: Callable[[], None] | None = None
) -> tuple[Tensor, float, float]:
    """Lower Cholesky factor of K + Sigma, with the jitter and passes it took.

    Args:
        system: The system, in float64.
        advance: Called now and then while the work goes on.

    Returns:
        The factor (n, n), whose strict upper triangle is not to be read; the
        jitter that was added; the passes over K.

    Raises:
        RuntimeError: Not positive definite even with the largest jitter.
    """
    scale = float(system.operator.diagonal().mean())
    passes = 0.0
    matrix = system.rhs.new_empty(system.n, system.n)
    for relative in _JITTERS:
        jitter = relative * scale
        _fill(matrix, system)
        matrix.diagonal().add_(system.noise[:, 0] + jitter)
        passes += 1.0
        if factorise_(matrix, advance=advance):
            return matrix, jitter, passes
    raise RuntimeError(
        "K + Sigma is not positive definite even with a jitter of "
        f"{_JITTERS[-1]:.0e} times the kernel's diagonal; expected a valid kernel"
    )


def factorise_(
    matrix: Float[Tensor, "n n"],
    block: int = _BLOCK,
    advance: Callable[[], None] | None = None,
) -> bool:
    """Overwrite the lower triangle with the Cholesky factor, in place.

    Args:
        matrix: Symmetric matrix; only the lower triangle is read.
        block: Columns at a time.
        advance: Called after every eighth block.

    Returns:
        Whether the matrix was positive definite; if not, its content is lost.
    """
    n = matrix.shape[0]
    for count, start in enumerate(range(0, n, block)):
        if advance is not None and count % 8 == 7:
            advance()
        stop = min(start + block, n)
        panel = matrix[start:, start:stop]
        if start:
            head = matrix[start:stop, :start].mT
            for rows in row_slices(n - start, 4096):
                panel[rows] -= matrix[start:][rows, :start] @ head
        corner, info = torch.linalg.cholesky_ex(panel[: stop - start])
        if int(info) or not bool(torch.isfinite(corner.diagonal()).all()):
            return False
        panel[: stop - start] = corner
        if stop < n:
            below = panel[stop - start :]
            below.copy_(
                torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False)
            )
    return True


def solve_factored(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int = 2048
) -> Tensor:
    """(L L^T)^-1 B by blocked forward and backward substitution."""
    return backward_substitute(factor, forward_substitute(factor, rhs, block), block)


def forward_substitute(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int = 2048
) -> Tensor:
    """L^-1 B."""
    out = rhs.clone()
    for rows in row_slices(len(factor), block):
        out[rows] -= factor[rows, : rows.start] @ out[: rows.start]
        corner = factor[rows, rows]
        out[rows] = torch.linalg.solve_triangular(corner, out[rows], upper=False)
    return out


def backward_substitute(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int = 2048
) -> Tensor:
    """L^-T B."""
    out = rhs.clone()
    for rows in reversed(list(row_slices(len(factor), block))):
        out[rows] -= factor[rows.stop :, rows].mT @ out[rows.stop :]
        corner = factor[rows, rows].mT
        out[rows] = torch.linalg.solve_triangular(corner, out[rows], upper=True)
    return out


def _fill(matrix: Tensor, system: System) -> None:
    everything = slice(0, system.n)
    for rows in row_slices(system.n, system.operator.rows_per_step):
        matrix[rows] = system.operator.block(rows, everything)
