"""The prior of a model that is being trained: its own kernel, with a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter.covariance import (
    Rows,
    columns_of,
    kernel_of,
    nugget_of,
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
    mean = distribution.loc
    multitask = isinstance(distribution, MultitaskMultivariateNormal)
    if mean.ndim != 1 or (multitask and not distribution._interleaved):
        raise UnsupportedModelError(
            f"model: expected a prior without batch shape, found a mean of shape "
            f"{tuple(mean.shape)}; batch models are not supported. For independent "
            "outputs that share a kernel give a single-output model and y of shape "
            "(n, outputs); for correlated ones use a MultitaskKernel"
        )
    covariance = distribution.lazy_covariance_matrix
    tree = tree_of(covariance)
    if multitask:
        chosen = torch.arange(len(mean), device=mean.device) if rows is None else rows
        tasks = distribution.num_tasks
        which = Rows(points=chosen // tasks, tasks=chosen % tasks)
    else:
        which = Rows(points=rows)
    return TracedPrior(
        kernel_of(tree),
        mean if rows is None else mean[rows],
        columns_of(tree, which),
        nugget_of(covariance),
    )
