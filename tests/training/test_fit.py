import copy
import functools
import math
import sys

import gpytorch
import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize, Warp
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.priors import NormalPrior

import sgdgp
from sgdgp.features import NoRandomFeatures, has_features
from sgdgp.training import (
    FitEntry,
    PathwiseProbes,
    Plateau,
    StandardProbes,
    fit,
    log_marginal_likelihood,
)
from sgdgp.training.fit import best_of, describe, fit_bar
from sgdgp.training.parameters import parameter_values, put_state, state_of
from sgdgp.training.run import Fitted
from tests.models import hadamard_gp, multitask_gp
from tests.training.problems import (
    Model,
    assert_same,
    data,
    exact_loop,
    parameters,
    rbf_model,
)
from tests.training.test_marginal_likelihood import MODELS

STOCHASTIC = {"probes": PathwiseProbes(8, num_features=64), "solver": "cholesky"}


@pytest.mark.parametrize("name", [n for n in MODELS if n != "hadamard"])
def test_fit_makes_the_steps_of_gpytorchs_loop(name):
    model = MODELS[name]().double()
    truth = copy.deepcopy(model)
    exact_loop(truth, truth.train_inputs[0], truth.train_targets, 5)
    fitted = fit(model, steps=5)
    assert (fitted.reason, fitted.steps, len(fitted.history)) == ("steps", 5, 5)
    assert_same(parameters(model), parameters(truth), rtol=1e-5, atol=1e-7)


def large():
    """1,200 rows: more than what is factorised."""
    x, y = (part.float() for part in data(1200, 2))
    return Model(x, y, ScaleKernel(RBFKernel()))


def value_of(model):
    """log p(y | X) / n by GPyTorch's Cholesky factor."""
    model.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    with torch.no_grad(), gpytorch.settings.max_cholesky_size(2000):
        return float(mll(model(model.train_inputs[0]), model.train_targets))


@pytest.fixture(scope="module")
def truth():
    model = large()
    with gpytorch.settings.max_cholesky_size(2000):
        exact_loop(model, model.train_inputs[0], model.train_targets, 15)
    return model


@pytest.mark.parametrize(
    ("settings", "within"),
    [({}, 0.1), ({"probes": StandardProbes(128)}, 0.03)],
    ids=["default", "many_probes"],
)
def test_more_rows_follow_the_path_of_the_exact_gradient(settings, within, truth):
    model = large()
    fitted = fit(model, steps=15, **settings)
    assert fitted.reason == "steps"
    assert fitted.passes >= 15.0
    found, wanted, start = map(positive_parameters, (model, truth, large()))
    torch.testing.assert_close(found, wanted, rtol=within, atol=0.0)
    assert bool(((wanted / start).log().abs() > 0.13).all())
    # The value is integrated along the path, so its gain is known, not its height.
    gain = fitted.history[-1].value - fitted.history[0].value
    true_gain = value_of(truth) - value_of(large())
    assert abs(gain - true_gain) <= 0.1 * true_gain


def positive_parameters(model):
    kernel = model.covar_module
    found = [kernel.outputscale, kernel.base_kernel.lengthscale, model.likelihood.noise]
    return torch.tensor([float(value.detach()) for value in found])


def test_a_hadamard_model_learns_from_points_and_tasks():
    model = hadamard_gp()
    before = parameters(model)
    fitted = fit(model, steps=30)
    assert fitted.history[-1].value > fitted.history[0].value + 0.1
    assert set(before) == set(parameters(model))
    moved = [n for n, p in parameters(model).items() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)


def test_missing_targets_of_a_multitask_model_do_not_matter():
    model = multitask_gp()
    x, y = model.train_inputs[0], model.train_targets.clone()
    y[::2, 0] = math.nan
    fitted = fit(model, x, y, steps=20)
    assert fitted.history[-1].value > fitted.history[0].value + 0.1
    other = multitask_gp()
    z = y.clone()
    z[1, 1] = math.nan
    fit(other, x, z, steps=20)
    found, wanted = parameters(other), parameters(model)
    assert any(not torch.allclose(found[n], wanted[n], rtol=1e-6) for n in found)


