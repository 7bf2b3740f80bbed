import pytest
import torch
from gpytorch.kernels import RBFKernel

from sgdgp.gpytorch_adapter import prior_at, training_problems
from sgdgp.training.exact import exact_log_likelihood
from tests.training.problems import (
    Model,
    assert_same,
    data,
    dense_log_likelihood,
    gradients,
    true_gradients,
)


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
