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

1. The step size comes from spectral estimates (``step_size.py``), momentum grows with
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

With exact features
-------------------
Where K = phi phi^T, the objective is, with W = phi^T V, that of ridge regression,

    1/2 ||B - phi W||^2_{Sigma^-1} + 1/2 ||W||^2,

up to the split of B, which does not change the gradient. At the minimum
V = Sigma^-1 (B - phi W). That V is kept for every row as of its last visit, and so is
U = phi^T V, and a step on a block I of rows is

    D = Sigma_I^-1 (B[I] - phi_I W) - V[I],   G = W - U - (n / b) phi_I^T D,
    V[I] <- V[I] + D,                         U <- U + phi_I^T D:

one forward and one adjoint on the block. G is the gradient of all rows in expectation
(SAGA; Defazio, Bach & Lacoste-Julien, 2014, arXiv:1407.0202), and its noise dies out at
the solution, where plain SGD would need ever smaller steps. The Hessian
phi^T Sigma^-1 phi + I has the condition number of K + Sigma, not its square.

Sigma_I D is the residual of V on the block with W for U: its norm over a pass triggers
a true residual, which alone can end the solve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.codec import register_stored_class
from sgdgp.features import FeatureMap, FeatureRequest, NoRandomFeatures
from sgdgp.features.dispatch import features_of
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.operators.feature import FeatureOperator
from sgdgp.solvers.blocks import Shuffled, partition, shuffle
from sgdgp.solvers.driver import (
    Algorithm,
    Settings,
    StochasticSolver,
    Task,
    check_steps,
)
from sgdgp.solvers.iterates import AveragedIterate
from sgdgp.solvers.step_size import (
    StepRule,
    leading_eigenvalues,
    primal_spectrum,
    primal_step_rule,
    scale_diagonal,
)
from sgdgp.solvers.system import System, initial_weights

# k of the averages. The noise of fresh features stays at the solution: a wider window
# averages it.
_POWER_WITH_FEATURES, _POWER = 4.0, 100.0
_LARGEST_BLOCK = 2**28  # entries of a block of rows, which is in memory
_STORED_FEATURES = 1024  # of n numbers each, evaluated once for both of their products
_MOST_MOMENTUM = 0.999  # with exact features: a thousand steps of memory
_FRACTION = 0.125  # swept on five problems: a half diverges at small noise


