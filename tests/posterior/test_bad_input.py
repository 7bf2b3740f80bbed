"""Bad input is a clear error before any solve starts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import jaxtyping
import numpy as np
import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

import sgdgp
from tests.models import GP, gp, toy_data

X, Y = toy_data(30)


@pytest.fixture(autouse=True)
def _without_the_shape_checker():
    """A user has none, so these tests must meet the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@dataclass(frozen=True)
class NeverCalled(sgdgp.Solver):
    """Remembers that it was asked to solve."""

    calls: list[str] = field(default_factory=list)
    name = "never_called"

    def solve(self, *args, **settings):
        self.calls.append("solve")
        raise AssertionError("a solve was started")


def refused(error, message, *data, model=None, **settings):
    """The call fails with the error, and no solver has been called by then."""
    solver = NeverCalled()
    with pytest.raises(error, match=message):
        sgdgp.condition(model or gp(), *data, **{"solver": solver, **settings})
    assert solver.calls == []


def spoilt(values, value, *places):
    values = values.clone()
    for place in places:
        values[place] = value
    return values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_of_x_that_are_not_finite_are_counted_and_located(value):
    message = re.escape("x: expected finite values, found 3 NaN or infinite of 60, the")
    bad = spoilt(X, value, (4, 1), (7, 0), (29, 1))
    refused(ValueError, message + r" first at index \(4, 1\)", bad, Y)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_values_of_y_that_are_not_finite_are_counted_and_located(value):
    message = re.escape("y: expected finite values, found 2 NaN or infinite of 30, the")
    bad = spoilt(Y, value, 3, 11)
    refused(ValueError, message + r" first at index \(3,\)", X, bad)


def test_bad_values_in_the_models_own_data_are_found_too():
    model = GP(X, Y * math.nan, RBFKernel()).double()
    refused(ValueError, "y: expected targets, found NaN in every row", model=model)
    model = GP(X, Y / 0.0, RBFKernel()).double()
    refused(ValueError, r"y: .* found 30 .* \(0,\)", model=model)
    model = GP(spoilt(X, math.nan, (2, 0)), Y, RBFKernel()).double()
    refused(ValueError, r"x: .* found 1 .* \(2, 0\)", model=model)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, Y[:7], ValueError, r"y: expected shape \(30,\), found \(7,\)"),
        (X, Y[:7, None].expand(-1, 2), ValueError, r"y: .*\(30, outputs\), found"),
        (X, Y[0], ValueError, r"y: expected shape \(30,\), found \(\)"),
        (X[None], Y, ValueError, r"x: expected shape \(n, d\), found \(1, 30, 2\)"),
        (X[:0], Y[:0], ValueError, r"x: expected data, found shape \(0, 2\)"),
        (X[:, :0], Y, ValueError, r"x: expected data, found shape \(30, 0\)"),
        (X.half(), Y.half(), TypeError, "x: expected float32 or float64.*float16"),
        (X.long(), Y, TypeError, "x: expected float32 or float64.*int64"),
        (X, Y.long(), ValueError, "y: expected the dtype of x.*float64.*int64"),
        (X, Y.float(), ValueError, "y: expected the dtype of x.*float64.*float32"),
        (X.float(), Y.float(), ValueError, "x: .* the model's parameters.*float32"),
        (X.numpy(), Y, TypeError, "x: expected a torch.Tensor, found.*ndarray"),
        (X, Y.numpy(), TypeError, "y: expected a torch.Tensor, found.*ndarray"),
        (X.tolist(), Y, TypeError, "x: expected a torch.Tensor, found.*list"),
        (X, None, ValueError, "x, y: expected both or neither"),
        (None, Y, ValueError, "x, y: expected both or neither"),
    ],
)
def test_data_of_the_wrong_shape_or_kind(x, y, error, message):
    refused(error, message, x, y)


def test_the_wrong_number_of_columns():
    kernel = RBFKernel(ard_num_dims=2)
    refused(
        ValueError,
        "x: .* inputs with 4 columns",
        torch.cat([X, X], 1),
        Y,
        model=gp(kernel),
    )


def test_data_on_another_device():
    elsewhere = X.to("meta"), Y.to("meta")
    refused(ValueError, "x: .*device of the model's parameters, cpu", *elsewhere)
    refused(ValueError, "y: expected the device of x, cpu, found meta", X, Y.to("meta"))


def test_no_data_at_all():
    model = GP(None, None, RBFKernel()).double()
    refused(ValueError, "no training data", model=model)


def test_no_model():
    with pytest.raises(TypeError, match=r"model: .*ExactGP, found RBFKernel"):
        sgdgp.condition(RBFKernel(), X, Y)


def test_noise_that_is_not_positive():
    model = gp(likelihood=FixedNoiseGaussianLikelihood(torch.full((30,), 0.1)))
    model.likelihood.noise_covar.noise[[5, 8]] = 0.0
    refused(ValueError, "likelihood: expected positive.*found 2 .*index 5", model=model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "kernel.raw_outputscale",
        "kernel.base_kernel.raw_lengthscale",
        "likelihood.noise_covar.raw_noise",
        "mean_module.raw_constant",
    ],
)
def test_parameters_that_are_not_finite_are_named(name, value):
    model = gp(ScaleKernel(MaternKernel(nu=1.5)))
    model.get_parameter(name).data.fill_(value)
    refused(ValueError, f"parameter '{re.escape(name)}'", model=model)


