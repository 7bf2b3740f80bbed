import copy
import math

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from sgdgp.operators import DenseOperator
from sgdgp.training import log_marginal_likelihood
from sgdgp.training.evidence import log_determinant
from tests.models import hadamard_gp, multitask_gp
from tests.training.problems import (
    Model,
    assert_same,
    data,
    dense_log_likelihood,
    rbf_model,
)
from tests.training.test_marginal_likelihood import covariance_of_pairs, with_priors


def large(nu=1.5):
    """1,500 rows, beyond what is factorised."""
    x, y = data(1500, 3)
    model = Model(x, y, ScaleKernel(MaternKernel(nu=nu)))
    model.likelihood.noise = 0.12
    model.covar_module.base_kernel.lengthscale = 1.2
    return model


def truth_of(model):
    with torch.no_grad():
        x, y = model.train_inputs[0], model.train_targets
        return float(dense_log_likelihood(model, x, y))


def test_small_data_have_the_exact_value_in_either_mode():
    model = rbf_model()
    for mode in (True, False):
        found = log_marginal_likelihood(model.train(mode))
        assert found.value == pytest.approx(truth_of(model), rel=1e-10)
        assert found.standard_error == 0.0
        assert model.training is mode


def test_large_data_are_within_four_small_standard_errors():
    model = large()
    truth = truth_of(model)
    found = log_marginal_likelihood(model)
    assert 0.0 < found.standard_error < 0.005 * 1500
    # The Lanczos runs end at a change of 1e-3 n of the log determinant.
    assert abs(found.value - truth) <= 4.0 * found.standard_error
    assert found.passes > 1.0
    again = log_marginal_likelihood(model, seed=1)
    assert again.value != found.value
    assert abs(again.value - truth) <= 4.0 * again.standard_error
    assert log_marginal_likelihood(model, seed=1) == again


def test_it_is_fine_enough_to_choose_between_models():
    better, worse = large(1.5), large(0.5)
    gap = truth_of(better) - truth_of(worse)
    found = [log_marginal_likelihood(model) for model in (better, worse)]
    error = math.hypot(*(estimate.standard_error for estimate in found))
    assert gap > 8.0 * error
    assert abs(found[0].value - found[1].value - gap) <= 4.0 * error


def test_priors_of_parameters_are_no_part_of_it():
    model = with_priors().double()
    bare = with_priors().double()
    for module in bare.modules():
        getattr(module, "_priors", {}).clear()
    assert log_marginal_likelihood(model).value == pytest.approx(truth_of(bare))


def test_missing_targets_of_correlated_outputs_are_left_out():
    model = multitask_gp()
    x, y = model.train_inputs[0], model.train_targets.clone()
    y[::3, 1] = math.nan
    kept = (~torch.isnan(y)).flatten()
    with torch.no_grad():
        mean, covariance = covariance_of_pairs(model.train(), x)
        normal = torch.distributions.MultivariateNormal(
            mean[kept], covariance[kept][:, kept]
        )
        truth = float(normal.log_prob(y.flatten()[kept]))
    assert log_marginal_likelihood(model, x, y).value == pytest.approx(truth)


def test_independent_outputs_add_up():
    model = rbf_model()
    x, y = model.train_inputs[0], model.train_targets
    columns = torch.stack([y, y.flip(0)], 1)
    columns[:9, 1] = math.nan
    parts = [
        log_marginal_likelihood(model, x[rows], columns[rows, i]).value
        for i, rows in enumerate((slice(None), slice(9, None)))
    ]
    found = log_marginal_likelihood(model, x, columns)
    assert found.value == pytest.approx(sum(parts), rel=1e-10)


def test_points_and_tasks_are_one_system():
    model = hadamard_gp()
    x, i = model.train_inputs
    with torch.no_grad():
        covariance = model.covar_module(x).to_dense()
        covariance = covariance * model.task_covar_module(i).to_dense()
        covariance.diagonal().add_(model.likelihood.noise)
        normal = torch.distributions.MultivariateNormal(
            model.mean_module(x), covariance
        )
        truth = float(normal.log_prob(model.train_targets))
    assert log_marginal_likelihood(model).value == pytest.approx(truth, rel=1e-8)


def test_the_model_stays_as_it_was():
    model = rbf_model()
    before = copy.deepcopy(model.state_dict())
    log_marginal_likelihood(model)
    assert_same(dict(model.state_dict()), dict(before), rtol=0.0, atol=0.0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_probes": 1}, ValueError, "num_probes"),
        ({"seed": None}, TypeError, "seed"),
        ({"x": torch.zeros(2, 2)}, ValueError, "x, y: expected both"),
    ],
)
def test_bad_arguments_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        log_marginal_likelihood(rbf_model(), **settings)


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
