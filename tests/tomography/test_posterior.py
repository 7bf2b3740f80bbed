"""The posterior of an image is that of a Gaussian process, drawn and without draws."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from sgdgp.core.errors import CheckpointError, StorageError
from sgdgp.networks import (
    Dual,
    Filters,
    GPrior,
    Isotropic,
    Layerwise,
    WeightCG,
    WeightSGD,
)
from sgdgp.solvers import CG, SDD
from sgdgp.solvers.preconditioners import Nystrom
from sgdgp.tomography import (
    ImagePosterior,
    LinearisedImage,
    Measurement,
    ParallelBeam,
    UNet,
    block,
    linearise,
)

SIZE = 8
SIGMA = 0.05
PRIOR = GPrior(probes=256)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return UNet(channels=(4, 4), skips=(0, 2)).double().eval()


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def geometry() -> ParallelBeam:
    return ParallelBeam(SIZE, 5, dtype=torch.float64)


@pytest.fixture(scope="module")
def truth(network: nn.Module, z: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    image = network(z)[0, 0].detach()
    return image + 0.05 * torch.randn(image.shape, generator=generator).double()


@pytest.fixture(scope="module")
def model(network, z, geometry, truth) -> LinearisedImage:
    return linearise(network, z, geometry, geometry.simulate(truth), PRIOR, noise=SIGMA)


@pytest.fixture(scope="module")
def posterior(model: LinearisedImage) -> ImagePosterior:
    return model.fit(final_samples=512)


def jacobian(network: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """J (d, D) in weights of convolutions, in the order of the network's."""
    weights = {n: p.detach() for n, p in network.named_parameters() if p.ndim > 1}
    found = jacrev(lambda w: functional_call(network, w, (z,)).flatten())(weights)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def closed_form(network, z, measurement, posterior) -> torch.Tensor:
    """C by its formula, from dense matrices."""
    j = jacobian(network, z)
    k = j @ posterior.weights.prior.covariance(j.mT)
    eye = torch.eye(SIZE**2, dtype=torch.float64)
    a = measurement(eye.reshape(-1, SIZE, SIZE)).flatten(1).mT
    s = a @ k @ a.mT + posterior.noise**2 * torch.eye(len(a), dtype=torch.float64)
    c = k - k @ a.mT @ torch.linalg.solve(s, a @ k)
    return c + eye * (float(posterior.mean.max() - posterior.mean.min()) / 255) ** 2


def test_the_covariance_is_that_of_the_formula(network, z, geometry, posterior) -> None:
    expected = closed_form(network, z, geometry, posterior)
    torch.testing.assert_close(posterior.covariance(), expected, rtol=1e-8, atol=1e-12)
    sd = expected.diagonal().sqrt().reshape(SIZE, SIZE)
    torch.testing.assert_close(posterior.standard_deviation, sd, rtol=1e-6, atol=1e-9)


def test_more_data_than_pixels_have_the_same_covariance(network, z, truth) -> None:
    many = ParallelBeam(SIZE, 9, dtype=torch.float64)
    model = linearise(network, z, many, many.simulate(truth), noise=SIGMA)
    posterior = model.fit(final_samples=2, steps=0, precision=1.0)
    expected = closed_form(network, z, many, posterior)
    torch.testing.assert_close(posterior.covariance(), expected, rtol=1e-6, atol=1e-10)


def test_it_says_in_a_line_what_it_is(posterior) -> None:
    assert repr(posterior).startswith(
        f"ImagePosterior(image_shape=(8, 8), measurement='ParallelBeam', "
        f"noise={SIGMA}, exact=True, num_samples=512, passes="
    )
    assert "<td style='text-align: left'>ParallelBeam</td>" in posterior._repr_html_()


def test_a_scale_of_the_weights_scales_all_variances(posterior) -> None:
    scaled = replace(posterior, weights=replace(posterior.weights, scale=4.0))
    own = posterior.resolution**2
    expected = 4 * (posterior.standard_deviation.square() - own) + own
    torch.testing.assert_close(scaled.standard_deviation, expected.sqrt())
    added, same = scaled.samples() - scaled.mean, posterior.samples() - posterior.mean
    torch.testing.assert_close(added, 2 * same)


def test_the_mean_is_what_the_network_shows(network, z, posterior) -> None:
    torch.testing.assert_close(posterior.mean, network(z)[0, 0].detach())
    assert posterior.noise == pytest.approx(SIGMA)