@pytest.mark.parametrize("learn", [fit, sgdgp.initialise])
def test_missing_targets_of_one_output_are_rows_left_out(learn):
    x, y = data(60, 2)
    y = torch.cat([y, torch.full_like(y, math.nan)])
    model, other = rbf_model(), rbf_model()
    learn(model, torch.cat([x, x + 0.3]), y, steps=4)
    learn(other, x, y[:60], steps=4)
    found, wanted = parameters(model), parameters(other)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_targets_are_those_given_or_those_of_the_model():
    given, own = rbf_model(), rbf_model()
    x, y = data(60, 2, seed=1)
    own.set_train_data(x, y)
    fit(given, x, y, steps=4)
    fit(own, steps=4)
    assert_same(parameters(given), parameters(own), rtol=0.0, atol=0.0)
    assert torch.equal(given.train_targets, rbf_model().train_targets)


def botorch(x, y):
    return SingleTaskGP(
        x,
        y.unsqueeze(1),
        input_transform=Normalize(2),
        outcome_transform=Standardize(1),
    )


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", [{}, STOCHASTIC], ids=["exact", "stochastic"])
def test_botorchs_transforms_are_undone_once_in_either_mode(mode, settings):
    x, y = data(60, 2)
    x, y = 4.0 + 3.0 * x, 100.0 + 20.0 * y
    models = [botorch(x, y).train(mode), botorch(x, y).train(mode)]
    fit(models[0], steps=5, **settings)
    fit(models[1], x, y, steps=5, **settings)
    for model in models:
        assert model.training is mode
        assert model.likelihood.training is mode
        inputs = model.train_inputs[0] if mode else model._original_train_inputs
        assert torch.equal(inputs, x)
    assert_same(parameters(models[0]), parameters(models[1]), rtol=1e-6, atol=1e-9)
    if not settings:
        truth = botorch(x, y).train()
        exact_loop(truth, truth.train_inputs[0], truth.train_targets, 5)
        assert_same(parameters(models[0]), parameters(truth), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_botorchs_models_are_fitted_as_well_as_by_its_own_optimiser(seed):
    x, y = data(25, 2, seed=seed)
    found, truth = botorch(x, y), botorch(x, y)
    fitted = fit(found)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(truth.likelihood, truth)
    fit_gpytorch_mll(mll)
    values = []
    for model in (found, truth):
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model.train())
        values.append(float(mll(model(model.train_inputs[0]), model.train_targets)))
    # A plateau ends it a little early; with steps of the values themselves it was .4.
    assert values[0] > values[1] - 0.05
    assert fitted.warnings == ()


def test_a_fall_is_no_plateau():
    model = rbf_model()
    fitted = fit(model, steps=200, optimizer=lambda p: torch.optim.Adam(p, lr=2.0))
    best = rbf_model()
    fit(best, steps=500)
    assert fitted.reason == "plateau"
    assert value_of(model) == pytest.approx(value_of(best), abs=0.02)


@pytest.mark.parametrize("steps", [1, 10, 200])
def test_an_exact_fit_leaves_the_best_parameters_it_has_seen(steps):
    model = rbf_model()
    wild = fit(model, steps=steps, optimizer=lambda p: torch.optim.Adam(p, lr=5.0))
    assert value_of(model) >= max(entry.value for entry in wild.history) - 1e-3


def test_what_reads_a_bounded_value_itself_is_fitted():
    x, y = data(40, 2)
    warped = SingleTaskGP(
        x,
        y.unsqueeze(1),
        input_transform=Warp(d=2, indices=[0, 1]),
        outcome_transform=None,
    )
    first = value_of(warped)
    fitted = fit(warped)
    assert fitted.history[0].value == pytest.approx(first, abs=1e-6)
    assert value_of(warped) > first + 0.1


def test_a_state_that_a_callback_keeps_is_one_of_values():
    model, kept = botorch(*data(25, 2)), {}

    def keep(entry):
        if entry.step == 5:
            kept.update(state_of(model))

    fitted = fit(model, steps=10, callback=keep)
    put_state(model, kept)
    for name, values in parameter_values(model).items():
        assert values == pytest.approx(fitted.history[6].parameters[name])


def test_an_optimiser_of_the_models_own_parameters_moves_them():
    model = botorch(*data(25, 2))
    noise = float(model.likelihood.noise)
    with pytest.warns(UserWarning, match="not learned yet"):
        fit(
            model,
            steps=12,
            optimizer=lambda _: torch.optim.Adam(model.parameters(), 1e-2),
        )
    assert float(model.likelihood.noise) != noise


