import pytest
import torch
from gpytorch.kernels import MaternKernel, PiecewisePolynomialKernel, ScaleKernel

from sgdgp.features import NoRandomFeatures
from sgdgp.training import PathwiseProbes, StandardProbes
from tests.training.problems import data

N, COUNT = 10, 1500


def kernel():
    found = ScaleKernel(MaternKernel(nu=1.5)).double()
    found.outputscale = 1.6
    return found


def drawn(probes, seed=0, function=None):
    x, noise = inputs()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        return probes.draw(function or kernel(), x, noise, generator)


def inputs():
    return data(N, 2)[0], torch.linspace(0.1, 0.6, N, dtype=torch.float64)


def system():
    x, noise = inputs()
    return kernel()(x).to_dense().detach() + noise.diag()


def assert_second_moment(columns, truth):
    """E[v v^T] entry by entry, within five standard errors of products of normals."""
    products = columns.unsqueeze(0) * columns.unsqueeze(1)
    found, error = products.mean(2), products.std(2) / columns.shape[1] ** 0.5
    assert bool(((found - truth).abs() <= 5.0 * error).all())
    assert float(error.max()) < 0.1 * float(truth.diagonal().max())


@pytest.mark.parametrize("features", [1, 8])
def test_pathwise_probes_have_the_systems_covariance_for_any_features(features):
    probes = drawn(PathwiseProbes(COUNT, num_features=features))
    assert probes.is_pathwise
    # With few features a probe is far from normal, its covariance is right still.
    assert_second_moment(probes.rhs, system())


def test_the_noise_in_a_pathwise_probe_has_the_noises_variance():
    probes = drawn(PathwiseProbes(COUNT, num_features=2))
    _, noise = inputs()
    assert_second_moment(probes.noise_draws, noise.diag())
    # What is left is the prior function, which knows nothing of the noise.
    assert_second_moment(probes.rhs - probes.noise_draws, system() - noise.diag())


def test_standard_probes_are_white_and_have_no_noise_part():
    probes = drawn(StandardProbes(COUNT))
    assert not probes.is_pathwise
    assert not probes.noise_draws.any()
    assert_second_moment(probes.rhs, torch.eye(N, dtype=torch.float64))


@pytest.mark.parametrize("kind", [PathwiseProbes, StandardProbes])
def test_pairs_of_solved_probes_average_to_the_inverse(kind):
    probes = drawn(kind(COUNT))
    truth = torch.linalg.inv(system())
    solved = truth @ probes.rhs
    pairs = solved.unsqueeze(1) * probes.right(solved).unsqueeze(0)
    error = pairs.std(2) / COUNT**0.5
    assert bool(((pairs.mean(2) - truth).abs() <= 5.0 * error).all())
    assert float(error.max()) < 0.1 * float(truth.diagonal().max())


@pytest.mark.parametrize("kind", [PathwiseProbes, StandardProbes])
def test_a_seed_gives_its_probes_again_also_as_the_kernel_moves(kind):
    one, again, other = (drawn(kind(3), seed).rhs for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    moved = kernel()
    moved.outputscale = 1.6 * 1.001
    near = drawn(kind(3), 1, moved).rhs
    assert float((near - one).abs().max()) < 0.01


def test_a_kernel_without_random_features_has_standard_probes_only():
    without = PiecewisePolynomialKernel(q=2).double()
    assert drawn(StandardProbes(2), function=without).rhs.shape == (N, 2)
    with pytest.raises(NoRandomFeatures):
        drawn(PathwiseProbes(2), function=without)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (PathwiseProbes, {"count": 0}, "count"),
        (StandardProbes, {"count": -2}, "count"),
        (PathwiseProbes, {"num_features": 0}, "num_features"),
    ],
)
def test_bad_settings_are_refused(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(**settings)
