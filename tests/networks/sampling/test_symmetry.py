"""Members of symmetry groups: applied, undone, composed, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from sgdgp.networks.sampling.symmetry import Symmetry, SymmetryGroup
from sgdgp.tangent import Tangent


def mlp(activation: nn.Module, hidden: int = 5) -> nn.Module:
    """A small network in float64."""
    torch.manual_seed(0)
    layers = nn.Linear(3, hidden), activation, nn.Linear(hidden, 2)
    return nn.Sequential(*layers).double().eval()


def permuted(group: SymmetryGroup, permutation: list[int]) -> Symmetry:
    """A member of a group with one hidden layer."""
    identity = group.identity()
    return Symmetry(
        group, (torch.tensor(permutation),), identity.signs, identity.scales
    )


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.Identity(), nn.GELU()])
def test_flat_weights_of_many_networks_are_moved(activation: nn.Module):
    """All outputs stay to 1e-10 (row A2), and all weights come back to the last bit."""
    network = mlp(activation)
    tangent = Tangent(network)
    group = SymmetryGroup.of(tangent)
    draws = torch.randn(4, 3, tangent.num_weights, dtype=torch.float64)
    member = group.sample(1, 3)
    moved = member.apply(draws)
    x = torch.randn(6, 3, dtype=torch.float64)
    before, after = (
        torch.func.vmap(lambda w: functional_call(network, w, (x,)))(
            tangent.weights_of(rows.flatten(0, 1))
        )
        for rows in (draws, moved)
    )
    assert not torch.equal(moved, draws)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    assert torch.equal(member.inverse().apply(moved), draws)


def test_members_are_composed_in_order():
    group = SymmetryGroup.of(mlp(nn.Identity()))
    one, two = group.sample(1, 4), group.sample(2)
    weights = torch.randn(4, group.num_weights, dtype=torch.float64)
    both = two.compose(one)
    assert torch.equal(both.apply(weights), two.apply(one.apply(weights)))
    back = both.compose(both.inverse())
    assert torch.equal(back.apply(weights), weights)
    assert int(back.total_transpositions.sum()) == 0


def test_signs_and_scales_can_be_left_out():
    group = SymmetryGroup.of(mlp(nn.Identity()))
    member = group.restricted(signs=False, scales=False).sample(3)
    assert bool((member.signs[0] == 1).all() and (member.scales[0] == 1).all())
    member = group.restricted(scales=False).sample(3)
    assert bool((member.signs[0] == -1).any() and (member.scales[0] == 1).all())


def test_transpositions_are_counted():
    """0 of the identity, 1 of an exchange, n - 1 of a cycle (row A1)."""
    group = SymmetryGroup.of(mlp(nn.Tanh(), 7))
    cases = {
        (0, 1, 2, 3, 4, 5, 6): 0,
        (0, 1, 5, 3, 4, 2, 6): 1,
        (1, 2, 3, 4, 5, 6, 0): 6,
        (1, 0, 3, 2, 5, 6, 4): 4,
    }
    for permutation, count in cases.items():
        member = permuted(group, list(permutation))
        assert int(member.transpositions["0"]) == count
        assert int(member.total_transpositions) == count


def test_random_permutations_take_n_minus_harmonic_transpositions():
    group = SymmetryGroup.of(mlp(nn.Tanh(), 12))
    counts = group.sample(0, 4000).transpositions["0"].double()
    expected = group.expected_transpositions["0"]
    assert expected == pytest.approx(12 - 3.1032, abs=1e-4)
    error = float(counts.std()) / 4000**0.5
    assert abs(float(counts.mean()) - expected) < 4 * error


def test_a_group_by_hand_is_the_traced_one():
    network = nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    )
    network = network.double().eval()
    x = torch.randn(2, 1, 5, dtype=torch.float64)
    tensors = [("0.weight", 0), ("0.bias", 0), ("3.weight", 1, 4)]
    group = SymmetryGroup.given(network, {"0": ("odd", tensors)}, x)
    weights = torch.randn(2, group.num_weights, dtype=torch.float64)
    moved = group.sample(4).apply(weights)
    assert torch.equal(moved, SymmetryGroup.of(network, x).sample(4).apply(weights))


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({}, "expected a hidden layer"),
        ({"h": ("even", [("0.weight", 0)])}, "expected one of .*'odd'.* found 'even'"),
        ({"h": ("odd", [("1.weight", 0)])}, "no weights '1.weight'; there are"),
        ({"h": ("odd", [("0.bias", 1)])}, "'0.bias' of shape .5,. has no axis 1"),
        ({"h": ("odd", [("0.weight", 0, 2)])}, "entries for each unit that divide 5"),
        ({"h": ("odd", [("0.weight", 0), ("2.bias", 0)])}, "expected one number of"),
        ({"h": ("odd", [("0.weight", 0), ("0.bias", 0)])}, "its outputs change by"),
    ],
)
def test_a_group_by_hand_that_does_not_fit_is_refused(axes, words):
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=words):
        SymmetryGroup.given(mlp(nn.Tanh()), axes, x)


def test_weights_of_another_network_are_refused():
    member = SymmetryGroup.of(mlp(nn.Tanh())).sample()
    with pytest.raises(ValueError, match="expected 32 weights along the last axis"):
        member.apply(torch.zeros(2, 31))
    others = SymmetryGroup.of(mlp(nn.Tanh(), hidden=4))
    with pytest.raises(ValueError, match=r"other: expected hidden units .'0': 5."):
        member.compose(others.sample())
    with pytest.raises(ValueError, match=r"'0.weight' of shape .5, 3. as the group's"):
        member.apply_to(others.network)
    with pytest.raises(ValueError, match="symmetry: expected one member, found a"):
        others.sample(count=2).apply_to(others.network)
