"""Direct solution by a blocked Cholesky factorisation.

    K + Sigma = L L^T,   V = L^-T L^-1 B.

The factor overwrites the matrix, so the memory is that of K and no more. Left-looking
blocks keep almost all of the work in matrix products and let Ctrl-C in between them.

Deviations from the textbook:

1. A matrix that is not positive definite gets the smallest of a short list of
   jitters; the solve is then refined against the true matrix, and the jitter is
   reported.
2. A float32 factor takes half the memory and time. Plain refinement with it need not
   contract where the noise is low, so it preconditions conjugate gradients in float64
   on the true matrix, as in the GMRES-based refinement of Carson & Higham (2018,
   doi:10.1137/17M1140819): every step costs one streamed pass in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.core.memory import named_if_too_large
from sgdgp.core.slices import slices
from sgdgp.operators.dense import DenseOperator
from sgdgp.solvers.base import (
    Callback,
    Factor,
    Limits,
    Progress,
    Reason,
    Recorder,
    Solution,
    Solver,
    Task,
)
from sgdgp.solvers.conjugate_gradients import CG
from sgdgp.solvers.preconditioners import Inverse, Preconditioner
from sgdgp.solvers.system import System

_KEPT_ROWS = 2_000  # of a factor, or of K, that is kept: 32 MB each
_BLOCK = 512  # columns: wide enough for fast products, and Ctrl-C gets in between
# Times the kernel's diagonal, the smallest that does: from about its rounding on.
_JITTERS = {
    torch.float64: (0.0, 1e-12, 1e-10, 1e-8, 1e-6),
    torch.float32: (0.0, 1e-7, 1e-6, 1e-5, 1e-4),
}
# Of refinement: with a float64 factor the first does nearly all; with a float32 one
# they are iterations of conjugate gradients, a streamed pass each.
_STEPS = {torch.float64: 3, torch.float32: 100}


@register_stored_class
@dataclass(frozen=True)
class Cholesky(Solver):
    """Exact solve; memory 8 n^2 bytes, in float32 4 n^2; n^3 / 3 multiply-adds.

    Attributes:
        tolerance: Relative residual, of the weights rounded to the data's dtype, at
            which the solve counts as converged. Default: 1e-8, in float32 1e-3.
        max_refinements: Steps of iterative refinement against the true residual.
            Default: 3, with a float32 factor 100.
        factor_dtype: ``torch.float64`` or ``torch.float32``, whatever the data's.
    """

    tolerance: float | None = None
    max_refinements: int | None = None
    factor_dtype: torch.dtype = torch.float64

    name = "cholesky"

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        if self.max_refinements is not None:
            check_count("max_refinements", self.max_refinements, 0)
        if self.factor_dtype not in _JITTERS:
            raise ValueError(
                "factor_dtype: expected torch.float64 or torch.float32, found "
                f"{self.factor_dtype}"
            )

    @property
    def limits(self) -> Limits:
        """A tolerance, if one was given; no budgets: all of the work is done."""
        return Limits(self.tolerance)

    def with_limits(self, limits: Limits) -> Cholesky:
        return replace(self, tolerance=limits.tolerance)

    def _solve(self, task: Task) -> Solution:
        record = Recorder(task.callback)
        system, rhs = task.system.to(torch.float64), task.system.rhs
        factored = system.to(self.factor_dtype)
        if system.n <= _KEPT_ROWS and self.factor_dtype == torch.float64:
            # One evaluation of K for the factor and all residuals.
            kept = DenseOperator.filled_by(system.operator)
            factored = system = replace(system, operator=kept)
        untouched = torch.ones_like(task.system.scale)

        def advance() -> None:
            # Until the factor is there the solution is zero and its residual one.
            if record(1.0, untouched, exact=True, weights=lambda: 0.0 * rhs):
                raise _Stopped

        try:
            factor, jitter, passes = factorise(factored, advance)
        except _Stopped:
            return Solution(
                solver=self.name,
                operator=task.system.operator.name,
                weights=0.0 * rhs,
                residuals=untouched,
                passes=1.0,
                seconds=record.seconds,
                reason="interrupted",
                history=tuple(record.history),
            )
        tolerance = self.tolerance or (1e-8 if rhs.dtype == torch.float64 else 1e-3)
        most = _STEPS[self.factor_dtype]
        most = most if self.max_refinements is None else self.max_refinements

        def rounded(v: Tensor) -> Tensor:
            # What the caller gets back is what the residual must be true of.
            return ((v * system.scale).to(rhs.dtype).double()) / system.scale

        def current() -> Tensor:
            return (weights * system.scale).to(rhs.dtype)

        refinements = 0
        interrupted = False
        if self.factor_dtype == torch.float64:
            weights = solve_factored(factor, system.rhs)
        else:

            def watch(progress: Progress) -> bool:
                return record(
                    passes + progress.passes,
                    progress.residuals,
                    exact=False,
                    weights=lambda: (progress.weights() * system.scale).to(rhs.dtype),
                )

            inner = _by_conjugate_gradients(factor, system, tolerance, most, watch)
            weights = inner.weights
            passes += inner.passes
            refinements = sum(not entry.exact for entry in inner.history)
            interrupted = inner.reason == "interrupted"
            most = refinements
        weights = rounded(weights)
        residual = system.residual(weights)
        norms = residual.norm(dim=0)
        passes += 1.0
        interrupted |= record(passes, norms, exact=True, weights=current)
        while not interrupted and refinements < most and float(norms.max()) > tolerance:
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
        if jitter and self.factor_dtype == torch.float64:
            warnings += (
                "K + Sigma is not positive definite in float64; a jitter of "
                f"{jitter:.1e} was added to factorise it and the solve refined without"
                " it. The noise is very small against the kernel's amplitude.",
            )
        if reason == "stagnated":
            cause = f"it is what rounding to {rhs.dtype} leaves."
            if self.factor_dtype != torch.float64:
                cause = (
                    f"that, or more than {refinements} steps with a factor in "
                    f"{self.factor_dtype}: use factor_dtype=torch.float64."
                )
            warnings += (
                f"The residual {float(norms.max()):.1e} stays above the tolerance "
                f"{tolerance:g}: {cause}",
            )
        return Solution(
            solver=self.name,
            operator=task.system.operator.name,
            weights=current(),
            residuals=norms.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=warnings,
            settings={
                "jitter": jitter,
                "refinements": refinements,
                "factor_dtype": str(self.factor_dtype),
            },
            factor=Factor(system.operator.streaming(), factor)
            if system.n <= _KEPT_ROWS and (factor.dtype, jitter) == (torch.float64, 0.0)
            else None,
        )


class _Stopped(Exception):
    """The callback asked to stop while the factor was being computed."""


def _by_conjugate_gradients(
    factor: Tensor, system: System, tolerance: float, steps: int, callback: Callback
) -> Solution:
    """CG in float64 on the true matrix, preconditioned by a factor in float32."""
    solver = CG(
        # Rounding the weights to the data's dtype comes on top.
        tolerance=0.5 * tolerance,
        max_passes=max(1.0, float(steps)),
        preconditioner=_Factored(factor),
    )
    return solver.solve(
        system.operator, system.noise[:, 0], system.rhs, callback=callback
    )


class _Factored(Preconditioner, Inverse):
    """(L L^T)^-1 for a factor that is there already."""

    passes = 0.0

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor
        self.settings: dict[str, object] = {}

    def cost(self, n: int) -> float:
        """Nothing: it is paid for."""
        return 0.0

    def prepare(self, system: System, generator: torch.Generator) -> Inverse:
        """The factor knows the system."""
        return self

    def __call__(self, r: Tensor) -> Tensor:
        """L^-T L^-1 r, in the factor's dtype."""
        # To unit columns: small residuals must not leave the range of float32.
        norms = r.norm(dim=0).clamp_min(torch.finfo(r.dtype).tiny)
        narrow = (r / norms).to(self._factor.dtype)
        return solve_factored(self._factor, narrow).to(r.dtype) * norms


