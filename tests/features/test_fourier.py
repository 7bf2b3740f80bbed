"""Fourier features agree with the closed-form kernels of GPyTorch."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, keops

from sgdgp.core import slices
from sgdgp.features import FourierFeatures, fourier
from tests.features.kernels import STATIONARY, dense, features, lengthscales, points

N, FEATURES = 20, 20_000


def z_scores(phi, exact):
    """(K~ - K) over its standard error, from the spread over frequencies."""
    m = phi.shape[1] // 2
    sin, cos = phi[:, :m], phi[:, m:]
    approximate = phi @ phi.T
    square = torch.zeros_like(approximate)
    for i in range(phi.shape[0]):
        pair = (sin * sin[i] + cos * cos[i]) * m
        square[i] = pair.var(1)
    error = (approximate - exact)[~torch.eye(len(phi), dtype=torch.bool)]
    return error / (square[~torch.eye(len(phi), dtype=torch.bool)] / m).sqrt()


@pytest.mark.parametrize("dim", [1, 3, 8])
@pytest.mark.parametrize("family", STATIONARY)
def test_kernel_of_the_features_is_within_its_error_bars(family, dim):
    kernel = STATIONARY[family](dim)
    x = points(N, dim)
    exact = dense(kernel, x)
    # Entries of one map share their frequencies, so their errors go together; the
    # mean square settles near one only over several maps. A kernel that is wrong
    # by 0.02 everywhere would put it at about 5.
    maps = [features(kernel, dim, 10_000, seed).features(x) for seed in range(4)]
    z = torch.stack([z_scores(phi, exact) for phi in maps])
    assert z.abs().max() < 5.0
    assert z.square().mean() < 3.0
    assert (maps[0] @ maps[0].T - exact).abs().max() < 5.0 * exact[0, 0] / 5000**0.5


@pytest.mark.parametrize("family", STATIONARY)
def test_variance_has_no_error(family):
    kernel = STATIONARY[family](3)
    x = points(5, 3)
    phi = features(kernel, 3, 64).features(x)
    torch.testing.assert_close((phi**2).sum(1), dense(kernel, x).diagonal())


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_independent_student_t_frequencies_would_not_be_matern(nu):
    dim = 8
    kernel = STATIONARY[f"matern {int(2 * nu)}/2"](dim)
    x = points(N, dim)
    exact = dense(kernel, x)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(dim, FEATURES // 2, generator=generator, dtype=torch.float64)
    gamma = torch._standard_gamma(torch.full_like(normal, nu), generator=generator)
    wrong = FourierFeatures(
        normal * (nu / gamma).sqrt() / lengthscales(dim).double().T
    ).features(x)
    right = features(kernel, dim, FEATURES).features(x)
    assert z_scores(right, exact).square().mean() < 3.0
    assert z_scores(wrong, exact).square().mean() > 30.0


@pytest.mark.parametrize(
    ("fast", "plain"),
    [(keops.RBFKernel, RBFKernel), (keops.MaternKernel, MaternKernel)],
)
def test_keops_kernels_have_the_features_of_the_plain_ones(fast, plain):
    x = points(4, 2)
    torch.testing.assert_close(
        features(fast(), 2, 10).features(x), features(plain(), 2, 10).features(x)
    )


def test_same_seed_same_map_and_other_seed_another():
    kernel, x = STATIONARY["matern 3/2"](3), points(4, 3)
    a, b, c = (features(kernel, 3, 32, seed=s).features(x) for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_global_random_state_is_not_touched():
    before = torch.random.get_rng_state()
    for make in STATIONARY.values():
        features(make(2), 2, 16)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("family", STATIONARY)
def test_float32_map_is_the_float64_map_rounded(family):
    kernel, x = STATIONARY[family](3), points(20, 3)
    single = features(kernel, 3, 256, dtype=torch.float32)
    double = features(kernel, 3, 256)
    w = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    value = single.forward(x.float(), w)
    assert value.dtype == torch.float32
    # Frequencies of heavy tails are large, and so is the rounding of their phase.
    torch.testing.assert_close(
        value.double(), double.forward(x, w.double()), rtol=0, atol=1e-3
    )


def test_odd_number_of_features_is_rounded_up():
    phi = features(RBFKernel(), 2, 7)
    assert phi.num_features == 8
    assert phi.features(points(3, 2)).shape == (3, 8)
    assert not phi.exact


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(slices, "CPU_TILE", 24)


@pytest.mark.usefixtures("small_tiles")
def test_products_that_track_gradients_have_the_same_values():
    phi = features(STATIONARY["rbf"](3), 3, 30)
    x, w, v = points(17, 3), points(30, 4), points(17, 4, seed=2)
    tracked = x.clone().requires_grad_()
    torch.testing.assert_close(phi.forward(tracked, w).detach(), phi.forward(x, w))
    torch.testing.assert_close(phi.adjoint(tracked, v).detach(), phi.adjoint(x, v))


@pytest.mark.usefixtures("small_tiles")
def test_gradient_of_weights_that_depend_on_x_is_the_total_derivative():
    phi = features(STATIONARY["rbf"](2), 2, 6)

    def value(x):
        return phi.forward(x, x.sum() * torch.ones(6, 1, dtype=x.dtype))

    x = points(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(value, (x,))
    assert torch.autograd.gradgradcheck(value, (x,))


def test_backward_keeps_no_features():
    """What autograd stores for n = 400 points is far less than n M numbers."""
    phi = features(STATIONARY["rbf"](3), 3, 4096)
    x, w = points(400, 3).requires_grad_(), points(4096, 1)
    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = phi.forward(x, w).sum()
    value.backward()
    inputs = 8 * (x.numel() + w.numel() + phi.frequencies.numel())
    assert sum(stored.values()) < 2 * inputs
    assert x.grad is not None


def test_tiles_of_functions_at_points_of_their_own_add_up(monkeypatch):
    phi, own = features(STATIONARY["matern 3/2"](3), 3, 64), 3
    x = points(5 * own, 3).view(5, own, 3).requires_grad_()
    weights = points(5, 64, seed=2)

    def found():
        values = phi.each(x, weights)
        return values, torch.autograd.grad(values.sin().sum(), x)[0]

    whole = found()
    monkeypatch.setattr(fourier, "_ROWS", 2 * own)
    monkeypatch.setattr(fourier, "_TILE_CPU", 40)
    for part, expected in zip(found(), whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_points_of_another_width_are_refused():
    phi = features(STATIONARY["rbf"](2), 2, 8)
    with pytest.raises(ValueError, match=r"x must be a matrix with 2 columns"):
        phi.forward(points(3, 4), points(8, 1))
