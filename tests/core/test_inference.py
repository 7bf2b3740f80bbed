"""Doors of the package in inference mode and without gradients.

What they keep serves derivatives later, and learning is learning anywhere.
"""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, PeriodicKernel, ScaleKernel

import sgdgp
from sgdgp.bayesopt import maximise
from sgdgp.botorch import PathwiseModel
from sgdgp.sklearn import SGDGPRegressor
from tests.models import gp, toy_data

X = toy_data(4, seed=1)[0]
KERNELS = {
    "features": lambda: ScaleKernel(MaternKernel(nu=1.5)),
    "exact draws": lambda: ScaleKernel(PeriodicKernel()),
    "finite features": LinearKernel,
}
without_gradients = pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode]
)


def conditioned(model, *data, solver="auto"):
    settings = {"num_samples": 3, "num_features": 16, "solver": solver}
    return sgdgp.condition(model, *data, **settings)


def assert_differentiable(*functions):
    for function in functions:
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_a_posterior_made_in_inference_mode_can_be_differentiated(kernel, solver):
    with torch.inference_mode():
        made_inside = conditioned(gp(KERNELS[kernel]()), solver=solver)
        model = gp(KERNELS[kernel]())
        data = (model.train_inputs[0].clone(), model.train_targets.clone())
    for found in (made_inside, conditioned(model, *data)):
        functions = [found.mean]
        if kernel != "exact draws":
            functions += [found.samples, found.variance]
        assert_differentiable(*functions)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("operator", ["dense", "tiled", "row_blocks"])
def test_use_in_inference_mode_leaves_nothing_that_cannot_be_differentiated(
    kernel, operator
):
    if operator == "tiled" and kernel == "exact draws":
        return
    model = gp(KERNELS[kernel]())
    posterior = sgdgp.condition(model, num_samples=3, operator=operator)
    before = posterior.samples(X)
    with torch.inference_mode():
        for use in (posterior.mean, posterior.variance, posterior.predict):
            use(X + 0.5)
        assert torch.equal(posterior.samples(X), before)
        drawn = posterior.draw(2)
        updated = posterior.update(X + 0.1, X[:, 0])
    functions = [posterior.mean, updated.mean]
    if kernel != "exact draws":
        functions += [posterior.samples, posterior.variance, updated.samples, drawn]
        functions.append(lambda x: posterior.functions.each(x.expand(3, -1, -1)))
    assert_differentiable(*functions)


@without_gradients
def test_learning_is_the_same_without_gradients(mode):
    found = []
    for context in (torch.enable_grad, mode):
        model = gp(ScaleKernel(MaternKernel(nu=1.5)), n=30)
        with context():
            sgdgp.initialise(model, subsets=2, size=20, steps=2)
            sgdgp.fit(model, steps=3)
        x, y = model.train_inputs[0].numpy(), model.train_targets.numpy()
        with context():
            regressor = SGDGPRegressor(steps=2, random_state=0).fit(x, y)
        assert_differentiable(regressor.posterior_.mean)
        found.append((dict(model.named_parameters()), regressor.predict(x)))
    (before, mean), (after, other_mean) = found
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (mean == other_mean).all()


def test_parameters_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = gp(MaternKernel(nu=1.5), n=10)
    with pytest.raises(ValueError, match="expected one built outside"):
        sgdgp.fit(model)


@without_gradients
def test_what_a_pathwise_model_keeps_can_be_differentiated(mode):
    model = gp(ScaleKernel(MaternKernel(nu=1.5)), n=20)
    y = model.train_targets.unsqueeze(1)
    pathwise = PathwiseModel(model, model.train_inputs[0], y, num_samples=4)
    with mode():
        pathwise.posterior(X).rsample(torch.Size([2]))
    assert_differentiable(lambda x: pathwise.posterior(x).mean)


@without_gradients
def test_maxima_are_found_without_gradients_of_the_callers(mode):
    functions = conditioned(gp(ScaleKernel(MaternKernel(nu=1.5)), n=20)).functions
    bounds = torch.stack([X.amin(0), X.amax(0)])
    with mode():
        found = maximise(functions, bounds)
    assert torch.equal(found.x, maximise(functions, bounds).x)
