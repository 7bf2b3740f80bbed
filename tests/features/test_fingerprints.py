"""Signed hashes: unbiased, of the stated variance, and always the same."""

from __future__ import annotations

import math

import gpytorch
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from gpytorch.kernels import IndexKernel, RBFKernel, ScaleKernel

import sgdgp
from sgdgp.features import TanimotoFeatures, draw_prior, has_features, random_features
from sgdgp.features.fingerprints import NoInputGradientError
from sgdgp.kernels import TanimotoKernel
from tests.kernels.test_tanimoto import DIM, by_definition, fingerprints, model_of
from tests.stored import stored

SEEDS = 40


def errors(num_features, x, seeds=SEEDS):
    """Errors of the kernel (seeds, pairs) over the pairs above the diagonal."""
    truth = by_definition(x, x)
    above = torch.triu(torch.ones_like(truth), 1).bool()
    found = []
    for seed in range(seeds):
        phi = TanimotoFeatures(seed, x.shape[1], num_features).features(x)
        found.append((phi @ phi.mT - truth)[above])
    return torch.stack(found), truth[above]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("num_features", [16, 256])
def test_the_mean_is_the_kernel_and_the_variance_that_of_signs(num_features, whole):
    # A feature contributes 1 with probability T and a fair sign otherwise: mean T,
    # variance 1 - T^2, and M times less for M of them.
    x = fingerprints(12, seed=4, whole=whole)
    error, truth = errors(num_features, x)
    deviation = (1 - truth.square()).clamp_min(1e-12).sqrt()
    z = error * math.sqrt(num_features) / deviation
    # The seeds are independent, the pairs of one seed are not.
    bias = z.mean(1)
    assert abs(float(bias.mean())) < 4 * float(bias.std()) / math.sqrt(SEEDS)
    spread = z.square().mean(1)
    away = abs(float(spread.mean()) - 1)
    assert away < 4 * float(spread.std()) / math.sqrt(SEEDS)
    assert float(spread.std()) / math.sqrt(SEEDS) < 0.15  # so that this says something


def test_the_error_falls_as_one_over_the_root_of_the_features():
    x = fingerprints(15, seed=2)
    counts = [8, 32, 128, 512, 2048]
    logs, bars = [], []
    for count in counts:
        squares = errors(count, x, seeds=24)[0].square().mean(1)
        logs.append(0.5 * math.log(float(squares.mean())))
        bars.append(0.5 * float(squares.std() / squares.mean()) / math.sqrt(24))
    places = torch.tensor([math.log(count) for count in counts])
    centred = places - places.mean()
    weights = centred / centred.square().sum()
    slope = float((weights * torch.tensor(logs)).sum())
    bar = float((weights * torch.tensor(bars)).square().sum().sqrt())
    assert bar < 0.02
    assert abs(slope + 0.5) < 4 * bar


def test_levels_far_apart_do_not_collide():
    # One bin, so that only the level decides: T = 1 / 2, 1 / 9, 1 / 65.
    x = torch.tensor([[1.0], [2.0], [9.0], [65.0]]).double()
    phi = torch.cat([TanimotoFeatures(s, 1, 4096).features(x) for s in range(10)], 1)
    found = (phi @ phi.mT / 10)[0]
    expected = torch.tensor([1.0, 1 / 2, 1 / 9, 1 / 65]).double()
    assert float((found - expected).abs().max()) < 4 / math.sqrt(40960)


def test_the_diagonal_is_exact_and_empty_fingerprints_have_a_bin():
    x = torch.cat([fingerprints(9), torch.zeros(2, DIM).double()])
    for dtype in (torch.float32, torch.float64):
        phi = TanimotoFeatures(3, DIM, 1000).features(x.to(dtype))
        assert phi.dtype == dtype
        torch.testing.assert_close(phi.square().sum(1), torch.ones(11, dtype=dtype))
        assert torch.equal(phi[9], phi[10])
    assert abs(float((phi[9] * phi[0]).sum())) < 4 / math.sqrt(1000)


@hypothesis.given(
    seed=st.integers(0, 2**62 - 1),
    num_features=st.integers(1, 300),
    order=st.permutations(range(8)),
    whole=st.booleans(),
)
def test_a_molecule_has_the_same_features_in_any_company(
    seed, num_features, order, whole
):
    x = fingerprints(8, whole=whole)
    features = TanimotoFeatures(seed, DIM, num_features)
    together = features.features(x)
    alone = torch.cat([features.features(row) for row in x.split(1)])
    assert torch.equal(together, alone)
    assert torch.equal(features.features(x[list(order)]), together[list(order)])
    if whole:
        low = features.features(x.float())
        assert torch.equal(low > 0, together > 0)


def test_features_of_a_seed_never_change():
    # Files hold the seed alone: other numbers here are another format.
    x = torch.tensor([[1.0, 0.0, 3.0, 2.5], [0.0, 0.0, 0.0, 0.0]])
    signs = (TanimotoFeatures(12345, 4, 24).features(x) > 0).long().tolist()
    assert ["".join(map(str, row)) for row in signs] == GOLDEN


GOLDEN = ["101111011000010011111101", "011011100101011011111000"]


