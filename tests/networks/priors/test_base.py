"""What holds for every prior: roots against dense ones, groups, files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgdgp.networks import GPrior, Kronecker, Layerwise
from sgdgp.networks.priors import DiagonalPrior
from sgdgp.tangent import Tangent
from tests.networks.priors.family import (
    SETTINGS,
    Network,
    built,
    dense_root,
    no_probes,
    stored,
)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_adjoint_and_covariance_agree_with_the_dense_root(setting, tangent):
    _, prior = built(setting, tangent)
    root = dense_root(prior)
    z = torch.randn(4, prior.num_weights, dtype=torch.float64).mT
    for found, truth in [
        (prior.root(z), root @ z),
        (prior.root_adjoint(z), root.mT @ z),
        (prior.covariance(z), root @ (root.mT @ z)),
    ]:
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10 * truth.max())
        assert found.mT.is_contiguous()
    torch.testing.assert_close(prior.whiten(prior.root(z)), z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_precisions_scale_the_covariance_group_by_group(setting, tangent):
    unit, prior = built(setting, tangent)
    scale = torch.empty(prior.num_weights, dtype=torch.float64)
    for s, g in zip(prior.groups, prior.group_of, strict=True):
        scale[s] = prior.precisions[g] ** -0.5
    torch.testing.assert_close(dense_root(prior), scale[:, None] * dense_root(unit))
    assert unit.precisions.tolist() == [1.0] * unit.num_groups


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_groups_partition_the_weights(setting, tangent):
    prior, _ = built(setting, tangent)
    covered = [i for s in prior.groups for i in range(s.start, s.stop)]
    assert covered == list(range(tangent.num_weights))
    assert sum(prior.group_sizes) == tangent.num_weights


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_group_sums_are_inner_products_group_by_group(seed, columns):
    tangent = Tangent(Network().double().eval())
    prior = Layerwise("layers").build(tangent, no_probes)
    g = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(columns, prior.num_weights, generator=g).double().mT
        for _ in range(2)
    )
    sums = prior.group_sums(a, b)
    torch.testing.assert_close(sums.sum(0), (a * b).sum(0))
    last = tangent.slices["last.weight"].start
    torch.testing.assert_close(sums[-1], (a[last:] * b[last:]).sum(0))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rewhitened_weights_are_the_same_weights(setting, tangent):
    old, new = built(setting, tangent)
    v = torch.randn(3, old.num_weights, dtype=torch.float64).mT
    torch.testing.assert_close(new.root(new.rewhiten(v, old)), old.root(v))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_stored_prior_comes_back(setting, tangent):
    _, prior = built(setting, tangent)
    same = stored(prior)
    assert type(same) is type(prior)
    assert (same.groups, same.group_of) == (prior.groups, prior.group_of)
    assert torch.equal(dense_root(same), dense_root(prior))


def test_layers_tie_biases_to_weights_and_all_norms_together(tangent):
    prior = Layerwise("layers").build(tangent, no_probes)
    label = {}
    for s, g in zip(prior.groups, prior.group_of, strict=True):
        for name, own in tangent.slices.items():
            if s.start <= own.start < s.stop:
                label[name] = g
    assert label["first.weight"] == label["first.bias"]
    assert label["norm.weight"] == label["norm.bias"] == label["norm2.weight"]
    assert label["first.weight"] != label["kernel.weight"] != label["norm.weight"]
    assert prior.num_groups == 4


def test_a_function_of_names_makes_the_groups(tangent):
    prior = Layerwise(lambda name: name.rpartition(".")[2]).build(tangent, no_probes)
    assert prior.num_groups == 2
    biases = sum(
        s.stop - s.start for n, s in tangent.slices.items() if n.endswith("bias")
    )
    assert prior.group_sizes[1] == biases


def test_precisions_that_do_not_fit_are_refused(tangent):
    prior = Layerwise().build(tangent, no_probes)
    with pytest.raises(ValueError, match=r"expected shape \(10,\)"):
        prior.with_precisions(torch.ones(3))
    with pytest.raises(ValueError, match="positive finite"):
        prior.with_precisions(torch.zeros(10))
    with pytest.raises(ValueError, match="expected slices that partition"):
        DiagonalPrior(5, torch.ones(2), [slice(0, 2), slice(3, 5)])
    with pytest.raises(ValueError, match="end at 5"):
        DiagonalPrior(5, torch.ones(1), [slice(0, 4)])
    with pytest.raises(ValueError, match="rows"):
        prior.root(torch.ones(3, 2).double())


def test_settings_are_checked_at_once():
    with pytest.raises(ValueError, match="groups"):
        Layerwise("kernels")
    with pytest.raises(ValueError, match="floor"):
        GPrior(floor=0)
    with pytest.raises(ValueError, match="probes"):
        Kronecker(probes=0)
