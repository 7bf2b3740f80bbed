"""Any exact GP definition gives its own exact posterior, and is left as it was."""

from __future__ import annotations

import math
import signal
import subprocess
import sys

import gpytorch
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.kernels import (
    GridInterpolationKernel,
    InducingPointKernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RBFKernelGradGrad,
    ScaleKernel,
)
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    HadamardGaussianLikelihood,
    StudentTLikelihood,
)
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.likelihoods.noise_models import HeteroskedasticNoise
from gpytorch.priors import GammaPrior

import sgdgp
from sgdgp.gpytorch_adapter import noise_of, prior_of
from tests.models import GP, gp, own_posterior, toy_data

SAMPLES = 512
VARIANCE_BAND = 5.0 * math.sqrt(2.0 / SAMPLES)
"""Five standard errors of a relative variance (0.31)."""


class Network(torch.nn.Sequential):
    """A network that is far from the identity, with a layer that differs in eval."""

    def __init__(self, out: int = 2) -> None:
        super().__init__(
            torch.nn.Linear(2, 5),
            torch.nn.BatchNorm1d(5),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(5, out),
        )
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values)


def with_priors():
    kernel = ScaleKernel(
        MaternKernel(nu=2.5, ard_num_dims=2, lengthscale_prior=GammaPrior(3.0, 6.0)),
        outputscale_prior=GammaPrior(2.0, 0.15),
    )
    kernel.base_kernel.lengthscale = torch.tensor([[0.5, 1.2]])
    likelihood = GaussianLikelihood(noise_prior=GammaPrior(1.1, 0.05))
    return gp(kernel, likelihood=likelihood)


def active_dims():
    return gp(
        ScaleKernel(RBFKernel(active_dims=[1])) + MaternKernel(nu=1.5, active_dims=[0])
    )


def active_dims_behind_a_transformation():
    return gp(
        ScaleKernel(RBFKernel(active_dims=[1])),
        covariance=lambda m, x: m.kernel(torch.tanh(x)),
    )


def linear_mean():
    model = gp(mean=gpytorch.means.LinearMean(2))
    model.mean_module.weights.data.copy_(torch.tensor([[0.7], [-0.4]]))
    return model


def deep_kernel():
    return gp(
        ScaleKernel(RBFKernel()),
        covariance=lambda m, x: m.kernel(m.net(x)),
        net=Network(),
    )


def deep_kernel_to_more_dims():
    return gp(
        MaternKernel(nu=1.5, ard_num_dims=3),
        covariance=lambda m, x: m.kernel(m.net(x)),
        net=Network(3),
    )


def sum_over_network_and_inputs():
    return gp(
        RBFKernel(),
        covariance=lambda m, x: m.kernel(m.net(x)) + m.second(x),
        net=Network(1),
        second=LinearKernel(),
    )


def one_kernel_on_two_inputs():
    return gp(covariance=lambda m, x: m.kernel(torch.tanh(x)) + 2.0 * m.kernel(x))


def constants():
    return gp(covariance=lambda m, x: 2.0 * m.kernel(x) / 4.0)


def nested_constants():
    return gp(
        ScaleKernel(RBFKernel(active_dims=[1])) * PeriodicKernel(active_dims=[0]),
        covariance=lambda m, x: (
            m.kernel(torch.tanh(x)) + 0.5 * (3.0 * m.kernel(x) + m.second(x))
        ),
        second=MaternKernel(nu=0.5, active_dims=[1]),
    )


def almost_the_inputs():
    """Equal to the inputs wherever those are positive, as on the first rows here."""
    model = gp(covariance=lambda m, x: m.kernel(torch.relu(x)))
    x, y = model.train_inputs[0], model.train_targets
    order = x.min(1).values.argsort(descending=True)
    model.set_train_data(x[order], y[order], strict=False)
    assert bool((model.train_inputs[0][:3] > 0).all())
    return model


def product_in_forward():
    return gp(
        ScaleKernel(RBFKernel()),
        covariance=lambda m, x: (
            0.5 * m.kernel(torch.tanh(x)) * m.second(x) + 2.0 * m.kernel(x)
        ),
        second=MaternKernel(nu=1.5, active_dims=[1]),
    )


def product_of_sums_in_forward():
    return gp(
        covariance=lambda m, x: (
            (m.kernel(x) + m.second(x)) * (m.second(x) + m.kernel(torch.tanh(x)))
        ),
        second=LinearKernel(),
    )


def jitter():
    return gp(covariance=lambda m, x: m.kernel(x).add_jitter(1e-4))


