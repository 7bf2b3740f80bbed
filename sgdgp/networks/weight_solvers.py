"""Solvers of (phi^T phi + I) V = B in the weights of a tangent model.

The system is as large as the network has weights, its rows cost as much as a whole
product, and its right-hand sides are posterior draws or the linear model's mean. A
column v with residual r is done when

    |r| <= tolerance * min(|phi v|, |v|).

The precision is at least one, so the error is below |r| in the weights and below
|r| / 2 in the outputs phi v: the tolerance is a relative error of both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_positive
from sgdgp.networks.curvature import WeightSystem
from sgdgp.networks.stream import Batch
from sgdgp.solvers.base import Reason
from sgdgp.solvers.block_recurrence import BlockRecurrence

_STEP = 0.1

Watch: TypeAlias = Callable[[float, Tensor, Callable[[], Tensor]], bool]
"""Told of passes, relative errors (k,) and how to get the weights; True stops."""


@dataclass(frozen=True)
class WeightSolution:
    """Solved whitened weights.

    Attributes:
        weights: V (D, k).
        residuals: B - (phi^T phi + I) V (D, k), true ones.
        errors: The bounds that the tolerance is compared with (k,).
        passes: Products with the data set.
        reason: Why it stopped.
    """

    weights: Float[Tensor, "D k"]
    residuals: Float[Tensor, "D k"]
    errors: Float[Tensor, " k"]
    passes: float
    reason: Reason

    def images(self, rhs: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """phi^T phi V, known from the residuals without another pass."""
        return rhs - self.weights - self.residuals


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

    @abstractmethod
    def solve(
        self,
        system: WeightSystem,
        rhs: Float[Tensor, "D k"],
        initial: Float[Tensor, "D k"],
        *,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> WeightSolution:
        """Solve for all columns at once.

        Args:
            system: The posterior precision as a product.
            rhs: Right-hand sides (D, k).
            initial: Starting point (D, k).
            seed: Seed of everything random.
            watch: Called as the solve advances; True stops it.
        """


def relative_errors(
    rhs: Float[Tensor, "D k"],
    weights: Float[Tensor, "D k"],
    residuals: Float[Tensor, "D k"],
) -> Float[Tensor, " k"]:
    """|r| / min(|phi v|, |v|) of every column, by |phi v|^2 = v^T (b - v - r)."""
    wide = torch.float64
    squares = weights.square().sum(0, dtype=wide)
    images = (weights * (rhs - residuals - weights)).sum(0, dtype=wide)
    smaller = torch.minimum(images, squares).clamp_min(0.0).sqrt().to(rhs)
    norms = residuals.norm(dim=0)
    # A column of zeros with a right-hand side of zeros is solved.
    return torch.where(norms > 0, norms / smaller, torch.zeros_like(norms))


@dataclass(frozen=True)
class WeightCG(WeightSolver):
    """Block conjugate gradients: one pass over the data an iteration.

    All columns share one Krylov space, so that the few large eigenvalues of a network's
    curvature cost one or two iterations.

    Attributes:
        tolerance: Relative error that every column must reach.
        max_passes: Budget in passes over the data.
    """

    tolerance: float = 0.05
    max_passes: float = 100.0

    def solve(
        self,
        system: WeightSystem,
        rhs: Float[Tensor, "D k"],
        initial: Float[Tensor, "D k"],
        *,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> WeightSolution:
        """Solve (phi^T phi + I) V = B; see ``WeightSolver.solve``."""
        residual, passes = first_residual(system, rhs, initial)
        errors = relative_errors(rhs, initial, residual)
        run = BlockRecurrence(
            lambda v: system.product(v).add_(v),
            initial,
            residual,
            None,
            ~(errors <= self.tolerance),
        )
        reason: Reason | None = "converged" if run.is_done else None
        while reason is None:
            while not run.is_done and reason is None:
                run.step()
                passes += 1.0
                errors = relative_errors(rhs, run.weights, run.residual)
                run.release(~(errors <= self.tolerance))
                if watch is not None and watch(passes, errors, lambda: run.weights):
                    reason = "interrupted"
                elif passes + 1.0 >= self.max_passes:
                    reason = "budget"
            everything = torch.arange(rhs.shape[1], device=rhs.device)
            run.adopt(everything, true_residual(system, rhs, run.weights))
            passes += 1.0
            errors = relative_errors(rhs, run.weights, run.residual)
            unsolved = ~(errors <= self.tolerance)
            if not bool(torch.isfinite(errors).all()):
                reason = "diverged"
            elif not bool(unsolved.any()):
                reason = "converged"
            elif reason is None and passes + 2.0 > self.max_passes:
                reason = "budget"
            if reason is None:
                run.resume(unsolved)
        return WeightSolution(run.weights, run.residual, errors, passes, reason)


def first_residual(
    system: WeightSystem, rhs: Float[Tensor, "D k"], initial: Float[Tensor, "D k"]
) -> tuple[Tensor, float]:
    """The residual of a starting point and the passes it took: none from zero."""
    if not bool(initial.any()):
        return rhs.clone(), 0.0
    return true_residual(system, rhs, initial), 1.0


def true_residual(
    system: WeightSystem, rhs: Float[Tensor, "D k"], v: Float[Tensor, "D k"]
) -> Float[Tensor, "D k"]:
    """B - (phi^T phi + I) V, one pass."""
    return system.product(v).add_(v).neg_().add_(rhs)


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

    def solve(
        self,
        system: WeightSystem,
        rhs: Float[Tensor, "D k"],
        initial: Float[Tensor, "D k"],
        *,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> WeightSolution:
        """Solve (phi^T phi + I) V = B; see ``WeightSolver.solve``."""
        generator = torch.Generator().manual_seed(seed)
        best = initial
        residual, passes = first_residual(system, rhs, initial)
        errors = relative_errors(rhs, best, residual)
        step = self.step_size
        if step is None:
            step = _STEP / (1.0 + largest_batch_eigenvalue(system, generator))
            passes += 3.0 * 8.0 / max(3.0, _steps_per_epoch(system))
        epochs, halvings, slow = 2, 0, 0
        reason: Reason | None = None
        while reason is None:
            if not bool((errors > self.tolerance).any()):
                reason = "converged"
                break
            epochs = min(epochs, int(self.max_passes - passes) - 1)
            if epochs < 1:
                reason = "budget"
                break
            candidate = best + self._descend(system, residual, step, epochs, generator)
            passes += epochs + 1.0
            found = true_residual(system, rhs, candidate)
            if not bool(torch.isfinite(found).all()) or float(
                found.norm()
            ) > 2.0 * float(residual.norm()):
                halvings += 1
                step /= 2.0
                reason = "diverged" if halvings > 20 else None
                continue
            if float(found.norm()) > 0.5 * float(residual.norm()):
                # Too short a way, or steps that are only just not too long.
                slow += 1
                epochs, step = (2 * epochs, step) if slow % 4 else (epochs, step / 4.0)
            better = found.norm(dim=0) < residual.norm(dim=0)
            best = torch.where(better, candidate, best)
            residual = torch.where(better, found, residual)
            errors = relative_errors(rhs, best, residual)
            if watch is not None and watch(passes, errors, best.clone):
                reason = "interrupted"
        return WeightSolution(best, residual, errors, passes, reason)

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


def largest_batch_eigenvalue(
    system: WeightSystem, generator: torch.Generator, batches: int = 3, steps: int = 8
) -> float:
    """Largest eigenvalue of (N / b) phi_b^T phi_b, over a few batches b."""
    largest = 0.0
    like = system.outputs
    for _, batch in zip(range(batches), _batches(system, generator), strict=False):
        v = torch.randn(system.num_weights, 1, generator=generator).to(like)
        for _ in range(steps):
            v = _batch_image(system, batch, v / v.norm().clamp_min(1e-30))
        largest = max(largest, float(v.norm()))
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