def factorise(
    system: System, advance: Callable[[], None] | None = None
) -> tuple[Tensor, float, float]:
    """Lower Cholesky factor of K + Sigma, with the jitter and passes it took.

    Args:
        system: The system, in the dtype of the factor.
        advance: Called now and then while the work goes on.

    Returns:
        The factor (n, n), whose strict upper triangle is not to be read; the
        jitter that was added; the passes over K.

    Raises:
        RuntimeError: Not positive definite even with the largest jitter.
    """
    scale = float(system.operator.diagonal().mean())
    passes = 0.0
    with named_if_too_large(f"the Cholesky factor ({system.n} x {system.n})"):
        matrix = system.rhs.new_empty(system.n, system.n)
    for relative in _JITTERS[system.rhs.dtype]:
        jitter = relative * scale
        for rows in slices(system.n, system.operator.rows_per_step):
            matrix[rows] = system.operator.block(rows, slice(0, system.n))
        matrix.diagonal().add_(system.noise[:, 0] + jitter)
        passes += 1.0
        if factorise_(matrix, advance=advance):
            return matrix, jitter, passes
    raise RuntimeError(
        "K + Sigma is not positive definite even with a jitter of "
        f"{relative:.0e} times the kernel's diagonal in {system.rhs.dtype}; expected "
        "a valid kernel"
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
            for rows in slices(n - start, 4096):
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
    for rows in slices(len(factor), block):
        out[rows] -= factor[rows, : rows.start] @ out[: rows.start]
        corner = factor[rows, rows]
        out[rows] = torch.linalg.solve_triangular(corner, out[rows], upper=False)
    return out


def backward_substitute(
    factor: Float[Tensor, "n n"], rhs: Float[Tensor, "n k"], block: int = 2048
) -> Tensor:
    """L^-T B."""
    out = rhs.clone()
    for rows in reversed(list(slices(len(factor), block))):
        out[rows] -= factor[rows.stop :, rows].mT @ out[rows.stop :]
        corner = factor[rows, rows].mT
        out[rows] = torch.linalg.solve_triangular(corner, out[rows], upper=True)
    return out