def jitter_in_a_term():
    return gp(
        covariance=lambda m, x: m.kernel(x) + 3.0 * m.second(x).add_jitter(1e-3),
        second=MaternKernel(nu=1.5),
    )


def noise_on_its_bound():
    model = gp(noise=1e-4)
    assert torch.isinf(model.likelihood.raw_noise).all()
    return model


def fixed_noise():
    return gp(likelihood=FixedNoiseGaussianLikelihood(torch.linspace(0.05, 0.6, 30)))


def fixed_noise_and_more():
    likelihood = FixedNoiseGaussianLikelihood(
        torch.linspace(0.05, 0.6, 30), learn_additional_noise=True
    )
    likelihood.second_noise = 0.3
    return gp(likelihood=likelihood)


def noise_by_task():
    likelihood = HadamardGaussianLikelihood(num_tasks=2, task_feature_index=-1)
    likelihood.noise = torch.tensor([0.05, 0.7])
    model = gp(RBFKernel(active_dims=[0]), likelihood=likelihood)
    x = model.train_inputs[0].clone()
    x[:, 1] = (x[:, 1] > 0).double()
    model.set_train_data(x, strict=False)
    return model


def noise_by_a_model():
    inputs, _ = toy_data(8, seed=4)
    noise_model = GP(inputs, inputs[:, 0].clone(), RBFKernel()).double()
    return gp(
        likelihood=_GaussianLikelihoodBase(
            noise_covar=HeteroskedasticNoise(noise_model)
        )
    )


def grid_that_stays():
    bounds = ((-2.0, 2.0), (-2.0, 2.0))
    return gp(GridInterpolationKernel(RBFKernel(), grid_size=20, grid_bounds=bounds))


MODELS = [
    gp,
    with_priors,
    active_dims,
    active_dims_behind_a_transformation,
    linear_mean,
    deep_kernel,
    deep_kernel_to_more_dims,
    sum_over_network_and_inputs,
    one_kernel_on_two_inputs,
    constants,
    nested_constants,
    product_in_forward,
    product_of_sums_in_forward,
    almost_the_inputs,
    jitter,
    jitter_in_a_term,
    noise_on_its_bound,
    fixed_noise,
    fixed_noise_and_more,
    noise_by_task,
    noise_by_a_model,
    grid_that_stays,
]


def new_points(model):
    x, _ = toy_data(9, seed=1)
    if isinstance(model.likelihood, HadamardGaussianLikelihood):
        x[:, 1] = 0.0
    return x


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_posterior_is_the_models_own(build):
    model = build()
    x = new_points(model)
    mean, covariance = own_posterior(model, x)
    posterior = sgdgp.condition(model, num_samples=SAMPLES, num_features=512)
    torch.testing.assert_close(posterior.mean(x), mean, rtol=0, atol=1e-6)
    ratio = posterior.variance(x) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < VARIANCE_BAND


def test_explicit_data_replace_the_models_own():
    x, y = toy_data(40, seed=7)
    at, _ = toy_data(9, seed=1)
    model = gp(ScaleKernel(RBFKernel()))
    elsewhere = gp(ScaleKernel(RBFKernel()))
    elsewhere.set_train_data(x, y, strict=False)
    posterior = sgdgp.condition(model, x, y, num_samples=0)
    expected, _ = own_posterior(elsewhere, at)
    torch.testing.assert_close(posterior.mean(at), expected, rtol=0, atol=1e-6)


def test_a_model_without_data_takes_explicit_data():
    x, y = toy_data(30)
    model = GP(None, None, RBFKernel()).double()
    model.likelihood.noise = 0.1
    model.mean_module.constant = 0.2
    at, _ = toy_data(9, seed=1)
    posterior = sgdgp.condition(model, x, y, num_samples=0)
    expected, _ = own_posterior(gp(), at)
    torch.testing.assert_close(posterior.mean(at), expected, rtol=0, atol=1e-6)


def test_a_model_that_has_predicted_already_is_no_different():
    model = deep_kernel()
    at, _ = toy_data(9, seed=1)
    before = sgdgp.condition(model, num_samples=3).samples(at)
    model.eval()
    model(at).variance.sum().backward()
    torch.testing.assert_close(
        sgdgp.condition(model, num_samples=3).samples(at), before
    )


def test_later_changes_of_the_model_do_not_reach_the_posterior():
    model = deep_kernel()
    at, _ = toy_data(9, seed=1)
    posterior = sgdgp.condition(model, num_samples=3)
    before = posterior.mean(at), posterior.samples(at)
    for parameter in model.parameters():
        parameter.data.add_(0.3)
    assert torch.equal(posterior.mean(at), before[0])
    assert torch.equal(posterior.samples(at), before[1])


