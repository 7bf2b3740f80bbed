"""Solvers of (phi^T phi + I) V = B in the weights of a tangent model.

The system is as large as the network has weights, its rows cost as much as a whole
product, and its right-hand sides are posterior draws or the linear model's mean. A
column v with residual r is done when

    |r| <= tolerance * min(|phi v|, |v|).

The precision is at least one, so the error is below |r| in the weights and below
|r| / 2 in the outputs phi v: the tolerance is a relative error of both. That is what
these solvers report and what callbacks see, in place of |r| / |b|. A preconditioner
that lies below the precision, as Nystrom's does, bounds both by (r^T M^-1 r)^1/2.
|r| is larger, five times at the start of a volume's solve: it counts stiff directions,
whose errors are small.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.seeds import derived_generator
from sgdgp.networks.curvature import WeightSystem, largest_eigenvalue
from sgdgp.networks.expectation_maximisation import (
    SMALLEST_DIMENSION,
    EffectiveDimension,
    effective_dimension,
)
from sgdgp.networks.stream import Batch
from sgdgp.networks.whitened_blocks import kronecker_blocks
from sgdgp.solvers.base import Callback, Reason, Recorder
from sgdgp.solvers.conjugate_gradients import BlockRecurrence
from sgdgp.solvers.preconditioners import Inverse

_STEP = 0.1
"""Of what the curvature of single batches allows without momentum. A momentum of 0.9
makes steps ten times as long in effect."""

_POWER_BATCHES, _POWER_STEPS = 3, 8
"""Batches, and power iterations on each, that find the step size. An estimate that is
too low by some 10 % does no harm at a tenth of it."""

_MOST_HALVINGS = 20
"""Of the step size; a residual that grows at a millionth of it comes from elsewhere."""

_ROUNDS_BEFORE_SHORTER_STEPS = 4
"""Every so many rounds that gain too little, the step is what is changed, and in
between the number of epochs."""


def prior_draws(
    like: Float[Tensor, "D k"], columns: range, seed: int
) -> Float[Tensor, "D c"]:
    """theta_0 ~ N(0, I) of the samples with these numbers (D, c), like ``like``."""
    rows = torch.empty(len(columns), like.shape[0], dtype=like.dtype, device="cpu")
    for row, column in zip(rows, columns, strict=True):
        row.normal_(generator=derived_generator(seed, "prior weights", column))
    return rows.to(like.device).mT


def relative_errors(
    rhs: Float[Tensor, "D k"],
    weights: Float[Tensor, "D k"],
    residuals: Float[Tensor, "D k"],
    inverse: Inverse | None = None,
) -> Float[Tensor, " k"]:
    """|r| / min(|phi v|, |v|) of every column, by |phi v|^2 = v^T (b - v - r).

    With the inverse of a preconditioner that lies below the precision, |r| is in its
    norm.
    """
    wide = torch.float64
    squares = weights.square().sum(0, dtype=wide)
    images = (weights * (rhs - residuals - weights)).sum(0, dtype=wide)
    smaller = torch.minimum(images, squares).clamp_min(0.0).sqrt().to(rhs)
    norms = residuals.norm(dim=0)
    if inverse is not None:
        inner = (residuals * inverse(residuals)).sum(0, dtype=wide)
        norms = inner.clamp_min(0.0).sqrt().to(norms)
    # A column of zeros with a right-hand side of zeros is solved.
    return torch.where(norms > 0, norms / smaller, torch.zeros_like(norms))


class WeightSolution:
    """Whitened weights on their way to a solution, and what they have cost.

    Arguments are those of ``WeightSolver.solve``. The residual of the starting point
    takes a pass, that of zero none.

    Attributes:
        weights: V (D, k).
        residuals: B - (phi^T phi + I) V (D, k), true ones.
        errors: The bounds that the tolerance is compared with (k,).
        passes: Products with the data set so far.
        inverse: That of a preconditioner below the precision, which bounds errors.
        reason: Why the solver stopped.
    """

    reason: Reason
    inverse: Inverse | None = None

    def __init__(
        self,
        system: WeightSystem,
        rhs: Float[Tensor, "D k"],
        initial: Float[Tensor, "D k"],
        callback: Callback | None,
    ) -> None:
        self.system = system
        self.rhs = rhs
        self.passes = 0.0
        self._record = Recorder(callback)
        is_zero = not bool(initial.any())
        self.move_to(initial, rhs.clone() if is_zero else self.residuals_of(initial))

    def images(self) -> Float[Tensor, "D k"]:
        """phi^T phi V, known from the residuals without another pass."""
        return self.rhs - self.weights - self.residuals

    def dimension(self) -> EffectiveDimension:
        """How many weights the data determine, by what samples these are."""
        prior = self.system.prior
        products = prior.group_sums(self.weights, self.images())
        return effective_dimension(products, prior.group_sizes)

    def move_to(
        self, weights: Float[Tensor, "D k"], residuals: Float[Tensor, "D k"]
    ) -> None:
        """Go on from other weights, whose residuals are known."""
        self.weights, self.residuals = weights, residuals
        self.errors = relative_errors(self.rhs, weights, residuals, self.inverse)

    def improve(
        self, candidate: Float[Tensor, "D k"], residuals: Float[Tensor, "D k"]
    ) -> Tensor:
        """Move to those columns of a candidate that are better; which they are (k,)."""
        better = residuals.norm(dim=0) < self.residuals.norm(dim=0)
        self.move_to(
            torch.where(better, candidate, self.weights),
            torch.where(better, residuals, self.residuals),
        )
        return better

    def residuals_of(self, weights: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """The true residuals of any weights, one pass."""
        self.passes += 1.0
        return self.system.residual(self.rhs, weights)

    def report(self, passes: float = 0.0) -> bool:
        """Tell the callback; whether it asks to stop.

        Args:
            passes: Those of work that has not changed the weights yet.
        """
        return self._record(
            self.passes + passes, self.errors, exact=False, weights=self.weights.clone
        )


@dataclass(frozen=True)
class WeightSolver(ABC):
    """Settings of an algorithm for (phi^T phi + I) V = B.

    Attributes:
        tolerance: Relative error that every column must reach.
        max_passes: Budget in passes over the data.
    """

    tolerance: float
    max_passes: float

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)
        check_positive("max_passes", self.max_passes)

    def solve(
        self,
        system: WeightSystem,
        rhs: Float[Tensor, "D k"],
        initial: Float[Tensor, "D k"],
        *,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> WeightSolution:
        """Solve for all columns at once.

        Args:
            system: The posterior precision as a product.
            rhs: Right-hand sides (D, k).
            initial: Starting point (D, k).
            seed: Seed of everything random.
            callback: Called as the solve advances, with relative errors in place of
                residuals; True stops it.
        """
        found = WeightSolution(system, rhs, initial, callback)
        found.reason = self._advance(found, torch.Generator().manual_seed(seed))
        return found

    def draw(
        self,
        system: WeightSystem,
        columns: range,
        initial: Float[Tensor, "D k"],
        *,
        seed: int,
        callback: Callback | None = None,
    ) -> WeightSolution:
        """Posterior samples of these numbers: B = theta_0 + phi^T eps.

        The pass that makes B is not among those of the solution.

        Args:
            system: The posterior precision as a product.
            columns: Numbers of the samples.
            initial: Starting point (D, k).
            seed: Of theta_0, eps and the solver.
            callback: As in ``solve``.
        """
        rhs = system.noise(columns, seed) + prior_draws(initial, columns, seed)
        return self.solve(system, rhs, initial, seed=seed, callback=callback)

    def dimension(self, system: WeightSystem, seed: int) -> EffectiveDimension | None:
        """How many weights the data determine, where that takes no samples."""
        return None

    @abstractmethod
    def _advance(self, found: WeightSolution, generator: torch.Generator) -> Reason:
        """Move the weights until the tolerance or the budget is reached; say which."""


@dataclass(frozen=True)
class WeightCG(WeightSolver):
    """Block conjugate gradients: one pass over the data an iteration.

    All columns share one Krylov space, so that the few large eigenvalues of a network's
    curvature cost one or two iterations. Where they are hundreds, as behind a linear
    measurement of an image, a Nystrom preconditioner takes them out for all solves of
    a fit.

    Attributes:
        tolerance: Relative error that every column must reach.
        max_passes: Budget in passes over the data.
        rank: Of the preconditioner, which costs a pass with so many columns, once.
            Default: none.
    """

    tolerance: float = 0.05
    max_passes: float = 100.0
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank, 0)

    def _advance(self, found: WeightSolution, generator: torch.Generator) -> Reason:
        unsolved = ~(found.errors <= self.tolerance)
        if self.rank and bool(unsolved.any()):
            inverse = found.system.preconditioner(self.rank, generator)
            found.passes += inverse.passes
            found.inverse = inverse
            found.move_to(found.weights, found.residuals)
            unsolved = ~(found.errors <= self.tolerance)
        run = BlockRecurrence(
            found.system.precision,
            found.weights,
            found.residuals,
            found.inverse,
            unsolved,
        )
        every_column = torch.arange(found.rhs.shape[1], device=found.rhs.device)
        reason: Reason | None = "converged" if run.is_done else None
        while reason is None:
            while not run.is_done and reason is None:
                run.step()
                found.passes += 1.0
                found.move_to(run.weights, run.residual)
                run.release(~(found.errors <= self.tolerance))
                if found.report():
                    reason = "interrupted"
                elif found.passes + 1.0 >= self.max_passes:
                    reason = "budget"
                elif not bool(torch.isfinite(found.errors).all()):
                    break  # |phi v|^2 < 0: in float32 the recursion has drifted.
            run.adopt(every_column, found.residuals_of(run.weights))
            found.move_to(run.weights, run.residual)
            unsolved = ~(found.errors <= self.tolerance)
            if not bool(torch.isfinite(found.errors).all()):
                reason = "diverged"
            elif not bool(unsolved.any()):
                reason = "converged"
            elif reason is None and found.passes + 2.0 > self.max_passes:
                reason = "budget"
            if reason is None:
                run.resume(unsolved)
        return reason


@dataclass(frozen=True)
class WeightCholesky(WeightSolver):
    """The smaller of two matrices is factorised, in float64: an exact solve.

    For few weights, phi^T phi + I, which costs a pass for the Jacobian and D^2 numbers.
    For few examples, N rows of phi with all their outputs, phi phi^T + I by

        (phi^T phi + I)^-1 B = B - phi^T (phi phi^T + I)^-1 phi B.

    It costs N^2 D operations once, N^3 each time that precisions or the likelihood's
    Hessian change, and a pass for each solve; the linear model's mean is found among
    the rows alone. Effective dimensions are exact, too, without samples. Rows of
    several processes are with none of them: they share the matrix of the weights.

    Attributes:
        tolerance: Relative error of the linear model's mean, by Newton's method.
        max_passes: Budget in passes over the data.
    """

    tolerance: float = 1e-3
    max_passes: float = 100.0

    def solve(
        self,
        system: WeightSystem,
        rhs: Float[Tensor, "D k"],
        initial: Float[Tensor, "D k"],
        *,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> WeightSolution:
        """Solve for all columns at once; the starting point makes no difference."""
        zero = torch.zeros_like(initial)
        return super().solve(system, rhs, zero, seed=seed, callback=callback)

    def draw(
        self,
        system: WeightSystem,
        columns: range,
        initial: Float[Tensor, "D k"],
        *,
        seed: int,
        callback: Callback | None = None,
    ) -> WeightSolution:
        """Posterior samples of these numbers; of few rows by Matheron's rule."""
        if not system.is_wide:
            return super().draw(system, columns, initial, seed=seed, callback=callback)
        zero = torch.zeros_like(initial)
        found = WeightSolution(system, zero, zero, callback)
        found.passes += 0.0 if system.is_formed else 1.0
        found.weights = system.solve(
            prior_draws(initial, columns, seed), system.noise_table(columns, seed)
        )
        found.reason = "interrupted" if found.report() else "converged"
        return found

    def dimension(self, system: WeightSystem, seed: int) -> EffectiveDimension:
        """How many weights the data determine."""
        groups = system.dimensions().clamp_min(SMALLEST_DIMENSION)
        return EffectiveDimension(groups, 0.0)

    def _advance(self, found: WeightSolution, generator: torch.Generator) -> Reason:
        system = found.system
        found.passes += 0.0 if system.is_formed else 1.0
        if system.is_wide:
            weights = system.solve(found.rhs)
            found.passes += 1.0
            found.move_to(weights, found.residuals_of(weights))
        else:
            wide = found.rhs.double()
            exact = torch.cholesky_solve(wide, system.factor)
            residuals = wide - exact - system.gram @ exact
            found.move_to(
                *(x.to(found.rhs).mT.contiguous().mT for x in (exact, residuals))
            )
        return "interrupted" if found.report() else "converged"


