"""``PathPosterior``: numbered functions, their mirror images, lazy evaluation."""

from __future__ import annotations

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.model import ModelList
from botorch.models.transforms import Standardize
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.sampling.list_sampler import ListSampler
from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler

from sgdgp.botorch import PathSampler
from tests.botorch import problems
from tests.botorch.problems import SAMPLES, inputs, pathwise

X = inputs(5, 7, 3)


@pytest.fixture(scope="module")
def model():
    """Two outputs."""
    return pathwise(problems.batched())


def _numbered(posterior, numbers):
    index = torch.tensor(numbers)
    return posterior.rsample_from_base_samples(index.shape, index)


def test_functions_are_chosen_by_number(model):
    values = model.posterior(X).values
    for numbers in ([3, 0, 3], list(range(SAMPLES)), [SAMPLES - 1]):
        # Few functions are evaluated alone, many together.
        chosen = _numbered(model.posterior(X), numbers)
        torch.testing.assert_close(chosen, values[numbers])
    index = torch.tensor([[1, 2], [4, 1]])
    chosen = model.posterior(X).rsample_from_base_samples(index.shape, index)
    torch.testing.assert_close(chosen, values[index])


def test_numbers_beyond_the_last_are_mirror_images(model):
    posterior = model.posterior(X)
    images = _numbered(posterior, [SAMPLES + 2, 2 * SAMPLES - 1])
    expected = 2 * posterior.mean - posterior.values[[2, SAMPLES - 1]]
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(
        _numbered(posterior, [2 * SAMPLES]), posterior.values[:1]
    )
    everything = _numbered(posterior, list(range(2 * SAMPLES)))
    torch.testing.assert_close(everything.mean(0), posterior.mean)
    torch.testing.assert_close(everything.var(0, correction=0), posterior.variance)


def test_mirror_images_pass_through_the_transform():
    posterior = pathwise(problems.single(log=True)).posterior(X)
    image = _numbered(posterior, [SAMPLES + 2]).log()
    own = posterior.values[2:3].log()
    other = _numbered(posterior, [SAMPLES + 3]).log()
    torch.testing.assert_close(
        image + own, other + posterior.values[3:4].log(), rtol=1e-9, atol=1e-9
    )


def test_draws_walk_through_all_functions_before_any_repeats():
    model = pathwise(problems.single())
    draws = [
        model.posterior(X).rsample(torch.Size([n])) for n in (1, 50, 2 * SAMPLES - 51)
    ]
    first = model.posterior(X).rsample()
    everything = torch.cat(draws)
    assert everything.shape[0] == 2 * SAMPLES
    assert len(everything.flatten(1).unique(dim=0)) == 2 * SAMPLES
    torch.testing.assert_close(first, everything[:1])
    # Without gradients, and as many as asked for.
    assert not model.posterior(X.clone().requires_grad_()).sample().requires_grad
    assert model.posterior(X).rsample(torch.Size([300])).shape == (300, 3, 5, 1)


def test_nothing_is_evaluated_before_it_is_asked_for(model):
    wrong = model.posterior(X.float())
    assert wrong._extended_shape(torch.Size([2])) == (2, 3, 5, 2)
    with pytest.raises(ValueError, match="float64"):
        _ = wrong.mean


def test_every_sampler_of_botorch_gives_distinct_functions(model):
    posterior = model.posterior(X)
    for kind in (SobolQMCNormalSampler, IIDNormalSampler):
        sampler = kind(torch.Size([2 * SAMPLES]), seed=3)
        samples = sampler(posterior)
        assert samples.shape == (2 * SAMPLES, 3, 5, 2)
        assert len(samples.flatten(1).unique(dim=0)) == 2 * SAMPLES
        torch.testing.assert_close(samples, sampler(model.posterior(X)))


def test_gradients_are_those_of_finite_differences(model):
    x = X[0, :2].clone().requires_grad_()
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    for value in (
        lambda p: p.mean.sum(),
        lambda p: p.variance.sum(),
        lambda p: p.values[5].sum(),
        lambda p: _numbered(p, [3]).sum(),
    ):
        (slope,) = torch.autograd.grad(value(model.posterior(x)), x)
        step = 1e-5 * direction
        with torch.no_grad():
            up, down = (value(model.posterior(x + s)) for s in (step, -step))
        torch.testing.assert_close(
            (slope @ direction).sum(), (up - down) / 2e-5, rtol=1e-5, atol=1e-7
        )


