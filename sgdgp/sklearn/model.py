"""The GPyTorch model behind the regressor: kernels by name, a start, sample weights.

A weight w makes an observation count w times: its likelihood to the power w. Up to a
constant that is one observation of noise variance sigma^2 / w, times a function of
sigma^2 alone,

    N(y | f, sigma^2)^w = N(y | f, sigma^2 / w) (2 pi sigma^2)^(-(w - 1) / 2) / sqrt(w),

so learning needs a noise model that divides by the weight, and a factor that GPyTorch
knows as a prior on the noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
)
from gpytorch.likelihoods.noise_models import HomoskedasticNoise
from gpytorch.means import ConstantMean, Mean, ZeroMean
from gpytorch.models import ExactGP
from gpytorch.priors import Prior
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from sgdgp.core.inference import outside_inference_mode
from sgdgp.posterior import Posterior
from sgdgp.sklearn.arguments import Settings
from sgdgp.sklearn.kernels import Hyperparameter, Translated, logarithmic
from sgdgp.training import (
    Fitted,
    Plateau,
    StochasticMarginalLogLikelihood,
    fit,
    log_marginal_likelihood,
)

NOISE_BOUND = 1e-4
"""Smallest noise variance that is learned, over the variance of the targets."""


def _stationary(
    base: Callable[..., Kernel], spread: Tensor, variance: float
) -> ScaleKernel:
    dim = len(spread)
    kernel = ScaleKernel(
        base(ard_num_dims=dim, lengthscale_constraint=logarithmic()),
        outputscale_constraint=logarithmic(),
    ).to(spread)
    # The squared distance of two points is about 2 d in units of the spread.
    kernel.base_kernel.lengthscale = spread * dim**0.5
    kernel.outputscale = variance
    return kernel


def _linear(spread: Tensor, variance: float) -> AdditiveKernel:
    """With a bias, as in scikit-learn's DotProduct: the prior mean may be zero."""
    bias = ConstantKernel(constant_constraint=logarithmic()).to(spread)
    kernel = LinearKernel(
        ard_num_dims=len(spread), variance_constraint=logarithmic()
    ).to(spread)
    bias.constant = spread.new_tensor([variance])
    kernel.variance = variance / (len(spread) * spread.square())
    return kernel + bias


_KERNELS: dict[str, Callable[[Tensor, float], Kernel]] = {
    "matern12": partial(_stationary, partial(MaternKernel, nu=0.5)),
    "matern32": partial(_stationary, partial(MaternKernel, nu=1.5)),
    "matern52": partial(_stationary, partial(MaternKernel, nu=2.5)),
    "rbf": partial(_stationary, RBFKernel),
    "rq": partial(_stationary, RQKernel),
    "linear": _linear,
}

KERNEL_NAMES = tuple(_KERNELS)
"""Names that can be given for a kernel, alone or as a sum: "linear + matern32"."""


def make_kernel(
    kernel: Kernel | Translated | str, spread: Float[Tensor, " d"], variance: float
) -> Kernel:
    """The kernel to learn: a copy of the one given, or a new one of that name.

    Args:
        kernel: A GPyTorch kernel, which is never changed; a translated one, which is
            what is learned; or a name or a sum of names such as "linear + matern32".
        spread: Standard deviation of each input column (d,), where named kernels
            start; its dtype and device are the kernel's.
        variance: Prior variance of named kernels.

    Raises:
        TypeError: Neither a GPyTorch kernel nor a string.
        ValueError: A name is not known, or the kernel does not fit the inputs.
    """
    if isinstance(kernel, Translated):
        return kernel.kernel
    if isinstance(kernel, Kernel):
        return _fitting(copy.deepcopy(kernel).to(spread), spread)
    if not isinstance(kernel, str):
        raise TypeError(
            "kernel: expected a kernel of GPyTorch or scikit-learn, or a name, found "
            f"{type(kernel).__name__}"
        )
    names = [name.strip() for name in kernel.split("+")]
    unknown = [name for name in names if name not in _KERNELS]
    if unknown:
        known = ", ".join(repr(name) for name in KERNEL_NAMES)
        raise ValueError(
            f"kernel: expected one of {known} or a sum of them, found {kernel!r}"
        )
    share = variance / len(names)
    terms = [_KERNELS[name](spread, share) for name in names]
    return terms[0] if len(terms) == 1 else AdditiveKernel(*terms)


def _fitting(kernel: Kernel, spread: Tensor) -> Kernel:
    """The kernel, if it can be evaluated at inputs with so many columns."""
    if kernel.batch_shape:
        raise ValueError(
            "kernel: expected one without batch shape, found batch shape "
            f"{tuple(kernel.batch_shape)}"
        )
    try:
        with torch.no_grad():
            kernel(spread.unsqueeze(0)).to_dense()
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"kernel: cannot be evaluated at inputs with {len(spread)} columns: {error}"
        ) from error
    return kernel


