import importlib
import math

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

import sgdgp
from sgdgp.training import fit, initialise
from tests.models import hadamard_gp, multitask_gp
from tests.training.problems import Model, assert_same, data, parameters, rbf_model
from tests.training.test_marginal_likelihood import botorch, deep, fixed_noise

MODULE = importlib.import_module("sgdgp.training.initialise")


def known(n=1200, lengthscale=0.15, outputscale=1.5, noise=0.05):
    """Draws of a known prior, and a model that knows nothing of it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    kernel = ScaleKernel(MaternKernel(nu=1.5)).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = lengthscale, outputscale
    with torch.no_grad():
        covariance = kernel(x).to_dense()
    covariance.diagonal().add_(noise)
    standard = torch.randn(n, generator=generator, dtype=torch.float64)
    y = torch.linalg.cholesky(covariance) @ standard
    return Model(x, y, ScaleKernel(MaternKernel(nu=1.5)))


@pytest.mark.parametrize("kind", ["neighbourhoods", "random"])
def test_it_comes_near_to_the_parameters_that_made_the_data(kind):
    model = known()
    initialise(model, subsets=2, size=200, steps=40, kind=kind)
    kernel = model.covar_module
    found = [kernel.base_kernel.lengthscale, kernel.outputscale, model.likelihood.noise]
    for value, truth in zip(found, (0.15, 1.5, 0.05), strict=True):
        assert abs(math.log(float(value.detach()) / truth)) < math.log(2.0)


def test_one_subset_of_everything_is_a_fit():
    model, truth = rbf_model(), rbf_model()
    initialise(model, subsets=1, size=1000, steps=7)
    fit(truth, steps=7)
    # The rows are in another order.
    assert_same(parameters(model), parameters(truth), rtol=1e-6, atol=1e-8)


def test_positive_parameters_are_averaged_geometrically_and_means_arithmetically(
    monkeypatch,
):
    def told(model, x, y, **settings):
        told.calls += 1
        model.mean_module.constant = float(told.calls)
        model.covar_module.outputscale = 4.0 ** (told.calls - 1)

    told.calls = 0
    monkeypatch.setattr(MODULE, "fit", told)
    model = rbf_model()
    before = parameters(model)
    initialise(model, subsets=3, size=10)
    assert float(model.mean_module.constant.detach()) == pytest.approx(2.0)
    assert float(model.covar_module.outputscale.detach()) == pytest.approx(4.0)
    name = "covar_module.base_kernel.raw_lengthscale"
    torch.testing.assert_close(parameters(model)[name], before[name])


def subset_seen(monkeypatch, **settings):
    seen = []
    monkeypatch.setattr(
        MODULE, "fit", lambda model, x, y, **rest: seen.append((x[0], y))
    )
    model = rbf_model(100)
    initialise(model, **settings)
    return model, seen


def test_a_neighbourhood_is_the_rows_closest_to_one_of_them(monkeypatch):
    model, seen = subset_seen(monkeypatch, subsets=3, size=12)
    x, y = model.train_inputs[0], model.train_targets
    assert len(seen) == 3
    for part, targets in seen:
        centre = part[(part - part[0]).norm(dim=1).argmin()]
        distance = (x - centre).norm(dim=1)
        rows = distance.topk(12, largest=False).indices
        assert torch.equal(part, x[rows])
        assert torch.equal(targets, y[rows])


def test_random_rows_are_drawn_without_replacement(monkeypatch):
    _, seen = subset_seen(monkeypatch, subsets=2, size=60, kind="random")
    for part, _ in seen:
        assert part.shape == part.unique(dim=0).shape == (60, 2)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_data_and_modes_stay_and_frozen_parameters_too():
    model = rbf_model(50).eval()
    model.likelihood.raw_noise.requires_grad_(False)
    x, y = model.train_inputs[0].clone(), model.train_targets.clone()
    before = parameters(model)
    initialise(model, subsets=2, size=20, steps=3)
    assert torch.equal(model.train_inputs[0], x)
    assert torch.equal(model.train_targets, y)
    assert not model.training
    after = parameters(model)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"likelihood.noise_covar.raw_noise"}


def test_networks_stay_as_they_are():
    model = deep(torch.nn.Identity()).double()
    before = parameters(model)
    initialise(model, subsets=2, size=30, steps=3)
    for name, value in parameters(model).items():
        assert torch.equal(value, before[name]) is name.startswith("network"), name


def with_missing_targets():
    model = multitask_gp()
    model.train_targets[::3, 1] = math.nan
    return model


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "make", [botorch, fixed_noise, multitask_gp, hadamard_gp, with_missing_targets]
)
def test_other_kinds_of_models_are_fitted_on_subsets_too(make, mode):
    model = make().double().train(mode)
    data_before = [t.clone() for t in (*model.train_inputs, model.train_targets)]
    before = parameters(model)
    initialise(model, subsets=2, size=15, steps=4)
    after = parameters(model)
    assert all(bool(torch.isfinite(p).all()) for p in after.values())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    for now, then in zip(
        (*model.train_inputs, model.train_targets), data_before, strict=True
    ):
        torch.testing.assert_close(now, then, rtol=0.0, atol=0.0, equal_nan=True)


def test_botorchs_units_are_those_of_its_own_fit():
    model, truth = botorch(), botorch()
    initialise(model, subsets=1, size=60, steps=5)
    fit(truth, steps=5)
    assert_same(parameters(model), parameters(truth), rtol=1e-6, atol=1e-8)


def test_fixed_noise_goes_with_its_rows(monkeypatch):
    seen = []
    monkeypatch.setattr(
        MODULE,
        "fit",
        lambda model, x, y, **rest: seen.append((x[0], model.likelihood)),
    )
    model = fixed_noise()
    initialise(model, subsets=2, size=9)
    for x, likelihood in seen:
        assert likelihood.noise.shape == (9,)
        for row, variance in zip(x, likelihood.noise, strict=True):
            place = (model.train_inputs[0] == row).all(1).nonzero().item()
            assert variance == model.likelihood.noise[place]


def test_a_seed_gives_the_same_start():
    found = []
    for seed in (1, 1, 2):
        model = rbf_model()
        initialise(model, subsets=1, size=20, steps=2, seed=seed)
        found.append(parameters(model))
    assert_same(found[0], found[1], rtol=0.0, atol=0.0)
    assert not torch.equal(*(f["mean_module.raw_constant"] for f in found[1:]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"subsets": 0}, ValueError, "subsets"),
        ({"size": 1}, ValueError, "size"),
        ({"steps": 0}, ValueError, "steps"),
        ({"kind": "best"}, ValueError, "kind: expected 'neighbourhoods' or 'random'"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"y": torch.zeros(60)}, ValueError, "x, y: expected both"),
    ],
)
def test_bad_arguments_are_named_before_anything_happens(arguments, error, words):
    model = rbf_model()
    before = parameters(model)
    with pytest.raises(error, match=words):
        initialise(model, **arguments)
    assert_same(parameters(model), before, rtol=0.0, atol=0.0)


def test_a_model_with_nothing_to_average_is_refused():
    network = torch.nn.Linear(2, 2).double()
    model = Model(*data(20, 2), RBFKernel(), network=network)
    for module in (model.likelihood, model.mean_module, model.covar_module):
        module.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters of kernels, means or noise"):
        initialise(model)


def test_it_is_known_by_both_spellings():
    assert sgdgp.initialize is sgdgp.initialise is initialise
