"""update: the same functions, conditioned on more data, at a fraction of the passes."""

from __future__ import annotations

import math
import warnings

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, PiecewisePolynomialKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood

import sgdgp
from sgdgp.solvers.auto import Auto, Stage
from tests.models import GP, gp, own_posterior, toy_data

SOLVERS = {
    "cg": sgdgp.CG(tolerance=1e-9),
    "pivoted": sgdgp.CG(tolerance=1e-9, preconditioner=sgdgp.solvers.PivotedCholesky()),
    "sdd": sgdgp.SDD(tolerance=1e-7),
    "alternating": sgdgp.AlternatingProjections(tolerance=1e-7),
    "cholesky": sgdgp.Cholesky(),
    "auto": "auto",
    "auto_in_stages": Auto(tolerance=1e-9, stages=(Stage(sgdgp.CG()),)),
}


def new_points():
    return toy_data(8, seed=1)[0]


def more_data(m=6, d=2, dtype=torch.float64):
    return toy_data(m, d, seed=7, dtype=dtype)


def model_on(x, y, noise=0.1, kernel=None, **settings):
    model = GP(x, y, kernel or ScaleKernel(MaternKernel(nu=1.5)), **settings).to(x)
    if isinstance(model.likelihood, GaussianLikelihood):
        model.likelihood.noise = noise
    return model


def both(m=6, n=200, **settings):
    """A model on n points, new data, and the same model on all of them."""
    x, y = toy_data(n)
    x_new, y_new = more_data(m)
    together = model_on(torch.cat([x, x_new]), torch.cat([y, y_new]), **settings)
    return model_on(x, y, **settings), x_new, y_new, together