def mean_and_spread(
    values: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Weighted mean and standard deviation of each column.

    Args:
        values: (n, d).
        weights: How often each row counts (n,). Default: once.

    Returns:
        The means (d,), and the standard deviations (d,) with ones for constant columns.
    """
    exact = values.double()
    counts = exact.new_ones(len(exact)) if weights is None else weights.double()
    share = counts / counts.sum()
    mean = share @ exact
    spread = (share @ (exact - mean).square()).sqrt()
    # The rounding of its mean gives a constant column a spread.
    spread = torch.where(spread <= 1e-12 * mean.abs(), torch.ones_like(spread), spread)
    return mean.to(values), spread.to(values)


class GPModel(ExactGP):
    """Mean plus kernel; the data are handed to whoever fits or conditions it.

    Args:
        mean: Mean function.
        kernel: Covariance function.
        likelihood: Gaussian likelihood.
    """

    def __init__(self, mean: Mean, kernel: Kernel, likelihood: Likelihood) -> None:
        super().__init__(None, None, likelihood)
        self.mean_module = mean
        self.covar_module = kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at x (n, d)."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class WeightedGPModel(GPModel):
    """The same of inputs (n, d + 1) whose last column is the weight of the row."""

    def forward(self, x: Tensor) -> MultivariateNormal:
        """Prior at x (n, d + 1)."""
        return super().forward(x[..., :-1])


class WeightedNoise(HomoskedasticNoise):
    """Noise variance sigma^2 / w, w the last column of the inputs."""

    def forward(self, *params: Any, **_: Any) -> DiagLinearOperator:
        """The noise at the inputs ``params``."""
        x = params[0] if torch.is_tensor(params[0]) else params[0][0]
        return DiagLinearOperator(self.noise / x[..., -1])


class WeightedLikelihood(GaussianLikelihood):
    """Gaussian likelihood with ``WeightedNoise``.

    Args:
        plain: Likelihood whose parameter it shares.
    """

    def __init__(self, plain: GaussianLikelihood) -> None:
        super().__init__()
        homoscedastic: HomoskedasticNoise = plain.noise_covar
        constraint = homoscedastic.raw_noise_constraint
        self.noise_covar = WeightedNoise(noise_constraint=constraint)
        self.noise_covar.raw_noise = homoscedastic.raw_noise


class CountedObservations(Prior):
    """(2 pi sigma^2)^(-c / 2): what c more observations without a residual add.

    Args:
        count: c, sum(w) minus the number of rows, times the number of outputs.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, count: float) -> None:
        torch.nn.Module.__init__(self)
        super().__init__(validate_args=False)
        self.count = count

    def log_prob(self, x: Tensor) -> Tensor:
        """Logarithm of the factor at the noise variance x."""
        return -0.5 * self.count * (2.0 * math.pi * x).log()


@outside_inference_mode
def starting_model(
    kernel: Kernel | Translated | str,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"] | Float[Tensor, "n t"],
    weights: Float[Tensor, " n"] | None,
    noise: float | Float[Tensor, " n"],
    *,
    with_mean: bool,
) -> GPModel:
    """A model to learn, which starts where the data are.

    Args:
        kernel: As for ``make_kernel``.
        x: Inputs (n, d); their spread is where named kernels start.
        y: Targets (n,) or (n, t).
        weights: How often each row counts (n,). Default: once.
        noise: Noise variance to start from, or those of the rows, which stay.
        with_mean: Whether a constant prior mean is learned; else it is zero.
    """
    _, spread = mean_and_spread(x, weights)
    centre, scale = mean_and_spread(y.reshape(len(x), -1), weights)
    variance = float((centre.square() + scale.square()).mean())
    with x.device:  # whatever torch's default device is
        if isinstance(noise, Tensor):
            likelihood = fixed_noise(noise)
        else:
            # A smaller start is an explicit wish for little noise.
            least = min(NOISE_BOUND * float(scale.square().mean()), 0.1 * noise)
            likelihood = GaussianLikelihood(noise_constraint=GreaterThan(least)).to(x)
            likelihood.noise = x.new_tensor(noise)
            if isinstance(kernel, Translated):
                likelihood.requires_grad_(kernel.learns_noise)
        # About zero, as the prior has them.
        mean = ConstantMean().to(x) if with_mean else ZeroMean()
        return GPModel(mean, make_kernel(kernel, spread, variance), likelihood)