@dataclass(frozen=True)
class WeightKronecker(WeightCG):
    """Samples of an approximate posterior: Kronecker factors for each layer, as KFAC.

    They cost one pass over the data, however many. The linear model's mean is that of
    ``WeightCG``. Weights of different layers are independent, so variances differ from
    those of other solvers by more than an error that more passes would remove.

    Attributes:
        tolerance: Relative error of the linear model's mean.
        max_passes: Budget in passes over the data.
    """

    def draw(
        self,
        system: WeightSystem,
        columns: range,
        initial: Float[Tensor, "D k"],
        *,
        seed: int,
        callback: Callback | None = None,
    ) -> WeightSolution:
        """Samples of these numbers."""
        zero = torch.zeros_like(initial)
        found = WeightSolution(system, zero, zero, callback)
        draws = prior_draws(initial, columns, seed).mT
        samples = torch.empty_like(draws)
        for block in kronecker_blocks(system, seed):
            layer = block.layer
            layer.put(block.inverse_root(layer.take(draws)), samples)
        found.weights = samples.mT
        found.reason = "interrupted" if found.report() else "converged"
        return found

    def dimension(self, system: WeightSystem, seed: int) -> EffectiveDimension:
        """How many weights the data determine, by the same factors."""
        shares = torch.empty(1, system.num_weights).to(system.outputs)
        for block in kronecker_blocks(system, seed):
            block.layer.put(block.shares().unsqueeze(0), shares)
        groups = system.prior.group_sums(shares.mT, torch.ones_like(shares).mT)[:, 0]
        return EffectiveDimension(groups.clamp_min(SMALLEST_DIMENSION), 0.0)


