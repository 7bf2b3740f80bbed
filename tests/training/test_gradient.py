import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel

from sgdgp.features import has_features
from sgdgp.gpytorch_adapter import prior_at, training_problems
from sgdgp.training import (
    PathwiseProbes,
    StandardProbes,
    StochasticMarginalLogLikelihood,
)
from sgdgp.training.gradient import exact_log_likelihood
from tests.operators.kernel_cases import CASES
from tests.training.problems import (
    Model,
    assert_same,
    data,
    dense_log_likelihood,
    gradients,
    true_gradients,
)

SEVERAL_OUTPUTS = {"multitask", "lcm", "rbf_grad", "matern52_grad", "polynomial_grad"}
SINGLE_OUTPUT = sorted(set(CASES) - SEVERAL_OUTPUTS)
N = 300
BATCHES = 8


def estimates(model, x, y, probes):
    """Gradients (batches, size) by parameter, each batch with probes of its own."""
    found = []
    model.train()
    for seed in range(BATCHES):
        mll = StochasticMarginalLogLikelihood(
            model.likelihood,
            model,
            probes=probes,
            solver="cholesky",
            initial_value=0.0,
            seed=seed,
        )
        model.zero_grad()
        mll(model(x), y).backward()
        found.append(gradients(model))
    return {name: torch.stack([g[name] for g in found]) for name in found[0]}


def assert_agree(found, truth):
    """Means agree within five standard errors, and some of those are small."""
    scale = max(float(g.abs().max()) for g in truth.values())
    errors = []
    for name, batches in found.items():
        error = batches.std(0) / BATCHES**0.5
        difference = (batches.mean(0) - truth[name]).abs()
        assert bool((difference <= 5.0 * error + 1e-7 * scale).all()), name
        errors += [float(e) for e in error.flatten() if e > 0]
    assert min(errors) <= 0.03 * scale


def model_of(name):
    case = CASES[name]
    # A cosine of the distance is a covariance in one dimension only.
    x = case.x(N, d=1) if name == "cosine" else case.x(N)
    y = torch.sin(2.0 * x[:, 0]) + 0.3 * data(N, 1, seed=5)[0][:, 0]
    model = Model(x, y, case.kernel())
    model.likelihood.noise = 0.2
    return model, x, y


@pytest.mark.parametrize("name", SINGLE_OUTPUT)
def test_standard_probes_give_the_gradient_on_average(name):
    model, x, y = model_of(name)
    found = estimates(model, x, y, StandardProbes(64))
    assert_agree(found, true_gradients(model, x, y))


@pytest.mark.parametrize(
    "name", [n for n in SINGLE_OUTPUT if has_features(CASES[n].kernel())]
)
def test_pathwise_probes_give_the_gradient_on_average(name):
    model, x, y = model_of(name)
    found = estimates(model, x, y, PathwiseProbes(32, num_features=32))
    assert_agree(found, true_gradients(model, x, y))


@pytest.mark.parametrize("probes", [StandardProbes(64), PathwiseProbes(64, 32)])
def test_every_weight_of_a_deep_kernel_has_its_gradient(probes):
    x, y = data(N, 3)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    )
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))
    model = Model(x, y, kernel, network=network)
    truth = true_gradients(model, x, y)
    assert {"network.0.weight", "network.2.bias"} <= truth.keys()
    assert_agree(estimates(model, x, y, probes), truth)


def test_small_systems_have_the_exact_gradient_and_value():
    x, y = data(300, 3)
    model = Model(x, y, gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()))
    truth = true_gradients(model, x, y)
    model.zero_grad()
    model.train()
    exact = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    mll = StochasticMarginalLogLikelihood(model.likelihood, model)
    value = mll(model(x), y)
    value.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(value, exact(model(x), y), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_a_dense_factorisation(dtype):
    x, y = (part.to(dtype) for part in data(80, 2))
    # Without a scale in front, the kernel's own graph holds the block.
    model = Model(x, y, RBFKernel())
    (problem,) = training_problems(prior_at(model, x), model.likelihood, x, y)
    scalar, value = exact_log_likelihood(problem)
    scalar.backward()
    found = {name: g.double() for name, g in gradients(model).items()}
    model.double()
    truth = true_gradients(model, x.double(), y.double())
    exact = dtype == torch.float64
    assert_same(
        found,
        {name: len(y) * g for name, g in truth.items()},
        rtol=1e-9 if exact else 1e-3,
        atol=1e-9 if exact else 1e-3,
    )
    wanted = float(dense_log_likelihood(model, x.double(), y.double()).detach())
    assert value == pytest.approx(wanted, rel=1e-10 if exact else 1e-4)


def test_what_cannot_be_factorised_is_an_error_that_says_what_to_do():
    x, y = data(30, 2)
    x[1:] = x[0]
    model = Model(x, y, RBFKernel())
    (problem,) = training_problems(prior_at(model, x), model.likelihood, x, y)
    problem.noise.data.zero_() if problem.noise.is_leaf else None
    object.__setattr__(problem, "noise", torch.zeros_like(problem.noise))
    with pytest.raises(torch.linalg.LinAlgError, match="larger lower bound"):
        exact_log_likelihood(problem)
