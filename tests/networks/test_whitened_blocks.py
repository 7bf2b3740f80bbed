"""Kronecker-factored posteriors against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks import (
    Categorical,
    Gaussian,
    Isotropic,
    curvature,
    linearise,
    load,
    whitened_blocks,
)
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.stream import stream_of
from sgdgp.networks.whitened_blocks import kronecker_blocks
from sgdgp.tangent import Tangent
from tests.networks.kinds import KINDS, inputs_of, network_of

QUICK = {"num_samples": 4, "steps": 4, "final_samples": 8, "progress": False}


def system_of(network, x, y, likelihood, precision=0.5):
    tangent = Tangent(network)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    data = TangentData(tangent, stream_of(loader, tangent.device))
    prior = Isotropic().build(tangent, lambda count: iter(()))
    prior = prior.with_precisions(torch.tensor([precision], dtype=x.dtype))
    return WeightSystem(data, prior, likelihood, data.network_outputs)


def linear_layer():
    """A layer whose curvature is a Kronecker product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    return nn.Linear(4, 3).double().eval(), x, y


def inverse_of(blocks, size: int):
    """(phi^T phi + I)^-1 as the blocks have it, their roots applied twice."""
    found = torch.eye(size, dtype=torch.float64)
    for _ in range(2):
        rows = torch.empty_like(found)
        for block in blocks:
            block.layer.put(block.inverse_root(block.layer.take(found)), rows)
        found = rows
    return found


def test_a_linear_layer_is_exact():
    system = system_of(*linear_layer(), Gaussian(noise=0.3))
    exact = torch.linalg.inv(system.gram + torch.eye(15))
    blocks = kronecker_blocks(system, seed=0)
    torch.testing.assert_close(inverse_of(blocks, 15), exact)
    shares = torch.empty(1, 15, dtype=torch.float64)
    for block in blocks:
        block.layer.put(block.shares().unsqueeze(0), shares)
    torch.testing.assert_close(shares[0], 1 - exact.diagonal())


def test_the_prior_is_no_part_of_the_factors():
    system = system_of(*linear_layer(), Gaussian(noise=0.3), precision=1e12)
    torch.testing.assert_close(
        inverse_of(kronecker_blocks(system, seed=0), 15),
        torch.eye(15, dtype=torch.float64),
        rtol=1e-7,
        atol=1e-7,
    )


@pytest.mark.parametrize("largest", [4096, 3], ids=["full", "diagonal sides"])
def test_random_rows_have_the_moments_of_all_of_them(monkeypatch, largest):
    monkeypatch.setattr(whitened_blocks, "LARGEST_FACTOR", largest)
    monkeypatch.setattr(whitened_blocks, "_PROBES", 2**14)
    network, x, y = linear_layer()
    expected = inverse_of(
        kronecker_blocks(system_of(network, x, y, Gaussian(noise=0.3)), 0), 15
    )
    monkeypatch.setattr(curvature, "_KEPT_NUMBERS", 0)
    system = system_of(network, x, y, Gaussian(noise=0.3))
    assert not system.data.keeps_jacobian
    found = inverse_of(kronecker_blocks(system, seed=1), 15)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_in_one_block(kind: str):
    network, _ = network_of(kind)
    x = inputs_of(kind, 6)
    y = torch.arange(6) % 3
    system = system_of(network, x, y, Categorical())
    rows = torch.randn(2, system.num_weights, dtype=torch.float64)
    out = torch.full_like(rows, torch.nan)
    for block in kronecker_blocks(system, seed=0):
        block.layer.put(block.layer.take(rows), out)
    assert torch.equal(out, rows)
    # Factors keep the trace of each block, and so of the whole.
    total = sum(float(b.values.sum()) for b in kronecker_blocks(system, seed=0))
    assert total == pytest.approx(float(system.gram.trace()))


@pytest.mark.filterwarnings("ignore:Learning has not settled")
@pytest.mark.parametrize("mean", ["network", "linear", None])
def test_a_fit_is_near_the_exact_one_and_all_that_follows_works(mean, tmp_path):
    network, x, y = linear_layer()
    data = TensorDataset(x, y)
    linear = linearise(network, Gaussian(), Isotropic(), mean=mean)
    settings = {**QUICK, "final_samples": 256}
    exact = linear.fit(data, **settings, solver="cholesky")
    found = linear.fit(data, **settings, solver="kronecker")
    assert found.mean_of == exact.mean_of
    torch.testing.assert_close(found.precisions, exact.precisions, rtol=0.1, atol=0)
    assert found.noise == pytest.approx(exact.noise, rel=0.05)
    one, other = found.predict(x), exact.predict(x)
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=0.05)
    ratio = one.variance / other.variance
    assert 0.6 < float(ratio.min()) <= float(ratio.max()) < 1.7
    assert float(ratio.log().mean().abs()) < 0.1
    evidence = found.log_marginal_likelihood(data)
    assert evidence.value == pytest.approx(
        exact.log_marginal_likelihood(data).value, abs=0.5
    )
    found.calibrate(data)
    found.save(tmp_path / "posterior")
    again = load(tmp_path / "posterior", network)
    torch.testing.assert_close(again.samples(x), found.samples(x))


@pytest.mark.filterwarnings("ignore:Learning has not settled")
def test_an_interrupted_fit_says_so_and_a_seed_gives_the_same_samples():
    network, x, _ = linear_layer()
    data = TensorDataset(x, torch.arange(30) % 3)
    linear = linearise(network, Categorical())
    settings = {**QUICK, "solver": "kronecker"}
    one, other = (linear.fit(data, **settings) for _ in range(2))
    assert torch.equal(one.weight_samples, other.weight_samples)
    stopped = linear.fit(data, **settings, callback=lambda progress: True)
    assert stopped.reason == "interrupted"
