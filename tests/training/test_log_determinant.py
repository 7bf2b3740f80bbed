import math

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from sgdgp.operators import DenseOperator
from sgdgp.training.log_determinant import log_determinant
from tests.training.problems import data

N = 400
KERNELS = {
    "smooth": RBFKernel,
    "rough": lambda: ScaleKernel(MaternKernel(nu=0.5)),
}


def problem(name, noise):
    x, _ = data(N, 2)
    operator = DenseOperator(KERNELS[name]().double(), x)
    variances = torch.full((N,), noise, dtype=torch.float64)
    variances[::2] *= 2.0
    matrix = operator.to_dense() if hasattr(operator, "to_dense") else None
    if matrix is None:
        matrix = operator.matmul(torch.eye(N, dtype=torch.float64))
    return operator, variances, float((matrix + variances.diag()).logdet())


def estimate(operator, noise, seed=0, **settings):
    return log_determinant(
        operator,
        noise,
        generator=torch.Generator().manual_seed(seed),
        **{"num_probes": 8, "max_steps": 40, "tolerance": 1e-4, **settings},
    )


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("name", KERNELS)
def test_it_is_within_four_standard_errors_of_a_dense_factorisation(name, noise):
    operator, variances, truth = problem(name, noise)
    found, error, passes = estimate(operator, variances)
    assert abs(found - truth) <= 4.0 * error + 1e-4 * N
    assert error < 0.04 * N
    assert passes > 0.0


def test_the_standard_error_is_the_spread_over_seeds():
    operator, variances, truth = problem("rough", 0.1)
    found, errors = zip(
        *(estimate(operator, variances, seed)[:2] for seed in range(40)), strict=True
    )
    found = torch.tensor(found, dtype=torch.float64)
    told = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert float(found.std()) == pytest.approx(told, rel=0.4)
    # No bias beyond the mean's own error.
    assert abs(float(found.mean()) - truth) <= 4.0 * told / len(errors) ** 0.5 + 0.05


def test_more_probes_halve_the_error():
    operator, variances, _ = problem("rough", 0.1)
    _, few, _ = estimate(operator, variances, num_probes=16)
    _, many, _ = estimate(operator, variances, num_probes=64)
    assert many == pytest.approx(few / 2.0, rel=0.4)


def test_steps_end_the_runs():
    operator, variances, _ = problem("rough", 1e-3)
    *_, short = estimate(operator, variances, max_steps=3, tolerance=1e-12)
    *_, longer = estimate(operator, variances, max_steps=9, tolerance=1e-12)
    assert longer - short == 6.0


def test_noise_alone_needs_no_luck():
    x, _ = data(N, 2)
    kernel = ScaleKernel(RBFKernel()).double()
    kernel.outputscale = 1e-9
    variances = torch.linspace(0.1, 2.0, N, dtype=torch.float64)
    found, error, _ = estimate(DenseOperator(kernel, x), variances)
    assert found == pytest.approx(float(variances.log().sum()), abs=1e-4)
    assert error < 1e-4
