"""Posteriors of several outputs agree with exact ones, output by output and jointly."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from botorch.models import KroneckerMultiTaskGP, MultiTaskGP, SingleTaskGP
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import LinearKernel, MultitaskKernel, RBFKernel
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    HadamardGaussianLikelihood,
    MultitaskGaussianLikelihood,
)

import sgdgp
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.posterior import MultiOutputPosterior, PathwisePosterior
from sgdgp.posterior.paths import PairPaths, ParallelPaths
from tests.models import (
    GP,
    MULTITASK_KERNELS,
    MultitaskGP,
    gp,
    hadamard_gp,
    multitask_data,
    multitask_gp,
    own_posterior,
    toy_data,
)

NAN = math.nan
SAMPLES = 512
BAND = 5.0 * math.sqrt(2.0 / SAMPLES)
"""Five standard errors of a relative variance (0.31)."""


def new_points(n=7):
    return toy_data(n, seed=1)[0]


def own_multitask(model, x, y, at):
    """Mean (m, T) and covariance (m T, m T) by dense solves, NaN rows taken out."""
    model = model.eval()
    with torch.no_grad(), gpytorch.settings.prior_mode(True):
        prior = model(torch.cat([x, at]))
    n, tasks = y.shape
    seen = (~torch.isnan(y)).flatten().nonzero().squeeze(1)
    mean, covariance = prior.loc.detach(), prior.covariance_matrix.detach()
    noise = model.likelihood.task_noises + model.likelihood.noise
    system = covariance[seen][:, seen] + torch.diag(noise.detach().repeat(n)[seen])
    cross = covariance[n * tasks :][:, seen]
    gain = torch.linalg.solve(system, cross.T).T
    centred = y.flatten()[seen] - mean[seen]
    found = mean[n * tasks :] + gain @ centred
    left = covariance[n * tasks :, n * tasks :] - gain @ cross.T
    return found.reshape(len(at), tasks), left


def with_gaps(y):
    y = y.clone()
    y[3, 1] = y[5] = y[7, 2] = y[10:15, 0] = NAN
    return y


@pytest.mark.parametrize("name", MULTITASK_KERNELS)
def test_a_multitask_posterior_is_gpytorchs(name):
    model = multitask_gp(MULTITASK_KERNELS[name]())
    posterior = sgdgp.condition(model, num_samples=SAMPLES, num_features=512)
    assert isinstance(posterior, MultiOutputPosterior)
    assert isinstance(posterior.paths, PairPaths)
    x = new_points()
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        own = model.eval()(x)
    torch.testing.assert_close(posterior.mean(x), own.mean, rtol=0, atol=1e-6)
    ratio = posterior.variance(x) / own.variance
    assert float((ratio - 1).abs().max()) < BAND


@pytest.mark.parametrize("solver", ["cholesky", "cg", "sdd"])
def test_missing_targets_are_left_out(solver):
    model = multitask_gp()
    x, y = multitask_data()
    y = with_gaps(y)
    posterior = sgdgp.condition(
        model, x, y, solver=solver, num_samples=SAMPLES, num_features=512
    )
    assert posterior.solution.weights.shape == (62, 1 + SAMPLES)
    at = new_points()
    mean, covariance = own_multitask(model, x, y, at)
    atol = 1e-6 if solver == "cholesky" else 0.02
    torch.testing.assert_close(posterior.mean(at), mean, rtol=0, atol=atol)
    ratio = posterior.variance(at).flatten() / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < BAND


@pytest.mark.parametrize("shape", [(30,), (30, 1)])
@pytest.mark.parametrize("held", [False, True])
def test_missing_targets_of_one_output_are_left_out(shape, held):
    x, y = toy_data(36)
    y[[0, 7, 8, 29, 31]] = NAN
    seen = ~torch.isnan(y)
    noise = torch.linspace(0.05, 0.6, 36).double()
    model = GP(None, None, RBFKernel(), FixedNoiseGaussianLikelihood(noise[:30]))
    data = (x[:30], y[:30].reshape(shape))
    if held and len(shape) == 1:
        model.set_train_data(*data, strict=False)
        data = ()
    posterior = sgdgp.condition(model.double(), *data, num_samples=2, num_features=64)
    assert isinstance(posterior, PathwisePosterior)
    after = posterior.update(x[30:], y[30:].reshape(-1, *shape[1:]), noise=noise[30:])
    at = new_points()
    for found, n in ((posterior, 30), (after, 36)):
        own = GP(
            x[:n][seen[:n]],
            y[:n][seen[:n]],
            RBFKernel(),
            FixedNoiseGaussianLikelihood(noise[:n][seen[:n]]),
        ).double()
        assert len(found.problem.x) == int(seen[:n].sum())
        mean, covariance = own_posterior(own, at)
        torch.testing.assert_close(found.mean(at), mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.variance(at), covariance.diagonal())


def test_a_task_may_have_no_targets_at_all():
    model = multitask_gp()
    x, y = multitask_data()
    y[:, 2] = NAN
    posterior = sgdgp.condition(model, x, y, num_samples=0)
    at = new_points()
    torch.testing.assert_close(
        posterior.mean(at), own_multitask(model, x, y, at)[0], rtol=0, atol=1e-6
    )


def test_samples_are_jointly_distributed_over_points_and_outputs():
    model = multitask_gp()
    x, y = multitask_data()
    y = with_gaps(y)
    at = new_points(4)
    mean, covariance = own_multitask(model, x, y, at)
    posterior = sgdgp.condition(model, x, y, num_samples=2048, num_features=256, seed=2)
    values = posterior.samples(at).flatten(1)
    scale = covariance.diagonal().sqrt()
    error = (values.T.cov() - covariance) / scale.outer(scale)
    # Entries of a sample correlation have a standard error of at most sqrt(2 / s).
    assert float(error.abs().max()) < 5.0 * math.sqrt(2.0 / 2048)
    standard = (values.mean(0) - mean.flatten()) / scale * math.sqrt(2048)
    assert float(standard.abs().max()) < 4.5
    joint = posterior.predict(at)
    assert isinstance(joint, MultitaskMultivariateNormal)
    torch.testing.assert_close(joint.covariance_matrix, covariance)
    torch.testing.assert_close(joint.mean, posterior.mean(at))


def test_noise_of_predictions_is_the_tasks():
    model = multitask_gp()
    posterior = sgdgp.condition(model, num_samples=8, num_features=64)
    x = new_points()
    noise = (model.likelihood.task_noises + model.likelihood.noise).detach()
    for batch_size in (None, 3):
        noisy = posterior.predict(x, observation_noise=True, batch_size=batch_size)
        torch.testing.assert_close(
            noisy.variance, posterior.variance(x) + noise, check_dtype=True
        )
    given = torch.rand(7, 3, dtype=torch.float64) + 0.1
    noisy = posterior.predict(x, observation_noise=given)
    torch.testing.assert_close(noisy.variance, posterior.variance(x) + given)


def independent():
    x, y = multitask_data(30)
    return gp(), x, y


def test_independent_outputs_are_posteriors_of_each_by_itself():
    model, x, y = independent()
    posterior = sgdgp.condition(model, x, y, num_samples=SAMPLES, num_features=512)
    assert isinstance(posterior, MultiOutputPosterior)
    assert isinstance(posterior.paths, ParallelPaths)
    assert posterior.solution.weights.shape == (30, 3 * (1 + SAMPLES))
    at = new_points()
    for output in range(3):
        own = gp()
        own.set_train_data(x, y[:, output], strict=False)
        mean, covariance = own_posterior(own, at)
        found = posterior.mean(at)[:, output]
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)
        ratio = posterior.variance(at)[:, output] / covariance.diagonal()
        assert float((ratio - 1).abs().max()) < BAND


def test_samples_of_independent_outputs_are_independent():
    model, x, y = independent()
    posterior = sgdgp.condition(model, x, y, num_samples=2048, num_features=256)
    at = new_points(4)
    _, covariance = own_posterior(model, at)
    truth = torch.kron(covariance, torch.eye(3).double())
    for values in (posterior.samples(at), posterior.draw(2048, seed=4)(at)):
        scale = truth.diagonal().sqrt()
        error = (values.flatten(1).T.cov() - truth) / scale.outer(scale)
        assert float(error.abs().max()) < 5.0 * math.sqrt(2.0 / 2048)
    joint = posterior.predict(at)
    torch.testing.assert_close(joint.mean, posterior.mean(at))
    torch.testing.assert_close(joint.variance, posterior.variance(at))
    cross = joint.covariance_matrix.reshape(4, 3, 4, 3)
    assert float(cross[:, 0, :, 1].abs().max()) == 0.0
    torch.testing.assert_close(cross[:, 1, :, 1], covariance)


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_independent_outputs_may_miss_different_rows(solver):
    model, x, y = independent()
    y = with_gaps(y)
    posterior = sgdgp.condition(
        model, x, y, solver=solver, num_samples=4, num_features=64
    )
    at = new_points()
    for output in range(3):
        seen = ~torch.isnan(y[:, output])
        alone = sgdgp.condition(model, x[seen], y[seen, output], num_samples=0)
        torch.testing.assert_close(
            posterior.mean(at)[:, output], alone.mean(at), rtol=0, atol=1e-6
        )
    assert posterior.solution.residuals.shape == (15,)
    assert posterior.solution.weights.shape == (28, 15)
    assert posterior.solution.reason == "converged"


def test_outputs_that_miss_the_same_rows_share_a_solve():
    model, x, y = independent()
    y[4, 0] = y[9, 1] = y[9, 2] = NAN
    posterior = sgdgp.condition(model, x, y, num_samples=2, num_features=64)
    first, second, third = (part.paths.operator for part in posterior.parts)
    assert second is third
    assert first is not second


def test_one_column_of_many_is_the_same_as_that_column():
    model, x, y = independent()
    several = sgdgp.condition(model, x, y[:, :1].expand(-1, 2), num_samples=0)
    alone = sgdgp.condition(model, x, y[:, :1], num_samples=0)
    at = new_points()
    torch.testing.assert_close(several.mean(at)[:, 1], alone.mean(at))
    assert alone.mean(at).shape == (7,)


def test_fixed_noise_is_shared_by_independent_outputs():
    x, y = multitask_data(30)
    y = with_gaps(y)
    noise = torch.linspace(0.05, 0.6, 30).double()
    model = GP(None, None, RBFKernel(), FixedNoiseGaussianLikelihood(noise)).double()
    posterior = sgdgp.condition(model, x, y, num_samples=2, num_features=64)
    at = new_points()
    for output in range(3):
        seen = ~torch.isnan(y[:, output])
        own = GP(
            x[seen],
            y[seen, output],
            RBFKernel(),
            FixedNoiseGaussianLikelihood(noise[seen]),
        ).double()
        torch.testing.assert_close(
            posterior.mean(at)[:, output], own_posterior(own, at)[0], rtol=0, atol=1e-6
        )


def test_fixed_noise_of_tasks_is_one_for_each_target():
    x, y = multitask_data()
    y = with_gaps(y)
    noise = torch.rand(24, 3, generator=torch.Generator().manual_seed(0)).double() + 0.1
    model = multitask_gp(likelihood=FixedNoiseGaussianLikelihood(noise))
    posterior = sgdgp.condition(model, x, y, num_samples=0)
    seen = (~torch.isnan(y)).flatten()
    torch.testing.assert_close(posterior.parts[0].problem.noise, noise.flatten()[seen])
    with pytest.raises(ValueError, match=r"as a tensor \(7, 3\)"):
        sgdgp.condition(model, x, y, num_samples=2, num_features=16).predict(
            new_points(), observation_noise=True
        )


KINDS = pytest.mark.parametrize("kind", ["multitask", "independent"])


def posterior_of(kind):
    model, x, y = independent()
    data = (multitask_gp(),) if kind == "multitask" else (model, x, y)
    return sgdgp.condition(*data, num_samples=3, num_features=64)


@KINDS
def test_noise_that_does_not_fit_is_refused(kind):
    posterior = posterior_of(kind)
    with pytest.raises(ValueError, match=r"noise: expected .* \(7, 3\) or \(7,\)"):
        posterior.predict(new_points(), observation_noise=torch.ones(6, 3))
    noise = torch.ones(7, 3)
    noise[2, 1] = 0.0
    with pytest.raises(ValueError, match=r"found 1 .* at index \(2, 1\)"):
        posterior.predict(new_points(), observation_noise=noise)


@KINDS
def test_updates_are_as_good_as_conditioning_on_all(kind):
    x, y = multitask_data(30)
    y = with_gaps(y)
    y[25:27, 1] = NAN
    model = multitask_gp() if kind == "multitask" else gp()
    settings = {"num_samples": SAMPLES, "num_features": 512}
    before = sgdgp.condition(model, x[:24], y[:24], **settings)
    held = before.mean(new_points())
    after = before.update(x[24:], y[24:])
    at = new_points()
    whole = sgdgp.condition(model, x, y, num_samples=0)
    torch.testing.assert_close(after.mean(at), whole.mean(at), rtol=0, atol=1e-6)
    truth = sgdgp.condition(model, x, y, num_samples=SAMPLES, num_features=512, seed=1)
    ratio = after.variance(at) / truth.variance(at)
    assert float((ratio - 1).abs().max()) < 1.5 * BAND
    # The same functions as before, but for what the data say.
    moved = (after.samples(at) - before.samples(at)).abs().mean()
    assert float(moved) < float((truth.samples(at) - before.samples(at)).abs().mean())
    assert torch.equal(before.mean(at), held)


def test_an_update_of_all_outputs_is_one_solve():
    x, y = multitask_data(30)
    settings = {"num_samples": 2, "num_features": 64, "solver": "cg"}
    before = sgdgp.condition(gp(), x[:24], y[:24], **settings)
    after = before.update(x[24:], y[24:])
    first, *others = (part.paths.operator for part in after.parts)
    assert all(operator is first for operator in others)
    assert after.solution.passes == after.parts[0].solution.passes
    y[25, 1] = NAN
    after = before.update(x[24:], y[24:])
    first, second, third = (part.paths.operator for part in after.parts)
    assert first is third
    assert second is not first
    again = after.update(new_points(2), torch.ones(2, 3).double())
    assert [len(part.problem.x) for part in again.parts] == [32, 31, 32]


def test_updates_with_noise_of_their_own():
    x, y = multitask_data(30)
    noise = torch.linspace(0.05, 0.6, 30).double()
    short = FixedNoiseGaussianLikelihood(noise[:24])
    model = GP(None, None, RBFKernel(), short).double()
    before = sgdgp.condition(model, x[:24], y[:24], num_samples=2, num_features=64)
    after = before.update(x[24:], y[24:], noise=noise[24:])
    whole = GP(None, None, RBFKernel(), FixedNoiseGaussianLikelihood(noise)).double()
    expected = sgdgp.condition(whole, x, y, num_samples=0)
    at = new_points()
    torch.testing.assert_close(after.mean(at), expected.mean(at), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.ones(2, 2).double(), ValueError, r"\(2, 3\), found \(2, 2\)"),
        (torch.full((2, 3), NAN).double(), ValueError, "NaN in every row"),
        (torch.full((2, 3), math.inf).double(), ValueError, "y_new.* found 6"),
        ([1.0], TypeError, "y_new"),
    ],
)
@KINDS
def test_new_targets_that_do_not_fit_are_refused(kind, y, error, message):
    with pytest.raises(error, match=message):
        posterior_of(kind).update(new_points(2), y)


def test_independent_outputs_are_checkpointed_in_a_file_per_solve(tmp_path):
    model, x, y = independent()
    y = with_gaps(y)
    settings = {"num_samples": 2, "num_features": 64, "solver": "cg"}
    path = tmp_path / "solve"
    first = sgdgp.condition(model, x, y, checkpoint=path, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["solve", "solve.1", "solve.2"]
    again = sgdgp.condition(model, x, y, checkpoint=path, **settings)
    assert torch.equal(again.solution.weights, first.solution.weights)
    assert again.solution.seconds == first.solution.seconds
    y[0] += 1.0
    with pytest.raises(ValueError, match="training targets y"):
        sgdgp.condition(model, x, y, checkpoint=path, **settings)


def test_hadamard_models_take_points_and_tasks():
    model = hadamard_gp()
    posterior = sgdgp.condition(model, num_samples=SAMPLES, num_features=512)
    x = new_points()
    i = torch.tensor([[0], [1], [1], [0], [1], [0], [0]])
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        own = model.eval()(x, i)
    torch.testing.assert_close(posterior.mean((x, i)), own.mean, rtol=0, atol=1e-6)
    ratio = posterior.variance((x, i)) / own.variance
    assert float((ratio - 1).abs().max()) < BAND
    explicit = sgdgp.condition(
        hadamard_gp().train(), model.train_inputs, model.train_targets, num_samples=0
    )
    torch.testing.assert_close(explicit.mean((x, i)), posterior.mean((x, i)))
    flat = i.squeeze(1)
    torch.testing.assert_close(posterior.mean((x, flat)), posterior.mean((x, i)))
    with pytest.raises(ValueError, match="2 input tensors"):
        posterior.mean(x)


def test_hadamard_models_with_noise_by_task():
    likelihood = HadamardGaussianLikelihood(num_tasks=2)
    model = hadamard_gp(likelihood=likelihood)
    posterior = sgdgp.condition(model, num_samples=2, num_features=64)
    x, i = model.train_inputs
    noise = model.likelihood.noise.detach()[i.squeeze(1)]
    torch.testing.assert_close(posterior.problem.noise, noise)
    noisy = posterior.predict((x, i), observation_noise=True).variance
    torch.testing.assert_close(noisy - posterior.variance((x, i)), noise)


def test_botorch_multitask_models_of_long_data():
    x, y = toy_data(30)
    x = torch.cat([x, (torch.arange(30) % 3).double().unsqueeze(1)], dim=1)
    torch.manual_seed(0)
    model = MultiTaskGP(x, 5.0 + 3.0 * y[:, None], task_feature=-1)
    at = torch.cat([new_points(), torch.ones(7, 1).double()], dim=1)
    own = model.eval().posterior(at[:, :-1], output_indices=[1])
    posterior = sgdgp.condition(model, num_samples=SAMPLES, num_features=512)
    torch.testing.assert_close(
        posterior.mean(at), own.mean[:, 0].detach(), rtol=0, atol=1e-5
    )
    ratio = posterior.variance(at) / own.variance[:, 0].detach()
    assert float((ratio - 1).abs().max()) < BAND


@pytest.mark.parametrize("explicit", [True, False])
def test_botorch_kronecker_models_have_units_by_output(explicit):
    x, y = multitask_data()
    y = torch.tensor([100.0, -3.0, 0.0]) + torch.tensor([30.0, 1.0, 0.1]) * y
    torch.manual_seed(0)
    model = KroneckerMultiTaskGP(x, y.double())
    for parameter in model.parameters():
        parameter.data.clamp_(-1.0, 1.0)
    at = new_points()
    own = model.eval().posterior(at)
    data = (x, y.double()) if explicit else ()
    posterior = sgdgp.condition(model, *data, num_samples=SAMPLES, num_features=512)
    torch.testing.assert_close(
        posterior.mean(at), own.mean.detach(), rtol=1e-5, atol=1e-5
    )
    ratio = posterior.variance(at) / own.variance.detach()
    assert float((ratio - 1).abs().max()) < BAND
    noisy = posterior.predict(at, observation_noise=True).variance
    scales = torch.tensor(
        [s.scale for s in posterior.parts[0].problem.prior.outcome_scales]
    ).double()
    noise = (model.likelihood.task_noises + model.likelihood.noise).detach()
    torch.testing.assert_close(
        noisy - posterior.variance(at), (scales**2 * noise)[None].expand(7, 3)
    )


def test_columns_of_a_botorch_model_have_its_units():
    x, y = toy_data(30)
    model = SingleTaskGP(x, 1e3 + 20.0 * y[:, None])
    both = torch.stack([1e3 + 20.0 * y, 1e3 - 20.0 * y], dim=1)
    at = new_points()
    posterior = sgdgp.condition(model, x, both, num_samples=0)
    for output in range(2):
        alone = sgdgp.condition(model, x, both[:, output], num_samples=0)
        torch.testing.assert_close(posterior.mean(at)[:, output], alone.mean(at))


def test_float32_is_kept():
    x, y = multitask_data(dtype=torch.float32)
    kernel = MultitaskKernel(RBFKernel(), 3)
    torch.manual_seed(0)
    posterior = sgdgp.condition(MultitaskGP(x, y, kernel), num_samples=2)
    assert posterior.samples(new_points().float()).dtype == torch.float32


def test_kernels_without_random_features_work_too():
    model = multitask_gp(MultitaskKernel(LinearKernel() + Unknown(), 3))
    posterior = sgdgp.condition(model, num_samples=SAMPLES)
    x = new_points()
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        own = model.eval()(x)
    torch.testing.assert_close(posterior.mean(x), own.mean, rtol=0, atol=1e-5)
    ratio = posterior.variance(x) / own.variance
    assert float((ratio - 1).abs().max()) < BAND


class Unknown(RBFKernel):
    """A kernel that nothing is known of but its forward."""

    def forward(self, x1, x2, diag=False, **params):
        return super().forward(x1, x2, diag=diag, **params).pow(2)


def correlated_noise():
    return multitask_gp(likelihood=MultitaskGaussianLikelihood(3, rank=1)), ()


def too_few_columns():
    x, y = multitask_data()
    return multitask_gp(), (x, y[:, :2])


def nothing_in_a_column():
    x, y = multitask_data(30)
    y[:, 1] = NAN
    return gp(), (x, y)


def infinite_target():
    x, y = multitask_data(30)
    y[4, 1] = math.inf
    return gp(), (x, y)


def batch_model():
    x, y = multitask_data(30)
    return SingleTaskGP(x, y), ()


class BatchIndependent(gpytorch.models.ExactGP):
    """GPyTorch's tutorial on independent outputs by a batch of kernels."""

    def __init__(self, x, y):
        super().__init__(x, y, MultitaskGaussianLikelihood(3))
        shape = torch.Size([3])
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=shape)
        self.kernel = RBFKernel(batch_shape=shape)

    def forward(self, x):
        return MultitaskMultivariateNormal.from_batch_mvn(
            gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.kernel(x)
            )
        )


def batch_of_kernels():
    return BatchIndependent(*multitask_data(30)).double(), ()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (correlated_noise, "expected rank=0"),
        (too_few_columns, r"expected shape \(24, 3\).*found \(24, 2\)"),
        (nothing_in_a_column, "only NaN in column 1"),
        (infinite_target, r"y: expected finite values.*\(4, 1\)"),
        (batch_model, r"y of shape \(n, outputs\)"),
        (batch_of_kernels, r"batch.*y of shape \(n, outputs\).*MultitaskKernel"),
    ],
)
def test_what_cannot_be_conditioned_is_refused_with_what_to_do(build, message):
    model, data = build()
    with pytest.raises(ValueError, match=message):
        sgdgp.condition(model, *data, num_samples=1)
    assert issubclass(UnsupportedModelError, ValueError)
