"""Pruning takes as many weights as it says, and those that it says."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.nn.utils import prune as torch_prune

from sgdgp.networks import Categorical, linearise
from sgdgp.networks.sampling import (
    CompactGaussian,
    SymmetryGroup,
    prune,
    pruning_masks,
    sparsity_curve,
)

CRITERIA = ["signal_to_noise", "magnitude", "precision", "random"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def posterior(model: nn.Module) -> CompactGaussian:
    """Around the network, with deviations of its weights' own."""
    generator = torch.Generator().manual_seed(0)
    mean = parameters_to_vector(model.parameters()).detach()
    return CompactGaussian(
        mean,
        0.1 + torch.rand(len(mean), generator=generator),
        mean.new_zeros(len(mean), 0),
    )


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((p == 0).sum()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_as_many_weights_go_as_are_asked_for(criterion: str):
    model = network()
    settings = {"criterion": criterion, "posterior": posterior(model)}
    for sparsity, count in ((0.0, 0), (0.5, 32), (0.99, 63), (1.0, 64)):
        found = zeros(prune(model, sparsity, **settings))
        assert found["0.weight"] + found["2.weight"] == count
        assert found["0.bias"] + found["2.bias"] == 0
    each = zeros(prune(model, 0.75, per_layer=True, **settings))
    assert (each["0.weight"], each["2.weight"]) == (30, 18)
    every = zeros(prune(model, 0.6, biases=True, **settings))
    assert sum(every.values()) == 45
    assert sum(zeros(model).values()) == 0


def test_the_least_of_each_criterion_go():
    model = network()
    around = posterior(model)
    weights = parameters_to_vector(model.parameters()).detach()
    scores = {
        "magnitude": weights.abs(),
        "signal_to_noise": weights.abs() / around.standard_deviation,
        "precision": 1 / around.standard_deviation,
    }
    for criterion, score in scores.items():
        masks = pruning_masks(model, 0.3, criterion, posterior=around, biases=True)
        kept = torch.cat([mask.flatten() for mask in masks.values()])
        assert float(score[kept].min()) >= float(score[~kept].max())
        pruned = prune(model, 0.3, criterion, posterior=around, biases=True)
        torch.testing.assert_close(
            parameters_to_vector(pruned.parameters()), weights * kept
        )


def test_masks_are_those_that_torch_takes():
    model = network()
    masks = pruning_masks(model, 0.4)
    expected = prune(model, 0.4)
    for name, mask in masks.items():
        layer, _, tensor = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(layer), tensor, mask)
    x = torch.randn(4, 5)
    torch.testing.assert_close(model(x), expected(x))


def test_random_is_by_its_seed():
    model = network()
    one, other, again = (
        pruning_masks(model, 0.5, "random", seed=seed)["0.weight"] for seed in (0, 1, 0)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_curve_is_of_the_pruned_networks():
    model = network()
    found = sparsity_curve(
        model, lambda pruned: sum(zeros(pruned).values()), [0.0, 0.25, 1.0]
    )
    assert found == [(0.0, 0), (0.25, 16), (1.0, 64)]


def test_a_plainly_trained_network_is_pruned_by_its_linearised_posterior():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    # The last two inputs say nothing.
    y = x[:, :3].argmax(1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    settings = {"steps": 0, "precision": 0.3, "final_samples": 24, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = linearise(model, Categorical()).fit([(x, y)], **settings)
        around = CompactGaussian.of_posterior(fitted)

    def accuracy(pruned: nn.Module) -> float:
        return float((pruned(x).argmax(1) == y).double().mean())

    curves = {
        criterion: dict(
            sparsity_curve(model, accuracy, [0.0, 0.5], criterion, posterior=around)
        )
        for criterion in ("signal_to_noise", "random")
    }
    assert curves["signal_to_noise"][0.0] == curves["random"][0.0] == accuracy(model)
    assert curves["signal_to_noise"][0.5] > curves["random"][0.5]


def test_a_posterior_of_a_permuted_copy_is_noticed():
    model = network()
    around = posterior(model)
    order = torch.tensor([3, 1, 0, 2, 7, 5, 4, 6])

    def exchanged(rows: Tensor) -> Tensor:
        first, bias, second, last = rows.split([40, 8, 24, 3], dim=1)
        return torch.cat(
            [
                first.unflatten(1, (8, 5))[:, order].flatten(1),
                bias[:, order],
                second.unflatten(1, (3, 8))[:, :, order].flatten(1),
                last,
            ],
            1,
        )

    moved = around.mapped(exchanged)
    with pytest.warns(UserWarning, match="deviations are of another copy"):
        prune(model, 0.5, "precision", posterior=moved)
    settings = {"criterion": "precision", "biases": True}
    group = SymmetryGroup.of(model)
    found = pruning_masks(model, 0.5, posterior=moved, group=group, **settings)
    expected = pruning_masks(model, 0.5, posterior=around, **settings)
    for name, mask in expected.items():
        assert torch.equal(found[name], mask)


def test_bad_input_is_refused():
    model = network()
    with pytest.raises(ValueError, match="criterion: expected one of signal_to_noise"):
        prune(model, 0.5, "std")
    with pytest.raises(ValueError, match="posterior: 'precision' is by its deviations"):
        prune(model, 0.5, "precision")
    with pytest.raises(ValueError, match="sparsity: expected a number from 0 to 1"):
        prune(model, 50)
    other = posterior(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="posterior: expected one of 75 weights"):
        prune(model, 0.5, "precision", posterior=other)
    with pytest.raises(ValueError, match="biases=True prunes others"):
        prune(nn.LayerNorm(3), 0.5)
    own = posterior(model)
    still = replace(own, remainder=0 * own.mean, factors=0 * own.factors)
    with pytest.raises(ValueError, match="posterior: expected positive finite"):
        prune(model, 0.5, "precision", posterior=still)
    with pytest.raises(TypeError, match=r"posterior: .* CompactGaussian\.of\(draws\)"):
        prune(model, 0.5, "precision", posterior=model)