def test_quantiles_are_those_of_the_distribution():
    posterior = pathwise(problems.single()).posterior(X)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    low, middle, high = posterior.quantile(levels)
    torch.testing.assert_close(middle, posterior.mean)
    torch.testing.assert_close(
        high - low, 2 * 1.6448536269514722 * posterior.variance.sqrt()
    )
    logged = pathwise(problems.single(log=True)).posterior(X)
    median = logged.quantile(levels[1:2])[0]
    latent = logged.values.log()
    images = _numbered(logged, list(range(SAMPLES, 2 * SAMPLES))).log()
    torch.testing.assert_close(
        median.log(), (latent + images)[0] / 2, rtol=1e-2, atol=1e-2
    )


def test_logarithms_of_all_samples_have_the_exact_spread():
    definition = problems.single(log=True)
    model = pathwise(definition, num_features=16)
    posterior = model.posterior(X)
    logs = posterior.rsample(torch.Size([2 * SAMPLES])).log()
    latent = definition.posterior(X)._posterior
    torch.testing.assert_close(logs.mean(0), latent.mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        logs.var(0, correction=0), latent.variance, rtol=1e-6, atol=1e-9
    )
    everything = logs.exp()
    torch.testing.assert_close(posterior.mean, everything.mean(0))
    torch.testing.assert_close(posterior.variance, everything.var(0, correction=0))


def test_a_joint_distribution_in_closed_form_is_refused(model):
    posterior = model.posterior(X)
    assert not hasattr(posterior, "distribution")
    for name in ("distribution", "mvn"):
        with pytest.raises(AttributeError, match=r"qMaxValueEntropy.*definition"):
            getattr(posterior, name)


def test_base_samples_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match="base_samples"):
        model.posterior(X).rsample_from_base_samples(
            torch.Size([3]), torch.zeros(2, dtype=torch.long)
        )


def test_it_answers_as_botorchs_ensemble_posterior_of_its_values(model):
    posterior = model.posterior(X)
    ensemble = EnsemblePosterior(posterior.values.movedim(0, -3))
    for shape in (torch.Size(), torch.Size([2]), torch.Size([2, 3])):
        assert posterior._extended_shape(shape) == ensemble._extended_shape(shape)
    assert (posterior.device, posterior.dtype) == (ensemble.device, ensemble.dtype)
    assert posterior.batch_shape == ensemble.batch_shape
    # The ensemble's mean has a Monte-Carlo error of sd / 8.
    error = (posterior.mean - ensemble.mean) / posterior.variance.sqrt()
    assert error.abs().max() < 4 / SAMPLES**0.5
    # All functions and images have the posterior's moments, whatever their features.
    everything = posterior.rsample(torch.Size([2 * SAMPLES]))
    ensemble = EnsemblePosterior(everything.movedim(0, -3))
    torch.testing.assert_close(posterior.mean, ensemble.mean)
    correction = 2 * SAMPLES / (2 * SAMPLES - 1)
    torch.testing.assert_close(correction * posterior.variance, ensemble.variance)


def test_no_points_have_no_values(model):
    posterior = model.posterior(X[:, :0])
    assert posterior.rsample(torch.Size([4])).shape == (4, 3, 0, 2)
    assert posterior.mean.shape == (3, 0, 2)


@pytest.fixture
def many_rows(monkeypatch):
    """As if the data were too many for exact covariances."""
    monkeypatch.setattr("sgdgp.posterior.variances.EXACT_ROWS", 10)


def test_botorch_finds_the_sampler_of_functions(many_rows):
    posterior = pathwise(problems.single()).posterior(X)
    sampler = get_sampler(posterior, sample_shape=torch.Size([4]))
    assert isinstance(sampler, PathSampler)
    torch.testing.assert_close(sampler(posterior), posterior.values[:4])


def test_normal_samplers_number_functions_by_the_order_of_their_draws(many_rows):
    posterior = pathwise(problems.batched()).posterior(X)
    samples = IIDNormalSampler(torch.Size([2 * SAMPLES]), seed=3)(posterior)
    assert samples.shape == (2 * SAMPLES, 3, 5, 2)
    assert len(samples.flatten(1).unique(dim=0)) == 2 * SAMPLES
    torch.testing.assert_close(samples.mean(0), posterior.mean)


DEFINITIONS = {
    "one output": problems.single,
    "a logarithm": lambda: problems.single(log=True),
    "two outputs": problems.batched,
    "different data": problems.listed,
}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_few_rows_are_sampled_as_botorch_samples_its_own_models(name, noisy):
    definition = DEFINITIONS[name]().eval()
    model = pathwise(definition, num_samples=2, num_features=16)
    ours = model.posterior(X, observation_noise=noisy)
    theirs = definition.posterior(X, observation_noise=noisy)
    sampler = get_sampler(ours, sample_shape=torch.Size([8]), seed=5)
    assert isinstance(sampler, SobolQMCNormalSampler)
    expected = SobolQMCNormalSampler(torch.Size([8]), seed=5)(theirs)
    torch.testing.assert_close(sampler(ours), expected, rtol=1e-9, atol=1e-9)


