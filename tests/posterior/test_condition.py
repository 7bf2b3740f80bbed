"""condition: every solver and operator, awkward data, and seeds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel

import sgdgp
from sgdgp.features import NoRandomFeatures
from sgdgp.posterior import PathwisePosterior
from sgdgp.posterior.problem import Settings
from sgdgp.solvers.base import Progress, progress_bar
from tests.models import GP, gp, own_posterior, toy_data

SOLVERS = {
    "cholesky": sgdgp.Cholesky(),
    "cg": sgdgp.CG(tolerance=1e-10),
    "sdd": sgdgp.SDD(tolerance=1e-8),
}


def new_points():
    return toy_data(8, seed=1)[0]


def model_on(x, y, noise=0.1):
    model = GP(x, y, ScaleKernel(RBFKernel())).to(x.dtype)
    model.likelihood.noise = noise
    return model


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_the_models_own_posterior(solver):
    model, x = gp(MaternKernel(nu=1.5), n=200), new_points()
    mean, _ = own_posterior(model, x)
    exact = sgdgp.condition(model, solver="cholesky", num_samples=3, seed=2)
    posterior = sgdgp.condition(model, solver=SOLVERS[solver], num_samples=3, seed=2)
    assert posterior.solution.reason == "converged"
    torch.testing.assert_close(posterior.mean(x), mean, rtol=0, atol=1e-6)
    # The same prior draws and noise, hence the same functions.
    torch.testing.assert_close(
        posterior.samples(x), exact.samples(x), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("operator", ["dense", "tiled", "row_blocks"])
def test_every_operator_gives_the_same_functions(operator):
    model, x = gp(MaternKernel(nu=1.5), n=200), new_points()
    expected = sgdgp.condition(model, num_samples=3).samples(x)
    posterior = sgdgp.condition(model, num_samples=3, operator=operator)
    assert posterior.solution.operator == operator
    torch.testing.assert_close(posterior.samples(x), expected)


@pytest.mark.parametrize("name", ["cholesky", "cg", "sdd"])
def test_solvers_may_be_named(name):
    assert sgdgp.condition(gp(), solver=name, num_samples=1).solution.solver == name


def test_what_auto_chose_is_in_the_result():
    solution = sgdgp.condition(gp(), num_samples=2).solution
    assert (solution.solver, solution.operator) == ("cholesky", "dense")


def test_the_solution_reports_every_column():
    posterior = sgdgp.condition(gp(), num_samples=5)
    assert isinstance(posterior, PathwisePosterior)
    assert posterior.num_samples == 5
    assert posterior.solution.weights.shape == (30, 6)
    assert posterior.solution.residuals.shape == (6,)
    assert set(posterior.timings) == {"prior_draws", "solve"}


def test_the_first_column_solves_for_the_targets():
    model = gp()
    weights = sgdgp.condition(model, num_samples=2).solution.weights[:, 0]
    system = model.kernel(model.train_inputs[0]).to_dense() + 0.1 * torch.eye(30)
    torch.testing.assert_close(
        system @ weights, model.train_targets - 0.2, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_very_few_points(solver, n):
    x, y = toy_data(n)
    model = model_on(x, y)
    mean, _ = own_posterior(model, new_points())
    posterior = sgdgp.condition(model, solver=SOLVERS[solver], num_samples=3)
    torch.testing.assert_close(posterior.mean(new_points()), mean, rtol=0, atol=1e-6)
    assert bool(torch.isfinite(posterior.samples(new_points())).all())


def test_a_block_larger_than_the_data():
    model = gp()
    solver = sgdgp.SDD(tolerance=1e-8, block_size=1000)
    mean, _ = own_posterior(model, new_points())
    posterior = sgdgp.condition(model, solver=solver, num_samples=2)
    torch.testing.assert_close(posterior.mean(new_points()), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_duplicate_rows(solver):
    x, y = toy_data(20)
    model = model_on(x.repeat(3, 1), torch.cat([y, y + 0.1, y - 0.3]))
    mean, _ = own_posterior(model, new_points())
    posterior = sgdgp.condition(model, solver=SOLVERS[solver], num_samples=3)
    torch.testing.assert_close(posterior.mean(new_points()), mean, rtol=0, atol=1e-6)
    assert bool(torch.isfinite(posterior.samples(new_points())).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_constant_inputs(solver):
    _, y = toy_data(40)
    model = model_on(torch.full((40, 2), 0.3, dtype=torch.float64), y)
    mean, _ = own_posterior(model, new_points())
    posterior = sgdgp.condition(model, solver=SOLVERS[solver], num_samples=3)
    torch.testing.assert_close(posterior.mean(new_points()), mean, rtol=0, atol=1e-6)
    assert bool(torch.isfinite(posterior.samples(new_points())).all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_targets(solver, value):
    x, _ = toy_data(30)
    model = model_on(x, torch.full((30,), value, dtype=torch.float64))
    mean, _ = own_posterior(model, new_points())
    posterior = sgdgp.condition(model, solver=SOLVERS[solver], num_samples=2)
    torch.testing.assert_close(posterior.mean(new_points()), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_seed_gives_the_same_bits(solver, dtype):
    # The solvers' default tolerance, which float32 can reach.
    def run(seed):
        model = gp(n=150, dtype=dtype)
        posterior = sgdgp.condition(
            model, solver=solver, num_samples=3, num_features=256, seed=seed
        )
        x = new_points().to(dtype)
        return (
            posterior.solution.weights,
            posterior.mean(x),
            posterior.samples(x),
            posterior.draw(2, seed=7)(x),
        )

    first, second, other = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[2].dtype == dtype
    assert not torch.allclose(first[2], other[2])


def test_a_generator_is_as_good_as_its_seed():
    x = new_points()
    seeded = sgdgp.condition(gp(), num_samples=3, seed=11).samples(x)
    stream = torch.Generator().manual_seed(11)
    first = sgdgp.condition(gp(), num_samples=3, seed=stream).samples(x)
    second = sgdgp.condition(gp(), num_samples=3, seed=stream).samples(x)
    assert torch.equal(first, seeded)
    assert not torch.allclose(second, first)


def test_the_global_generator_and_default_dtype_are_irrelevant():
    x = new_points()
    torch.manual_seed(0)
    first = sgdgp.condition(gp(), num_samples=3).samples(x)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(sgdgp.condition(gp(), num_samples=3).samples(x), first)
    assert torch.equal(torch.get_rng_state(), state)
    model = gp()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sgdgp.condition(model, num_samples=3).samples(x), first)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_callback_that_returns_true_stops_the_solve():
    seen = []

    def stop(progress):
        seen.append(progress.passes)
        return True

    posterior = sgdgp.condition(
        gp(n=200, noise=1e-3),
        solver=sgdgp.SDD(tolerance=1e-12),
        num_samples=2,
        callback=stop,
    )
    assert len(seen) == 1
    assert posterior.solution.reason == "interrupted"
    assert bool(torch.isfinite(posterior.samples(new_points())).all())


def test_a_bar_counts_from_the_first_run_and_never_from_zero(capsys):
    with progress_bar(True, "sdd", passes=5.0, seconds=125.0) as told:
        told(Progress(2.0, 10.0, torch.ones(1), False, lambda: torch.ones(1)))
    shown = capsys.readouterr().err
    assert "sdd: begins" in shown
    assert "sdd: 7 passes [02:15" in shown
    assert "0 passes" not in shown


def test_a_bar_ends_its_line(capsys):
    step = Progress(2.0, 10.0, torch.ones(1), False, lambda: torch.ones(1))
    with progress_bar(True, "sdd") as told:
        told(step)
    assert capsys.readouterr().err.endswith("\n")
    with progress_bar(True, "sdd"):
        pass
    assert capsys.readouterr().err.endswith("\n")


def test_the_bar_is_silent_off_a_terminal_and_shown_on_demand(capsys):
    posterior = sgdgp.condition(gp(), num_samples=1)
    posterior.draw(1)
    posterior.predict(new_points(), batch_size=3)
    assert capsys.readouterr().err == ""
    sgdgp.condition(gp(), num_samples=1, progress=True)
    assert "passes" in capsys.readouterr().err
    posterior.draw(1, progress=True)
    assert "passes" in capsys.readouterr().err
    posterior.predict(new_points(), batch_size=3, progress=True)
    assert "predict" in capsys.readouterr().err


def test_one_dimensional_inputs_and_column_targets_are_taken_as_gpytorch_takes_them():
    model = gp(n=40, d=1)
    x, y = model.train_inputs[0], model.train_targets
    new = torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = sgdgp.condition(model, num_samples=3).samples(new[:, None])
    found = sgdgp.condition(model, x[:, 0], y[:, None], num_samples=3)
    assert torch.equal(found.samples(new), expected)
    assert found.mean(new).shape == found.variance(new).shape == (7,)


@pytest.mark.parametrize("verb", ["mean", "variance", "predict", "draw"])
def test_few_rows_know_mean_and_variance_before_any_function(verb, monkeypatch):
    x, asked, draw = new_points(), [], Settings.draw_prior
    monkeypatch.setattr(
        Settings, "draw_prior", lambda *given: asked.append(given[3]) or draw(*given)
    )
    posterior = sgdgp.condition(gp(), num_samples=5)
    assert "num_samples=5" in repr(posterior)
    getattr(posterior, verb)(3 if verb == "draw" else x)
    assert 5 not in asked
    posterior.samples(x)
    posterior.samples(x)
    assert asked.count(5) == 1


def test_functions_that_waited_are_those_of_the_moment_of_conditioning():
    x, seed = new_points(), torch.Generator().manual_seed(0)
    data = toy_data(40)
    model = model_on(*data)
    at_once = sgdgp.condition(model, *data, num_samples=5, seed=seed)
    posterior = sgdgp.condition(model, *data, num_samples=5)
    expected = at_once.samples(x), at_once.mean(x), at_once.variance(x)
    several = posterior, copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))
    for tensor in data:
        tensor.zero_()
    model.likelihood.noise = 3.0
    model.kernel.outputscale = 7.0
    for each in several:
        before = each.mean(x), each.variance(x), each.predict(x).mean
        assert torch.equal(each.samples(x), expected[0])
        after = each.mean(x), each.variance(x), each.predict(x).mean
        assert all(map(torch.equal, before, after))
        assert torch.equal(before[0], expected[1])
        assert torch.equal(before[1], expected[2])
    assert torch.equal(posterior.solution.weights, at_once.solution.weights)
    assert posterior.timings["solve"] > posterior.parts[0].timings["solve"]


def test_what_cannot_be_drawn_is_refused_before_it_is_asked_for():
    model = gp(ScaleKernel(RBFKernel()) * LinearKernel())
    with pytest.raises(NoRandomFeatures, match="tensor product"):
        sgdgp.condition(model, num_samples=2, num_features=2**20)
