"""Draws that were scattered over symmetric copies of a mode are brought together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sgdgp.networks.sampling.alignment import align, barrier, match_weights
from sgdgp.networks.sampling.draws import Draws
from sgdgp.networks.sampling.symmetry import SymmetryGroup

X = torch.randn(20, 3, dtype=torch.float64)


def network_of(*hidden: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    """Dense, in float64."""
    torch.manual_seed(0)
    sizes, layers = (3, *hidden, 2), []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    return nn.Sequential(*layers[:-1]).double().eval()


def scrambled(group: SymmetryGroup, chains: int = 3, draws: int = 20, sd: float = 0.02):
    """Mean weights, draws around them, and the same scattered over copies."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(group.num_weights, generator=generator, dtype=torch.float64)
    noise = torch.randn(
        chains, draws, len(mean), generator=generator, dtype=torch.float64
    )
    there = mean + sd * noise
    moved = group.sample(1, chains * draws).unflattened(chains, draws).apply(there)
    return mean, there, Draws(moved, group.names, group.shapes)


@pytest.mark.parametrize("hidden", [(8,), (6, 5)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_scrambled_draws_are_brought_back(hidden, activation):
    """To the mean that they were drawn about, to the last bit (row A1)."""
    group = SymmetryGroup.of(network_of(*hidden, activation=activation))
    group = group.restricted(scales=False)
    mean, there, draws = scrambled(group)
    aligned, report = align(draws, group, mean)
    assert torch.equal(aligned.weights, there)
    assert torch.equal(report.symmetries.apply(draws.weights), there)
    assert report.variance_after < 1e-3 * report.variance_before
    for axis in group.axes:
        counts = report.transpositions[axis.name]
        assert counts.shape == (3, 20)
        expected = group.expected_transpositions[axis.name]
        assert abs(float(counts.double().mean()) - expected) < 1


@pytest.mark.parametrize("how", [{}, {"match": "activations", "x": X}])
@pytest.mark.parametrize("reference", ["procrustes", "first"])
def test_without_a_reference_they_are_brought_to_one_copy(how, reference):
    group = SymmetryGroup.of(network_of(6, 5))
    mean, there, draws = scrambled(group)
    aligned, report = align(draws, group, reference, **how)
    own = aligned.flat.mean(0)
    back = match_weights(own, mean, group)
    torch.testing.assert_close(
        back.apply(own), there.flatten(0, 1).mean(0), rtol=0, atol=1e-12
    )
    assert report.variance_reduction > 0.999
    assert float(report.r_hat_after.max()) < 1.2
    assert report.warnings == ()
    assert "2: 5 units, 2." in str(report)
    assert "transpositions (random: 2.7)" in str(report)


def test_draws_with_signs_need_signs():
    group = SymmetryGroup.of(network_of(4))
    _, _, draws = scrambled(group)
    _, report = align(draws, group.restricted(signs=False))
    assert report.variance_reduction < 0.9
    assert any("which is which is arbitrary" in words for words in report.warnings)


def test_scales_are_undone_if_asked():
    group = SymmetryGroup.of(network_of(6, activation=nn.ReLU))
    _, _, draws = scrambled(group)
    _, report = align(draws, group)
    assert report.variance_reduction < 0.9
    aligned, report = align(draws, group, canonical=True)
    assert report.variance_reduction > 0.999
    weights = aligned.flat[0]
    ins, outs = weights[:24], weights[24:36].view(2, 6)
    norms = torch.cat([ins[:18].view(6, 3), ins[18:, None]], dim=1).norm(dim=1)
    torch.testing.assert_close(norms, outs.norm(dim=0))


def test_rounds_never_raise_the_variance():
    """Draws as spread as their units: nothing to find, but nothing lost."""
    group = SymmetryGroup.of(network_of(5))
    _, _, draws = scrambled(group, sd=1.0)
    _, first = align(draws, group, "first")
    _, rounds = align(draws, group)
    assert rounds.variance_after <= first.variance_after <= first.variance_before


def test_chains_in_different_modes_are_reported():
    """The negative case: copies of two networks, not of one."""
    group = SymmetryGroup.of(network_of(6))
    _, _, draws = scrambled(group)
    _, _, others = scrambled(group)
    other = others.weights + 0.5 * torch.randn(
        group.num_weights, generator=torch.Generator().manual_seed(7)
    )
    both = Draws(torch.cat([draws.weights, other]), draws.names, draws.shapes)
    both.outputs = draws.weights.new_tensor([0.0, 0.1, 0.2]).repeat(6, 20, 1)
    both.outputs += 0.01 * torch.randn(both.outputs.shape)
    _, report = align(both, group)
    assert any("these chains are in different modes" in w for w in report.warnings)
    assert any("outputs agree" in words for words in report.warnings)
    assert "different modes" in str(report)


def test_chains_that_drift_are_reported():
    """By themselves, and beside others that are elsewhere."""
    group = SymmetryGroup.of(network_of(3)).restricted(signs=False)
    _, there, draws = scrambled(group)
    steps = torch.linspace(0, 0.5, 20, dtype=torch.float64)[:, None]
    for apart in (0.0, 5.0):
        moving = there + steps
        moving[0] += apart
        found = Draws(moving, draws.names, draws.shapes)
        _, report = align(found, group)
        assert any("they have not mixed" in words for words in report.warnings)
        modes = any("in different modes" in words for words in report.warnings)
        assert modes == (apart > 0)


def test_convolutions_with_batch_norms_are_matched_with_their_buffers():
    layers = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(20, 2)).double().eval()
    network[1].running_mean.normal_()
    network[1].running_var.exponential_()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    group = SymmetryGroup.of(network, x, buffers="permuted")
    moved = group.sample(5).apply_to(network)
    there, here = (
        torch.cat([p.detach().flatten() for p in n.parameters()])
        for n in (network, moved)
    )
    back = match_weights(here, there, group).apply_to(moved)
    for name, value in back.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


def test_the_barrier_of_a_parabola():
    def losses(rows):
        return 1 - rows.square().sum(-1)

    ends = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0])
    assert barrier(losses, *ends) == pytest.approx(1.0)
    assert barrier(lambda rows: -losses(rows), *ends) == 0.0
    with pytest.raises(ValueError, match=r"found shapes .2,. and .3,."):
        barrier(losses, ends[0], torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"draws": torch.zeros(2, 3)}, TypeError, "draws: expected Draws"),
        ({"group": None}, TypeError, r"SymmetryGroup.of\(posterior\)"),
        ({"reference": "mean"}, ValueError, "'procrustes', 'first' or flat weights"),
        ({"reference": torch.zeros(4)}, ValueError, "expected 44 weights along"),
        ({"match": "cosine"}, ValueError, "'weights' or 'activations', found 'cosine'"),
        ({"match": "activations"}, ValueError, "x: expected inputs"),
        ({"reference": np.zeros(44)}, ValueError, "'first' or flat weights"),
        ({"match": "activations", "x": X * torch.nan}, ValueError, "x: .* finite"),
    ],
)
def test_what_cannot_be_aligned_is_refused(change, error, words):
    group = SymmetryGroup.of(network_of(7))
    _, _, draws = scrambled(group)
    with pytest.raises(error, match=words):
        align(**{"draws": draws, "group": group, **change})