def weighted_model(
    model: GPModel, x: Float[Tensor, "n d"], weights: Float[Tensor, " n"], outputs: int
) -> tuple[WeightedGPModel, Float[Tensor, "n d+1"]]:
    """The model as it is learned from weighted rows, sharing its parameters.

    Args:
        model: Mean, kernel and the likelihood of a ``starting_model``.
        x: Inputs (n, d).
        weights: Positive weights of the rows (n,).
        outputs: Number of outputs that share the noise.

    Returns:
        The model, and its inputs (n, d + 1).
    """
    likelihood = WeightedLikelihood(model.likelihood)
    learned = WeightedGPModel(model.mean_module, model.covar_module, likelihood)
    # With the model: GPyTorch counts the priors of a likelihood twice, once for the
    # objective's likelihood and once for its model's.
    count = outputs * (float(weights.sum()) - len(weights))
    learned.register_prior("counted", CountedObservations(count), _noise_of)
    return learned, torch.cat([x, weights.unsqueeze(1)], dim=1)


def conditioned_model(model: GPModel, weights: Float[Tensor, " n"] | None) -> GPModel:
    """The learned model as it is conditioned on rows with these weights."""
    if weights is None:
        return model
    likelihood = fixed_noise(model.likelihood.noise.detach() / weights)
    return GPModel(model.mean_module, model.covar_module, likelihood)


def fixed_noise(noise: Float[Tensor, " n"]) -> FixedNoiseGaussianLikelihood:
    """A likelihood with these noise variances of the rows."""
    likelihood = FixedNoiseGaussianLikelihood(torch.ones_like(noise))
    # Past the constructor, which would round small variances up.
    likelihood.noise_covar.noise = noise
    return likelihood


def data_of(posterior: Posterior) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (n, d), targets about the prior mean (n, t), noise (n,), in float64."""
    problems = [part.problem for part in posterior.solved]
    y = torch.stack([problem.targets for problem in problems], dim=1)
    return problems[0].x.double(), y.double(), problems[0].noise.double()


def hyperparameters_of(kernel: Kernel) -> list[Hyperparameter]:
    """All positive parameters of a GPyTorch kernel."""
    return [
        Hyperparameter(raw, constraint)
        for _, raw, constraint in kernel.named_parameters_and_constraints()
        if constraint is not None and bool((constraint.lower_bound >= 0).all())
    ]


@outside_inference_mode
def log_likelihood(
    kernel: Kernel,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n t"],
    noise: Float[Tensor, " n"],
    variables: Sequence[Tensor] = (),
) -> tuple[float, list[Tensor]]:
    """Log p(y | x) of columns with zero mean, and its gradients.

    Exact up to 1,000 rows, and then an estimate, as ``log_marginal_likelihood``.

    Args:
        kernel: The kernel; its priors do not count.
        x: Inputs.
        y: Targets, independent columns.
        noise: Noise variances of the rows.
        variables: What the gradients are with respect to.
    """
    for module in kernel.modules():
        getattr(module, "_priors", {}).clear()
    with x.device:  # whatever torch's default device is
        model = GPModel(ZeroMean(), kernel, fixed_noise(noise))
    try:
        value = log_marginal_likelihood(model, x, y).value
    except torch.linalg.LinAlgError:
        return -math.inf, [torch.zeros_like(variable) for variable in variables]
    if not variables:
        return value, []
    objective = StochasticMarginalLogLikelihood(
        model.likelihood, model, initial_value=value
    )
    total = y.numel() * objective(model.forward(x), y, x)
    return value, list(torch.autograd.grad(total, variables))


def learn(
    model: GPModel,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"] | Float[Tensor, "n t"],
    weights: Float[Tensor, " n"] | None,
    settings: Settings,
    seed: int,
) -> Fitted | None:
    """Learn the parameters of ``model`` in place.

    Args:
        model: Model to learn.
        x: Inputs (n, d).
        y: Targets (n,) or (n, t), in the model's units.
        weights: How often each row counts (n,). Default: once.
        settings: Optimiser, steps and solver.
        seed: Seed of the probes.

    Returns:
        How it went, or None if nothing was to be learned.
    """
    free = any(parameter.requires_grad for parameter in model.parameters())
    if settings.optimiser is None or settings.steps == 0 or not free:
        return None
    plateau = Plateau()
    learned = model
    if weights is not None:
        learned, x = weighted_model(model, x, weights, 1 if y.ndim == 1 else y.shape[1])
        # Gains count per observation, and a row is as many as its weight.
        plateau = replace(plateau, gain=plateau.gain * float(weights.mean()))
    return fit(
        learned,
        x,
        y,
        steps=settings.steps,
        optimizer=settings.optimiser,
        solver=settings.solver,
        plateau=plateau,
        seed=seed,
        progress=settings.progress,
    )


def _noise_of(model: GPModel) -> Tensor:
    return model.likelihood.noise
