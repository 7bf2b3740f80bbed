"""Fantasies against BoTorch's own, of models with the same hyperparameters."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import qKnowledgeGradient
from botorch.exceptions.errors import UnsupportedError
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from botorch.sampling.normal import SobolQMCNormalSampler

import sgdgp
from sgdgp.botorch import PathSampler
from sgdgp.solvers import differentiable
from tests.botorch import problems
from tests.botorch.problems import SAMPLES, inputs, pathwise, targets

U = inputs(2, 3, 4)
SHAPES = ((5, 2), (4, 5, 2), (3, 4, 5, 2), (1, 4, 5, 2), (6, 3, 4, 5, 2))


def _sampler():
    return SobolQMCNormalSampler(torch.Size([3]), seed=5)


def _exact(definition):
    """The definition with the caches that BoTorch's fantasies need."""
    definition.posterior(U)
    return definition.fantasize(U, _sampler())


@pytest.mark.parametrize("make", [problems.single, problems.batched])
@pytest.mark.parametrize("known_noise", [False, True])
def test_mean_and_variance_are_those_of_botorchs_fantasies(make, known_noise):
    definition = make()
    if known_noise:
        x = inputs(25)
        y = targets(x, definition.num_outputs)
        noise = torch.linspace(0.01, 0.5, 25, dtype=torch.float64)
        definition = SingleTaskGP(
            x,
            y,
            noise.unsqueeze(1).expand_as(y),
            outcome_transform=Standardize(y.shape[1]),
        )
    model = pathwise(definition, num_samples=512).fantasize(U, _sampler())
    exact = _exact(definition)
    assert model.batch_shape == (3, 4)
    for shape in SHAPES[:4]:
        x = inputs(shape[-2], 9, *shape[:-2])
        ours, theirs = model.posterior(x), exact.posterior(x)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-6, atol=1e-9)
        slope, exact_slope = (
            torch.autograd.grad(m.posterior(z).variance.sum(), z)[0]
            for m, z in ((m, x.clone().requires_grad_()) for m in (model, exact))
        )
        torch.testing.assert_close(slope, exact_slope, rtol=1e-5, atol=1e-7)
        assert ours.values.shape == (512, *theirs.mean.shape)


def test_correlated_outputs_learn_from_each_other():
    definition = problems.correlated()
    u = inputs(2, 3)
    y = targets(u, 2)
    model = pathwise(definition, num_samples=512)
    fantasy = model.condition_on_observations(u.unsqueeze(0), y.unsqueeze(0))
    truth = model.condition_on_observations(u, y)
    x = inputs(6, 4)
    ours, theirs = fantasy.posterior(x), truth.posterior(x)
    torch.testing.assert_close(ours.mean[0], theirs.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.variance[0], theirs.variance, rtol=1e-6, atol=1e-9)
    one = fantasy.subset_output([1]).posterior(x)
    torch.testing.assert_close(one.mean, ours.mean[..., 1:])


def test_outputs_with_shared_kernel_and_with_data_of_their_own_can_be_fantasised():
    x = inputs(20)
    shared = pathwise(problems.single(20), train_X=x, train_Y=targets(x, 2))
    for model in (shared, pathwise(problems.listed())):
        y = targets(U, 2)
        fantasy = model.condition_on_observations(U, y).posterior(inputs(3, 8))
        truth = model.condition_on_observations(U[2], y[2]).posterior(inputs(3, 8))
        torch.testing.assert_close(fantasy.mean[2], truth.mean, rtol=1e-6, atol=1e-6)


def test_an_iterative_solver_gives_the_same_fantasies(monkeypatch):
    definition = problems.single()
    exact = pathwise(definition).fantasize(U, _sampler())
    monkeypatch.setattr(differentiable, "FACTOR_ROWS", 0)
    model = pathwise(definition, solver=sgdgp.CG(tolerance=1e-7))
    u = U.clone().requires_grad_()
    fantasy = model.fantasize(u, _sampler())
    x = inputs(5, 9)
    torch.testing.assert_close(
        fantasy.posterior(x).mean, exact.posterior(x).mean, rtol=1e-4, atol=1e-4
    )
    (slope,) = torch.autograd.grad(fantasy.posterior(x).mean.sum(), u)
    monkeypatch.undo()
    u = U.clone().requires_grad_()
    direct = pathwise(definition).fantasize(u, _sampler())
    (expected,) = torch.autograd.grad(direct.posterior(x).mean.sum(), u)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3)


