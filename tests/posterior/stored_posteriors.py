"""Models of every kind whose posteriors are stored, and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from gpytorch.constraints import Interval
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import (
    MaternKernel,
    MultitaskKernel,
    PiecewisePolynomialKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.priors import GammaPrior
from torch import Tensor

from tests.models import GP, toy_data

N = 40


class DeepGP(gpytorch.models.ExactGP):
    """A network in front of a kernel."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, GaussianLikelihood())
        self.mean_module = gpytorch.means.LinearMean(2)
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
        self.covar_module = ScaleKernel(MaternKernel(nu=2.5))

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(
            self.mean_module(x), self.covar_module(self.network(x))
        )


class TaskGP(gpytorch.models.ExactGP):
    """Two correlated outputs."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, MultitaskGaussianLikelihood(num_tasks=2))
        self.mean_module = gpytorch.means.MultitaskMean(
            gpytorch.means.ConstantMean(), num_tasks=2
        )
        self.covar_module = MultitaskKernel(RBFKernel(), num_tasks=2, rank=1)

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def _two_outputs(y: Tensor) -> Tensor:
    y = torch.stack([y, y.flip(0)], dim=1)
    y[3, 1] = y[7, 0] = torch.nan
    return y


def _scrambled(model: Any, seed: int) -> Any:
    """Other parameters for every seed, within their constraints."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            parameter.add_(0.3 * noise.to(parameter))
    return model


def _plain(seed: int = 0, dtype: torch.dtype = torch.float64) -> GP:
    kernel = ScaleKernel(
        MaternKernel(
            nu=1.5,
            ard_num_dims=2,
            lengthscale_prior=GammaPrior(3.0, 6.0),
            lengthscale_constraint=Interval(0.05, 4.0),
        )
    )
    x, y = toy_data(N, seed=seed, dtype=dtype)
    return _scrambled(GP(x, y, kernel).to(dtype), seed)


def _fixed_noise(seed: int = 0) -> GP:
    x, y = toy_data(N, seed=seed)
    noise = torch.linspace(0.05, 0.5, N, dtype=torch.float64) + 0.1 * seed
    likelihood = FixedNoiseGaussianLikelihood(noise)
    return _scrambled(GP(x, y, RBFKernel(), likelihood).double(), seed)


def _exact_draws(seed: int = 0) -> GP:
    x, y = toy_data(N, 1, seed=seed)
    return _scrambled(GP(x, y, PiecewisePolynomialKernel(q=2)).double(), seed)


def _deep(seed: int = 0) -> DeepGP:
    x, y = toy_data(N, seed=seed)
    torch_state = torch.get_rng_state()
    model = DeepGP(x, y).double()
    torch.set_rng_state(torch_state)
    return _scrambled(model, seed)


def _multitask(seed: int = 0) -> TaskGP:
    x, y = toy_data(N, seed=seed)
    return _scrambled(TaskGP(x, torch.stack([y, y.flip(0)], 1)).double(), seed)


def _botorch(seed: int = 0) -> Any:
    import botorch

    x, y = toy_data(N, seed=seed)
    model = botorch.models.SingleTaskGP(
        x,
        20 * y[:, None] + 3,
        input_transform=botorch.models.transforms.Normalize(2),
        outcome_transform=botorch.models.transforms.Standardize(1),
    )
    return _scrambled(model, seed)


BUILD: dict[str, Callable[..., Any]] = {
    "plain": _plain,
    "float32": lambda seed=0: _plain(seed, torch.float32),
    "fixed_noise": _fixed_noise,
    "exact_draws": _exact_draws,
    "deep": _deep,
    "multitask": _multitask,
    "independent": _plain,
    "botorch": _botorch,
}


def data_for(name: str) -> tuple[Tensor, ...]:
    """x and y that ``condition`` is given beside the model, if any."""
    if name == "independent":
        x, y = toy_data(N)
        return x, _two_outputs(y)
    return ()


def predictions(posterior: Any, name: str) -> dict[str, Tensor]:
    """Everything a posterior can say, and what it says after draws and new data."""
    dim = 1 if name == "exact_draws" else 2
    dtype = torch.float32 if name == "float32" else torch.float64
    x = toy_data(9, dim, seed=1, dtype=dtype)[0]
    x_new, y_new = toy_data(3, dim, seed=2, dtype=dtype)
    if name in ("multitask", "independent"):
        y_new = torch.stack([y_new, -y_new], dim=1)
    settings = {}
    if name == "fixed_noise":
        settings["noise"] = torch.full((3,), 0.2, dtype=dtype)
    updated = posterior.update(x_new, y_new, **settings)
    found = {
        "mean": posterior.mean(x),
        "variance": posterior.variance(x),
        "samples": posterior.samples(x),
        "marginals": posterior.predict(x, batch_size=4).variance,
        "draw": posterior.draw(2, seed=3)(x),
        "updated mean": updated.mean(x),
        "updated samples": updated.samples(x),
        "updated draw": updated.draw(1)(x),
    }
    return {key: value.detach().contiguous() for key, value in found.items()}