def test_products_are_those_of_the_features(generator):
    x = fingerprints(1500)
    features = TanimotoFeatures(7, DIM, 300)
    phi = features.features(x)
    assert phi.unique().numel() == 2
    w = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    v = torch.randn(1500, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(features.forward(x, w), phi @ w)
    torch.testing.assert_close(features.adjoint(x, v), phi.mT @ v)


def test_gradients_in_fingerprints_are_refused():
    x = fingerprints(4).requires_grad_()
    features = TanimotoFeatures(0, DIM, 8)
    draws = draw_prior(
        TanimotoKernel(),
        2,
        dim=DIM,
        num_features=8,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    for call in (
        lambda: features.features(x),
        lambda: features.forward(x, torch.ones(8, 1).double()),
        lambda: features.adjoint(x, torch.ones(4, 1).double()),
        lambda: draws(x),
    ):
        with pytest.raises(NoInputGradientError, match="no gradient"):
            call()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_counts_that_are_none_are_refused(value):
    x = fingerprints(4)
    x[1, 2] = value
    with pytest.raises(ValueError, match=r"first at index \(1, 2\)"):
        TanimotoFeatures(0, DIM, 8).features(x)


def test_fingerprints_of_another_width_are_refused():
    features = TanimotoFeatures(0, DIM, 8)
    with pytest.raises(ValueError, match=f"{DIM} columns"):
        features.features(fingerprints(3)[:, :-1])


def test_a_map_is_stored_as_its_seed():
    features = TanimotoFeatures(2**62 - 3, DIM, 64)
    again = stored(features)
    assert again.seed == features.seed
    x = fingerprints(5)
    assert torch.equal(again.features(x), features.features(x))


def test_draws_come_back_from_their_state():
    kernel = ScaleKernel(TanimotoKernel()).double()
    draws = draw_prior(
        kernel,
        3,
        dim=DIM,
        num_features=32,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    x = fingerprints(5)
    again = stored(draws, kernel, x)
    assert torch.equal(again(x), draws(x))


def test_posteriors_are_saved_loaded_and_updated(tmp_path):
    x, x_new = fingerprints(50), fingerprints(20, seed=9)
    y = x.sum(1).sin()
    model = model_of(x, y)
    posterior = sgdgp.condition(model, num_samples=4, num_features=256, progress=False)
    kept = [
        sgdgp.condition(
            model,
            num_samples=4,
            num_features=256,
            progress=False,
            checkpoint=tmp_path / "solve",
        )
        for _ in range(2)
    ]
    assert all(
        torch.equal(one.samples(x_new), posterior.samples(x_new)) for one in kept
    )
    posterior.save(tmp_path / "molecules.gp")
    loaded = sgdgp.load(tmp_path / "molecules.gp", model)
    assert torch.equal(loaded.samples(x_new), posterior.samples(x_new))
    longer = loaded.update(x_new, x_new.sum(1).sin(), progress=False)
    assert longer.solution.weights.shape[0] == 70


def test_prior_draws_have_the_kernel_as_their_covariance():
    x = fingerprints(6)
    kernel = ScaleKernel(TanimotoKernel()).double()
    kernel.outputscale = 1.7
    values = draw_prior(
        kernel,
        2000,
        dim=DIM,
        num_features=64,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
        group_size=20,
    )(x)
    # Products of two normals: 1.7 sqrt(2 / 2000) at most, and the maps' own error.
    bar = 1.7 * math.sqrt(2 / 2000 + 1 / (64 * 100))
    found = values @ values.mT / 2000
    assert float((found - 1.7 * by_definition(x, x)).abs().max()) < 4 * bar


def test_sums_products_and_tasks_have_features():
    molecules = tuple(range(DIM))
    tanimoto = TanimotoKernel(active_dims=molecules)
    task = IndexKernel(num_tasks=2, rank=1, active_dims=(DIM,))
    smooth = RBFKernel(active_dims=(DIM,))
    x = torch.cat([fingerprints(8), (torch.arange(8) % 2).double()[:, None]], 1)
    for kernel in (tanimoto * task, tanimoto + smooth):
        assert has_features(kernel)
        dense = kernel.double()(x).to_dense().detach()
        parts = [
            random_features(
                kernel,
                dim=DIM + 1,
                num_features=512,
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            ).features(x)
            for seed in range(8)
        ]
        found = sum(phi @ phi.mT for phi in parts) / len(parts)
        bar = float(dense.diagonal().max()) * 5 / math.sqrt(8 * 512)
        assert float((found - dense).abs().max()) < bar


def test_gpytorch_multitask_models_of_molecules_are_conditioned():
    x = fingerprints(30)
    y = torch.stack([x.sum(1).sin(), x.sum(1).cos()], 1)

    class Multitask(gpytorch.models.ExactGP):
        def __init__(self):
            likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2)
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.MultitaskMean(
                gpytorch.means.ConstantMean(), num_tasks=2
            )
            self.covar_module = gpytorch.kernels.MultitaskKernel(
                TanimotoKernel(), num_tasks=2, rank=1
            )

        def forward(self, x):
            return gpytorch.distributions.MultitaskMultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    posterior = sgdgp.condition(
        Multitask().double(), num_samples=4, num_features=64, progress=False
    )
    assert posterior.mean(x).shape == (30, 2)
    assert posterior.samples(x[:5]).shape == (4, 5, 2)