def test_a_fit_that_ends_while_it_still_gains_says_so():
    with pytest.warns(UserWarning, match="not learned yet"):
        fit(rbf_model(), steps=10)


def test_every_part_of_a_model_is_left_in_its_mode():
    norm = torch.nn.BatchNorm1d(2)
    model = Model(*data(60, 2), RBFKernel(), network=norm)
    for mode in (True, False):
        model.train(mode)
        norm.train(not mode)
        fit(model, steps=1)
        assert model.training is model.covar_module.training is mode
        assert norm.training is not mode


def test_frozen_parameters_stay():
    model = rbf_model()
    model.covar_module.base_kernel.raw_lengthscale.requires_grad_(False)
    model.likelihood.raw_noise.requires_grad_(False)
    before = parameters(model)
    fit(model, steps=3, **STOCHASTIC)
    after = parameters(model)
    for name, value in before.items():
        is_frozen = "lengthscale" in name or "noise" in name
        assert torch.equal(value, after[name]) is is_frozen, name


def test_constraints_hold_and_are_reached_from_within():
    kernel = RBFKernel(lengthscale_constraint=gpytorch.constraints.Interval(1.5, 2.0))
    model = Model(*data(80, 1), kernel)
    fit(model, steps=40, plateau=None)
    # The data ask for a shorter one.
    assert 1.5 <= float(kernel.lengthscale.detach()) <= 1.52


@pytest.mark.parametrize("settings", [{}, STOCHASTIC], ids=["exact", "stochastic"])
def test_a_value_on_its_bound_is_a_place_to_start(settings):
    model = rbf_model()
    model.likelihood.noise = 1e-4
    assert bool(model.likelihood.raw_noise.isneginf())
    fitted = fit(model, steps=4, **settings)
    values = [entry.value for entry in fitted.history]
    assert values == sorted(values)
    assert all(math.isfinite(value) for value in values)
    assert fitted.warnings == ()


def test_a_narrow_prior_holds_its_parameter():
    def learned(prior):
        kernel = ScaleKernel(RBFKernel(lengthscale_prior=prior))
        model = Model(*data(80, 1), kernel)
        fit(model, steps=40, plateau=None)
        return float(kernel.base_kernel.lengthscale.detach())

    assert abs(learned(NormalPrior(1.4, 0.005)) - 1.4) < 0.02
    assert abs(learned(None) - 1.4) > 0.2


