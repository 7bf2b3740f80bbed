"""Mean, samples and gradients agree with the closed form; verbs of every posterior."""

from __future__ import annotations

import functools
import math
import pickle

import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import (
    CosineKernel,
    MaternKernel,
    PiecewisePolynomialKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

import sgdgp
from sgdgp.posterior import (
    Marginals,
    MultiOutputPosterior,
    PathwisePosterior,
    Posterior,
    load,
    variances,
)
from tests.models import (
    FEATURE_KERNELS,
    closed_form,
    gp,
    multitask_data,
    multitask_gp,
    own_posterior,
    toy_data,
)

SAMPLES = 4096
GROUP = 64  # prior draws that share random features
NOISE = 0.1


def new_points(n: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return toy_data(n, seed=1, dtype=dtype)[0]


def truth(model, x):
    return closed_form(
        model.kernel,
        model.train_inputs[0],
        model.train_targets,
        x,
        noise=float(model.likelihood.noise.detach()),
        mean=float(model.mean_module.constant.detach()),
    )


@functools.cache
def many_samples(name):
    """A model with n = 100 and its posterior of 4,096 samples."""
    model = gp(FEATURE_KERNELS[name](), n=100, noise=NOISE)
    return model, sgdgp.condition(
        model, solver="cholesky", num_samples=SAMPLES, num_features=1024, seed=5
    )


def worst_and_mean_square(statistics):
    return float(statistics.abs().max()), float(statistics.square().mean())


@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize("name", FEATURE_KERNELS)
def test_mean_is_the_closed_form(name, n):
    model, x = gp(FEATURE_KERNELS[name](), n=n, noise=NOISE), new_points()
    posterior = sgdgp.condition(model, solver="cholesky", num_samples=0)
    expected, _ = truth(model, x)
    torch.testing.assert_close(posterior.mean(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FEATURE_KERNELS)
def test_samples_have_the_closed_forms_mean_and_covariance(name):
    """Student's t of every entry, over 64 independent groups of 64 samples.

    Samples of a group share their random features, so the groups, not the samples,
    are the independent observations. 44 entries with 63 degrees of freedom exceed
    4.5 with probability 0.001.
    """
    model, posterior = many_samples(name)
    x = new_points()
    mean, covariance = truth(model, x)
    centred = (posterior.samples(x) - mean).reshape(-1, GROUP, len(x))
    root = math.sqrt(len(centred))

    means = centred.mean(1)
    t_mean = root * means.mean(0) / means.std(0)

    upper = torch.triu_indices(len(x), len(x)).unbind()
    seconds = (centred.mT @ centred / GROUP)[:, upper[0], upper[1]]
    error = seconds.std(0) / root
    t_covariance = (seconds.mean(0) - covariance[upper]) / error

    worst, mean_square = worst_and_mean_square(torch.cat([t_mean, t_covariance]))
    assert worst < 4.5
    assert mean_square < 3.0
    # The test can see: its standard error of a variance is at most 5 %.
    diagonal = upper[0] == upper[1]
    assert bool((error[diagonal] < 0.05 * covariance.diagonal()).all())


@pytest.mark.parametrize("name", FEATURE_KERNELS)
def test_variance_from_samples_is_theirs_around_the_solved_mean(name):
    _, posterior = many_samples(name)
    x = new_points()
    squares = (posterior.samples(x) - posterior.mean(x)).square()
    variance, error = posterior.variance(x, from_samples=True, return_error=True)
    torch.testing.assert_close(variance, squares.mean(0))
    torch.testing.assert_close(error, variance * math.sqrt(2 / SAMPLES))


@pytest.mark.parametrize("name", FEATURE_KERNELS)
def test_gradients_of_mean_and_samples_agree_with_finite_differences(name):
    model = gp(FEATURE_KERNELS[name](), noise=NOISE)
    posterior = sgdgp.condition(model, num_samples=3, num_features=512)
    functions = posterior.draw(2, seed=9)
    training_point = model.train_inputs[0][:1]
    x = torch.cat([new_points(4), training_point])

    def values(at):
        return torch.cat(
            [posterior.mean(at)[None], posterior.samples(at), functions(at)]
        )

    at = x.clone().requires_grad_()
    rows = values(at)
    gradients = torch.stack(
        [torch.autograd.grad(row.sum(), at, retain_graph=True)[0] for row in rows]
    )
    # Small: features of a Matern-1/2 kernel have frequencies in the thousands.
    step = 1e-6
    for column in range(x.shape[1]):
        shift = torch.zeros(x.shape[1], dtype=x.dtype)
        shift[column] = step
        expected = (values(x + shift) - values(x - shift)) / (2 * step)
        torch.testing.assert_close(
            gradients[..., column], expected, rtol=1e-5, atol=1e-5
        )


def test_values_with_a_graph_are_those_without():
    model = gp(FEATURE_KERNELS["sum"](), n=60)
    posterior = sgdgp.condition(model, num_samples=3, num_features=512)
    x = new_points()
    graph = posterior.samples(x.clone().requires_grad_())
    torch.testing.assert_close(graph.detach(), posterior.samples(x))
    assert not posterior.samples(x).requires_grad


@pytest.fixture(scope="module")
def posterior():
    return sgdgp.condition(gp(n=60), num_samples=70, num_features=256)


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_new_even_with_the_seed_of_the_posterior(seed):
    posterior = sgdgp.condition(gp(), num_samples=3, num_features=256, seed=seed)
    x = new_points()
    assert not torch.allclose(posterior.draw(3, seed=seed)(x), posterior.samples(x))


def test_draws_follow_a_generator(posterior):
    x = new_points()
    stream = torch.Generator().manual_seed(3)
    first, second = posterior.draw(2, seed=stream)(x), posterior.draw(2, seed=stream)(x)
    assert not torch.allclose(first, second)


def test_draws_have_the_posteriors_distribution():
    model, posterior = many_samples("matern_32")
    x = new_points(4)
    mean, covariance = truth(model, x)
    centred = (posterior.draw(1024, seed=2)(x) - mean).reshape(-1, GROUP, len(x))
    seconds = centred.square().mean(1)
    t = (seconds.mean(0) - covariance.diagonal()) / (seconds.std(0) / 4.0)
    # 16 groups, so Student's t with 15 degrees of freedom: 4.9 is 0.0002.
    assert float(t.abs().max()) < 4.9


def test_draws_share_the_posteriors_mean(posterior):
    drawn = posterior.draw(2).paths.weights[:, 0]
    assert torch.equal(drawn, posterior.solution.weights[:, 0])


def test_draws_report_their_own_solve(posterior):
    functions = posterior.draw(5)
    assert functions.solution.weights.shape == (60, 5)
    assert functions.solution.reason == "converged"
    assert functions(new_points()).shape == (5, 8)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_samples_do_not_depend_on_how_x_is_batched(posterior, size):
    x = new_points(50)
    parts = torch.cat([posterior.samples(rows) for rows in x.split(size)], 1)
    torch.testing.assert_close(parts, posterior.samples(x))


def test_observation_noise_is_the_likelihoods(posterior):
    x = new_points()
    added = posterior.predict(x, observation_noise=True).covariance_matrix
    expected = posterior.predict(x).covariance_matrix + 0.1 * torch.eye(8)
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6)


def test_a_number_is_the_noise_variance(posterior):
    x = new_points()
    plain, noisy = (posterior.predict(x, observation_noise=v) for v in (False, 0.5))
    assert torch.allclose(noisy.variance, plain.variance + 0.5)


def test_fixed_noise_has_to_be_given_at_new_points():
    likelihood = FixedNoiseGaussianLikelihood(torch.linspace(0.05, 0.6, 30))
    posterior = sgdgp.condition(gp(likelihood=likelihood), num_samples=4)
    x, noise = new_points(), torch.linspace(0.1, 0.8, 8)
    with pytest.raises(ValueError, match="8 noise variances"):
        posterior.predict(x, observation_noise=True)
    with pytest.raises(ValueError, match=r"8 variances.*shape \(5,\)"):
        posterior.predict(x, observation_noise=noise[:5])
    for value in (0.0, -0.1, math.nan, math.inf):
        spoilt = noise.clone()
        spoilt[[3, 6]] = value
        with pytest.raises(ValueError, match=r"found 2 .* first at index 3: "):
            posterior.predict(x, observation_noise=spoilt)
    added = posterior.predict(x, observation_noise=noise, batch_size=3).variance
    torch.testing.assert_close(added - posterior.variance(x), noise.double())


def test_one_sample_is_enough_for_a_function_and_a_variance():
    posterior, x = sgdgp.condition(gp(), num_samples=1), new_points()
    squares = (posterior.samples(x)[0] - posterior.mean(x)).square()
    assert posterior.samples(x).shape == (1, 8)
    torch.testing.assert_close(posterior.variance(x, from_samples=True), squares)


def test_float32_agrees_with_float64():
    x = new_points()
    exact = sgdgp.condition(gp(n=100), num_samples=0).mean(x)
    posterior = sgdgp.condition(gp(n=100, dtype=torch.float32), num_samples=3)
    values = posterior.samples(x.float())
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        posterior.mean(x.float()).double(), exact, rtol=0, atol=1e-4
    )


WITHOUT_FEATURES = {
    "piecewise_polynomial": lambda: PiecewisePolynomialKernel(q=2),
    "cosine": lambda: CosineKernel() + RBFKernel(),
    "part_of_a_sum": lambda: (
        ScaleKernel(PiecewisePolynomialKernel(q=1)) + MaternKernel(nu=1.5)
    ),
}


@pytest.mark.parametrize("name", WITHOUT_FEATURES)
def test_kernels_without_features_are_drawn_exactly(name):
    # In one dimension every one of these kernels is positive definite.
    model = gp(WITHOUT_FEATURES[name](), d=1)
    assert not sgdgp.features.has_features(model.kernel)
    x = toy_data(8, 1, seed=1)[0]
    mean, covariance = truth(model, x)
    posterior = sgdgp.condition(model, num_samples=SAMPLES)
    values = posterior.samples(x)
    assert torch.equal(posterior.samples(x), values)
    torch.testing.assert_close(posterior.samples(x[2:4]), values[:, 2:4])
    # Independent samples: the usual standard errors hold.
    deviation = covariance.diagonal().sqrt()
    t_mean = (values.mean(0) - mean) / (deviation / math.sqrt(SAMPLES))
    centred = values - mean
    scale = covariance.square() + torch.outer(deviation, deviation).square()
    t_covariance = (centred.T @ centred / SAMPLES - covariance) / (
        scale / SAMPLES
    ).sqrt()
    assert float(t_mean.abs().max()) < 4.5
    assert float(t_covariance.abs().max()) < 4.5


def test_the_mean_of_a_kernel_without_features_is_differentiable():
    model = gp(PiecewisePolynomialKernel(q=2), d=1)
    posterior = sgdgp.condition(model, num_samples=2)
    x = toy_data(8, 1, seed=1)[0].requires_grad_()
    assert bool(
        torch.isfinite(torch.autograd.grad(posterior.mean(x).sum(), x)[0]).all()
    )
    with pytest.raises(ValueError, match="register random features"):
        posterior.samples(x)


def test_too_many_points_for_exact_draws_say_how_to_register_features():
    x, y = toy_data(10_001, 1)
    model = gp(PiecewisePolynomialKernel(q=2), d=1)
    with pytest.raises(sgdgp.NoRandomFeatures, match="register_features"):
        sgdgp.condition(model, x, y, num_samples=2, operator="row_blocks")


KINDS = pytest.mark.parametrize("kind", ["one", "multitask", "independent"])


def outputs_of(kind):
    """Shape of what comes behind the points."""
    return () if kind == "one" else (3,)


def posterior_of(kind, **settings):
    settings = {"num_samples": 3, "num_features": 64, **settings}
    data = multitask_data(30) if kind == "independent" else ()
    return sgdgp.condition(model_of(kind), *data, **settings)


def model_of(kind):
    return multitask_gp() if kind == "multitask" else gp()


@KINDS
def test_it_says_in_a_line_what_it_is(kind):
    posterior = posterior_of(kind)
    line = repr(posterior)
    assert line.startswith(f"{type(posterior).__name__}(points=")
    assert f"num_outputs={posterior.num_outputs}" in line
    assert line.endswith(f"reason={posterior.solution.reason!r})")
    assert len(line) < 200


@KINDS
def test_what_it_says_of_its_solves_is_what_they_say(kind):
    posterior = posterior_of(kind, solver="cg")
    facts, solution = posterior._facts(), posterior.solution
    assert facts["largest_residual"] == float(solution.residuals.max())
    assert (facts["passes"], facts["dim"]) == (solution.passes, 2)
    assert "<td style='text-align: left'>cg</td>" in posterior._repr_html_()


@KINDS
def test_shapes_of_every_verb(kind):
    posterior, t = posterior_of(kind), outputs_of(kind)
    x = new_points()
    assert isinstance(posterior, Posterior)
    assert isinstance(posterior, PathwisePosterior) == (kind == "one")
    assert isinstance(posterior, MultiOutputPosterior) == (kind != "one")
    assert posterior.num_outputs == (None if kind == "one" else 3)
    assert posterior.num_samples == 3
    assert posterior.mean(x).shape == posterior.variance(x).shape == (8, *t)
    assert posterior.samples(x).shape == posterior(x).shape == (3, 8, *t)
    assert torch.equal(posterior(x), posterior.samples(x))
    assert torch.equal(posterior.functions(x), posterior.samples(x))
    assert posterior.draw(5, seed=3)(x).shape == (5, 8, *t)
    assert set(posterior.timings) == {"prior_draws", "solve"}


@KINDS
def test_batch_dimensions_of_x_come_out_again(kind):
    posterior, t = posterior_of(kind), outputs_of(kind)
    flat = new_points(24)
    x = flat.reshape(2, 3, 4, 2)
    assert posterior.samples(x).shape == (3, 2, 3, 4, *t)
    torch.testing.assert_close(
        posterior.samples(x).reshape(3, 24, *t), posterior.samples(flat)
    )
    for verb in (posterior.mean, posterior.variance):
        torch.testing.assert_close(verb(x).reshape(24, *t), verb(flat))


@KINDS
@pytest.mark.parametrize("noise", [False, True, "given"])
def test_points_of_a_batch_are_predicted_by_themselves(kind, noise):
    posterior, t = posterior_of(kind), outputs_of(kind)
    x = new_points(24).reshape(2, 3, 4, 2)
    if noise == "given":
        noise = torch.linspace(0.1, 0.9, 24 * (t or (1,))[0]).reshape(2, 3, 4, *t)
    joint = posterior.predict(x, observation_noise=noise)
    assert joint.batch_shape == (2, 3)
    assert joint.event_shape == (4, *t)
    assert isinstance(joint, MultitaskMultivariateNormal) == (kind != "one")
    for i, j in [(0, 1), (1, 2)]:
        own = noise if isinstance(noise, bool) else noise[i, j]
        alone = posterior.predict(x[i, j], observation_noise=own)
        torch.testing.assert_close(joint.mean[i, j], alone.mean)
        torch.testing.assert_close(
            joint.covariance_matrix[i, j], alone.covariance_matrix
        )
    marginals = posterior.predict(x, observation_noise=noise, batch_size=5)
    torch.testing.assert_close(marginals.mean, joint.mean)
    torch.testing.assert_close(marginals.variance, joint.variance)
    empty = posterior.predict(x[:0], batch_size=5)
    assert empty.mean.shape == empty.variance.shape == (0, 3, 4, *t)


def test_a_batch_is_differentiable():
    posterior = posterior_of("one")
    x = new_points(4).reshape(2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: posterior.predict(x).covariance_matrix, x)


@KINDS
def test_no_points_give_empty_results(kind):
    posterior, t = posterior_of(kind), outputs_of(kind)
    x = new_points()[:0]
    assert posterior.mean(x).shape == posterior.variance(x).shape == (0, *t)
    assert posterior.samples(x).shape == (3, 0, *t)
    assert posterior.predict(x, batch_size=4).variance.shape == (0, *t)


@KINDS
def test_more_points_than_are_evaluated_at_a_time(kind, monkeypatch):
    posterior, x = posterior_of(kind), new_points(50)
    expected = posterior.mean(x), posterior.samples(x)
    monkeypatch.setattr("sgdgp.posterior.paths._ROWS", 7)
    torch.testing.assert_close((posterior.mean(x), posterior.samples(x)), expected)


@KINDS
@pytest.mark.parametrize("exact", [True, False])
def test_joint_prediction_has_the_mean_and_the_variances(kind, exact, monkeypatch):
    monkeypatch.setattr(variances, "EXACT_ROWS", 2_000 if exact else 0)
    posterior, x = posterior_of(kind), new_points()
    predicted = posterior.predict(x)
    assert isinstance(predicted, MultivariateNormal)
    assert isinstance(predicted, MultitaskMultivariateNormal) == (kind != "one")
    torch.testing.assert_close(predicted.mean, posterior.mean(x))
    torch.testing.assert_close(predicted.variance, posterior.variance(x))
    if not exact:
        # Correlations are the functions', of independent outputs none.
        deviations = (posterior.samples(x) - posterior.mean(x)).flatten(1)
        covariance = deviations.T @ deviations
        if kind == "independent":
            covariance *= torch.eye(3, dtype=torch.float64).repeat(8, 8)
        root = covariance.diagonal().rsqrt()
        scale = root * predicted.variance.flatten().sqrt()
        torch.testing.assert_close(
            predicted.covariance_matrix, covariance * scale.outer(scale)
        )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("noise", [False, True])
@KINDS
def test_marginals_are_those_of_the_joint_prediction(kind, batch_size, noise):
    posterior, x = posterior_of(kind), new_points()
    joint = posterior.predict(x, observation_noise=noise)
    marginals = posterior.predict(x, observation_noise=noise, batch_size=batch_size)
    assert isinstance(marginals, Marginals)
    torch.testing.assert_close(marginals.mean, joint.mean)
    torch.testing.assert_close(marginals.variance, joint.variance)


@KINDS
def test_gradients_in_x_are_those_of_differences(kind):
    posterior = posterior_of(kind)
    x = new_points(2).requires_grad_()
    assert torch.autograd.gradcheck(posterior.mean, x)
    assert torch.autograd.gradcheck(posterior.samples, x)


@KINDS
def test_the_same_seed_gives_the_same_functions(kind):
    x = new_points()
    one, other = posterior_of(kind, seed=5), posterior_of(kind, seed=5)
    assert torch.equal(one.samples(x), other.samples(x))
    assert torch.equal(one.samples(x), one.samples(x))
    assert torch.equal(one.draw(3, seed=4)(x), other.draw(3, seed=4)(x))
    assert not torch.allclose(one.draw(3, seed=4)(x), one.draw(3, seed=5)(x))
    assert not torch.equal(one.samples(x), posterior_of(kind, seed=6).samples(x))


@KINDS
def test_it_survives_a_pickle(kind):
    posterior, x = posterior_of(kind), new_points()
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(again.samples(x), posterior.samples(x))


@KINDS
def test_saved_and_loaded_it_predicts_the_same(kind, tmp_path):
    posterior, x = posterior_of(kind), new_points()
    posterior.save(tmp_path / "posterior")
    again = load(tmp_path / "posterior", model_of(kind))
    assert type(again) is type(posterior)
    assert type(again.paths) is type(posterior.paths)
    assert torch.equal(again.samples(x), posterior.samples(x))
    assert torch.equal(again.mean(x), posterior.mean(x))
    assert torch.equal(again.draw(2)(x), posterior.draw(2)(x))
    data = new_points(3), torch.ones(3, *outputs_of(kind), dtype=torch.float64)
    torch.testing.assert_close(
        again.update(*data).mean(x), posterior.update(*data).mean(x)
    )


@KINDS
def test_an_update_keeps_the_kind(kind):
    posterior, t = posterior_of(kind), outputs_of(kind)
    data = new_points(3), torch.ones(3, *t, dtype=torch.float64)
    updated = posterior.update(*data)
    assert type(updated) is type(posterior)
    assert updated.samples(new_points()).shape == (3, 8, *t)


@KINDS
def test_what_needs_samples_says_so(kind):
    posterior, x = posterior_of(kind, num_samples=0), new_points()
    assert posterior.mean(x).shape == (8, *outputs_of(kind))
    for verb in (posterior.variance, posterior.samples, posterior.predict):
        with pytest.raises(ValueError, match=r"no samples \(num_samples=0\)"):
            verb(x)
    assert posterior.draw(2)(x).shape == (2, 8, *outputs_of(kind))


@KINDS
def test_points_that_do_not_fit_are_refused(kind):
    posterior = posterior_of(kind)
    for bad in (new_points()[:, :1], new_points().repeat(1, 2)):
        with pytest.raises(ValueError, match=r"x: expected shape \(n, 2\)"):
            posterior.mean(bad)
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor"):
        posterior.mean([[0.0, 1.0]])
    with pytest.raises(ValueError, match="dtype"):
        posterior.mean(new_points().float())


def test_without_samples_the_mean_is_the_models_own():
    model, x = gp(), new_points()
    posterior = sgdgp.condition(model, num_samples=0)
    expected, _ = own_posterior(model, x)
    assert posterior.solution.weights.shape == (30, 1)
    torch.testing.assert_close(posterior.mean(x), expected, rtol=0, atol=1e-6)