def test_a_wrong_solve_leaves_a_positive_covariance_with_a_squared_error(monkeypatch):
    model = pathwise(problems.single())
    close = inputs(25)[:8].reshape(4, 2, 2) + 1e-3
    right = _covariance(model.fantasize(close, _sampler()))
    monkeypatch.setattr(differentiable, "FACTOR_ROWS", 0)
    whole = differentiable.DifferentiableSolve._iterate
    for error in (0.02, 0.2):
        monkeypatch.setattr(
            differentiable.DifferentiableSolve,
            "_iterate",
            lambda self, v, factor=1 + error: factor * whole(self, v),
        )
        wrong = _covariance(pathwise(problems.single()).fantasize(close, _sampler()))
        # error^2 times what the data explain, nearly all of the prior variance.
        scale = model.definition.outcome_transform.stdvs.item() ** 2
        explained = (wrong - right) / error**2
        torch.linalg.cholesky(explained + 1e-6 * torch.eye(2, dtype=torch.float64))
        assert 0.8 * scale < explained.diagonal(dim1=1, dim2=2).min()
        assert explained.diagonal(dim1=1, dim2=2).max() < scale * (1 + 1e-6)


def _covariance(fantasy):
    return fantasy._parts[0].site.gains[0][1].covariance


def test_samples_of_a_fantasy_agree_with_its_mean():
    model = pathwise(problems.single(), num_samples=512).fantasize(U, _sampler())
    posterior = model.posterior(inputs(5, 9))
    error = (posterior.values.mean(0) - posterior.mean) / posterior.variance.sqrt()
    assert error.abs().max() < 5 / 512**0.5
    # Where fantasies were made, the functions take up what was seen.
    at = model.posterior(U)
    before = pathwise(problems.single(), num_samples=512).posterior(U)
    assert (at.variance < before.variance).all()


def test_paths_can_draw_the_fantasies():
    model = pathwise(problems.batched())
    fantasy = model.fantasize(U, PathSampler(torch.Size([3])))
    noisy = model.posterior(U, observation_noise=True).values[:3]
    given = model.condition_on_observations(U, noisy)
    x = inputs(5, 9)
    torch.testing.assert_close(fantasy.posterior(x).mean, given.posterior(x).mean)


def test_values_pass_through_transforms_that_are_not_affine():
    definition = problems.single(log=True)
    model = pathwise(definition, num_samples=512)
    y = targets(U)
    fantasy = model.condition_on_observations(U, y).posterior(inputs(3, 8))
    truth = model.condition_on_observations(U[1], y[1]).posterior(inputs(3, 8))
    assert (fantasy.values > 0).all()
    torch.testing.assert_close(fantasy.mean[1], truth.mean, rtol=0.1, atol=0)


def test_knowledge_gradient_and_its_slope_are_those_of_botorch():
    definition = problems.single()
    x = inputs(2 + 3, 6, 4).requires_grad_()
    found = []
    for model in (pathwise(definition), definition):
        definition.posterior(U)
        value = qKnowledgeGradient(model, num_fantasies=None, sampler=_sampler())(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        found.append((value, slope))
    (ours, our_slope), (theirs, their_slope) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(our_slope, their_slope, rtol=1e-6, atol=1e-6)


def test_observation_noise_of_fantasies_is_the_same_for_all():
    fantasy = pathwise(problems.single()).fantasize(U, _sampler())
    quiet = fantasy.posterior(U)
    noisy = fantasy.posterior(U, observation_noise=True)
    difference = noisy.values - quiet.values
    torch.testing.assert_close(difference[:, 0, 0], difference[:, 2, 3])
    assert difference.shape == (SAMPLES, 3, 4, 2, 1)


def test_fantasies_of_fantasies_are_refused():
    fantasy = pathwise(problems.single()).fantasize(U, _sampler())
    with pytest.raises(UnsupportedError, match="fantasies of fantasies"):
        fantasy.fantasize(U, _sampler())
    with pytest.raises(UnsupportedError, match="fantasies of fantasies"):
        fantasy.condition_on_observations(U, targets(U))