@dataclass(frozen=True)
class WeightSGD(WeightSolver):
    """Primal stochastic gradient descent on minibatches; nothing needs to be set.

    Minimises 1/2 |phi v|^2 + 1/2 |v - b|^2, whose gradient noise is that of phi v alone
    (Antoran et al., ICLR 2023, eq. 10), by Nesterov's momentum with averaged iterates.
    Every few epochs the true residual is found, and from there on what is left is
    descended on: the noise is then that of the change alone and falls with it, which is
    variance reduction by an anchor (Johnson and Zhang, NeurIPS 2013), and the residual
    falls geometrically instead of as 1 / sqrt(t). The step size is a tenth of what the
    curvature of single batches allows without momentum; it is halved where the residual
    grows, and where it falls slowly whatever the number of epochs.

    Attributes:
        tolerance: Relative error that every column must reach.
        max_passes: Budget in passes over the data.
        momentum: In [0, 1).
        step_size: Of the summed objective. Default: from power iterations on batches.
    """

    tolerance: float = 0.1
    max_passes: float = 100.0
    momentum: float = 0.9
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected [0, 1), found {self.momentum}")
        if self.step_size is not None:
            check_positive("step_size", self.step_size)

    def _advance(self, found: WeightSolution, generator: torch.Generator) -> Reason:
        system = found.system
        step = self.step_size
        if step is None:
            step = _STEP / (1.0 + largest_batch_eigenvalue(system, generator))
            # An epoch of fewer batches counts as one of three.
            found.passes += (
                _POWER_BATCHES * _POWER_STEPS / max(3.0, _steps_per_epoch(system))
            )
        epochs, halvings, slow = 2, 0, 0
        while bool((found.errors > self.tolerance).any()):
            epochs = min(epochs, int(self.max_passes - found.passes) - 1)
            if epochs < 1:
                return "budget"
            change = self._descend(system, found.residuals, step, epochs, generator)
            candidate = found.weights + change
            residual = found.residuals_of(candidate)
            found.passes += epochs
            before, after = float(found.residuals.norm()), float(residual.norm())
            if not bool(torch.isfinite(residual).all()) or after > 2.0 * before:
                halvings += 1
                step /= 2.0
                if halvings > _MOST_HALVINGS:
                    return "diverged"
                continue
            if after > 0.5 * before:
                # Too short a way, or steps that are only just not too long.
                slow += 1
                if slow % _ROUNDS_BEFORE_SHORTER_STEPS:
                    epochs *= 2
                else:
                    step /= 4.0
            found.improve(candidate, residual)
            if found.report():
                return "interrupted"
        return "converged"

    def _descend(
        self,
        system: WeightSystem,
        residual: Tensor,
        step: float,
        epochs: int,
        generator: torch.Generator,
    ) -> Tensor:
        """What to add to the weights: the average over the later half of the epochs."""
        change, velocity = torch.zeros_like(residual), torch.zeros_like(residual)
        average, count = torch.zeros_like(residual), 0
        steps = epochs * _steps_per_epoch(system)
        for turn, batch in zip(range(steps), _batches(system, generator), strict=False):
            ahead = change.add(velocity, alpha=self.momentum)
            gradient = _batch_image(system, batch, ahead).add_(ahead).sub_(residual)
            velocity.mul_(self.momentum).sub_(gradient, alpha=step)
            change.add_(velocity)
            if 2 * turn >= steps:
                count += 1
                average.lerp_(change, 1.0 / count)
        return average