def dense_residuals(posterior):
    """True relative residuals of all columns, by GPyTorch's own dense kernel."""
    problem = posterior.problem
    with torch.no_grad():
        kernel = problem.prior.kernel(problem.operator.x).to_dense().double()
    system = kernel + torch.diag(problem.noise.double())
    rhs = problem.rhs.double()
    left = rhs - system @ posterior.solution.weights.double()
    return left.norm(dim=0) / rhs.norm(dim=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_the_posterior_of_all_data(solver):
    model, x_new, y_new, together = both()
    posterior = sgdgp.condition(model, solver=SOLVERS[solver], num_samples=3)
    updated = posterior.update(x_new, y_new)
    mean, _ = own_posterior(together, new_points())
    torch.testing.assert_close(updated.mean(new_points()), mean, rtol=0, atol=1e-5)
    assert updated.solution.weights.shape == (206, 4)
    assert float(dense_residuals(updated).max()) < 1e-6


@pytest.mark.parametrize("operator", ["dense", "tiled", "row_blocks"])
def test_the_operator_that_was_asked_for_is_kept(operator):
    model, x_new, y_new, together = both()
    posterior = sgdgp.condition(
        model, solver=SOLVERS["cg"], num_samples=2, operator=operator
    )
    updated = posterior.update(x_new, y_new)
    assert updated.solution.operator == operator
    mean, _ = own_posterior(together, new_points())
    torch.testing.assert_close(updated.mean(new_points()), mean, rtol=0, atol=1e-6)


def test_old_rows_keep_their_draws_and_new_rows_have_the_same_functions():
    model, x_new, y_new, _ = both()
    posterior = sgdgp.condition(model, num_samples=4)
    updated = posterior.update(x_new, y_new)
    before, after = posterior.problem, updated.problem
    assert after.draws is before.draws
    assert torch.equal(after.rhs[:200], before.rhs)
    assert torch.equal(after.noise_draws[:200], before.noise_draws)
    values = after.draws(after.operator.x[200:])
    torch.testing.assert_close(
        values + after.noise_draws[200:, 1:], after.sample_targets[200:]
    )
    constant = model.mean_module.constant.detach()
    torch.testing.assert_close(after.targets[200:], y_new - constant)


def test_samples_are_those_of_a_direct_solve_with_the_same_draws():
    model, x_new, y_new, _ = both()
    x = new_points()
    found = sgdgp.condition(model, solver=SOLVERS["cg"], num_samples=5, seed=3).update(
        x_new, y_new
    )
    direct = sgdgp.condition(model, solver="cholesky", num_samples=5, seed=3).update(
        x_new, y_new
    )
    torch.testing.assert_close(found.samples(x), direct.samples(x), rtol=0, atol=1e-6)


def test_noise_draws_of_new_rows_have_the_noise_variance_and_streams_of_their_own():
    x, y = toy_data(60)
    x_new, y_new = more_data(500)
    posterior = sgdgp.condition(
        model_on(x, y, noise=0.3), solver="cholesky", num_samples=8, num_features=64
    )
    once = posterior.update(x_new, y_new)
    again = posterior.update(x_new, y_new)
    twice = once.update(x_new, y_new)
    new = once.problem.noise_draws[60:, 1:]
    assert torch.equal(again.problem.noise_draws[60:, 1:], new)
    later = twice.problem.noise_draws[560:, 1:]
    # 4,000 squares of N(0, 0.3): a relative standard error of 2.2 %; and as many
    # products, of standard error 0.3 / sqrt(4000).
    assert abs(float(new.square().mean()) / 0.3 - 1) < 0.1
    assert abs(float((new * later).mean())) < 4 * 0.3 / math.sqrt(4000)


def test_the_old_posterior_stays_as_it_was():
    model, x_new, y_new, _ = both()
    posterior = sgdgp.condition(model, num_samples=3)
    x = new_points()
    before = posterior.mean(x), posterior.samples(x), posterior.solution
    posterior.update(x_new, y_new)
    assert torch.equal(posterior.mean(x), before[0])
    assert torch.equal(posterior.samples(x), before[1])
    assert posterior.solution is before[2]
    assert len(posterior.problem.rhs) == 200


def test_data_may_come_in_pieces():
    model, x_new, y_new, together = both()
    posterior = sgdgp.condition(model, solver=SOLVERS["cg"], num_samples=2)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        posterior = posterior.update(x_new[rows], y_new[rows])
    mean, _ = own_posterior(together, new_points())
    torch.testing.assert_close(posterior.mean(new_points()), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("m", [1, 150, 300])
def test_one_point_and_more_points_than_there_were(m):
    model, x_new, y_new, together = both(m=m, n=150)
    posterior = sgdgp.condition(model, solver=SOLVERS["cg"], num_samples=2)
    mean, _ = own_posterior(together, new_points())
    updated = posterior.update(x_new, y_new)
    torch.testing.assert_close(updated.mean(new_points()), mean, rtol=0, atol=1e-6)


def test_new_data_at_points_already_seen():
    x, y = toy_data(150)
    posterior = sgdgp.condition(model_on(x, y), solver=SOLVERS["cg"], num_samples=2)
    updated = posterior.update(x[:5], y[:5] + 0.3)
    together = model_on(torch.cat([x, x[:5]]), torch.cat([y, y[:5] + 0.3]))
    mean, _ = own_posterior(together, new_points())
    torch.testing.assert_close(updated.mean(new_points()), mean, rtol=0, atol=1e-6)


def test_new_draws_and_predictions_work_afterwards():
    model, x_new, y_new, together = both()
    updated = sgdgp.condition(model, num_samples=3).update(x_new, y_new)
    x = new_points()
    assert updated.draw(2)(x).shape == (2, 8)
    expected, covariance = own_posterior(together, x)
    many = updated.draw(4000, seed=5)(x)
    # 64 functions share their random features: the error is that of the features too.
    torch.testing.assert_close(many.mean(0), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(many.var(0), covariance.diagonal(), rtol=0.2, atol=0)


def test_without_samples():
    model, x_new, y_new, together = both()
    updated = sgdgp.condition(model, num_samples=0).update(x_new, y_new)
    mean, _ = own_posterior(together, new_points())
    torch.testing.assert_close(updated.mean(new_points()), mean, rtol=0, atol=1e-6)


def test_exact_draws_are_revealed_at_the_new_points():
    x, y = toy_data(60, 1)
    x_new, y_new = more_data(4, 1)
    model = model_on(x, y, kernel=PiecewisePolynomialKernel(q=2))
    posterior = sgdgp.condition(model, num_samples=3)
    updated = posterior.update(x_new, y_new)
    assert torch.equal(updated.problem.rhs[:60], posterior.problem.rhs)
    assert float(dense_residuals(updated).max()) < 1e-8


def test_one_dimensional_inputs_and_column_targets():
    x, y = toy_data(60, 1)
    x_new, y_new = more_data(4, 1)
    posterior = sgdgp.condition(model_on(x, y), num_samples=2)
    expected = posterior.update(x_new, y_new).samples(x_new)
    found = posterior.update(x_new[:, 0], y_new[:, None]).samples(x_new)
    assert torch.equal(found, expected)


class DeepGP(gpytorch.models.ExactGP):
    """A network in front of a kernel: kernel inputs are not the user's."""

    def __init__(self, x, y):
        super().__init__(x, y, GaussianLikelihood())
        self.mean_module = gpytorch.means.LinearMean(2)
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
        self.covar_module = ScaleKernel(MaternKernel(nu=2.5))

    def forward(self, x):
        return MultivariateNormal(
            self.mean_module(x), self.covar_module(self.network(x))
        )


def test_kernel_inputs_may_be_a_networks_outputs():
    x, y = toy_data(120)
    x_new, y_new = more_data()
    model = DeepGP(x, y).double()
    posterior = sgdgp.condition(model, solver=SOLVERS["cg"], num_samples=2)
    everything = torch.cat([x, x_new]), torch.cat([y, y_new])
    fresh = sgdgp.condition(model, *everything, solver="cholesky", num_samples=0)
    updated = posterior.update(x_new, y_new)
    assert updated.problem.operator.x.shape == (126, 3)
    torch.testing.assert_close(
        updated.mean(new_points()), fresh.mean(new_points()), rtol=0, atol=1e-6
    )


def test_transforms_of_a_botorch_model_hold_for_new_data_and_their_noise():
    botorch = pytest.importorskip("botorch")
    x, y = toy_data(60)
    x_new, y_new = more_data()
    y, y_new = 50 + 20 * y, 50 + 20 * y_new
    model = botorch.models.SingleTaskGP(
        x,
        y[:, None],
        input_transform=botorch.models.transforms.Normalize(2),
        outcome_transform=botorch.models.transforms.Standardize(1),
    )
    posterior = sgdgp.condition(model, num_samples=2)
    everything = torch.cat([x, x_new]), torch.cat([y, y_new])
    fresh = sgdgp.condition(model, *everything, num_samples=0)
    updated = posterior.update(x_new, y_new)
    at = new_points()
    torch.testing.assert_close(updated.mean(at), fresh.mean(at), rtol=0, atol=1e-5)
    scale = posterior.problem.prior.outcome_scale.scale
    given = posterior.update(x_new, y_new, noise=9.0)
    expected = torch.full((6,), 9.0 / scale**2, dtype=torch.float64)
    torch.testing.assert_close(given.problem.noise[60:], expected)


def test_fixed_noise_has_to_be_given_for_new_data():
    x, y = toy_data(80)
    x_new, y_new = more_data()
    noise = torch.linspace(0.05, 0.5, 86, dtype=torch.float64)
    model = model_on(x, y, likelihood=FixedNoiseGaussianLikelihood(noise[:80]))
    posterior = sgdgp.condition(model, num_samples=2)
    with pytest.raises(ValueError, match=r"noise: .* pass the 6 noise variances"):
        posterior.update(x_new, y_new)
    updated = posterior.update(x_new, y_new, noise=noise[80:])
    together = model_on(
        torch.cat([x, x_new]),
        torch.cat([y, y_new]),
        likelihood=FixedNoiseGaussianLikelihood(noise),
    )
    mean, _ = own_posterior(together, new_points())
    torch.testing.assert_close(updated.mean(new_points()), mean, rtol=0, atol=1e-6)


def test_noise_may_be_given_for_any_likelihood():
    model, x_new, y_new, _ = both()
    posterior = sgdgp.condition(model, num_samples=2)
    precise = posterior.update(x_new, y_new, noise=1e-8)
    torch.testing.assert_close(precise.mean(x_new), y_new, rtol=0, atol=1e-5)


def test_a_float32_posterior_stays_one():
    x, y = toy_data(200, dtype=torch.float32)
    x_new, y_new = more_data(dtype=torch.float32)
    posterior = sgdgp.condition(model_on(x, y), solver=sgdgp.CG(1e-4), num_samples=2)
    updated = posterior.update(x_new, y_new)
    assert updated.solution.weights.dtype == torch.float32
    assert updated.solution.reason == "converged"
    assert float(dense_residuals(updated).max()) < 1.2e-4


@pytest.mark.parametrize(
    "solver", [sgdgp.SDD(1e-2), sgdgp.CG(1e-2, 1000.0, None, None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_percent_new_data_cost_less_than_a_third_of_the_passes(solver, dtype):
    x, y = toy_data(2020, 3, dtype=dtype)
    kernel = ScaleKernel(MaternKernel(nu=1.5))
    model = model_on(x, y, noise=0.01, kernel=kernel)
    settings = {"solver": solver, "num_samples": 4, "num_features": 512}
    fresh = sgdgp.condition(model, x, y, **settings)
    posterior = sgdgp.condition(model, x[:2000], y[:2000], **settings)
    updated = posterior.update(x[2000:], y[2000:])
    assert updated.solution.reason == fresh.solution.reason == "converged"
    assert float(dense_residuals(updated).max()) < 1.05e-2
    assert updated.solution.passes < fresh.solution.passes / 3


def test_passes_and_history_are_those_of_the_correction_and_the_solver():
    # So many new rows that the correction cannot end it.
    model, x_new, y_new, _ = both(m=60, n=300, noise=1e-2)
    seen = []
    posterior = sgdgp.condition(
        model, solver=sgdgp.CG(1e-8, preconditioner=None), num_samples=2
    )
    solution = posterior.update(
        x_new, y_new, callback=lambda progress: seen.append(progress.passes)
    ).solution
    passes = [entry.passes for entry in solution.history]
    assert passes == sorted(passes) == seen
    # The new rows of what is known: its residuals belong to CG's last iterate.
    assert passes[0] == 60 / 360
    assert solution.passes >= passes[-1]
    assert solution.settings["local_rows"] > 60
    assert solution.solver == "local+cg"


def test_what_the_first_solve_took_is_remembered_and_stored(tmp_path):
    model, x_new, y_new, _ = both(n=300)
    first = sgdgp.condition(model, solver=sgdgp.CG(1e-6), num_samples=2)
    updated = first.update(x_new[:3], y_new[:3]).update(x_new[3:], y_new[3:])
    assert updated.parts[0].passes_from_zero == first.solution.passes
    updated.save(tmp_path / "updated")
    again = sgdgp.load(tmp_path / "updated", model)
    assert again.parts[0].passes_from_zero == first.solution.passes
    # A direct solve starts anew, whatever there was.
    direct = updated.update(x_new, y_new, solver="cholesky")
    assert direct.parts[0].passes_from_zero == 0.0


def test_a_callback_stops_the_update_at_once():
    model, x_new, y_new, _ = both(noise=1e-3)
    seen = []

    def stop(progress):
        seen.append(progress.weights().shape)
        return True

    posterior = sgdgp.condition(model, solver=sgdgp.SDD(1e-8), num_samples=2)
    updated = posterior.update(x_new, y_new, callback=stop)
    assert seen == [(206, 3)]
    assert updated.solution.reason == "interrupted"
    torch.testing.assert_close(
        updated.solution.residuals, dense_residuals(updated), rtol=1e-6, atol=0
    )


def test_another_solver_may_take_over():
    model, x_new, y_new, together = both()
    posterior = sgdgp.condition(model, solver=sgdgp.SDD(1e-2), num_samples=2)
    updated = posterior.update(x_new, y_new, solver=sgdgp.Cholesky())
    mean, _ = own_posterior(together, new_points())
    assert updated.solution.solver == "cholesky"
    assert updated.problem.solver == sgdgp.Cholesky()
    torch.testing.assert_close(updated.mean(new_points()), mean, rtol=0, atol=1e-6)


X, Y = more_data()


@pytest.mark.parametrize(
    ("x", "y", "settings", "error", "message"),
    [
        (X[:, :1], Y, {}, ValueError, "x_new: expected 2 columns, found 1"),
        (X[:0], Y[:0], {}, ValueError, "x_new: expected data"),
        (X[None], Y, {}, ValueError, r"x_new: expected shape \(n, d\)"),
        (X, Y[:3], {}, ValueError, r"y_new: expected shape \(6,\), found \(3,\)"),
        (X, Y.numpy(), {}, TypeError, "y_new: expected a torch.Tensor"),
        (X.float(), Y.float(), {}, ValueError, "x_new: expected the dtype"),
        (X, Y.float(), {}, ValueError, "y_new: expected the dtype"),
        (X * math.nan, Y, {}, ValueError, "x_new: expected finite values, found 12"),
        (X, Y * math.inf, {}, ValueError, "y_new: expected finite values, found 6"),
        (X, Y, {"noise": 0.0}, ValueError, "noise: expected positive"),
        (X, Y, {"noise": Y[:2]}, ValueError, r"noise: .* 6 variances.*\(2,\)"),
        (X, Y, {"solver": 3}, TypeError, "solver: .*found 3"),
        (X, Y, {"solver": "newton"}, ValueError, "solver: .*'newton'"),
    ],
)
def test_bad_input_is_refused_before_any_solve(x, y, settings, error, message):
    posterior = sgdgp.condition(gp(), num_samples=1)
    with pytest.raises(error, match=message):
        posterior.update(
            x, y, callback=lambda progress: pytest.fail("solved"), **settings
        )


def test_means_go_on_until_predictions_are_right_as_those_of_a_first_solve():
    positive = gpytorch.constraints.Positive()
    likelihood = GaussianLikelihood(noise_constraint=positive)
    model, x_new, y_new, together = both(m=8, n=400, noise=1e-6, likelihood=likelihood)
    solver = Auto(tolerance=1e-2, stages=(Stage(sgdgp.CG()),))
    posterior = sgdgp.condition(model, solver=solver, num_samples=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updated = posterior.update(x_new, y_new)
    solution = updated.solution
    assert solution.reason == "converged"
    assert solution.prediction_error <= 0.1
    # The functions are as exact as was asked for.
    assert float(solution.residuals[1:].max()) > 10.0 * float(solution.residuals[0])
    at = toy_data(50, seed=9)[0]
    mean, covariance = own_posterior(together, at)
    deviation = (covariance.diagonal() + 1e-6).sqrt()
    off = (updated.mean(at) - mean) / deviation
    assert float(off.square().mean().sqrt()) < 0.3
