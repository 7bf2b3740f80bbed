"""Primal stochastic gradient descent (Lin et al., NeurIPS 2023, arXiv:2306.11589).

Minimises, for every column with B = T_e + T_r,

    1/2 ||t_e - K v||^2_{Sigma^-1} + 1/2 ||v - Sigma^-1 t_r||^2_K,

whose gradient K Sigma^-1 ((K + Sigma) v - b) does not depend on the split. T_r are
the noise draws of posterior samples where they are given (the variance-reduced
sampling objective), else zero. Over random blocks I and fresh features Phi, with
E Phi Phi^T = K, at the look-ahead point e:

    g = (n / b) K[:, I] Sigma_I^-1 (K[I, :] e - t_e[I]) + Phi Phi^T (e - Sigma^-1 t_r)
    m <- rho m + g;   e <- e - beta D^-1 (g + rho m);   average <- as for SDD

Without features (``num_features=0``, or a kernel that has none) the block estimates
the regulariser as well: g = (n / b) K[:, I] Sigma_I^-1 ((K + Sigma)[I, :] e - b[I]).
That gradient vanishes at the solution, block by block, so its noise dies out.

Deviations from the paper:

1. The step size comes from spectral estimates (``primal.py``), momentum grows with
   the steps instead of staying at .9, coordinates are scaled by D = diag(K + Sigma),
   and gradients are not clipped.
2. Noise may differ from row to row. The paper's step size is beta n / (s^2 D).
3. The data are shuffled once and cut into fixed blocks, visited in a new random
   order on every pass; K[I, :] is evaluated once for both of its products.
4. The averaging weight (k + 1) / (t + k) needs no horizon.
5. The residual of every visited block is averaged with the same weights as the
   iterate. That estimate can only trigger a true residual, which alone can end the
   solve: the look-ahead point itself stays noisy.
6. A residual that grows halves the step and restarts from the best average.
7. Where K = phi phi^T with exact features, the descent is in phi^T V
   (``feature_sgd.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
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
from sgdgp.solvers.feature_sgd import solve_with_features
from sgdgp.solvers.primal import (
    AveragedIterate,
    default_block_size,
    primal_spectrum,
    primal_step_rule,
    shuffle,
)
from sgdgp.solvers.primal_gradient import (
    FeatureSource,
    GradientEstimator,
    regulariser_targets,
)
from sgdgp.solvers.step_size import StepRule
from sgdgp.solvers.stopping import Monitor
from sgdgp.solvers.system import accurate_residual, as_system, initial_weights

_MAX_RESTARTS = 20
# The noise of fresh features stays at the solution: a wider window averages it.
_POWER_WITH_FEATURES = 4.0
_POWER_WITHOUT = 100.0


@register_stored_class
@dataclass(frozen=True)
class SGD(IterativeSolver):
    """Primal stochastic gradient descent; nothing needs to be set.

    The first of the stochastic solvers, and the slowest to a small residual: its
    condition number is the square of SDD's, and its gradients lie in the range of K.
    The fit K v is good long before the residual is. Random features are not counted
    in ``passes``.

    Attributes:
        tolerance: Relative residual that every column must reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds. Default: none.
        block_size: Rows per step. Default: chosen from n.
        num_features: Random features per step for the regulariser, 0 to estimate
            it from the block.
        momentum: rho in [0, 1). Default: growing as t / (t + 3) to a limit set from
            the noise of the features.
        step_size: beta. Default: half of the stability limit.
    """

    block_size: int | None = None
    num_features: int = 100
    momentum: float | None = None
    step_size: float | None = None

    name = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_features", self.num_features, 0)
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
        """Solve (K + Sigma) V = B; see ``Solver.solve``."""
        generator = generator or torch.Generator().manual_seed(0)
        given = as_system(operator, noise, rhs)
        start = initial_weights(given, initial)
        draws = regulariser_targets(given, noise_draws)
        record = Recorder(callback)
        if operator.has_features:
            return solve_with_features(
                self,
                given,
                None if initial is None else start,
                generator,
                record,
            )

        size = self.block_size or default_block_size(given.n)
        data = shuffle(given, size, generator)
        system, order, blocks = data.system, data.order, data.blocks
        start = start[order]
        spectrum = primal_spectrum(system, generator)
        features = FeatureSource(system.operator, self.num_features, generator)
        rule = primal_step_rule(
            spectrum.largest,
            spectrum.mean_diagonal,
            len(blocks),
            fresh_noise=features.noise_level(system.n) * spectrum.kernel_diagonal,
            momentum=self.momentum,
        )
        if self.step_size is not None:
            rule = StepRule(self.step_size, rule.momentum)

        residual = system.rhs.clone()
        passes = min(system.n, 1000) ** 2 / system.n**2
        if initial is not None:
            residual = system.residual(start)
            passes += 1.0
        start_norms = residual.norm(dim=0)
        power = _POWER_WITH_FEATURES if features.active else _POWER_WITHOUT
        iterate = AveragedIterate(
            start, start_norms, rule, power=power, grows=self.momentum is None
        )
        best_residual = residual.clone()
        estimator = GradientEstimator(
            system, draws[order] if features.active else None, features, len(blocks)
        )
        # Momentum remembers 1 / (1 - rho) steps: no verdict before that has faded.
        patience = max(300.0, 20.0 / (1.0 - rule.momentum) / len(blocks))
        monitor = Monitor(self.tolerance, start_norms, patience)
        restarts = 0

        def weights() -> Tensor:
            return data.unshuffled(iterate.average) * system.scale

        reason: Reason | None = None
        if float(start_norms.max()) <= self.tolerance:
            reason = monitor.verdict(start_norms, passes)
        while reason is None:
            diverged = False
            for block in data.visits(generator):
                gradient, visited = estimator(block, iterate.lookahead)
                weight = min(1.0, len(blocks) * iterate.weight)
                residual[block] = torch.lerp(residual[block], visited, weight)
                diverged = monitor.is_diverging(visited, len(blocks))
                if diverged:
                    break
                iterate.step(gradient.div_(spectrum.diagonal))
            passes += 1.0
            norms = residual.norm(dim=0)
            exact = False
            if diverged or not bool(torch.isfinite(norms).all()):
                restarts += 1
                rule = StepRule(rule.step_size / 2, rule.momentum)
                iterate.restart(rule)
                residual = best_residual.clone()
                norms = residual.norm(dim=0)
                monitor.forget()
                if restarts > _MAX_RESTARTS:
                    reason = "diverged"
            else:
                if iterate.remember(norms):
                    best_residual = residual.clone()
                exact = monitor.wants_check(norms, passes)
            if exact:
                norms = accurate_residual(system, iterate.average).to(norms.dtype)
                passes += 1.0
                reason = monitor.verdict(norms, passes)
            if record(passes, norms, exact=exact, weights=weights):
                reason = reason or "interrupted"
            # The true residual at the end is part of the budget.
            if passes + 1.0 >= self.max_passes or record.is_past(self.max_seconds):
                reason = reason or "budget"

        final = monitor.checked_at(passes)
        if final is None:
            final = accurate_residual(system, iterate.average)
            passes += 1.0
        worse = ~(final <= start_norms)
        if bool(worse.any()):
            iterate.average[:, worse] = start[:, worse]
            final = torch.where(worse, start_norms.to(final.dtype), final)
        if float(final.max()) <= self.tolerance:
            reason = "converged"
        return Solution(
            solver=self.name,
            operator=operator.name,
            weights=weights(),
            residuals=final.to(rhs.dtype),
            passes=passes,
            seconds=record.seconds,
            reason=reason,
            history=tuple(record.history),
            warnings=self._warnings(reason, final, restarts, features.active),
            settings={
                "block_size": -(-system.n // len(blocks)),
                "momentum": rule.momentum,
                "momentum_grows": self.momentum is None,
                "step_size": rule.step_size,
                "restarts": restarts,
                "largest_eigenvalue": spectrum.largest,
                **features.settings,
            },
        )

    def _warnings(
        self, reason: Reason, norms: Tensor, restarts: int, features: bool
    ) -> tuple[str, ...]:
        warnings = []
        if reason != "converged":
            advice = "num_features=0 or " if features else ""
            warnings.append(
                f"SGD stopped ({reason}) with {int((norms > self.tolerance).sum())} of "
                f"{len(norms)} columns above the tolerance {self.tolerance:g}; the "
                f"largest relative residual is {float(norms.max()):.2e}. It does not "
                "see what lies where K is close to zero: predictions can be better "
                "than this residual. Give it more passes (max_passes), or use "
                f"{advice}SDD, CG or Cholesky."
            )
        if restarts:
            warnings.append(
                f"SGD met a growing residual and halved its step size {restarts} times."
            )
        return tuple(warnings)
