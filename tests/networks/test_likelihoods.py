"""Likelihoods against autograd: gradient, Hessian, and the Hessian's square root."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgdgp.networks.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
)

C = 5
LIKELIHOODS: list[Likelihood] = [
    Categorical(),
    Bernoulli(),
    Gaussian(0.3),
    Gaussian(torch.linspace(0.1, 2.0, C)),
    Gaussian().with_noise(1e-3),
]
DTYPES = [torch.float64, torch.float32]
SCALES = [0.1, 3.0, 30.0, 1000.0]


def batch(
    likelihood: Likelihood,
    scale: float,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    n: int = 7,
) -> tuple[Tensor, Tensor]:
    """Outputs (n, C) of a given spread, and targets that do not follow them."""
    generator = torch.Generator().manual_seed(seed)
    outputs = scale * torch.randn(n, C, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        return outputs.to(dtype), torch.randint(C, (n,), generator=generator)
    if isinstance(likelihood, Bernoulli):
        return outputs.to(dtype), torch.randint(2, (n, C), generator=generator)
    y = torch.randn(n, C, generator=generator, dtype=torch.float64)
    return outputs.to(dtype), y.to(dtype)


def identities(outputs: Tensor) -> Tensor:
    """One identity matrix an example (b, C, C)."""
    return torch.eye(C, dtype=outputs.dtype).expand(len(outputs), C, C)


def tolerance(likelihood: Likelihood, outputs: Tensor) -> float:
    """Rounding error of gradients, whose size the noise variance sets."""
    size = 1.0
    if isinstance(likelihood, Gaussian):
        size = float(likelihood.gradient(outputs, 0 * outputs).abs().max()) + 1e3
    return 8 * torch.finfo(outputs.dtype).eps * size


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_root_times_its_transpose_is_the_hessian_of_the_loss(
    likelihood: Likelihood, scale: float, dtype: torch.dtype
):
    outputs, y = batch(likelihood, scale, dtype)
    eye = identities(outputs)
    root = likelihood.hessian_root(outputs, eye)
    hessian = likelihood.hessian(outputs, eye)
    by_autograd = torch.stack(
        [
            torch.func.hessian(lambda f, t=t: likelihood.loss(f[None], t[None])[0])(f)
            for f, t in zip(outputs.double(), y, strict=True)
        ]
    )
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(hessian.double(), by_autograd, **close)
    torch.testing.assert_close(root @ root.mT, hessian, **close)
    transpose = likelihood.hessian_root_transpose(outputs, eye)
    torch.testing.assert_close(transpose, root.mT, **close)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_root_times_the_residual_is_minus_the_gradient_of_the_loss(
    likelihood: Likelihood, scale: float, dtype: torch.dtype
):
    outputs, y = batch(likelihood, scale, dtype)
    leaf = outputs.double().clone().requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.loss(leaf, y).sum(), leaf)
    z = likelihood.residual(outputs, y)
    assert torch.isfinite(z).all()
    close = {"rtol": 0.0, "atol": tolerance(likelihood, outputs)}
    gradient = likelihood.gradient(outputs, y)
    torch.testing.assert_close(gradient.double(), expected, **close)
    product = likelihood.hessian_root(outputs, z.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(product, -gradient, **close)


@given(scale=st.sampled_from(SCALES), seed=st.integers(0, 1000))
def test_root_and_its_transpose_are_adjoint_and_compose_to_the_hessian(
    scale: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, 7, C, 3, generator=generator, dtype=torch.float64)
    for likelihood in LIKELIHOODS:
        outputs, _ = batch(likelihood, scale, seed=seed)
        left = (u * likelihood.hessian_root(outputs, v)).sum((0, 1))
        right = (likelihood.hessian_root_transpose(outputs, u) * v).sum((0, 1))
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)
        twice = likelihood.hessian_root(
            outputs, likelihood.hessian_root_transpose(outputs, v)
        )
        torch.testing.assert_close(
            twice, likelihood.hessian(outputs, v), rtol=1e-10, atol=1e-15
        )


@pytest.mark.parametrize("gap", [10.0, 12.0, 14.0])
def test_curvature_of_sure_predictions_keeps_its_relative_accuracy_in_float32(
    gap: float,
):
    """Where p -> 1, p (1 - p) computed as such has no correct digit in float32."""
    exact = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    v = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    for product in (Categorical().hessian, Categorical().hessian_root_transpose):
        expected = product(exact, v)
        found = product(exact.float(), v.float()).double()
        # The floor of p at the rounding error is the only difference: see the class.
        floor = torch.finfo(torch.float32).eps * math.exp(gap)
        torch.testing.assert_close(found, expected, rtol=floor + 1e-5, atol=0.0)


@pytest.mark.parametrize("gap", [10.0, 12.0, 14.0])
def test_gradients_of_sure_and_right_predictions_keep_theirs(gap: float):
    outputs, y = torch.tensor([[gap, 0.0]]), torch.tensor([0])
    eps = torch.finfo(torch.float32).eps
    other = (1 / (1 + math.exp(gap)) + eps / 2) / (1 + eps)
    found = Categorical().gradient(outputs, y)
    torch.testing.assert_close(
        found, torch.tensor([[-other, other]]), rtol=1e-5, atol=0.0
    )


def test_hessian_is_never_indefinite_in_float32():
    generator = torch.Generator().manual_seed(0)
    outputs = 20 * torch.randn(500, C, generator=generator)
    v = torch.randn(500, C, 4, generator=generator)
    curvature = (v * Categorical().hessian(outputs, v)).sum(1)
    assert (curvature >= 0).all()


def test_whitened_noise_has_the_covariance_of_the_hessian():
    outputs, _ = batch(Categorical(), 1.0, n=1)
    generator = torch.Generator().manual_seed(0)
    k = 200_000
    noise = torch.randn(1, C, k, generator=generator, dtype=torch.float64)
    draws = Categorical().hessian_root(outputs, noise)[0]
    hessian = Categorical().hessian(outputs, identities(outputs))[0]
    assert (draws @ draws.mT / k - hessian).abs().max() < 4 * math.sqrt(2 / k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_of_hopeless_predictions_are_finite(dtype: torch.dtype):
    outputs = torch.tensor([[1e4, 0.0, -1e4]], dtype=dtype)
    y = torch.tensor([2])
    assert float(Categorical().loss(outputs, y)) == pytest.approx(2e4)
    assert torch.isfinite(Categorical().residual(outputs, y)).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_log_prob_scores_every_column_and_agrees_with_torch_distributions(
    likelihood: Likelihood,
):
    outputs, y = batch(likelihood, 2.0)
    columns = torch.stack([outputs, outputs + 1, outputs.flip(1)], -1)
    found = likelihood.log_prob(columns, y)
    for k, f in enumerate(columns.unbind(-1)):
        if isinstance(likelihood, Gaussian):
            scale = torch.tensor(likelihood.variance, dtype=torch.float64).sqrt()
            expected = torch.distributions.Normal(f, scale).log_prob(y).sum(1)
        elif isinstance(likelihood, Bernoulli):
            labels = torch.distributions.Bernoulli(logits=f)
            expected = labels.log_prob(y.double()).sum(1)
        else:
            expected = torch.distributions.Categorical(logits=f).log_prob(y)
        torch.testing.assert_close(found[:, k], expected)
        torch.testing.assert_close(likelihood.loss(f, y), -expected)


def test_noise_of_a_mean_is_the_unbiased_variance():
    """A constant fitted to N numbers has one effective dimension."""
    y = torch.randn(50, 1, dtype=torch.float64)
    likelihood = Gaussian().with_noise(1.0)
    error = likelihood.squared_error(y.mean().expand(50, 1), y)
    found = likelihood.update_noise(error, 50, 1.0)
    assert found.variance == pytest.approx(float(y.var()))
    assert found.learns_noise


def test_noise_maximises_the_likelihood_where_nothing_was_fitted():
    outputs, y = batch(Gaussian(), 1.0, n=40)
    error = Gaussian().squared_error(outputs, y)
    for start in (Gaussian(), Gaussian(per_output=True)):
        best = start.update_noise(error, 40)
        least = best.loss(outputs, y).sum()
        noise = torch.tensor(best.variance, dtype=torch.float64)
        for factor in (0.97, 1.03):
            other = best.with_noise(noise * factor)
            assert other.loss(outputs, y).sum() > least


def test_noise_of_each_output_uses_its_own_effective_dimension():
    error = torch.tensor([1.0, 8.0])
    each = Gaussian(per_output=True).update_noise(error, 10, torch.tensor([0.0, 2.0]))
    assert each.variance == pytest.approx((0.1, 1.0))
    together = Gaussian().update_noise(error, 10, torch.tensor([0.0, 2.0]))
    assert together.variance == pytest.approx(9.0 / 18.0)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_both_steps_of_the_noise_have_the_fixed_point_of_the_evidence(share: float):
    """Where sigma^2 = |y - f|^2 / (N - gamma), the evidence is stationary."""
    n, error = 100, torch.tensor([3.0], dtype=torch.float64)
    fixed = float(error) / (n - share * n)
    start = Gaussian().with_noise(fixed)
    found = start.update_noise(error, n, share * n)
    assert found.variance == pytest.approx(fixed, rel=1e-12)
    above = start.with_noise(1.5 * fixed).update_noise(error, n, share * n)
    assert above.variance < 1.5 * fixed


def test_a_model_that_seems_to_interpolate_still_has_a_noise():
    """Gamma from samples can exceed the number of targets."""
    start = Gaussian().with_noise(0.1)
    found = start.update_noise(torch.tensor([1e-3]), 10, 10.7)
    assert found.variance == pytest.approx(0.1001, rel=1e-6)


def test_the_noise_of_an_exact_fit_falls_step_by_step():
    found = Gaussian().with_noise(1.0).update_noise(torch.zeros(1), 10, 1.0)
    assert found.variance == pytest.approx(0.01)
    assert Gaussian().update_noise(torch.zeros(1), 10).variance > 0


def test_fixed_noise_is_not_learned():
    fixed = Gaussian(0.5)
    assert not fixed.learns_noise
    assert fixed.update_noise(torch.ones(1), 10) is fixed
    assert fixed.with_noise(0.25) == Gaussian(0.25)


def test_gaussian_settings_compare_by_value():
    assert Gaussian(torch.tensor([1.0, 2.0])) == Gaussian([1.0, 2.0])
    assert hash(Gaussian([1.0, 2.0])) == hash(Gaussian((1.0, 2.0)))


def test_noise_given_as_a_number_keeps_its_digits():
    assert Gaussian(0.3).variance == 0.3


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf, [1.0, 0.0], []])
def test_noise_that_is_no_variance_is_refused(noise):
    with pytest.raises(ValueError, match="noise: expected"):
        Gaussian(noise)


def test_noise_in_use_before_it_is_learned_is_refused():
    with pytest.raises(ValueError, match="noise: it is learned from data"):
        Gaussian().hessian(torch.zeros(1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match=r"per_output: .* noise, which is given"):
        Gaussian(0.1, per_output=True)


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        (-1.0, "no negative value, found -1"),
        (math.nan, "effective_dimension: expected finite"),
    ],
)
def test_effective_dimensions_that_are_none_are_refused(gamma, message):
    with pytest.raises(ValueError, match=message):
        Gaussian().update_noise(torch.ones(1), 10, gamma)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([0, 1], TypeError, "y: expected a torch.Tensor, found list"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers, found torch.float32"),
        (torch.tensor([True]), TypeError, "integers, found torch.bool"),
        (torch.tensor([[0], [1]]), ValueError, r"shape \(b,\), found \(2, 1\)"),
        (torch.tensor([0, 3]), ValueError, "from 0 to 2, .* found 3"),
        (torch.tensor([0, -100]), ValueError, "from 0 to 2, .* found -100"),
        (torch.tensor([], dtype=torch.long), ValueError, r"found \(0,\)"),
    ],
)
def test_targets_that_are_no_classes_are_refused(y, error, message):
    with pytest.raises(error, match=message):
        Categorical().check_targets(y, 3)


def test_a_single_logit_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"two outputs \(0, f\)"):
        Categorical().check_targets(torch.tensor([0, 1]), 1)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.tensor([1, 2]), TypeError, "floating-point targets, found torch.int64"),
        (torch.zeros(4), ValueError, r"shape \(b, 3\), found \(4,\)"),
        (torch.zeros(4, 2), ValueError, r"shape \(b, 3\), found \(4, 2\)"),
        (torch.full((4, 3), math.nan), ValueError, "y: expected finite"),
    ],
)
def test_targets_that_are_no_outputs_are_refused(y, error, message):
    with pytest.raises(error, match=message):
        Gaussian().check_targets(y, 3)


def test_noise_of_another_number_of_outputs_is_refused():
    with pytest.raises(ValueError, match="one variance per output, 3, found 2"):
        Gaussian([1.0, 2.0]).check_targets(torch.zeros(4, 3), 3)


def test_good_targets_pass_in_every_shape():
    Categorical().check_targets(torch.tensor([0, 2], dtype=torch.int32), 3)
    Gaussian().check_targets(torch.zeros(4), 1)
    Gaussian().check_targets(torch.zeros(4, 1), 1)
    Gaussian().check_targets(torch.zeros(4, 2, 3), 6)


def test_positions_are_examples_of_their_own_and_ignored_ones_are_none():
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(4, 15, generator=generator, dtype=torch.float64)
    v = torch.randn(4, 15, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (4, 5), generator=generator)
    y[0, 1] = y[2] = -7
    several = Categorical(ignore_index=-7).with_targets(y, 15)
    several.check_targets(y, 15)
    assert several.classes == 3
    counted = several.counted(y).flatten()
    flat, u, labels = f.view(20, 3), v.view(20, 3, 2), y.flatten()
    one = Categorical()
    for name in ("hessian", "hessian_root", "hessian_root_transpose"):
        found = getattr(several, name)(f, v).view(20, 3, 2)
        torch.testing.assert_close(found, getattr(one, name)(flat, u))
    for name in ("gradient", "residual"):
        found = getattr(several, name)(f, y).view(20, 3)
        expected = getattr(one, name)(flat[counted], labels[counted])
        torch.testing.assert_close(found[counted], expected)
        assert not found[~counted].any()
    each = one.log_prob(u[counted], labels[counted])
    expected = torch.zeros(20, 2, dtype=torch.float64)
    expected[counted] = each
    torch.testing.assert_close(several.log_prob(v, y), expected.view(4, 5, 2).sum(1))


@pytest.mark.parametrize(
    ("y", "outputs"),
    [
        (torch.tensor([[0, 1], [2, 0]]), 7),
        (torch.tensor([[0, 1], [3, 0]]), 6),
        (torch.tensor([[0, -100], [2, 0]]), 6),
        (torch.tensor([[0, 1], [1, 0]]), 2),
    ],
)
def test_targets_of_positions_that_do_not_fit_are_refused(y, outputs):
    with pytest.raises(ValueError, match="y: "):
        Categorical().check_targets(y, outputs)