def test_the_plain_inputs_are_used_without_a_copy():
    model = gp(ScaleKernel(RBFKernel()))
    x, _ = toy_data(9, seed=1)
    prior = prior_of(model, x)
    assert prior.evaluate(x)[1] is x


def test_jitter_counts_as_noise_with_its_factor():
    x, _ = toy_data(9, seed=1)
    assert prior_of(jitter(), x).nugget == pytest.approx(1e-4)
    assert prior_of(jitter_in_a_term(), x).nugget == pytest.approx(3e-3)
    assert prior_of(gp(), x).nugget == 0.0


def botorch_model(**settings):
    x, y = toy_data(30)
    torch.manual_seed(0)
    model = SingleTaskGP(
        5.0 + 40.0 * x,
        1e3 + 20.0 * y[:, None],
        input_transform=Normalize(2),
        **settings,
    )
    model.covar_module.lengthscale = torch.tensor([[0.3, 0.6]])
    if isinstance(model.likelihood, GaussianLikelihood):
        model.likelihood.noise = 0.1
    return model


def botorch_points():
    x, _ = toy_data(9, seed=1)
    return 5.0 + 40.0 * x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("explicit", [True, False])
def test_botorch_posterior_is_the_models_own(training, explicit):
    model = botorch_model()
    assert isinstance(model.outcome_transform, Standardize)
    x = botorch_points()
    expected = botorch_model().eval().posterior(x)
    model.train(training)
    data, targets = toy_data(30)
    given = (5.0 + 40.0 * data, 1e3 + 20.0 * targets) if explicit else ()
    posterior = sgdgp.condition(model, *given, num_samples=SAMPLES, num_features=512)
    mean, variance = expected.mean[:, 0].detach(), expected.variance[:, 0].detach()
    torch.testing.assert_close(posterior.mean(x), mean, rtol=1e-9, atol=1e-6)
    assert float((posterior.variance(x) / variance - 1).abs().max()) < VARIANCE_BAND
    # Noise is in the units of the targets, too.
    noisy = model.eval().posterior(x, observation_noise=True).variance[:, 0].detach()
    ours = posterior.predict(x, observation_noise=True).variance
    torch.testing.assert_close(ours - posterior.variance(x), noisy - variance)


def test_botorch_fixed_noise_is_read_in_the_models_units():
    noise = torch.linspace(10.0, 200.0, 30, dtype=torch.float64)
    model = botorch_model(train_Yvar=noise[:, None])
    x = botorch_points()
    expected = model.eval().posterior(x).mean[:, 0]
    posterior = sgdgp.condition(model, num_samples=0)
    torch.testing.assert_close(posterior.mean(x), expected, rtol=1e-9, atol=1e-6)


def inducing_points():
    kernel = InducingPointKernel(
        ScaleKernel(RBFKernel()), torch.zeros(3, 2), GaussianLikelihood()
    )
    return gp(kernel)


def dense_product():
    return gp(covariance=lambda m, x: m.kernel(x).to_dense() * m.kernel(x).to_dense())


def product_with_jitter():
    return gp(covariance=lambda m, x: m.kernel(x).add_jitter() * m.kernel(x))


def second_derivatives():
    return gp(RBFKernelGradGrad())


def batch_of_kernels():
    return gp(
        RBFKernel(batch_shape=torch.Size([3])),
        mean=gpytorch.means.ConstantMean(batch_shape=torch.Size([3])),
    )


def batch_of_data():
    x, y = toy_data(30)
    return GP(x.expand(3, -1, -1), y.expand(3, -1), RBFKernel()).double()


def multi_output():
    x, y = toy_data(30)
    return SingleTaskGP(x, torch.stack([y, y.square()], 1))


def scaled_by_the_batch():
    return gp(covariance=lambda m, x: m.kernel(x / x.abs().max()))


def centred_by_the_batch():
    return gp(covariance=lambda m, x: m.kernel(x - x.mean(0)))


def two_sets_of_points():
    return gp(covariance=lambda m, x: m.kernel(x, x.flip(0)))


def noise_in_forward():
    return gp(covariance=lambda m, x: m.kernel(x).add_diagonal(1.0 + x[:, 0].square()))


def grid_that_moves():
    return gp(GridInterpolationKernel(RBFKernel(), grid_size=20, num_dims=2))