def largest_batch_eigenvalue(system: WeightSystem, generator: torch.Generator) -> float:
    """Largest eigenvalue of (N / b) phi_b^T phi_b, over a few batches b."""
    largest = 0.0
    batches = _batches(system, generator)
    for _, batch in zip(range(_POWER_BATCHES), batches, strict=False):
        v = torch.randn(
            system.num_weights, 1, generator=generator, device=generator.device
        ).to(system.outputs)
        product = functools.partial(_batch_image, system, batch)
        largest = max(largest, largest_eigenvalue(product, v, _POWER_STEPS))
    return largest


def _steps_per_epoch(system: WeightSystem) -> int:
    """Steps in which all processes together see about every example once."""
    stream = system.data.stream
    total = torch.tensor([float(stream.num_batches)], device=system.outputs.device)
    stream.processes.sum_(total)
    return max(1, round(float(total[0]) / stream.processes.size))


def _batches(system: WeightSystem, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of this process without end."""
    while True:
        yield from system.data.stream.shuffled(generator)


def _batch_image(system: WeightSystem, batch: Batch, v: Tensor) -> Tensor:
    """(N / b) phi_b^T phi_b v, over the batches of all processes."""
    stream = system.data.stream
    image = system.batch_product(batch, v).mT.contiguous()
    size = torch.tensor([float(len(batch.y))], device=image.device)
    stream.processes.sum_(image, size)
    return image.mul_(stream.num_examples / float(size[0])).mT