def test_samples_have_the_covariance_of_the_formula(posterior) -> None:
    """The variances of 512 have a relative standard deviation of sqrt(2 / 512)."""
    added = (posterior.samples() - posterior.mean).flatten(1)
    c = posterior.covariance() - posterior.resolution**2 * torch.eye(SIZE**2)
    ratio = added.square().mean(0) / c.diagonal()
    spread = math.sqrt(2 / 512)
    assert float((ratio - 1).square().mean().sqrt()) < 1.5 * spread
    white = torch.linalg.lstsq(
        torch.linalg.cholesky(c + 1e-10 * torch.eye(SIZE**2)), added.mT
    ).solution
    # A wrong correlation of pixels would leave some direction with another variance.
    assert float(white.square().mean()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("patch", [1, 3, None])
def test_the_log_density_is_that_of_independent_patches(
    posterior, truth, patch
) -> None:
    c = posterior.covariance()
    numbers = torch.arange(SIZE**2).reshape(SIZE, SIZE)
    side = SIZE if patch is None else patch
    total = 0.0
    for i in range(0, SIZE, side):
        for j in range(0, SIZE, side):
            pixels = numbers[i : i + side, j : j + side].flatten()
            total += torch.distributions.MultivariateNormal(
                posterior.mean.flatten()[pixels], c[pixels][:, pixels]
            ).log_prob(truth.flatten()[pixels])
    expected = float(total) / SIZE**2
    assert posterior.log_density(truth, patch) == pytest.approx(expected, rel=1e-6)


def test_patches_by_samples_halve_covariances_between_pixels(model, truth) -> None:
    posterior = model.fit(final_samples=16, exact=False)
    added = (posterior.samples() - posterior.mean).flatten(1)
    c = added.mT @ added / 32
    c.diagonal().mul_(2).add_(posterior.resolution**2)
    joint = torch.distributions.MultivariateNormal(posterior.mean.flatten(), c)
    expected = float(joint.log_prob(truth.flatten())) / SIZE**2
    assert posterior.log_density(truth, None) == pytest.approx(expected, rel=1e-6)


def test_coverage_counts_pixels_within_intervals(posterior, truth) -> None:
    error = (truth - posterior.mean).abs()
    inside = (error <= 1.959964 * posterior.standard_deviation).double().mean()
    assert posterior.coverage(truth) == pytest.approx(float(inside))
    flipped = np.ascontiguousarray(truth.numpy()[::-1])[::-1]
    assert posterior.coverage(flipped) == posterior.coverage(truth)
    assert posterior.coverage(truth, 0.5) < posterior.coverage(truth, 0.99)


@pytest.mark.parametrize(
    ("solver", "batch_views", "error"),
    [
        (WeightCG(tolerance=1e-4, rank=20), None, 1e-3),
        (Dual(CG(preconditioner=Nystrom(rank=20)), tolerance=1e-6), None, 1e-3),
        (Dual(SDD(), tolerance=0.1, batch_size=1), 1, 0.1),
        (WeightSGD(tolerance=0.3), 1, 0.1),
    ],
    ids=["weights", "data", "minibatches of views", "in the weights"],
)
def test_another_solver_draws_the_same_images(
    model, solver, batch_views, error
) -> None:
    fixed = {"steps": 0, "precision": 1e4, "final_samples": 2, "exact": False}
    same = model.fit(**fixed)
    found = model.fit(**fixed, solver=solver, batch_views=batch_views)
    change = (found.samples() - same.samples()).norm()
    assert float(change / (same.samples() - same.mean).norm()) < error
    assert not found.weights.warnings


def test_views_taken_apart_teach_the_same(network, z, geometry, truth) -> None:
    model = linearise(network, z, geometry, geometry.simulate(truth), Isotropic())
    whole, apart = (model.fit(final_samples=2, batch_views=b) for b in (None, 1))
    assert apart.noise == pytest.approx(whole.noise, rel=1e-2)
    torch.testing.assert_close(
        apart.covariance(), whole.covariance(), rtol=0.05, atol=1e-6
    )


def test_learned_noise_is_that_of_the_data(network, z, geometry) -> None:
    """The data are an image of the model with noise: the evidence finds its size."""
    y = geometry.simulate(network(z)[0, 0].detach(), standard_deviation=0.1, seed=5)
    posterior = linearise(network, z, geometry, y).fit(final_samples=8)
    # 60 numbers know a variance to 18 %; the network's own weights fit some of them.
    assert posterior.noise == pytest.approx(0.1, rel=0.3)


def test_priors_of_blocks_and_filters_are_learned(network, z, geometry, truth) -> None:
    y = geometry.simulate(truth)
    model = linearise(network, z, geometry, y, Layerwise(block), dtype=torch.float32)
    posterior = model.fit(final_samples=4)
    labels = {block(name) for name in posterior.weights.tangent.names}
    assert labels == {"down.0", "down.1", "skip.1", "up.1", "out"}
    assert len(posterior.weights.precisions) == len(labels)
    smooth = linearise(network, z, geometry, y, Filters(length=1.0, groups=block))
    covariance = smooth.fit(final_samples=4)
    expected = closed_form(network, z, geometry, covariance)
    torch.testing.assert_close(covariance.covariance(), expected, rtol=1e-7, atol=1e-11)


def test_inpainting_has_large_deviations_where_nothing_is_seen(network, z) -> None:
    seen = torch.ones(SIZE, SIZE, dtype=torch.bool)
    seen[2:6, 2:6] = False
    mask = Measurement.of(
        lambda x: x[:, seen], image_shape=(SIZE, SIZE), dtype=torch.float64
    )
    image = network(z)[0, 0].detach()
    posterior = linearise(network, z, mask, mask(image), PRIOR, noise=0.01).fit(
        final_samples=4, steps=0, precision=1.0
    )
    sd = posterior.standard_deviation
    assert float(sd[~seen].mean()) > 1.5 * float(sd[seen].mean())


def test_a_saved_posterior_comes_back_for_the_same_data_only(
    model, posterior, network, z, geometry, truth, tmp_path
) -> None:
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    same = copy.deepcopy(model.load(path))
    assert same.noise == posterior.noise
    torch.testing.assert_close(same.samples(3), posterior.samples(3), rtol=0, atol=0)
    torch.testing.assert_close(same.standard_deviation, posterior.standard_deviation)
    y = geometry.simulate(truth)
    turned = geometry.at(geometry.angles + 1)
    for other in (
        linearise(network, z, turned, y),
        linearise(network, z + 1, geometry, y),
        linearise(network, z, geometry, 2 * y),
    ):
        with pytest.raises(StorageError, match=r"seen|input"):
            other.load(path)


def test_a_fit_goes_on_from_its_checkpoint_for_the_same_data_only(
    model, network, z, geometry, truth, tmp_path
) -> None:
    fixed = {"final_samples": 2, "checkpoint": tmp_path / "fit.safetensors"}
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(callback=lambda _: True, **fixed)
    found = model.fit(**fixed)
    assert found.weights.reason == "finished"
    with pytest.raises(CheckpointError):
        linearise(
            network, z, geometry, geometry.simulate(truth), PRIOR, noise=SIGMA
        ).fit(**{**fixed, "seed": 1})
    turned = geometry.at(geometry.angles + 1)
    with pytest.raises(CheckpointError):
        linearise(network, z, turned, geometry.simulate(truth), PRIOR, noise=SIGMA).fit(
            **fixed
        )


def test_volumes_by_networks_with_norms_have_the_same_posterior_in_any_layout() -> None:
    torch.manual_seed(0)
    network = UNet((2, 2), (0, 2), dimensions=3, norm=1).double().eval()
    geometry = ParallelBeam(4, 3, slices=2, dtype=torch.float64)
    z = torch.rand(1, 1, 2, 4, 4, dtype=torch.float64)
    data = geometry.simulate(network(z)[0, 0].detach())
    layouts = (torch.contiguous_format, torch.channels_last_3d)
    one, other = (
        linearise(network.to(memory_format=layout), z, geometry, data, noise=SIGMA)
        .fit(final_samples=2, steps=0, precision=1.0, exact=False)
        .samples()
        for layout in layouts
    )
    torch.testing.assert_close(one, other)


def test_weights_are_chosen_by_the_names_of_the_network(network, z, geometry, truth):
    y = geometry.simulate(truth)
    model = linearise(network, z, geometry, y, weights=["out.weight"])
    assert model.model.tangent.names == ("network.out.weight",)


def test_what_does_not_fit_is_refused(
    network, z, geometry, truth, model, posterior
) -> None:
    y = geometry.simulate(truth)
    with pytest.raises(ValueError, match=r"data: expected shape .*5, 12"):
        linearise(network, z, geometry, y[:4])
    with pytest.raises(ValueError, match=r"data.*finite"):
        linearise(network, z, geometry, y * math.nan)
    with pytest.raises(ValueError, match="network: expected an image of shape"):
        linearise(network, z[..., :4], geometry, y)
    with pytest.raises(ValueError, match="noise: expected"):
        linearise(network, z, geometry, y, noise=-1.0)
    with pytest.raises(TypeError, match="dtype: expected float32 or float64"):
        linearise(network, z, geometry, y, dtype=torch.float16)
    with pytest.raises(MemoryError, match="exact: the covariance of 64 pixels needs"):
        linearise(network, z, geometry, y, memory_budget=1000).fit(exact=True)
    each = 16 * (SIZE**2 + model.model.tangent.num_weights)
    little = linearise(network, z, geometry, y, memory_budget=10 * each)
    with pytest.raises(MemoryError, match=r"final_samples: 64 .*at most 10$"):
        little.fit(exact=False)
    with pytest.raises(ValueError, match=r"count: expected at most the 512 samples"):
        posterior.samples(1000)
    with pytest.raises(ValueError, match=r"truth: expected shape \(8, 8\)"):
        posterior.log_density(truth[:4])
