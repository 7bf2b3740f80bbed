"""The noise model of a Gaussian likelihood: one variance per observation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    HadamardGaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.likelihoods.noise_models import HomoskedasticNoise
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from sgdgp.core.checks import check_variances


def noise_variances(
    likelihood: Likelihood, x: Tensor | Sequence[Tensor], n: int
) -> Float[Tensor, " N"]:
    """Noise variances at n inputs, with a graph to the likelihood's parameters.

    Works for homoscedastic, fixed and per-point (input-dependent) Gaussian noise, and
    for noise by task, because it asks the likelihood what it adds to a distribution of
    zero variance.

    Args:
        likelihood: The model's likelihood.
        x: Inputs (n, d) in the model's own units, or several of them.
        n: Number of inputs.

    Returns:
        The noise variances (n,) in the dtype of the inputs; of a multitask likelihood
        or fixed noise (n, T) all of them (n T,), those of one input side by side.

    Raises:
        TypeError: The likelihood is not Gaussian.
        ValueError: The number of variances is not that of the inputs, or the noise of
            different tasks is correlated.
    """
    inputs = [x] if torch.is_tensor(x) else list(x)
    like = next((part for part in inputs if part.is_floating_point()), inputs[0])
    if isinstance(likelihood, MultitaskGaussianLikelihood):
        return _of_tasks(likelihood, inputs, n).to(like.dtype)
    if _is_constant(likelihood):
        # The same as below, without the detour.
        return likelihood.noise.to(like.dtype).expand(n)
    if not isinstance(likelihood, GaussianLikelihood) and not (
        hasattr(likelihood, "noise_covar")
    ):
        raise TypeError(
            f"likelihood: expected a Gaussian likelihood, found "
            f"{type(likelihood).__name__}"
        )
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        return _fixed(likelihood, n).to(like.dtype)
    if isinstance(likelihood, HadamardGaussianLikelihood) and len(inputs) > 1:
        # Of a model's several inputs, its tasks are the one of whole numbers.
        whole = [part for part in inputs if not part.is_floating_point()]
        inputs = whole or inputs
    zeros = like.new_zeros(n)
    noisy = likelihood(MultivariateNormal(zeros, DiagLinearOperator(zeros)), inputs)
    noise = noisy.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2).to(like.dtype)
    if noise.shape != (n,):
        raise ValueError(
            f"likelihood: expected noise variances of shape ({n},), found "
            f"{tuple(noise.shape)}; batch models are not supported"
        )
    return noise


def _is_constant(likelihood: Likelihood) -> bool:
    """Whether this is GPyTorch's own likelihood with its own noise model."""
    return (
        type(likelihood) is GaussianLikelihood
        and type(likelihood.noise_covar) is HomoskedasticNoise
        and likelihood.noise.shape == (1,)
    )


def _of_tasks(
    likelihood: MultitaskGaussianLikelihood, inputs: list[Tensor], n: int
) -> Tensor:
    """What a multitask likelihood adds to each output of n inputs, (n T,)."""
    if likelihood.has_task_noise and likelihood.rank > 0:
        raise ValueError(
            f"likelihood: the noise of the tasks is correlated (rank="
            f"{likelihood.rank}), which sgdgp does not support; expected rank=0, a "
            "noise variance for each task"
        )
    tasks = likelihood.num_tasks
    if type(likelihood) is MultitaskGaussianLikelihood:
        # The same as below, without the detour.
        noise = torch.zeros((), device="cpu")
        if likelihood.has_global_noise:
            noise = likelihood.noise
        if likelihood.has_task_noise:
            noise = likelihood.task_noises + noise.to(likelihood.task_noises)
        if noise.shape in ((1,), (tasks,)):
            return noise.expand(tasks).repeat(n)
    zeros = inputs[0].new_zeros(n, tasks, dtype=torch.get_default_dtype())
    nothing = DiagLinearOperator(zeros.flatten())
    noisy = likelihood(MultitaskMultivariateNormal(zeros, nothing), inputs)
    noise = noisy.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2)
    if noise.shape != (n * tasks,):
        raise ValueError(
            f"likelihood: expected {n * tasks} noise variances, found shape "
            f"{tuple(noise.shape)}; batch models are not supported"
        )
    return noise


def _fixed(likelihood: FixedNoiseGaussianLikelihood, n: int) -> Tensor:
    """Fixed variances (n,) or (n, T), plus what the likelihood learns."""
    noise = likelihood.noise_covar.noise
    if noise.shape[-1] != n and (noise.ndim != 2 or noise.shape[0] != n):
        raise ValueError(
            f"likelihood: expected {n} fixed noise variances, one per observation, "
            f"found {noise.shape[-1]}"
        )
    return (noise + likelihood.second_noise).flatten()


def noise_of(
    likelihood: Likelihood, x: Tensor | Sequence[Tensor]
) -> Float[Tensor, " N"]:
    """``noise_variances`` at the inputs x, without a graph, and checked.

    Raises:
        TypeError: The likelihood is not Gaussian.
        ValueError: A variance is not positive and finite, or the number of fixed
            variances is not that of the inputs.
    """
    inputs = [x] if torch.is_tensor(x) else list(x)
    with torch.no_grad():
        noise = noise_variances(likelihood, inputs, inputs[0].shape[0])
    check_variances("likelihood", noise)
    return noise


def noise_of_rows(noise: Tensor, n: int, tasks: int) -> Tensor:
    """Noise variances (n T,), of a likelihood that may know only those of inputs (n,).

    Raises:
        ValueError: There are neither n nor n T of them.
    """
    if len(noise) == n * tasks:
        return noise
    if len(noise) == n:
        return noise.repeat_interleave(tasks)
    raise ValueError(
        f"likelihood: expected a noise variance for each of {n} inputs and {tasks} "
        f"outputs, found {len(noise)}"
    )


def has_fixed_noise(likelihood: Likelihood) -> bool:
    """Whether the likelihood only knows the noise of its training points."""
    return isinstance(likelihood, FixedNoiseGaussianLikelihood)
