"""The sampler that BoTorch finds for path posteriors."""

from __future__ import annotations

import torch
from botorch.models.model import ModelList
from botorch.sampling.get_sampler import get_sampler
from botorch.sampling.list_sampler import ListSampler

from sgdgp.botorch import PathSampler
from tests.botorch import problems
from tests.botorch.problems import SAMPLES, inputs, pathwise

X = inputs(5, 7, 3)


def test_botorch_finds_it():
    posterior = pathwise(problems.single()).posterior(X)
    sampler = get_sampler(posterior, sample_shape=torch.Size([4]))
    assert isinstance(sampler, PathSampler)
    torch.testing.assert_close(sampler(posterior), posterior.values[:4])


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


def test_models_in_a_list_are_sampled_side_by_side():
    model = ModelList(pathwise(problems.single()), pathwise(problems.batched()))
    posterior = model.posterior(X)
    sampler = get_sampler(posterior, sample_shape=torch.Size([4]), seed=0)
    assert isinstance(sampler, ListSampler)
    values = [part.values[:4] for part in posterior.posteriors]
    torch.testing.assert_close(sampler(posterior), torch.cat(values, dim=-1))
