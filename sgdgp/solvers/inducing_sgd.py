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
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.operators.base import RowIndex
from sgdgp.solvers.base import Reason
from sgdgp.solvers.blocks import Shuffled
from sgdgp.solvers.driver import Algorithm, StochasticSolver, Task, check_steps
from sgdgp.solvers.iterates import AveragedIterate
from sgdgp.solvers.sgd import AveragedDescent, default_block_size, row_blocks
from sgdgp.solvers.step_size import largest_eigenvalue, primal_step_rule, random_rows
from sgdgp.solvers.system import initial_weights

# Passes after which the whole gradient is found, at the price of one, and the estimator
# is centred on it: early first, as it is centred on the start till then.
_FIRST_CHECKS, _CHECK_EVERY = (1, 5), 20
_POWER = 10.0  # k of the average: a window of a tenth of the steps
_GROWTH = 100.0  # of the gradient, as a reason to restart
_CORRELATION = 0.99  # with a point chosen before: one like that adds nothing
_CHUNK = 256  # points that are compared at a time
_SPECTRUM_ROWS = 1000  # that stand for all but the inducing ones in the spectrum


@register_stored_class
@dataclass(frozen=True)
class InducingSGD(StochasticSolver):
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
    title = "InducingSGD"
    advice = (
        "Give it more of them (inducing), or use another solver for the full system."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("gradient_tolerance", self.gradient_tolerance)
        if self.inducing is not None and not torch.is_tensor(self.inducing):
            check_count("inducing", self.inducing, 1)
        check_steps(self.block_size, self.momentum, self.step_size)

    def begin(self, task: Task) -> Algorithm[Any]:
        return _InducingDescent(self, task)


class _InducingDescent(AveragedDescent[InducingSGD]):
    """Descent in a; checks find the whole gradient and centre the estimator on it."""

    whole_passes = True
    returns_last = True
    restart_warning = (
        "{title} met a growing gradient and halved its step size {restarts} times."
    )
    adjoint_cost = 0.0  # features are used like any kernel

    def __init__(self, solver: InducingSGD, task: Task) -> None:
        # To be checked, though they have no effect.
        initial_weights(task.system, task.noise_draws, "noise_draws")
        n = task.system.n
        size = solver.block_size or default_block_size(n)
        data = row_blocks(task.system, size, task.generator)
        self.points, passes = choose_inducing(data, solver.inducing)
        super().__init__(solver, task, data, passes)
        m, operator, noise = len(self.points), self.system.operator, self.system.noise
        self._start_norms = self.norms
        self._kzz = operator.block(self.points, self.points)
        self._scale = (operator.diagonal().unsqueeze(1) + noise)[self.points]
        self.check_cost = m / n
        self._largest, energy = self.spectrum()
        rule = primal_step_rule(
            self._largest, energy, self.num_blocks, momentum=solver.momentum
        ).with_step(solver.step_size)
        start = self.checked.weights[self.points]
        at_zero = self.whole_gradient(torch.zeros_like(start))[1].norm(dim=0)
        self._size = torch.where(at_zero > 0, at_zero, torch.ones_like(at_zero))
        self._own = self.center(start)[1]
        # K_ZZ, the rows behind the spectrum, and two gradients.
        self.passes += (m + min(n, _SPECTRUM_ROWS)) * m / n**2 + 2.0 * self.check_cost
        self._iterate = AveragedIterate(
            start, self._own, rule, power=_POWER, grows=solver.momentum is None
        )
        # Blocks of a start that is already good show residuals near those of b.
        self._bound = _GROWTH * max(1.0, float(self._own.max()))
        self._epochs = 0

    def center(self, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Centre the estimator on weights (m, k).

        Returns:
            Residual norms of the full system (k,), and those of the gradient relative
            to that at zero (k,).
        """
        norms, gradient = self.whole_gradient(anchor)
        self._anchor, self._at_anchor = anchor.clone(), gradient
        return norms, gradient.norm(dim=0) / self._size

    def gradient(self, block: RowIndex, at: Tensor) -> Tensor:
        """D^-1 g (m, k), the scaled stochastic gradient at weights (m, k)."""
        rows = self.system.operator.block(block, self.points)
        step = at - self._anchor
        error = (rows @ step).div_(self.system.noise[block])
        gradient = (rows.mT @ error).mul_(self.num_blocks)
        return gradient.add_(self._kzz @ step).add_(self._at_anchor).div_(self._scale)

    def whole_gradient(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Residual norms of the full system (k,), in float64, and the gradient."""
        system, v = self.system, self.scattered(at)
        squares = torch.zeros(at.shape[1], dtype=torch.float64, device=at.device)
        gradient = self._kzz @ at
        for block in self.data.blocks:
            rows, noise = system.operator.block(block, self.points), system.noise[block]
            misfit = system.rhs[block] - rows @ at
            gradient -= rows.mT @ (misfit / noise)
            residual = misfit.double() - noise.double() * v[block].double()
            squares += residual.square().sum(0)
        return squares.sqrt(), gradient

    def spectrum(self) -> tuple[float, float]:
        """lambda_1(B) scaled by D, and the mean noise of a row in its units.

        The inducing rows themselves are exact, a random subset stands for the rest.
        """
        noise, n = self.system.noise, self.system.n
        others = torch.ones(n, dtype=torch.bool, device=self.points.device)
        others[self.points] = False
        rest = others.nonzero()[:, 0]
        total = len(rest)
        chosen = random_rows(total, _SPECTRUM_ROWS, self.generator)
        rest = rest[chosen.to(rest.device)]
        ratio = total / max(1, len(rest))
        scale = self._scale.rsqrt()
        kzz = self._kzz * scale * scale.mT
        # Rows scaled on the inducing side, weighted with their precision.
        inner = self._kzz * scale.mT / noise[self.points].sqrt()
        outer = self.system.operator.block(rest, self.points) * scale.mT
        outer = outer / noise[rest].sqrt()
        largest = largest_eigenvalue(
            lambda v: (
                kzz @ v + inner.mT @ (inner @ v) + ratio * (outer.mT @ (outer @ v))
            ),
            kzz,
            self.generator,
        )
        energy = inner.square().sum() + ratio * outer.square().sum()
        return largest, float(energy) / n

    def scattered(self, at: Tensor) -> Tensor:
        """V (n, k) that is zero outside of Z."""
        v = torch.zeros_like(self.system.rhs)
        v[self.points] = at
        return v

    @property
    def reserve(self) -> float:
        """A check, and the residual at the end, which is found again."""
        return self.check_cost if self.is_verified else 2.0 * self.check_cost

    def visit(self, block: RowIndex) -> Tensor:
        self._gradient = self.gradient(block, self._iterate.lookahead)
        return self._gradient

    def is_diverging(self, residual: Tensor) -> bool:
        """Not known before the next check."""
        return False

    def end_pass(self) -> None:
        self.passes += self.check_cost
        self._epochs += 1

    def has_grown(self) -> bool:
        return False

    def weights(self) -> Tensor:
        return self.scattered(self._iterate.average)

    def wants_check(self, is_last: bool) -> bool:
        """At some passes, and when the iterate is not finite."""
        due = self._epochs % _CHECK_EVERY == 0 or self._epochs in _FIRST_CHECKS
        return is_last or due or not bool(self._iterate.lookahead.isfinite().all())

    def check(self) -> None:
        """Find the whole gradient; where it has grown, start again with half a step."""
        self._measure()
        if not float(self._own.max()) < self._bound:
            self.restarts += 1
            self._iterate.restart()
            self._measure()
        else:
            self._iterate.remember(self._own)

    def _measure(self) -> None:
        """Centre the estimator on the average."""
        self.norms, self._own = self.center(self._iterate.average)
        self.passes += self.check_cost
        self.is_verified = True

    def verdict(self) -> Reason | None:
        if float(self.norms.max()) <= self.solver.tolerance:
            return "converged"
        if float(self._own.max()) <= self.solver.gradient_tolerance:
            return "stagnated"
        return "diverged" if self.restarts > self.max_restarts else None

    def finish(self) -> None:
        self._measure()
        super().finish()

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "inducing": len(self.points),
            "own_gradient": float(self._own.max()),
            "rows": self.data.order[self.points].sort().values,
        }

    def column_warnings(self, reason: Reason) -> tuple[str, ...]:
        sentences = []
        if reason != "converged":
            advice = "" if reason == "interrupted" else f" {self.advice}"
            sentences.append(
                f"InducingSGD ended ({reason}) with a relative gradient of its own "
                f"problem of {float(self._own.max()):.2e}; the relative residual of "
                f"the full system, {float(self.checked.norms.max()):.2e} at most, is "
                f"that of an approximation with {len(self.points)} inducing points."
                f"{advice}"
            )
        kept = int((~(self.norms <= self._start_norms)).sum())
        if kept:
            sentences.append(
                f"InducingSGD found nothing better than the start for {kept} columns, "
                "which are returned as they were given."
            )
        return tuple(sentences)


def choose_inducing(
    data: Shuffled, wanted: int | Tensor | None
) -> tuple[Tensor, float]:
    """Inducing rows of the shuffled system (m,), and the passes spent on them.

    Raises:
        ValueError: Rows are missing, repeated or out of range.
    """
    n = data.system.n
    if torch.is_tensor(wanted):
        return _given_rows(data, wanted), 0.0
    if wanted is None:
        wanted = min(max(512, n // 10), 8192)
    wanted = min(wanted, n)
    everything = torch.arange(n, device=data.order.device)
    candidates = torch.cat([everything[block] for block in data.blocks])
    operator = data.system.operator
    if wanted == n or operator.outputs_per_input != 1:
        return candidates[:wanted], 0.0
    scale = operator.diagonal().clamp_min(torch.finfo(operator.dtype).tiny).rsqrt()
    kept = candidates[:0]
    scanned = 0
    while len(kept) < wanted and scanned < n:
        chunk = candidates[scanned : scanned + _CHUNK]
        near = operator.block(chunk, torch.cat([kept, chunk]))
        near = near * scale[chunk].unsqueeze(1) * scale[torch.cat([kept, chunk])]
        close = near > _CORRELATION
        fresh = ~close[:, : len(kept)].any(1)
        within = close[:, len(kept) :].cpu()
        chosen: list[int] = []
        for row in fresh.nonzero()[:, 0].tolist():
            if not bool(within[row, chosen].any()):
                chosen.append(row)
        kept = torch.cat([kept, chunk[chosen]])
        scanned += len(chunk)
    return kept[:wanted], scanned * min(len(kept), wanted) / n**2


def _given_rows(data: Shuffled, rows: Tensor) -> Tensor:
    n = data.system.n
    if rows.ndim != 1 or rows.numel() == 0 or rows.is_floating_point():
        raise ValueError(
            "inducing: expected a count or integer row indices (m,), found "
            f"{rows.dtype} of shape {tuple(rows.shape)}"
        )
    rows = rows.to(data.order.device).long()
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(
            f"inducing: expected rows in [0, {n}), found {int(rows.min())} to "
            f"{int(rows.max())}"
        )
    if len(rows.unique()) != len(rows):
        raise ValueError("inducing: expected distinct rows, found repeated ones")
    position = torch.empty_like(data.order)
    position[data.order] = torch.arange(n, device=position.device)
    return position[rows]