def test_few_rows_of_correlated_outputs_are_sampled_with_their_covariance():
    model = pathwise(problems.correlated(), num_samples=2, num_features=16)
    posterior = model.posterior(X[1:])
    # The columns of a root of the covariance.
    normals = torch.eye(10, dtype=torch.float64).reshape(10, 1, 5, 2)
    root = posterior.rsample_from_base_samples(torch.Size([10]), normals)
    root = (root - posterior.mean).flatten(2)
    exact = model.posteriors[0].predict(X[1]).covariance_matrix
    torch.testing.assert_close(root[:, 0].mT @ root[:, 0], exact, rtol=1e-7, atol=1e-9)
    turned = posterior.rsample_from_base_samples(torch.Size([10]), normals.flip(0))
    torch.testing.assert_close(
        turned.flip(0).flatten(2) - posterior.mean.flatten(1), root
    )


@pytest.mark.parametrize("name", ["one output", "two outputs"])
def test_fantasies_of_few_rows_are_sampled_as_botorch_samples_its_own(name):
    definition = DEFINITIONS[name]().eval()
    model = pathwise(definition, num_samples=2, num_features=16)
    definition.posterior(X)  # which fills the caches that its fantasies need
    u = inputs(2, 3, 3)
    found = []
    for own in (model, definition):
        fantasies = own.fantasize(u, SobolQMCNormalSampler(torch.Size([4]), seed=1))
        sampler = SobolQMCNormalSampler(torch.Size([8]), seed=5)
        found.append(sampler(fantasies.posterior(X)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_duplicates_are_sampled_in_any_units(scale, dtype):
    definition = problems.single()
    x, y = definition.train_inputs[0] * 4, problems.targets(inputs(25))
    definition = SingleTaskGP(
        x.to(dtype), (scale * y).to(dtype), outcome_transform=Standardize(1)
    )
    points = inputs(1, 7).repeat(4, 1).to(dtype)
    points[3] += 1e-6
    posterior = pathwise(definition).posterior(points)
    samples = SobolQMCNormalSampler(torch.Size([512]), seed=3)(posterior)
    ratio = samples.std(0) / posterior.variance.sqrt()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.02, atol=0)


def test_normals_of_another_shape_are_refused(model):
    normals = torch.zeros(3, 1, 4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"base_samples: expected.*\(3, 3, 5, 2\)"):
        model.posterior(X).rsample_from_base_samples(torch.Size([3]), normals)


def test_the_same_functions_are_used_at_all_points_and_in_all_calls():
    model = pathwise(problems.single())
    sampler = PathSampler(torch.Size([6]), seed=2)
    once = sampler(model.posterior(X))
    model.posterior(X).rsample(torch.Size([5]))  # which walks on by itself
    torch.testing.assert_close(sampler(model.posterior(X[1, 3:4])), once[:, 1, 3:4])
    mixed = sampler(model.posterior(X.flip(0)))
    torch.testing.assert_close(mixed, once.flip(1))


def test_all_functions_are_used_before_any_repeats():
    posterior = pathwise(problems.single()).posterior(X)
    samples = PathSampler(torch.Size([2, SAMPLES]))(posterior)
    flat = samples.flatten(0, 1).flatten(1)
    assert len(flat.unique(dim=0)) == 2 * SAMPLES
    twice = PathSampler(torch.Size([4 * SAMPLES]))(posterior)
    torch.testing.assert_close(twice[: 2 * SAMPLES], twice[2 * SAMPLES :])


def test_seeds_start_elsewhere_and_do_not_touch_the_global_generator():
    posterior = pathwise(problems.single()).posterior(X)
    before = torch.random.get_rng_state()
    first, second = (PathSampler(torch.Size([8]), seed=s)(posterior) for s in (0, 1))
    torch.testing.assert_close(torch.cat([first, second]), posterior.values[:16])
    PathSampler(torch.Size([8]))
    assert torch.equal(before, torch.random.get_rng_state())


def test_models_in_a_list_are_sampled_side_by_side(many_rows):
    model = ModelList(pathwise(problems.single()), pathwise(problems.batched()))
    posterior = model.posterior(X)
    sampler = get_sampler(posterior, sample_shape=torch.Size([4]), seed=0)
    assert isinstance(sampler, ListSampler)
    values = [part.values[:4] for part in posterior.posteriors]
    torch.testing.assert_close(sampler(posterior), torch.cat(values, dim=-1))