def negative_constant():
    return gp(covariance=lambda m, x: m.kernel(x) * -1.0)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (inducing_points, "InducingPointKernel"),
        (dense_product, r"DenseLinearOperator.*\(kernel_1 \* kernel_2\)"),
        (product_with_jitter, "jitter to the product"),
        (second_derivatives, "RBFKernelGradGrad"),
        (batch_of_kernels, "batch"),
        (batch_of_data, "batch"),
        (multi_output, "multi-output"),
        (scaled_by_the_batch, "other points"),
        (centred_by_the_batch, "other points"),
        (two_sets_of_points, "RBFKernel on two different sets"),
        (noise_in_forward, "DiagLinearOperator"),
        (negative_constant, "one positive number"),
        (grid_that_moves, "grid_bounds"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_what_is_no_function_of_two_points_is_refused_by_name(build, named):
    with pytest.raises(ValueError, match=named):
        sgdgp.condition(build(), num_samples=2)


def test_likelihoods_that_are_not_gaussian_are_refused_by_name():
    model = gp()
    model.likelihood = StudentTLikelihood().double()
    with pytest.raises(TypeError, match="StudentTLikelihood"):
        sgdgp.condition(model)


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_noise_that_is_not_positive_is_refused_with_its_row(value):
    likelihood = FixedNoiseGaussianLikelihood(torch.full((6,), 0.1))
    likelihood.noise_covar.noise[[2, 4]] = value
    with pytest.raises(ValueError, match="found 2 that are not, the first at index 2"):
        noise_of(likelihood, torch.zeros(6, 1))


def test_fixed_noise_needs_one_variance_per_observation():
    model = fixed_noise()
    x, y = toy_data(12)
    with pytest.raises(ValueError, match=r"12 fixed noise variances.*found 30"):
        sgdgp.condition(model, x, y)


def snapshot(model):
    """All of a model that a user can see, to be compared with ==."""
    return {
        "state": {k: v.tolist() for k, v in model.state_dict().items()},
        "parameters": {
            k: (id(p), p.requires_grad, p.grad) for k, p in model.named_parameters()
        },
        "buffers": {k: (id(b), b.tolist()) for k, b in model.named_buffers()},
        "training": {k: m.training for k, m in model.named_modules()},
        "data": [
            (id(t), t.tolist(), t._version, t.requires_grad)
            for t in (*model.train_inputs, model.train_targets)
        ],
        "inputs": id(model.train_inputs),
        "cache": id(model.prediction_strategy),
    }


UNTOUCHED = {
    "deep": deep_kernel,
    "active_dims": active_dims_behind_a_transformation,
    "nested": nested_constants,
    "fixed": fixed_noise,
    "noise_model": noise_by_a_model,
    "botorch": botorch_model,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", UNTOUCHED)
def test_the_model_is_left_as_it_was(name, training):
    model = UNTOUCHED[name]().train(training)
    next(model.parameters()).requires_grad_(False)
    model_before, state = snapshot(model), torch.get_rng_state()
    x, _ = toy_data(9, seed=1)
    posterior = sgdgp.condition(model, num_samples=3)
    posterior.samples(x)
    posterior.draw(2)(x)
    posterior.mean(x.clone().requires_grad_()).sum().backward()
    assert snapshot(model) == model_before
    assert torch.equal(torch.get_rng_state(), state)


def interrupt(progress):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", UNTOUCHED)
@pytest.mark.parametrize("solver", ["cholesky", "cg", "sdd"])
def test_an_interrupt_leaves_the_model_as_it_was(name, solver):
    model = UNTOUCHED[name]()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        sgdgp.condition(model, num_samples=3, solver=solver, callback=interrupt)
    assert snapshot(model) == before


LONG_SOLVE = """
import signal
import time
import torch
import sgdgp
from tests.models import gp
from tests.gpytorch_adapter.test_prior import snapshot

# Whoever starts the tests in the background may have told them to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
model = gp(n=4000, noise=1e-3, dtype=torch.float32)
before = snapshot(model)
last = [0.0]

def report(progress):
    if not last[0]:
        print("solving", flush=True)
    last[0] = time.time()

try:
    sgdgp.condition(
        model,
        num_samples=8,
        num_features=256,
        solver=sgdgp.SDD(tolerance=1e-12, max_passes=1e9),
        callback=report,
    )
except KeyboardInterrupt:
    print("interrupted", time.time(), snapshot(model) == before, flush=True)
"""


def test_ctrl_c_in_a_long_solve_returns_control_and_leaves_the_model():
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LONG_SOLVE],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while "solving" not in (line := child.stdout.readline()):
            assert line, "the child ended before it solved"
        child.send_signal(signal.SIGINT)
        # The solve would take hours: that anything comes back is the point.
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert output.split()[0] == "interrupted"
    assert output.split()[2] == "True"
