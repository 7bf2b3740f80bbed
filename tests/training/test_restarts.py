import math

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

from sgdgp.training import fit, log_marginal_likelihood
from sgdgp.training.history import Fitted
from sgdgp.training.restarts import best_of, scatter
from tests.training.problems import Model, assert_same, data, parameters, rbf_model


def wave():
    """Three periods, and a model that starts where all seems to be noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.0, 1.0, 40, dtype=torch.float64).unsqueeze(1)
    noise = torch.randn(40, generator=generator, dtype=torch.float64)
    kernel = ScaleKernel(RBFKernel())
    model = Model(x, torch.sin(20.0 * x[:, 0]) + 0.3 * noise, kernel)
    kernel.base_kernel.lengthscale = 0.3
    model.likelihood.noise = 1.0
    return model


def test_restarts_find_the_better_optimum():
    alone, restarted = wave(), wave()
    fit(alone, steps=60)
    fitted = fit(restarted, steps=60, restarts=3)
    values = [log_marginal_likelihood(model).value for model in (alone, restarted)]
    assert values[1] > values[0] + 10.0
    assert fitted.steps <= 60


def test_the_first_fit_starts_where_the_model_is():
    """So restarts never end worse than without them."""
    alone, restarted = rbf_model(), rbf_model()
    fit(alone, steps=30)
    fit(restarted, steps=30, restarts=2)
    values = [log_marginal_likelihood(model).value for model in (alone, restarted)]
    assert values[1] >= values[0] - 1e-9


def attempts(model, outcomes):
    """Fits that set the mean and end as they are told."""
    seen = []

    def attempt(i, earlier):
        seen.append(len(earlier))
        mean, reason = outcomes[i]
        model.mean_module.constant = mean
        return Fitted(reason, steps=i, passes=2.0, seconds=0.5, history=())

    return attempt, seen


def run(model, outcomes):
    attempt, seen = attempts(model, outcomes)
    x, y = model.train_inputs[0], model.train_targets
    return best_of(len(outcomes), attempt, model, x, y, 0), seen


def test_the_model_ends_with_the_best_fits_parameters_and_all_costs():
    model = rbf_model()
    fitted, seen = run(model, [(5.0, "steps"), (0.1, "plateau"), (-7.0, "steps")])
    assert float(model.mean_module.constant.detach()) == pytest.approx(0.1)
    assert (fitted.reason, fitted.steps) == ("plateau", 1)
    assert (fitted.passes, fitted.seconds) == (6.0, 1.5)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("reason", ["interrupted", "budget"])
def test_a_stop_or_an_empty_budget_ends_all(reason):
    model = rbf_model()
    _, seen = run(model, [(0.2, "steps"), (4.0, reason), (0.0, "steps")])
    assert len(seen) == 2
    assert float(model.mean_module.constant.detach()) == pytest.approx(0.2)


def test_a_fit_that_ended_nowhere_is_never_the_best():
    model = rbf_model()
    run(model, [(math.nan, "diverged"), (9.0, "steps")])
    assert float(model.mean_module.constant.detach()) == pytest.approx(9.0)


def test_a_budget_is_for_all_fits_together():
    fitted = fit(rbf_model(), steps=10**5, plateau=None, restarts=3, max_seconds=0.3)
    assert fitted.reason == "budget"
    assert fitted.seconds < 3.0


def test_every_restart_has_a_checkpoint_of_its_own(tmp_path):
    path = tmp_path / "fit.sgdgp"
    whole, model = rbf_model(), rbf_model()
    truth = fit(whole, steps=6, restarts=2)
    seen = []

    def stop(entry):
        seen.append(entry)
        return len(seen) == 9

    fit(model, steps=6, restarts=2, checkpoint=path, callback=stop)
    assert len(list(tmp_path.iterdir())) == 2
    model, seen = rbf_model(), []
    fitted = fit(model, steps=6, restarts=2, checkpoint=path, callback=seen.append)
    assert len(seen) == 3 + 6
    assert len(list(tmp_path.iterdir())) == 3
    assert_same(parameters(model), parameters(whole), rtol=1e-6, atol=1e-8)
    assert fitted.steps == truth.steps


def test_scatter_keeps_to_constraints_and_leaves_means_and_frozen_ones():
    interval = gpytorch.constraints.Interval(0.2, 0.7)
    above = gpytorch.constraints.GreaterThan(0.05)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=above)
    kernel = ScaleKernel(RBFKernel(ard_num_dims=40, lengthscale_constraint=interval))
    model = Model(*data(5, 40), kernel, likelihood)
    model.covar_module.raw_outputscale.requires_grad_(False)
    before = parameters(model)
    for seed in range(20):
        scatter(model, torch.Generator().manual_seed(seed))
        lengthscales = kernel.base_kernel.lengthscale.detach()
        assert float(lengthscales.min()) > 0.2
        assert float(lengthscales.max()) < 0.7
        assert float(lengthscales.std()) > 0.05
        assert float(model.likelihood.noise.detach()) > 0.05
    after = parameters(model)
    for name in ("mean_module.raw_constant", "covar_module.raw_outputscale"):
        assert torch.equal(before[name], after[name])


def test_scattered_positive_parameters_are_log_normal_about_where_they_were():
    kernel = RBFKernel(ard_num_dims=4000)
    model = Model(*data(2, 4000), kernel)
    kernel.lengthscale = 0.3
    scatter(model, torch.Generator().manual_seed(0))
    logarithm = (kernel.lengthscale.detach() / 0.3).log()
    assert abs(float(logarithm.mean())) < 4.0 / 4000**0.5
    assert float(logarithm.std()) == pytest.approx(1.0, abs=0.06)


def test_a_seed_scatters_the_same_way():
    models = [rbf_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        scatter(model, torch.Generator().manual_seed(seed))
    one, again, other = map(parameters, models)
    assert_same(one, again, rtol=0.0, atol=0.0)
    name = "likelihood.noise_covar.raw_noise"
    assert not torch.equal(one[name], other[name])