def test_a_lengthscale_of_zero_is_named():
    model = gp(ScaleKernel(MaternKernel(nu=1.5)))
    model.kernel.base_kernel.raw_lengthscale.data.fill_(-math.inf)
    refused(ValueError, "kernel.base_kernel.raw_lengthscale", model=model)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"solver": "newton"}, ValueError, "solver: .*'newton'"),
        ({"solver": None}, TypeError, "solver: .*None"),
        ({"solver": sgdgp.SDD}, TypeError, r"solver: .*SDD\(\)"),
        ({"solver": ["sdd"]}, TypeError, r"solver: .*\['sdd'\]"),
        ({"operator": "sparse"}, ValueError, "operator.*'sparse'"),
        ({"operator": None}, ValueError, "operator.*None"),
        ({"seed": "0"}, TypeError, "seed: .*str"),
        ({"seed": None}, TypeError, "seed: .*NoneType"),
        ({"seed": 1.5}, TypeError, "seed: .*float"),
        ({"seed": True}, TypeError, "seed: .*bool"),
        ({"seed": 2**64}, ValueError, "seed: .*64 bits"),
        ({"num_samples": -1}, ValueError, "num_samples: .*at least 0, found -1"),
        ({"num_samples": 1.5}, TypeError, "num_samples: .*float"),
        ({"num_samples": True}, TypeError, "num_samples: .*bool"),
        ({"num_samples": None}, TypeError, "num_samples: .*NoneType"),
        ({"num_features": 0}, ValueError, "num_features: .*at least 1, found 0"),
        ({"num_features": 2.0}, TypeError, "num_features: .*float"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"memory_budget": "1GB"}, TypeError, "memory_budget: .*str"),
        ({"memory_budget": 0}, ValueError, "memory_budget: .*found 0"),
        ({"progress": "yes"}, TypeError, "progress: .*'yes'"),
        ({"callback": 3}, TypeError, "callback: .*3"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every: .*found 0"),
        ({"checkpoint_every": "a"}, TypeError, "checkpoint_every: .*'a'"),
    ],
)
def test_settings_that_do_not_exist(settings, error, message):
    refused(error, message, **settings)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X[:, :1], ValueError, r"x: expected shape \(n, 2\), found \(30, 1\)"),
        (X[0], ValueError, r"x: expected shape \(n, 2\), found \(2,\)"),
        (X.float(), ValueError, "x: expected the dtype of the training inputs"),
        (X.to("meta"), ValueError, "x: expected the device of the training inputs"),
        (X.numpy(), TypeError, "x: expected a torch.Tensor"),
        (
            spoilt(X, math.nan, (3, 1), (9, 0)),
            ValueError,
            r"x: .* found 2 NaN or infinite of 60, the first at index \(3, 1\)",
        ),
    ],
)
def test_new_points_that_do_not_fit(x, error, message):
    posterior = sgdgp.condition(gp(), num_samples=2, num_features=64)
    functions = posterior.draw(1)
    for verb in (
        posterior.mean,
        posterior.variance,
        posterior.samples,
        posterior.predict,
        posterior,
        functions,
    ):
        with pytest.raises(error, match=message):
            verb(x)


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (-2, ValueError), (1.0, TypeError)]
)
def test_numbers_of_draws_that_do_not_exist(k, error):
    posterior = sgdgp.condition(gp(), num_samples=1, num_features=64)
    with pytest.raises(error, match="k: "):
        posterior.draw(k)
    with pytest.raises(TypeError, match="seed: "):
        posterior.draw(1, seed="1")


@pytest.mark.parametrize("noise", ["a", None, [0.1] * 30, 0.1j])
def test_noise_that_is_no_number(noise):
    posterior = sgdgp.condition(gp(), num_samples=1, num_features=64)
    with pytest.raises(TypeError, match="observation_noise: expected a number or"):
        posterior.predict(X, observation_noise=noise)
    with pytest.raises(ValueError, match="observation_noise: expected positive"):
        posterior.predict(X, observation_noise=-0.1)
    with pytest.raises(TypeError, match=r"noise: expected a number or a torch\.Tensor"):
        posterior.update(X, Y, noise=True if noise is None else noise)


def test_reports_that_cannot_be_made():
    posterior = sgdgp.condition(gp(), num_samples=1, num_features=64)
    with pytest.raises(TypeError, match="progress: "):
        posterior.predict(X, batch_size=8, progress="yes")
    with pytest.raises(TypeError, match="callback: "):
        posterior.update(X, Y, callback=3)
    with pytest.raises(TypeError, match="progress: "):
        posterior.draw(1, progress=1)


def test_integers_of_numpy_are_integers(tmp_path):
    settings = {"seed": 3, "num_samples": 2, "num_features": 64}
    same = {name: np.int64(value) for name, value in settings.items()}
    posterior = sgdgp.condition(gp(), **same, solver=sgdgp.SDD(block_size=np.int32(8)))
    posterior.save(tmp_path / "posterior")
    again = sgdgp.load(tmp_path / "posterior", gp())
    expected = sgdgp.condition(gp(), **settings, solver=sgdgp.SDD(block_size=8))
    assert torch.equal(posterior.samples(X), expected.samples(X))
    assert torch.equal(again.samples(X), expected.samples(X))


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_batch_sizes_that_do_not_exist(size):
    posterior = sgdgp.condition(gp(), num_samples=1, num_features=64)
    with pytest.raises((ValueError, TypeError), match="batch_size: "):
        posterior.predict(X, batch_size=size)
