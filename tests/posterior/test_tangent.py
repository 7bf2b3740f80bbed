"""A network's tangent kernel in a GPyTorch model: the linearised network's posterior.

The truth is Bayesian linear regression on the network's Jacobian, dense in float64:
with J (n C, D), weights N(0, s I) and noise variance v, the posterior covariance of the
weights is A^-1 = (J^T J / v + I / s)^-1 and their mean A^-1 J^T y / v.
"""

from __future__ import annotations

import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.means import MultitaskMean, ZeroMean
from gpytorch.models import ExactGP
from torch import nn

import sgdgp
from sgdgp.gpytorch_adapter import multitask_inputs
from sgdgp.gpytorch_adapter.multitask import multitask_kernel
from sgdgp.kernels import NeuralTangentKernel
from sgdgp.operators import operator_by_name
from sgdgp.solvers import CG, SDD

NOISE, SCALE = 0.5, 0.5
SAMPLES = 256


class Regression(ExactGP):
    """A GP regression of one or several outputs."""

    def __init__(self, x, y, kernel, noise=NOISE):
        outputs = 1 if y.ndim == 1 else y.shape[1]
        if outputs == 1:
            likelihood = GaussianLikelihood()
        else:
            likelihood = MultitaskGaussianLikelihood(outputs, rank=0)
            likelihood.task_noises = torch.full((outputs,), noise / 2)
            noise = noise / 2
        likelihood.noise = noise
        super().__init__(x, y, likelihood)
        zero = ZeroMean()
        self.mean_module = zero if outputs == 1 else MultitaskMean(zero, outputs)
        self.kernel = kernel

    def forward(self, x):
        mean, covariance = self.mean_module(x), self.kernel(x)
        if mean.ndim == 1:
            return MultivariateNormal(mean, covariance)
        return MultitaskMultivariateNormal(mean, covariance)


class Case:
    """A network, data, the kernel, and the exact posterior of the tangent model."""

    def __init__(self, outputs, n=60):
        torch.manual_seed(outputs)
        self.network = nn.Sequential(
            nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, outputs)
        ).double()
        self.network.eval()
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(n + 25, 2, generator=generator, dtype=torch.float64)
        targets = torch.stack([(x[:, 0] * (c + 1)).sin() for c in range(outputs)], 1)
        self.x, self.x_new = x[:n], x[n:]
        self.y = targets[:n] + NOISE**0.5 * torch.randn(
            n, outputs, generator=generator, dtype=torch.float64
        )
        self.outputs = outputs
        self.kernel = NeuralTangentKernel(self.network)
        scaled = ScaleKernel(self.kernel)
        scaled.outputscale = SCALE
        y = self.y[:, 0] if outputs == 1 else self.y
        self.model = Regression(self.x, y, scaled).double()

    def jacobian(self, x):
        """J (n C, D), one backward pass at a time."""
        rows = []
        for output in self.network(x).flatten():
            gradients = torch.autograd.grad(
                output, list(self.network.parameters()), retain_graph=True
            )
            rows.append(torch.cat([g.flatten() for g in gradients]))
        return torch.stack(rows)

    def truth(self):
        """Mean (m C,) and covariance (m C, m C) at the new inputs."""
        j, j_new = self.jacobian(self.x), self.jacobian(self.x_new)
        precision = j.mT @ j / NOISE
        precision += torch.eye(j.shape[1], dtype=torch.float64) / SCALE
        weights = torch.linalg.solve(precision, j.mT @ self.y.flatten() / NOISE)
        return j_new @ weights, j_new @ torch.linalg.solve(precision, j_new.mT)


@pytest.mark.parametrize("outputs", [1, 2])
def test_sdd_gives_the_posterior_of_the_linearised_network(outputs):
    case = Case(outputs)
    posterior = sgdgp.condition(
        case.model,
        solver=SDD(tolerance=1e-3),
        num_samples=SAMPLES,
        operator="features",
        progress=False,
    )
    assert posterior.solution.operator == "features"
    assert posterior.solution.reason == "converged"
    mean, covariance = case.truth()
    found = posterior.mean(case.x_new).flatten()
    size = mean.abs().max()
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-3 * float(size))
    # The variance of s samples has a relative standard error of sqrt(2 / s), 8.8 %:
    # five of them at the worst of m C points, one half on average over the points.
    ratio = posterior.variance(case.x_new).flatten() / covariance.diagonal()
    error = (2 / SAMPLES) ** 0.5
    assert float((ratio - 1).abs().max()) < 5 * error
    assert float((ratio - 1).square().mean().sqrt()) < 1.5 * error
    assert abs(float(ratio.mean()) - 1) < error
    # Samples are joint: so is the covariance between points and outputs.
    values = posterior.samples(case.x_new).flatten(1)
    deviations = values - found
    scale = covariance.diagonal().sqrt()
    correlation = deviations.mT @ deviations / SAMPLES / scale / scale[:, None]
    truth = covariance / scale / scale[:, None]
    # A correlation of s samples is off by at most sqrt((1 + r^2) / s).
    assert float((correlation - truth).square().mean().sqrt()) < 1.5 * error


def test_draws_use_the_exact_features():
    case = Case(1)
    posterior = sgdgp.condition(case.model, num_samples=3, progress=False)
    (group,) = posterior.problem.draws.groups
    assert group.feature_map.exact
    weights = case.jacobian(case.x).shape[1]
    assert group.weights.shape == (weights, 3)


