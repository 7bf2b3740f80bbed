"""A model in training: its own kernel with a graph, and its linear systems."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import Likelihood
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.gpytorch_adapter.data import Inputs, Observed, observed_rows
from sgdgp.gpytorch_adapter.noise import noise_of_rows, noise_variances
from sgdgp.gpytorch_adapter.prior import (
    columns_of,
    kernel_of,
    nugget_of,
    tasks_of,
    tree_of,
)


@dataclass(frozen=True)
class TracedPrior:
    """Mean and covariance of a prior at some points, as functions of the parameters.

    Attributes:
        kernel: One GPyTorch kernel over ``inputs``; its parameters are the model's.
        mean: Prior mean (N,), with a graph.
        inputs: Kernel inputs (N, p), with a graph where ``forward`` computes them (a
            network, or a learned constant in front of a kernel).
        nugget: Variance that ``forward`` adds to the diagonal.
    """

    kernel: Kernel
    mean: Float[Tensor, " N"]
    inputs: Float[Tensor, "N p"]
    nugget: float


def traced_prior(
    distribution: MultivariateNormal, rows: Int[Tensor, " N"] | None = None
) -> TracedPrior:
    """Read what ``model(train_x)`` returns in train mode, without evaluating it.

    The kernel is the model's own: a step of an optimiser changes it in place. A
    multitask prior of T outputs at n inputs has n T rows, row i T + t for task t of
    input i; its kernel is one over (input, task) pairs.

    Args:
        distribution: Mean and lazy covariance over all training points.
        rows: Rows that are wanted (N,). Default: all.

    Raises:
        TypeError: Not a ``MultivariateNormal``.
        UnsupportedModelError: The covariance is not built from kernels between pairs
            of points, has been evaluated already, or has a batch shape.
    """
    if not isinstance(distribution, MultivariateNormal):
        raise TypeError(
            "distribution: expected the MultivariateNormal that model(train_x) "
            f"returns, found {type(distribution).__name__}"
        )
    tasks = tasks_of(distribution)
    mean = distribution.loc
    covariance = distribution.lazy_covariance_matrix
    tree = tree_of(covariance)
    if tasks is None:
        columns = columns_of(tree, rows)
    else:
        chosen = torch.arange(len(mean), device=mean.device) if rows is None else rows
        columns = columns_of(tree, chosen // tasks, chosen % tasks)
    mean = mean if rows is None else mean[rows]
    return TracedPrior(kernel_of(tree), mean, columns, nugget_of(covariance))


@dataclass(frozen=True, eq=False)
class TracedProblem:
    """One system (K + Sigma) V = targets - mean, as a function of the parameters.

    Attributes:
        kernel: The model's own kernel over ``inputs``.
        inputs: Kernel inputs (N, p), with a graph where ``forward`` computes them.
        mean: Prior mean (N,), with a graph; the same for all columns.
        noise: Noise variances (N,) with what ``forward`` adds to the diagonal, with a
            graph.
        targets: (N, c) in the model's units, none of them missing.
        rows: Rows of the prior (N,): the input i, or i T + t with T outputs per input.
        columns: Columns of y behind those of ``targets``.
    """

    kernel: Kernel
    inputs: Float[Tensor, "N p"]
    mean: Float[Tensor, " N"]
    noise: Float[Tensor, " N"]
    targets: Float[Tensor, "N c"]
    rows: Int[Tensor, " N"]
    columns: tuple[int, ...]


def training_problems(
    distribution: MultivariateNormal, likelihood: Likelihood, x: Inputs, y: Tensor
) -> tuple[TracedProblem, ...]:
    """Everything that a marginal likelihood is a function of.

    Args:
        distribution: The prior at all training inputs (``prior_at``, or what
            ``model(train_x)`` returns in train mode).
        likelihood: The model's likelihood.
        x: Inputs in the model's units, for noise that depends on them.
        y: Targets in the model's units: (n,); (n, T) for a model of T outputs per
            input, or for T independent outputs of a model of one. NaN where missing.

    Returns:
        One system; more where independent outputs miss different rows. The log
        marginal likelihood is the sum over systems and columns.

    Raises:
        TypeError: The likelihood is not Gaussian.
        UnsupportedModelError: The prior is not a function of two points.
        ValueError: y or the noise does not fit the prior, or y is missing altogether.
    """
    tasks = 1
    if isinstance(distribution, MultitaskMultivariateNormal):
        tasks = int(distribution.num_tasks)
    count = distribution.loc.shape[-1]
    n = count // tasks
    systems = _systems(y, n, tasks)
    noise = noise_of_rows(noise_variances(likelihood, x, n), n, tasks)
    problems = []
    for system in systems:
        rows = None if len(system.rows) == count else system.rows
        prior = traced_prior(distribution, rows)
        chosen = noise if rows is None else noise[rows]
        problems.append(
            TracedProblem(
                kernel=prior.kernel,
                inputs=prior.inputs,
                mean=prior.mean,
                noise=chosen + prior.nugget,
                targets=system.targets,
                rows=system.rows,
                columns=system.columns,
            )
        )
    return tuple(problems)


def _systems(y: Tensor, n: int, tasks: int) -> tuple[Observed, ...]:
    expected = f"({n}, {tasks})" if tasks > 1 else f"({n},) or ({n}, outputs)"
    fits = y.shape[:1] == (n,) and y.ndim == 2 and tasks in (1, y.shape[-1])
    if not fits and (tasks > 1 or y.shape != (n,)):
        raise ValueError(f"y: expected shape {expected}, found {tuple(y.shape)}")
    return observed_rows(y, tasks)