def test_a_kernel_without_random_features_is_learned_too():
    kernel = ScaleKernel(gpytorch.kernels.PiecewisePolynomialKernel(q=2))
    assert not has_features(kernel)
    x, y = data(1001, 1)
    model = Model(x, y, kernel)
    before = parameters(model)
    fitted = fit(model, steps=2, passes_per_step=5.0)
    assert fitted.passes > 0.0
    after = parameters(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(NoRandomFeatures):
        fit(model, steps=1, probes=PathwiseProbes(4))


def test_independent_outputs_share_what_is_learned():
    x, y = data(60, 2)
    columns = torch.stack([y, y.flip(0)], 1)
    columns[:4, 1] = math.nan
    model = Model(x, y, ScaleKernel(RBFKernel()))
    fitted = fit(model, x, columns, steps=25)
    assert fitted.history[-1].value > fitted.history[0].value + 0.1


def test_the_same_seed_gives_the_same_parameters():
    found = []
    for seed in (5, 5, 6, torch.Generator().manual_seed(5)):
        model = rbf_model()
        fit(model, steps=3, seed=seed, **STOCHASTIC)
        found.append(parameters(model))
    assert_same(found[0], found[1], rtol=0.0, atol=0.0)
    assert_same(found[0], found[3], rtol=0.0, atol=0.0)
    assert not torch.equal(*(f["covar_module.raw_outputscale"] for f in found[1:3]))


@pytest.fixture
def many(monkeypatch):
    """A fit of 120 rows counts as one of many, and starts on 40 of them."""
    module = sys.modules["sgdgp.training.fit"]
    monkeypatch.setattr(module, "_MANY_ROWS", 100)
    monkeypatch.setattr(module, "EXACT_ROWS", 40)


def of_120(columns=False):
    x, y = data(120, 2)
    y = torch.stack([y, y.flip(0)], 1) if columns else y
    return Model(x, y[:, 0] if columns else y, ScaleKernel(RBFKernel())), x, y


def test_a_fit_of_many_rows_starts_on_some(many):
    some, x, y = of_120()
    told = []
    fitted = fit(some, x, y, steps=30, plateau=None, callback=told.append)
    assert (fitted.steps, len(told), fitted.reason) == (10, 10, "steps")
    assert [entry.step for entry in told] == list(range(10))
    whole, _, _ = of_120()
    # As many steps on all rows, from where the model was, do not get as far.
    fit(whole, x, y, steps=10, probes=StandardProbes(64), plateau=None)
    full, _, _ = of_120()
    exact_loop(full.double(), x, y, 30)
    assert value_of(some) > value_of(whole) + 0.05
    assert value_of(some) > value_of(full) - 0.01


def test_given_probes_and_missing_targets_take_all_rows_from_the_first_step(many):
    model, x, y = of_120(columns=True)
    assert fit(model, x, y, steps=3, plateau=None).steps == 1
    y[3, 1] = math.nan
    assert fit(model, x, y, steps=3, plateau=None).steps == 3
    model, x, y = of_120()
    assert fit(model, x, y, steps=3, probes=StandardProbes(4)).steps == 3


def test_a_fit_of_many_rows_goes_on_from_its_checkpoint(many, tmp_path):
    path, told = tmp_path / "fit", []

    def stop(entry):
        told.append(entry)
        return len(told) == 3

    whole, x, y = of_120()
    fit(whole, x, y, steps=18, plateau=None)
    model, _, _ = of_120()
    fit(model, x, y, steps=18, plateau=None, callback=stop, checkpoint=path)
    model, _, _ = of_120()
    fitted = fit(model, x, y, steps=18, plateau=None, checkpoint=path)
    assert fitted.steps == 6
    assert_same(parameters(model), parameters(whole), rtol=1e-6, atol=1e-8)


def test_another_optimiser_makes_its_own_steps():
    model, truth = rbf_model(), rbf_model()
    fit(model, steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(truth.likelihood, truth.train())
    (-mll(truth(truth.train_inputs[0]), truth.train_targets)).backward()
    torch.optim.SGD(truth.parameters(), lr=0.5).step()
    assert_same(parameters(model), parameters(truth), rtol=1e-7, atol=1e-9)


def test_a_budget_of_passes_ends_a_fit():
    fitted = fit(
        rbf_model(), steps=50, probes=StandardProbes(4), solver="cg", max_passes=12.0
    )
    assert fitted.reason == "budget"
    assert 12.0 <= fitted.passes <= 12.0 + 11.0
    assert fitted.passes == fitted.history[-1].passes


def test_a_budget_of_seconds_ends_a_fit():
    fitted = fit(rbf_model(), steps=10**6, plateau=None, max_seconds=0.2)
    assert fitted.reason == "budget"
    # The last step would have taken the rest.
    assert fitted.seconds >= 0.1
    assert fitted.steps < 10**5


def test_a_plateau_ends_a_fit_near_the_optimum():
    model, longer = rbf_model(30), rbf_model(30)
    fitted = fit(model, steps=1000)
    assert fitted.reason == "plateau"
    assert fitted.steps < 150
    best = fit(longer, steps=150, plateau=None)
    assert best.steps == 150
    gap = best.history[-1].value - max(entry.value for entry in fitted.history)
    assert gap <= 5e-3


def test_callbacks_see_every_step_and_can_stop_the_fit():
    seen = []

    def callback(entry):
        seen.append(entry)
        return entry.step == 3

    fitted = fit(rbf_model(), steps=50, callback=callback)
    assert fitted.reason == "interrupted"
    assert tuple(seen) == fitted.history
    assert [entry.step for entry in seen] == [0, 1, 2, 3]


def test_history_tells_parameters_in_the_users_units():
    model = rbf_model()
    model.likelihood.noise = 0.25
    entry = fit(model, steps=1).history[0]
    assert entry.parameters["likelihood.noise_covar.noise"] == pytest.approx((0.25,))
    assert entry.seconds > 0.0


def test_a_fit_that_diverges_goes_back_and_says_so():
    model = rbf_model(100)
    fitted = fit(model, steps=40, optimizer=lambda p: torch.optim.Adam(p, lr=50.0))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert any("diverged" in warning for warning in fitted.warnings)
    values = [entry.value for entry in fitted.history]
    assert max(values) - values[-1] < 1.0
    assert [entry.step for entry in fitted.history] == list(range(len(values)))


class Explosive(torch.optim.SGD):
    """Sends every parameter to NaN at its third step, wherever that is."""

    calls = 0

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        if self.calls >= 3:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.fill_(math.nan)


@pytest.mark.parametrize("settings", [{}, STOCHASTIC], ids=["exact", "stochastic"])
def test_a_fit_that_cannot_recover_ends_at_the_last_good_parameters(settings):
    model = rbf_model()
    fitted = fit(model, steps=40, optimizer=lambda p: Explosive(p, lr=0.01), **settings)
    assert fitted.reason == "diverged"
    assert "last good parameters" in fitted.warnings[0]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    last = fitted.history[-1].parameters["covar_module.outputscale"]
    found = float(model.covar_module.outputscale.detach())
    assert found == pytest.approx(last[0], rel=0.05)


class OnceTooFar(torch.optim.SGD):
    """One step to NaN, as a bad batch would; all others are sound."""

    calls = 0

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        if self.calls == 3:
            self.param_groups[0]["params"][0].data.fill_(math.nan)


@pytest.mark.parametrize("settings", [{}, STOCHASTIC], ids=["exact", "stochastic"])
def test_one_step_to_nowhere_is_made_again_and_the_value_stays_finite(settings):
    fitted = fit(
        rbf_model(), steps=10, optimizer=lambda p: OnceTooFar(p, lr=0.1), **settings
    )
    assert (fitted.reason, fitted.steps) == ("steps", 10)
    assert "number of times: 1" in fitted.warnings[0]
    assert all(math.isfinite(entry.value) for entry in fitted.history)
    assert fitted.history[-1].value > fitted.history[0].value


@pytest.mark.parametrize(
    ("solver", "tolerance", "used"),
    [
        ("cg", None, (0.01, 10.0)),
        ("cg", 1e-6, (1e-6, 10.0)),
        (sgdgp.CG(tolerance=1e-3, max_passes=500.0), None, (1e-3, 10.0)),
        (sgdgp.CG(tolerance=1e-3, max_passes=500.0), 1e-6, (1e-6, 10.0)),
        (sgdgp.CG(max_passes=4.0), 1e-6, (1e-6, 4.0)),
    ],
)
def test_a_tolerance_that_is_given_holds_for_names_and_solvers(
    solver, tolerance, used, monkeypatch
):
    seen, solve = set(), sgdgp.CG.solve

    def solved(cg, *arguments, **settings):
        seen.add((cg.tolerance, cg.max_passes))
        return solve(cg, *arguments, **settings)

    monkeypatch.setattr(sgdgp.CG, "solve", solved)
    fit(
        rbf_model(),
        steps=2,
        probes=StandardProbes(2),
        solver=solver,
        tolerance=tolerance,
    )
    assert seen == {used}


def test_old_names_of_arguments_are_known():
    found, wanted = rbf_model(), rbf_model()
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.warns(DeprecationWarning, match="optimiser is now called optimizer"):
        fit(found, steps=1, optimiser=sgd)
    fit(wanted, steps=1, optimizer=sgd)
    assert_same(parameters(found), parameters(wanted), rtol=0.0, atol=0.0)


def test_a_poor_solve_is_told():
    fitted = fit(
        rbf_model(200),
        steps=1,
        probes=StandardProbes(4),
        solver=sgdgp.CG(preconditioner=None),
        passes_per_step=1.0,
    )
    assert any("passes_per_step" in warning for warning in fitted.warnings)


def infinite_at(model, where):
    y = model.train_targets.clone()
    y[where] = math.inf
    return {"x": model.train_inputs[0], "y": y}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.5}, TypeError, "steps"),
        ({"restarts": -1}, ValueError, "restarts"),
        ({"max_passes": 0.0}, ValueError, "max_passes"),
        ({"max_seconds": -1.0}, ValueError, "max_seconds"),
        ({"passes_per_step": 0.0}, ValueError, "passes_per_"),
        ({"tolerance": 0.0}, ValueError, "tolerance"),
        ({"plateau": 10}, TypeError, "plateau: expected a Plateau"),
        ({"solver": "newton"}, ValueError, "solver: expected .*'newton'"),
        ({"solver": 7}, TypeError, "solver"),
        ({"probes": 64}, TypeError, "probes: expected PathwiseProbes"),
        ({"probes": "many"}, TypeError, "probes"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"optimizer": "adam"}, TypeError, "optimizer: expected a function"),
        ({"optimizer": list}, TypeError, "optimizer: expected one that steps"),
        ({"optimizer": torch.optim.LBFGS}, TypeError, "optimizer.*LBFGS"),
        ({"x": torch.zeros(3, 2)}, ValueError, "x, y: expected both"),
        (
            {"x": torch.zeros(3, 2).double(), "y": torch.zeros(4).double()},
            ValueError,
            r"y: expected shape \(3,\), found \(4,\)",
        ),
        (
            {"x": torch.zeros(3, 2), "y": torch.zeros(3)},
            ValueError,
            "x: expected the dtype of the model's parameters",
        ),
        (infinite_at(rbf_model(), 7), ValueError, r"y: .*infinite.*index \(7,\)"),
        ({"checkpoint_every": 0, "checkpoint": "fit.sgdgp"}, ValueError, "every"),
        ({"checkpoint_every": -1}, ValueError, "every"),
        ({"max_passes": True}, TypeError, "max_passes: expected a number"),
        ({"progress": 1}, TypeError, "progress"),
        ({"checkpoint": 3}, TypeError, "checkpoint: expected a path"),
        (
            {"checkpoint": "/nowhere/fit.sgdgp"},
            ValueError,
            "checkpoint: expected an existing directory",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_happens(arguments, error, words):
    model = rbf_model()
    before = parameters(model)
    with pytest.raises(error, match=words):
        fit(model, callback=lambda entry: pytest.fail("too late"), **arguments)
    assert_same(parameters(model), before, rtol=0.0, atol=0.0)
    assert model.training


def test_models_that_cannot_be_fitted_are_refused():
    with pytest.raises(TypeError, match=r"model: expected a gpytorch\.models"):
        fit(torch.nn.Linear(1, 1))
    model = rbf_model().requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected parameters"):
        fit(model)
    x, y = data(20, 2)
    with pytest.raises(ValueError, match="batch models"):
        fit(SingleTaskGP(x, torch.stack([y, y], 1)))
    model = rbf_model()
    model.covar_module.raw_outputscale.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"model.*outputscale"):
        fit(model)