def test_one_draw_and_draws_of_another_architecture_are_refused():
    group = SymmetryGroup.of(network_of(7))
    _, _, draws = scrambled(group, chains=1, draws=1)
    with pytest.raises(ValueError, match=r"found one draw.*match_weights"):
        align(draws, group)
    _, _, draws = scrambled(SymmetryGroup.of(network_of(5)))
    words = r"'0.weight' of shape .7, 3. as the group's.*found .5, 3..*architecture"
    with pytest.raises(ValueError, match=words):
        align(draws, group)


@pytest.mark.parametrize(("chains", "draws"), [(2, 4), (2, 10), (4, 10)])
def test_few_draws_of_one_mode_are_no_disagreement(chains: int, draws: int):
    """R-hat of the worst of many weights is large by chance alone."""
    group = SymmetryGroup.of(network_of(40))
    _, _, found = scrambled(group, chains, draws)
    assert align(found, group, match="activations", x=X)[1].warnings == ()


def test_one_network_many_times_has_no_variance():
    group = SymmetryGroup.of(network_of(7))
    weights = torch.randn(group.num_weights, dtype=torch.float64)
    draws = Draws(weights.expand(2, 5, -1), group.names, group.shapes)
    _, report = align(draws, group)
    assert report.variance_reduction == 0
    assert "variance 0 -> 0" in str(report)