@register_stored_class
@dataclass(frozen=True)
class SGD(StochasticSolver):
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
    title = "SGD"
    advice = (
        "It does not see what lies where K is close to zero: predictions can be better "
        "than this residual. Give it more passes (max_passes), or use {also}SDD, CG or "
        "Cholesky."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_features", self.num_features, 0)
        check_steps(self.block_size, self.momentum, self.step_size)

    def begin(self, task: Task) -> Algorithm[Any]:
        draws = initial_weights(task.system, task.noise_draws, "noise_draws")
        if task.system.operator.has_features:
            return _FeatureDescent(self, task)
        return _PrimalDescent(self, task, draws)


def default_block_size(n: int) -> int:
    """Rows per step when none are asked for; a block of them stays below 2^28."""
    return max(1, min(512, max(64, n // 64), _LARGEST_BLOCK // n))


def row_blocks(system: System, size: int, generator: torch.Generator) -> Shuffled:
    """A system in random blocks of whole rows of K.

    One with several rows per point is left in the caller's order, in which its spectrum
    is estimated; its blocks are indices.
    """
    operator = system.operator
    if operator.outputs_per_input == 1 or operator.has_features:
        return shuffle(system, size, generator)
    order = operator.random_order(generator)
    blocks = partition(system.n, size, operator.outputs_per_input)
    everything = torch.arange(system.n, device=order.device)
    return Shuffled(system, everything, [order[block] for block in blocks])


class FeatureSource:
    """Fresh random features of the operator's kernel, or none.

    Attributes:
        settings: Where the regulariser comes from, for the solution.
        active: Whether there are features.
    """

    def __init__(
        self, operator: KernelOperator, num_features: int, generator: torch.Generator
    ) -> None:
        self._operator = operator
        self._count = num_features
        self._generator = generator
        self.active = False
        self.settings: dict[str, Any] = {"regulariser": "block", "num_features": 0}
        if num_features == 0:
            return
        if operator.outputs_per_input != 1:
            self.settings["regulariser"] += " (several outputs per input)"
            return
        try:
            self._map = self._draw()
        except NoRandomFeatures as error:
            reason = f" ({error.kernel_name} has no random features)"
            self.settings["regulariser"] += reason
            return
        self.active = True
        count = self._map.num_features
        self.settings = {"regulariser": "features", "num_features": count}

    @property
    def noise(self) -> float:
        """Their part, n / M, of the gradient noise, per unit of the diagonal."""
        fresh = self.active and not self._map.exact
        return self._operator.shape[0] / self._count if fresh else 0.0

    def product(self, v: Tensor) -> Tensor:
        """Phi Phi^T v (n, k) with features drawn anew."""
        phi, x = self._map, self._operator.x
        if phi.num_features <= _STORED_FEATURES:
            entries = phi.features(x)
            product = entries @ (entries.mT @ v)
        else:
            product = phi.forward(x, phi.adjoint(x, v))
        if not phi.exact:
            self._map = self._draw()
        return product

    def _draw(self) -> FeatureMap:
        x = self._operator.x
        # Unchecked: the operator has, and every look at a number waits for a GPU.
        return features_of(
            self._operator.kernel,
            FeatureRequest(x.shape[1], self._count, self._generator, x.dtype, x.device),
        )


class AveragedDescent(Algorithm[Settings]):
    """Descent whose iterate is averaged; all columns are worked on to the end.

    A visit leaves the scaled gradient of the step that follows it.
    """

    _iterate: AveragedIterate
    _gradient: Tensor
    _largest: float

    def step(self, block: RowIndex) -> None:
        self._iterate.step(self._gradient)

    def dismiss(self) -> None:
        """Nothing: no column is done before the others."""

    def settings(self) -> dict[str, Any]:
        return {
            "block_size": math.ceil(self.system.n / self.num_blocks),
            **self._iterate.settings,
            "restarts": self.restarts,
            "largest_eigenvalue": self._largest,
        }


class _PrimalDescent(AveragedDescent[SGD]):
    """Descent in V; the average at the end is what is returned."""

    whole_passes = True
    returns_last = True

    def __init__(self, solver: SGD, task: Task, draws: Tensor) -> None:
        size = solver.block_size or default_block_size(task.system.n)
        data = row_blocks(task.system, size, task.generator)
        spectrum = primal_spectrum(data.system, task.generator)
        super().__init__(solver, task, data, spectrum.passes)
        features = FeatureSource(
            self.system.operator, solver.num_features, task.generator
        )
        rule = primal_step_rule(
            spectrum.largest,
            spectrum.mean_diagonal,
            self.num_blocks,
            fresh_noise=features.noise * spectrum.kernel_diagonal,
            momentum=solver.momentum,
        ).with_step(solver.step_size)
        self._features, self._diagonal = features, spectrum.diagonal
        self._largest = spectrum.largest
        also = "num_features=0 or " if features.active else ""
        self.advice = solver.advice.format(also=also)
        self._shift = draws[data.order] / self.system.noise
        self._iterate = AveragedIterate(
            self.checked.weights,
            self.norms,
            rule,
            power=_POWER_WITH_FEATURES if features.active else _POWER,
            grows=solver.momentum is None,
        )
        self._best_residual = self.residual.clone()
        self.watch(1.0 / (1.0 - rule.momentum) / self.num_blocks)

    def gradient(self, block: RowIndex, at: Tensor) -> tuple[Tensor, Tensor]:
        """(g (n, k), residual on the block (b, k)) at a point (n, k)."""
        system = self.system
        noise, here = system.noise[block], at[block]
        rows = system.operator.rows(block).to_dense()
        residual = system.rhs[block] - rows @ at - noise * here
        error = -residual / noise
        if not self._features.active:
            return (rows.mT @ error).mul_(self.num_blocks), residual
        # K e - t_e = -(residual) - Sigma (e - Sigma^-1 t_r)
        error -= here - self._shift[block]
        gradient = (rows.mT @ error).mul_(self.num_blocks)
        return gradient.add_(self._features.product(at - self._shift)), residual

    def visit(self, block: RowIndex) -> Tensor:
        """See ``Algorithm.visit``; residuals are averaged as the iterates are."""
        gradient, seen = self.gradient(block, self._iterate.lookahead)
        self._gradient = gradient.div_(self._diagonal)
        weight = min(1.0, self.num_blocks * self._iterate.weight)
        self.residual[block] = torch.lerp(self.residual[block], seen, weight)
        return seen

    def end_pass(self) -> None:
        super().end_pass()
        self.passes += 1.0

    def has_grown(self) -> bool:
        """Whether residuals are not finite; keeps the best average."""
        if super().has_grown():
            return True
        if self._iterate.remember(self.norms):
            self._best_residual = self.residual.clone()
        return False

    def restart(self) -> None:
        """Half the step from the best average, at rest."""
        super().restart()
        self._iterate.restart()
        self.residual = self._best_residual.clone()
        self.see(self.residual.norm(dim=0))

    def weights(self) -> Tensor:
        return self._iterate.average

    def wants_check(self, is_last: bool) -> bool:
        """Never just because it is the last: that one is made in the end."""
        return super().wants_check(is_last=False)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self._features.settings}


class _FeatureDescent(AveragedDescent[SGD]):
    """Descent in W = phi^T V, where K has exact features.

    V is kept for every row as of its last visit, with U = phi^T V; V of an average W
    takes half a pass, so that between checks nothing is known but what they found.
    """

    check_cost = 1.5

    def __init__(self, solver: SGD, task: Task) -> None:
        n, outputs = task.system.n, task.system.operator.outputs_per_input
        size = solver.block_size or outputs * default_block_size(n // outputs)
        super().__init__(solver, task, shuffle(task.system, size, task.generator))
        operator = self.system.operator
        assert isinstance(operator, FeatureOperator)
        self._operator = operator
        self.advice = solver.advice.format(also="")
        rule = self._step_rule().with_step(solver.step_size)
        self._start_from(self.checked.weights, rule)
        self.watch()

    def _step_rule(self) -> StepRule:
        """Step size and momentum for a Hessian phi^T Sigma^-1 phi + I."""
        noise = self.system.noise
        prior = scale_diagonal(self._operator, self.generator)
        leading, passes = leading_eigenvalues(
            self._operator, noise.rsqrt(), self.generator
        )
        self.passes += self.adjoint_cost + passes
        rows = (prior / noise[:, 0]).double()
        # Rows of a large norm are as rare as others but move the iterate further.
        spread = float(rows.square().sum() / rows.sum().clamp_min(1e-300))
        self._largest = 1.0 + max(float(leading[-1]), float(rows.mean()))
        momentum = self.solver.momentum
        if momentum is None:
            q = math.sqrt(1.0 / self._largest)
            momentum = min((1.0 - q) / (1.0 + q), _MOST_MOMENTUM)
        return primal_step_rule(
            self._largest,
            spread,
            self.num_blocks,
            momentum=momentum,
            fraction=_FRACTION,
        )

    def _start_from(self, start: Tensor, rule: StepRule) -> None:
        """V (n, k) and the W that goes with it, at rest."""
        self._dual = self._operator.tracked(start)
        assert self._dual.phi_t_v is not None
        self._iterate = AveragedIterate(
            self._dual.phi_t_v,
            self.norms,
            rule,
            power=_POWER,
            grows=self.solver.momentum is None,
        )

    def visit(self, block: RowIndex) -> Tensor:
        """See ``Algorithm.visit``: D, G and what they do to V and U."""
        system, at = self.system, self._iterate.lookahead
        noise = system.noise[block]
        misfit = system.rhs[block] - self._operator.rows_of_weights(block, at)
        change = misfit / noise - self._dual.values[block]
        self.residual[block] = change * noise
        move = self._operator.move(block, change)
        assert self._dual.phi_t_v is not None
        assert move.phi_t_v is not None
        self._gradient = at - self._dual.phi_t_v
        self._gradient.sub_(move.phi_t_v, alpha=self.num_blocks)
        self._dual.move(move)
        self.passes += len(change) / system.n
        return self.residual[block]

    def restart(self) -> None:
        """Half the step from the best weights that were checked, at rest."""
        super().restart()
        self.passes += self.adjoint_cost if bool(self.checked.weights.any()) else 0.0
        self.norms = self.checked.norms.clone()
        self.residual = self.system.rhs.clone()
        self._start_from(self.checked.weights, self._iterate.rule.halved())

    def weights(self) -> Tensor:
        """V = Sigma^-1 (B - phi W), half a pass."""
        everything = slice(0, self.system.n)
        fitted = self._operator.rows_of_weights(everything, self._iterate.average)
        return (self.system.rhs - fitted) / self.system.noise

    def current(self) -> Tensor:
        return self.checked.weights

    def finish(self) -> None:
        """Nothing: what was checked is returned."""

    def settings(self) -> dict[str, Any]:
        count = self._operator.features.num_features
        own = {"regulariser": "exact features", "num_features": count}
        return {**super().settings(), **own}