def test_plateau_is_a_setting():
    fitted = fit(rbf_model(), steps=100, plateau=Plateau(patience=2, gain=10.0))
    assert (fitted.reason, fitted.steps) == ("plateau", 3)


def test_one_value_is_shown_as_it_is_and_several_by_their_range():
    parameters = {
        "likelihood.noise_covar.noise": (0.012345,),
        "covar_module.base_kernel.lengthscale": (0.5, 12.0, 0.031),
    }
    assert describe(parameters) == "noise 0.0123, lengthscale 0.031..12"


def test_no_more_than_four_are_shown():
    many = {f"kernel.part{i}": (float(i),) for i in range(9)}
    assert describe(many) == "part0 0, part1 1, part2 2, part3 3"


def test_nothing_to_show_is_shown_as_nothing():
    assert describe({}) == ""


def entry(step):
    return FitEntry(step, 3.0, 0.1, -1.0, 0.02, {"likelihood.noise": (0.25,)})


def test_the_bar_counts_steps_and_shows_parameters_and_residual(capsys):
    with fit_bar(True, 7, None) as moved:
        assert moved(entry(0)) is None
        assert moved(entry(4)) is None
    shown = capsys.readouterr().err
    assert "5/7" in shown
    assert "noise 0.25, residual 2e-02" in shown


def test_the_callback_behind_the_bar_decides():
    with fit_bar(True, 7, lambda found: found.step == 2) as moved:
        assert not moved(entry(1))
        assert moved(entry(2))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_by_default_there_is_a_bar_on_a_terminal_only(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    fit(rbf_model(20), steps=2)
    assert ("lengthscale" in capsys.readouterr().err) is is_terminal


def test_without_a_bar_the_callback_is_handed_through():
    def callback(found):
        return None

    with fit_bar(False, 7, callback) as moved:
        assert moved is callback


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
