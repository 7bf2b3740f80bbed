"""Inducing-point stochastic gradient descent (Lin et al., arXiv:2306.11589, section 3).

The primal objective of ``sgd.py`` over weights that are zero outside of m rows Z:
with v = E_Z a and B = T_e + T_r,

    1/2 ||t_e - K_XZ a||^2_{Sigma^-1} + 1/2 a^T K_ZZ a - a^T K_ZX Sigma^-1 t_r

(the K-norm of v - Sigma^-1 t_r up to a constant). Its minimiser is that of the
subset-of-regressors approximation whatever the split,

    (K_ZX Sigma^-1 K_XZ + K_ZZ) a = K_ZX Sigma^-1 b,

and the stochastic gradient from a block I of rows is

    g = (n / b) K_ZI Sigma_I^-1 (K_IZ a - t_e[I]) + K_ZZ a - K_ZX Sigma^-1 t_r.

Its mean does not depend on the split of B either, its noise does: T_e = K_XZ c for
an anchor c makes it vanish at a = c, and whatever is left of B is T_r:

    g = (n / b) K_ZI Sigma_I^-1 K_IZ (a - c) + K_ZZ (a - c) + (gradient at c)

A step evaluates b m kernel entries, m / n of a step of SGD.

Deviations from the paper:

1. T_e is not the noise-free part of B but K_XZ c, with c the average at the last
   check of the whole gradient (first zero), so that the noise dies out: variance
   reduction in the sense of Johnson & Zhang (2013). ``noise_draws`` have no effect.
   K_ZZ (m, m) is held in memory: no random features, every kernel is served.
2. Inducing points are rows of the data: random, without those whose correlation with
   one chosen before exceeds .99 (the paper clusters with nearest neighbours).
3. Step size, momentum, averaging, blocks and the divergence guard are SGD's; the
   step rule refers to B = K_ZX Sigma^-1 K_XZ + K_ZZ, scaled by the diagonal of
   (K + Sigma)_ZZ.
4. The solve ends when the gradient of this objective is small. That says nothing
   about (K + Sigma) v = b, whose true residuals are what the solution reports.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.operators.base import KernelOperator
from sgdgp.solvers.base import (
    Callback,
    IterativeSolver,
    Reason,
    Recorder,
    Solution,
)
from sgdgp.solvers.inducing_problem import (
    SPECTRUM_ROWS,
    InducingProblem,
    choose_inducing,
)
from sgdgp.solvers.primal import (
    AveragedIterate,
    default_block_size,
    primal_step_rule,
    shuffle,
)
from sgdgp.solvers.primal_gradient import regulariser_targets
from sgdgp.solvers.step_size import StepRule
from sgdgp.solvers.system import as_system, initial_weights

_CHECK_EVERY = 20
_MAX_RESTARTS = 20
_POWER = 10.0


@register_stored_class
@dataclass(frozen=True)
class InducingSGD(IterativeSolver):
    """Primal SGD over the weights of some rows; nothing needs to be set.

    Attributes:
        tolerance: Relative residual of the full system that counts as convergence;
            few inducing points cannot reach it.
        max_passes: Budget in passes over K, of n^2 entries each.
        max_seconds: Budget in seconds. Default: none.
        inducing: How many inducing points, or which rows (m,). Default: n / 10, at
            least 512 and at most 8,192.
        gradient_tolerance: Norm of the gradient, relative to the gradient at zero,
            at which the inducing problem counts as solved.
        block_size: Rows per step. Default: chosen from n.
        momentum: rho in [0, 1). Default: growing as t / (t + 3).
        step_size: beta. Default: half of the stability limit.
    """

    inducing: int | Int[Tensor, " m"] | None = None
    gradient_tolerance: float = 1e-4
    block_size: int | None = None
    momentum: float | None = None
    step_size: float | None = None

    name = "inducing_sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("gradient_tolerance", self.gradient_tolerance)
        if self.inducing is not None and not torch.is_tensor(self.inducing):
            check_count("inducing", self.inducing, 1)
        if self.block_size is not None:
            check_count("block_size", self.block_size, 1)
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected [0, 1), found {self.momentum}")
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

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
        """Solve (K + Sigma) V = B approximately; see ``Solver.solve``.

        Raises:
            ValueError: ``inducing`` does not fit the operator.
        """
        generator = generator or torch.Generator().manual_seed(0)
        given = as_system(operator, noise, rhs)
        start = initial_weights(given, initial)
        regulariser_targets(given, noise_draws)
        record = Recorder(callback)
        n = given.n
        size = self.block_size or default_block_size(n)
        data = shuffle(given, size, generator)
        system, order = data.system, data.order
        points, passes = choose_inducing(data, self.inducing)
        problem = InducingProblem(data, points)
        inner = problem.passes
        largest, mean_diagonal = problem.spectrum(generator)
        # K_ZZ, the rows behind the spectrum, and K_ZX Sigma^-1 B.
        passes += (len(points) + min(n, SPECTRUM_ROWS)) * len(points) / n**2 + inner
        rule = primal_step_rule(
            largest, mean_diagonal, len(data.blocks), momentum=self.momentum
        )
        if self.step_size is not None:
            rule = StepRule(self.step_size, rule.momentum)

        start = start[order]
        start_norms = system.rhs.norm(dim=0).double()
        if initial is not None:
            start_norms = system.residual(start).double().norm(dim=0)
            passes += 1.0
        target = problem.target.norm(dim=0)
        target = torch.where(target > 0, target, torch.ones_like(target))
        norms, gradient = problem.check(start[points])
        passes += inner
        own = gradient.norm(dim=0) / target
        iterate = AveragedIterate(
            start[points], own, rule, power=_POWER, grows=self.momentum is None
        )
        problem.anchor(start[points], gradient)
        # Blocks of a start that is already good show residuals near those of b.
        bound = 100.0 * max(1.0, float(own.max()))
        restarts, epochs = 0, 0

        def weights() -> Tensor:
            v = torch.zeros_like(start)
            v[points] = iterate.average
            return data.unshuffled(v) * system.scale

        reason: Reason | None = None
        if float(start_norms.max()) <= self.tolerance:
            reason = "converged"
        while reason is None:
            for block in data.visits(generator):
                iterate.step(problem.gradient(block, iterate.lookahead))
            passes += inner
            epochs += 1
            last = passes + 2.0 * inner >= self.max_passes or record.is_past(
                self.max_seconds
            )
            blown = not float(iterate.lookahead.abs().max()) < float("inf")
            exact = last or blown or epochs % _CHECK_EVERY == 0 or epochs in (1, 5)
            if exact:
                norms, gradient = problem.check(iterate.average)
                passes += inner
                own = gradient.norm(dim=0) / target
                if not float(own.max()) < bound:
                    restarts += 1
                    rule = StepRule(rule.step_size / 2, rule.momentum)
                    iterate.restart(rule)
                    norms, gradient = problem.check(iterate.average)
                    passes += inner
                    own = gradient.norm(dim=0) / target
                    if restarts > _MAX_RESTARTS:
                        reason = "diverged"
                else:
                    iterate.remember(own)
                problem.anchor(iterate.average, gradient)
                if float(norms.max()) <= self.tolerance:
                    reason = "converged"
                elif float(own.max()) <= self.gradient_tolerance:
                    reason = "stagnated"
            if record(passes, norms.to(rhs.dtype), exact=exact, weights=weights):
                reason = reason or "interrupted"
            if last:
                reason = reason or "budget"

        final, own, passes = self._final(problem, iterate, target, passes)
        solution = weights()
        worse = ~(final <= start_norms)
        if bool(worse.any()):
            solution[:, worse] = (data.unshuffled(start) * system.scale)[:, worse]
            final = torch.where(worse, start_norms, final)
        if float(final.max()) <= self.tolerance:
            reason = "converged"
        elif reason == "converged":
            reason = "stagnated"
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=solution,
            residuals=final.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=self._warnings(
                reason, final, own, len(points), restarts, int(worse.sum())
            ),
            settings={
                "block_size": -(-n // len(data.blocks)),
                "inducing": len(points),
                "momentum": rule.momentum,
                "momentum_grows": self.momentum is None,
                "step_size": rule.step_size,
                "restarts": restarts,
                "largest_eigenvalue": largest,
                "own_gradient": float(own.max()),
                "rows": order[points].sort().values,
            },
        )

    @staticmethod
    def _final(
        problem: InducingProblem,
        iterate: AveragedIterate,
        target: Tensor,
        passes: float,
    ) -> tuple[Tensor, Tensor, float]:
        norms, gradient = problem.check(iterate.average)
        return norms, gradient.norm(dim=0) / target, passes + problem.passes

    def _warnings(
        self,
        reason: Reason,
        norms: Tensor,
        own: Tensor,
        m: int,
        restarts: int,
        kept: int,
    ) -> tuple[str, ...]:
        warnings = []
        if reason != "converged":
            warnings.append(
                f"InducingSGD ended ({reason}) with a relative gradient of its own "
                f"problem of {float(own.max()):.2e}; the relative residual of the full "
                f"system, {float(norms.max()):.2e} at most, is that of an "
                f"approximation with {m} inducing points. Give it more of them "
                "(inducing), or use another solver for the full system."
            )
        if kept:
            warnings.append(
                f"InducingSGD found nothing better than the start for {kept} columns, "
                "which are returned as they were given."
            )
        if restarts:
            warnings.append(
                "InducingSGD met a growing gradient and halved its step size "
                f"{restarts} times."
            )
        return tuple(warnings)