@pytest.mark.parametrize("operator", ["auto", "features", "dense"])
def test_every_operator_gives_the_same_mean(operator):
    case = Case(2, n=30)
    posterior = sgdgp.condition(
        case.model,
        solver=CG(tolerance=1e-9, preconditioner=None),
        num_samples=0,
        operator=operator,
        progress=False,
    )
    mean, _ = case.truth()
    torch.testing.assert_close(
        posterior.mean(case.x_new).flatten(), mean, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("outputs", [1, 2])
def test_mean_and_samples_are_differentiable_in_the_inputs(outputs):
    case = Case(outputs, n=20)
    posterior = sgdgp.condition(
        case.model,
        solver=CG(tolerance=1e-10),
        num_samples=2,
        operator="features",
        progress=False,
    )
    x = case.x_new[:3].clone().requires_grad_()
    for verb in (posterior.mean, posterior.samples):
        value = verb(x).sum()
        (gradient,) = torch.autograd.grad(value, x)
        step = torch.zeros_like(x)
        step[1, 0] = 1e-5
        with torch.no_grad():
            slope = (verb(x + step).sum() - verb(x - step).sum()) / 2e-5
        torch.testing.assert_close(gradient[1, 0], slope, rtol=1e-5, atol=1e-7)


def test_a_missing_output_is_left_out():
    case = Case(2, n=30)
    y = case.y.clone()
    y[::3, 1] = torch.nan
    model = Regression(case.x, y, case.model.kernel).double()
    posterior = sgdgp.condition(
        model,
        case.x,
        y,
        solver=SDD(tolerance=1e-4),
        num_samples=0,
        operator="features",
        progress=False,
    )
    seen = ~torch.isnan(y.flatten())
    j, j_new = case.jacobian(case.x)[seen], case.jacobian(case.x_new)
    system = SCALE * j @ j.mT + NOISE * torch.eye(len(j), dtype=torch.float64)
    truth = SCALE * j_new @ j.mT @ torch.linalg.solve(system, y.flatten()[seen])
    torch.testing.assert_close(
        posterior.mean(case.x_new).flatten(), truth, rtol=0, atol=1e-3
    )


def test_a_sum_with_a_stationary_kernel_is_conditioned():
    case = Case(1, n=40)
    rbf = RBFKernel()
    model = Regression(case.x, case.y[:, 0], case.model.kernel + rbf).double()
    posterior = sgdgp.condition(model, num_samples=SAMPLES, progress=False)
    j, j_new = case.jacobian(case.x), case.jacobian(case.x_new)
    with torch.no_grad():
        blocks = [
            SCALE * a @ b.mT + rbf(p, q).to_dense()
            for a, p, b, q in (
                (j, case.x, j, case.x),
                (j_new, case.x_new, j, case.x),
                (j_new, case.x_new, j_new, case.x_new),
            )
        ]
    system = blocks[0] + NOISE * torch.eye(len(j), dtype=torch.float64)
    mean = blocks[1] @ torch.linalg.solve(system, case.y[:, 0])
    torch.testing.assert_close(
        posterior.mean(case.x_new), mean, rtol=0, atol=1e-3 * float(mean.abs().max())
    )
    covariance = blocks[2] - blocks[1] @ torch.linalg.solve(system, blocks[1].mT)
    ratio = posterior.variance(case.x_new) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 5 * (2 / SAMPLES) ** 0.5


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_saved_posterior_predicts_the_same_with_the_same_network(outputs, tmp_path):
    case = Case(outputs, n=20)
    posterior = sgdgp.condition(
        case.model, num_samples=4, operator="features", progress=False
    )
    posterior.save(tmp_path / "posterior")
    again = sgdgp.load(tmp_path / "posterior", case.model)
    assert torch.equal(again.samples(case.x_new), posterior.samples(case.x_new))
    other = Case(outputs, n=20)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.mul_(1.5)
    other.model.kernel.base_kernel = NeuralTangentKernel(other.network)
    with pytest.raises(ValueError, match="other values at the training inputs"):
        sgdgp.load(tmp_path / "posterior", other.model)


def test_new_data_update_the_posterior():
    case = Case(1, n=40)
    y = case.y[:, 0]
    part = Regression(case.x[:30], y[:30], case.model.kernel).double()
    solver = CG(tolerance=1e-6)
    settings = {"num_samples": 2, "operator": "features", "progress": False}
    posterior = sgdgp.condition(part, solver=solver, **settings)
    posterior = posterior.update(case.x[30:], y[30:], progress=False)
    whole = sgdgp.condition(case.model, solver=solver, **settings)
    torch.testing.assert_close(
        posterior.mean(case.x_new), whole.mean(case.x_new), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("operator", ["features", "row_blocks"])
def test_the_kernel_over_pairs_is_the_kernel_of_all_outputs(operator):
    case = Case(2, n=7)
    pairs = multitask_inputs(case.x, 2)
    kernel = multitask_kernel(case.model.kernel, 2)
    j = case.jacobian(case.x)
    truth = SCALE * j @ j.mT
    order = torch.tensor([3, 0, 1, 12, 5])
    with torch.no_grad():
        found = kernel(pairs[order], pairs).to_dense()
        diagonal = kernel(pairs[order], diag=True)
    torch.testing.assert_close(found, truth[order])
    torch.testing.assert_close(diagonal, truth.diagonal()[order])
    over = operator_by_name(operator, kernel, pairs)
    torch.testing.assert_close(over.diagonal(), truth.diagonal())
    v = torch.ones(14, 1, dtype=torch.float64)
    torch.testing.assert_close(over.rows(order).matmul(v), truth[order] @ v)
