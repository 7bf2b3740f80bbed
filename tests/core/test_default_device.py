"""torch.set_default_device changes nothing: data say where work is done.

The device "meta" stands in for a GPU: whatever is made there by default has no values,
so that nothing can go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo  # optimisers do, and it cannot be imported while "meta" is default
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    MultitaskKernel,
    PeriodicKernel,
    PiecewisePolynomialKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from torch import nn

import sgdgp
from sgdgp import tomography
from sgdgp.bayesopt import thompson_sampling
from sgdgp.networks import Categorical, Gaussian, linearise
from sgdgp.sklearn import SGDGPRegressor
from sgdgp.solvers.auto import SOLVERS
from tests.models import GP, MultitaskGP

KERNELS = {
    "matern": lambda: ScaleKernel(MaternKernel(1.5, ard_num_dims=3)),
    "sum": lambda: LinearKernel() + RBFKernel(),
    "polynomial": lambda: PolynomialKernel(power=2),
    "rq": RQKernel,
    "periodic": PeriodicKernel,
    "exact draws": PiecewisePolynomialKernel,
}
FEW = {"num_samples": 2, "num_features": 64}


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and test inputs on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 3, generator=generator)
    return x, torch.sin(5 * x).sum(1), torch.rand(7, 3, generator=generator)


class _Elsewhere:
    """Enters a default device that holds no values; ``start`` is called by a test."""

    def start(self) -> None:
        torch.set_default_device("meta")


@pytest.fixture
def elsewhere() -> Iterator[_Elsewhere]:
    yield _Elsewhere()
    torch.set_default_device(None)


@pytest.mark.parametrize("name", KERNELS)
def test_posteriors_do_not_ask_for_the_default_device(name, data, elsewhere, tmp_path):
    x, y, x_new = data
    model = GP(x, y, kernel=KERNELS[name]())
    expected = sgdgp.condition(model, **FEW).predict(x_new)
    elsewhere.start()
    posterior = sgdgp.condition(model, **FEW)
    found = posterior.predict(x_new)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.variance, expected.variance)
    posterior.draw(2)(x_new)
    posterior.update(x_new, x_new[:, 0])
    posterior.save(tmp_path / "posterior")
    loaded = sgdgp.load(tmp_path / "posterior", model)
    assert torch.equal(loaded.samples(x_new), posterior.samples(x_new))


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_do_not_ask_for_the_default_device(name, data, elsewhere, tmp_path):
    x, y, _ = data
    model = GP(x, y, kernel=MaternKernel(1.5))
    expected = sgdgp.condition(model, solver=SOLVERS[name](), **FEW)
    elsewhere.start()
    checkpoint = tmp_path / "checkpoint"
    found = sgdgp.condition(model, solver=name, checkpoint=checkpoint, **FEW)
    torch.testing.assert_close(found.solution.weights, expected.solution.weights)


def test_several_outputs_do_not_ask_for_the_default_device(data, elsewhere):
    x, y, x_new = (values[:, :2] if values.ndim > 1 else values for values in data)
    both = torch.stack([y, -y, y], 1)
    kernel = MultitaskKernel(RBFKernel(), 3, rank=1)
    tasks, model = MultitaskGP(x, both, kernel), GP(x, y, kernel=MaternKernel(1.5))
    elsewhere.start()
    for posterior in (
        sgdgp.condition(tasks, **FEW),
        sgdgp.condition(model, x, both, **FEW),
    ):
        assert posterior.predict(x_new).mean.shape == (7, 3)


def test_learning_does_not_ask_for_the_default_device(data, elsewhere):
    x, y, x_new = data
    model = GP(x, y, kernel=ScaleKernel(MaternKernel(2.5)))
    bounds = torch.tensor([[0.0] * 3, [1.0] * 3])
    elsewhere.start()
    sgdgp.initialise(model)
    assert sgdgp.fit(model, steps=2, solver="cg").steps == 2
    sgdgp.log_marginal_likelihood(model)
    regressor = SGDGPRegressor(steps=2).fit(x.numpy(), y.numpy())
    assert regressor.predict(x_new.numpy()).shape == (7,)
    run = thompson_sampling(
        lambda x: -x.square().sum(1), bounds, 20, steps=1, batch=2, model=model
    )
    assert run.x.device.type == "cpu"


@pytest.mark.parametrize("likelihood", [Gaussian(), Categorical()])
def test_networks_do_not_ask_for_the_default_device(
    likelihood, data, elsewhere, tmp_path
):
    x, y, x_new = data
    is_regression = isinstance(likelihood, Gaussian)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1 if is_regression else 3)
    )
    y = y.unsqueeze(1) if is_regression else (3 * x[:, 0]).long().clamp(0, 2)
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    elsewhere.start()
    model = linearise(network, likelihood)
    posterior = model.fit(batches, num_samples=2, final_samples=4, steps=2)
    posterior.predict(x_new)
    posterior.save(tmp_path / "posterior")


def test_measurements_do_not_ask_for_the_default_device(elsewhere):
    image = np.ones((4, 4))
    elsewhere.start()
    beam = tomography.FanBeam(4, 3, source_distance=9.0)
    for some in (beam, beam.views([0, 2]), tomography.Measurement.of(np.eye(16))):
        data = some.simulate(image, standard_deviation=0.1).tolist()
        assert some.back_projection(data).device.type == "cpu"
    tomography.Measurement.of(lambda x: 2 * x, (4, 4)).simulate(image, photons=9.0)
