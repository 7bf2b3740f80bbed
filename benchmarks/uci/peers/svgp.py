"""GPyTorch's stochastic variational GP, as in its tutorial."""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import VariationalELBO
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.data import Split
from benchmarks.uci.peers.outcome import Clock, PeerOutcome, thin
from benchmarks.uci.request import RunRequest
from benchmarks.uci.trainable import learnt

_TEST_BLOCK = 2048


class VariationalGP(gpytorch.models.ApproximateGP):
    """The fit's model over inducing points that move."""

    def __init__(self, points: Float[Tensor, "p d"]) -> None:
        strategy = VariationalStrategy(
            self,
            points,
            CholeskyVariationalDistribution(len(points)),
            learn_inducing_locations=True,
        )
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = ScaleKernel(
            MaternKernel(nu=1.5, ard_num_dims=points.shape[1])
        )

    def forward(self, x: Float[Tensor, "n d"]) -> MultivariateNormal:
        """The prior at x (n, d)."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def gpytorch_svgp(request: RunRequest, split: Split) -> PeerOutcome:
    """Train by Adam on minibatches, from a random subset as inducing points."""
    generator = torch.Generator().manual_seed(request.seed)
    count = min(request.setting("svgp_points"), len(split.x))
    chosen = torch.randperm(len(split.x), generator=generator)[:count]
    model = VariationalGP(split.x[chosen].clone()).to(split.x)
    likelihood = GaussianLikelihood().to(split.x)
    clock = Clock(request.max_seconds)
    with clock.phase("fit"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)  # GPyTorch draws its start globally
        history, steps, reason = _train(
            model, likelihood, split, request, clock, generator
        )
    with clock.phase("prediction"):
        mean, variance = _predict(model, likelihood, split.x_test)
    return PeerOutcome(
        mean=mean,
        variance=variance,
        learnt=learnt(model.mean_module, model.covar_module, likelihood),
        steps=steps,
        reason=reason,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        settings={
            "inducing_points": count,
            "inducing_start": "random subset of the training rows",
            "epochs": request.setting("svgp_epochs"),
            "batch": request.setting("svgp_batch"),
            "optimiser": f"Adam, learning rate {request.setting('svgp_learning_rate')}",
        },
        rows=len(split.x),
        history=thin(history),
    )


def _train(
    model: VariationalGP,
    likelihood: GaussianLikelihood,
    split: Split,
    request: RunRequest,
    clock: Clock,
    generator: torch.Generator,
) -> tuple[list[dict[str, float]], int, str]:
    """Epochs of shuffled minibatches; history has the mean loss of each epoch."""
    model.train()
    likelihood.train()
    parameters = [*model.parameters(), *likelihood.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=request.setting("svgp_learning_rate"))
    objective = VariationalELBO(likelihood, model, num_data=len(split.y))
    history: list[dict[str, float]] = []
    steps = 0
    for epoch in range(1, request.setting("svgp_epochs") + 1):
        order = torch.randperm(len(split.x), generator=generator)
        losses = []
        for rows in order.split(request.setting("svgp_batch")):
            optimiser.zero_grad()
            loss = -objective(model(split.x[rows]), split.y[rows])
            loss.backward()
            optimiser.step()
            steps += 1
            losses.append(loss.item())
            if clock.expired:
                return history, steps, f"stopped at step {steps} (epoch {epoch})"
        history.append(
            {
                "step": steps,
                "seconds": clock.elapsed,
                "loss": sum(losses) / len(losses),
            }
        )
    return history, steps, "epochs"


def _predict(
    model: VariationalGP, likelihood: GaussianLikelihood, x: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    model.eval()
    likelihood.eval()
    with torch.no_grad():
        found = [likelihood(model(block)) for block in x.split(_TEST_BLOCK)]
    return (
        torch.cat([part.mean for part in found]),
        torch.cat([part.variance for part in found]),
    )
