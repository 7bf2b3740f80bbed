import copy
import math

import gpytorch
import hypothesis
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior, LogNormalPrior
from hypothesis import strategies as st

import sgdgp
from sgdgp.training import (
    PathwiseProbes,
    StandardProbes,
    StochasticMarginalLogLikelihood,
)
from sgdgp.training.marginal_likelihood import PathIntegral
from tests.models import hadamard_gp, multitask_gp
from tests.stored import stored
from tests.training.problems import (
    Model,
    UnitProbes,
    assert_same,
    data,
    gradients,
    rbf_model,
)


class NoiseOfPosition(gpytorch.likelihoods.noise_models.Noise):
    """Noise whose log variance is linear in the first coordinate."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([-1.5, 0.4]))

    def forward(self, *params, shape=None, noise=None, **kwargs):
        x = params[0][0] if isinstance(params[0], list | tuple) else params[0]
        variance = (self.slope[0] + self.slope[1] * x[:, 0]).exp()
        return gpytorch.linear_operator.operators.DiagLinearOperator(variance)


class Scaled(Model):
    """A learned constant in front of a kernel, and one in front of the inputs."""

    def __init__(self, x, y):
        super().__init__(x, y, RBFKernel())
        self.amplitude = torch.nn.Parameter(x.new_tensor(0.3))
        self.stretch = torch.nn.Parameter(x.new_tensor([0.8, 1.3]))

    def forward(self, x):
        covariance = self.covar_module(x * self.stretch) * self.amplitude.exp()
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), covariance
        )


def fixed_noise():
    x, y = data(60, 2)
    noise = 0.05 + 0.2 * torch.rand(60, generator=torch.Generator().manual_seed(1))
    likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(
        noise.double(), learn_additional_noise=True
    )
    return Model(x, y, ScaleKernel(MaternKernel(nu=1.5)), likelihood)


def noise_of_position():
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    likelihood.noise_covar = NoiseOfPosition()
    return Model(*data(60, 2), ScaleKernel(RBFKernel()), likelihood)


def with_priors():
    kernel = ScaleKernel(
        RBFKernel(
            lengthscale_prior=LogNormalPrior(0.2, 0.5),
            lengthscale_constraint=gpytorch.constraints.Interval(0.1, 3.0),
        ),
        outputscale_prior=GammaPrior(2.0, 0.5),
    )
    likelihood = gpytorch.likelihoods.GaussianLikelihood(
        noise_prior=GammaPrior(1.1, 0.05)
    )
    return Model(*data(60, 2), kernel, likelihood)


def deep(last):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2), last
    )
    return Model(*data(60, 2), ScaleKernel(RBFKernel()), network=network)


def botorch():
    x, y = data(60, 2)
    return SingleTaskGP(
        4.0 + 3.0 * x,
        100.0 + 20.0 * y.unsqueeze(1),
        input_transform=Normalize(2),
        outcome_transform=Standardize(1),
    )


MODELS = {
    "homoscedastic": rbf_model,
    "fixed_noise": fixed_noise,
    "noise_of_position": noise_of_position,
    "constants_in_forward": lambda: Scaled(*data(60, 2)),
    "priors": with_priors,
    "scale_to_bounds": lambda: deep(gpytorch.utils.grid.ScaleToBounds(-1.0, 1.0)),
    "batch_norm": lambda: deep(torch.nn.BatchNorm1d(2)),
    "botorch": botorch,
    "multitask": multitask_gp,
    "hadamard": hadamard_gp,
}


def value_and_gradients(mll, model):
    """At the model's own data, in train mode."""
    model.train()
    model.zero_grad()
    inputs = model.train_inputs
    given = inputs if len(inputs) == 1 else ()
    with gpytorch.settings.fast_computations(False, False, False):
        value = mll(model(*inputs), model.train_targets, *given)
    value.backward()
    return value.detach(), gradients(model)


def unit_mll(model, **settings):
    """All of the stochastic path but its randomness."""
    return StochasticMarginalLogLikelihood(
        model.likelihood, model, probes=UnitProbes(), solver="cholesky", **settings
    )


@pytest.mark.parametrize("name", MODELS)
def test_small_systems_have_gpytorchs_value_and_gradient(name):
    model = MODELS[name]().double()
    exact = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    truth, slopes = value_and_gradients(exact, model)
    mll = StochasticMarginalLogLikelihood(model.likelihood, model)
    value, found = value_and_gradients(mll, model)
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-9)
    assert_same(found, slopes, rtol=1e-6, atol=1e-8)
    assert mll.passes == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_solves_with_every_unit_vector_give_gpytorchs_value_and_gradient(name):
    model = MODELS[name]().double()
    exact = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    truth, slopes = value_and_gradients(exact, model)
    mll = unit_mll(model)
    value, found = value_and_gradients(mll, model)
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-9)
    assert_same(found, slopes, rtol=1e-6, atol=1e-8)
    assert mll.passes > 0.0


def assert_value_and_gradient(model, y, truth, probes):
    """Of solves with these probes, those of ``truth``, which has a graph."""
    model.zero_grad()
    truth.backward()
    slopes = gradients(model)
    mll = StochasticMarginalLogLikelihood(
        model.likelihood, model, probes=probes, solver="cholesky"
    )
    model.zero_grad()
    value = mll(model(model.train_inputs[0]), y)
    value.backward()
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-10)
    assert_same(gradients(model), slopes, rtol=1e-6, atol=1e-8)


def covariance_of_pairs(model, x):
    """Mean (nT,) and noisy covariance (nT, nT) of a multitask model, densely."""
    noisy = model.likelihood(gpytorch.Module.__call__(model, x), x)
    return noisy.loc, noisy.lazy_covariance_matrix.to_dense()


@pytest.mark.parametrize("probes", ["auto", UnitProbes()])
def test_missing_targets_of_a_multitask_model_are_left_out(probes):
    model = multitask_gp().train()
    x, y = model.train_inputs[0], model.train_targets.clone()
    y[::3, 1] = y[5, :] = math.nan
    kept = (~torch.isnan(y)).flatten()
    mean, covariance = covariance_of_pairs(model, x)
    normal = torch.distributions.MultivariateNormal(
        mean[kept], covariance[kept][:, kept]
    )
    truth = normal.log_prob(y.flatten()[kept]) / kept.sum()
    assert_value_and_gradient(model, y, truth, probes)


@pytest.mark.parametrize("probes", ["auto", UnitProbes()])
def test_missing_targets_of_one_output_are_left_out(probes):
    model = rbf_model().train()
    x, y = model.train_inputs[0], model.train_targets.clone()
    y[::4] = math.nan
    there = ~torch.isnan(y)
    exact = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    with gpytorch.settings.debug(False):
        truth = exact(model(x[there]), y[there])
    assert_value_and_gradient(model, y, truth, probes)


@pytest.mark.parametrize("probes", ["auto", UnitProbes()])
def test_independent_outputs_add_up_whatever_is_missing_in_each(probes):
    model = rbf_model().train()
    x, y = model.train_inputs[0], model.train_targets
    columns = torch.stack([y, 0.5 * y.flip(0), y.square()], dim=1)
    columns[:7, 1] = math.nan
    exact = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    total = torch.zeros((), dtype=torch.float64)
    for column in columns.T:
        there = ~torch.isnan(column)
        with gpytorch.settings.debug(False):
            part = exact(model(x[there]), column[there])
        total = total + part * there.sum() / (~torch.isnan(columns)).sum()
    assert_value_and_gradient(model, columns, total, probes)


class Tutorial(gpytorch.models.ExactGP):
    """The model of GPyTorch's tutorial on simple regression."""

    def __init__(self, train_x, train_y, likelihood):
        super().__init__(train_x, train_y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = ScaleKernel(RBFKernel())

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


def tutorial(marginal_log_likelihood):
    """Its training loop; the learned parameters in its units."""
    train_x = torch.linspace(0, 1, 100)
    generator = torch.Generator().manual_seed(0)
    train_y = torch.sin(train_x * (2 * math.pi))
    train_y = train_y + torch.randn(100, generator=generator) * math.sqrt(0.04)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Tutorial(train_x, train_y, likelihood)
    model.train()
    likelihood.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    mll = marginal_log_likelihood(likelihood, model)
    for _ in range(50):
        optimizer.zero_grad()
        output = model(train_x)
        loss = -mll(output, train_y)
        loss.backward()
        optimizer.step()
    return {
        "noise": likelihood.noise,
        "lengthscale": model.covar_module.base_kernel.lengthscale,
        "outputscale": model.covar_module.outputscale,
        "mean": model.mean_module.constant,
    }


@pytest.mark.parametrize(
    "settings",
    [{}, {"probes": UnitProbes(), "solver": "cholesky"}],
    ids=["exact", "by_solves"],
)
def test_the_tutorials_loop_ends_within_two_per_cent_in_float32(settings):
    truth = tutorial(gpytorch.mlls.ExactMarginalLogLikelihood)

    def ours(likelihood, model):
        return sgdgp.training.StochasticMarginalLogLikelihood(
            likelihood, model, **settings
        )

    for name, value in tutorial(ours).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, truth[name], rtol=0.02, atol=0.0, msg=name)


def test_warm_starts_take_fewer_passes_to_the_same_gradient():
    found = {}
    for warm_start in (True, False):
        model = rbf_model(300)
        mll = StochasticMarginalLogLikelihood(
            model.likelihood,
            model,
            probes=PathwiseProbes(16),
            solver=sgdgp.CG(tolerance=1e-3, preconditioner=None),
            passes_per_evaluation=1000.0,
            warm_start=warm_start,
        )
        values = [value_and_gradients(mll, model) for _ in range(3)]
        found[warm_start] = (mll.passes, values[-1][1])
    assert found[True][0] < 0.6 * found[False][0]
    assert_same(found[True][1], found[False][1], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("solver", ["cg", "sdd", sgdgp.CG(max_seconds=1e4)])
def test_a_solve_past_its_deadline_ends_with_a_gradient(solver):
    model = rbf_model(1500)
    mll = StochasticMarginalLogLikelihood(
        model.likelihood, model, solver=solver, tolerance=1e-10
    )
    mll.deadline = 0.0
    _, found = value_and_gradients(mll, model)
    assert mll.solution.reason == "budget"
    assert mll.passes <= 4.0  # of ten
    assert all(bool(torch.isfinite(g).all()) for g in found.values())


def test_a_solve_keeps_to_its_budget():
    model = rbf_model(300)
    mll = StochasticMarginalLogLikelihood(
        model.likelihood,
        model,
        probes=StandardProbes(4),
        solver="cg",
        tolerance=1e-10,
        passes_per_evaluation=3.0,
    )
    value_and_gradients(mll, model)
    assert 0.0 < mll.passes <= 4.0
    assert mll.solution.reason == "budget"


def test_the_value_follows_the_parameters():
    model = rbf_model(80)
    exact = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    mll = unit_mll(model)
    gains = []
    for lengthscale in torch.linspace(0.25, 0.7, 11):
        model.covar_module.base_kernel.lengthscale = lengthscale
        value, _ = value_and_gradients(mll, model)
        gains.append((value, value_and_gradients(exact, model)[0]))
    found, truth = (torch.stack(column) for column in zip(*gains, strict=True))
    assert float((truth - truth[0]).abs().max()) > 0.05
    torch.testing.assert_close(found, truth, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("probes", [PathwiseProbes(8), StandardProbes(8)])
def test_the_same_seed_gives_the_same_gradient_and_another_another(probes):
    def slopes(seed):
        model = rbf_model()
        mll = StochasticMarginalLogLikelihood(
            model.likelihood, model, probes=probes, solver="cholesky", seed=seed
        )
        return value_and_gradients(mll, model)[1]["covar_module.raw_outputscale"]

    assert torch.equal(slopes(3), slopes(3))
    assert not torch.equal(slopes(3), slopes(4))
    assert torch.equal(
        slopes(torch.Generator().manual_seed(3)),
        slopes(torch.Generator().manual_seed(3)),
    )


def test_global_random_numbers_are_left_alone():
    model = rbf_model()
    mll = StochasticMarginalLogLikelihood(
        model.likelihood, model, probes=PathwiseProbes(4)
    )
    before = torch.get_rng_state()
    value_and_gradients(mll, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_object_goes_on_as_the_first():
    model = rbf_model()
    solver = sgdgp.CG(preconditioner=None)
    settings = {"probes": PathwiseProbes(8), "solver": solver, "seed": 2}
    one = StochasticMarginalLogLikelihood(model.likelihood, model, **settings)
    value_and_gradients(one, model)
    other = StochasticMarginalLogLikelihood(model.likelihood, model, **settings)
    other.restore(copy.deepcopy(one.state()))
    model.covar_module.outputscale = 0.9
    value, slopes = value_and_gradients(one, model)
    again, others = value_and_gradients(other, model)
    assert torch.equal(value, again)
    assert_same(others, slopes, rtol=0.0, atol=0.0)
    assert one.passes == other.passes


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"probes": 64}, TypeError, "probes: expected PathwiseProbes"),
        ({"probes": "standard"}, TypeError, "probes: expected"),
        ({"solver": 3}, TypeError, "solver: expected a Solver"),
        ({"solver": "newton"}, ValueError, "solver: expected .*'newton'"),
        ({"tolerance": 0.0}, ValueError, "tolerance"),
        ({"passes_per_evaluation": -1.0}, ValueError, "passes_per_evaluation"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
        ({"seed": "0"}, TypeError, "seed"),
    ],
)
def test_bad_settings_are_refused_by_name_at_once(settings, error, words):
    model = rbf_model()
    with pytest.raises(error, match=words):
        StochasticMarginalLogLikelihood(model.likelihood, model, **settings)


def test_another_kind_of_model_is_refused():
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    with pytest.raises(TypeError, match=r"model: expected a gpytorch\.models"):
        StochasticMarginalLogLikelihood(likelihood, torch.nn.Linear(1, 1))


def test_targets_that_do_not_fit_are_refused():
    model = rbf_model().train()
    mll = StochasticMarginalLogLikelihood(model.likelihood, model)
    x, y = model.train_inputs[0], model.train_targets.clone()
    with pytest.raises(ValueError, match="y: expected shape"):
        mll(model(x), y[:-1])
    y[3] = math.inf
    with pytest.raises(ValueError, match=r"y: .* infinite .*index \(3,\)"):
        mll(model(x), y)


def quadratic(seed):
    """A quadratic of a (3,) and a 0-dim parameter, and its gradient."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    linear = torch.randn(4, generator=generator, dtype=torch.float64)

    def value(p, q):
        z = torch.cat([p, q.unsqueeze(0)])
        return float(linear @ z - 0.5 * (root @ z).square().sum())

    def gradient(p, q):
        z = torch.cat([p, q.unsqueeze(0)])
        slope = linear - root.T @ (root @ z)
        return [slope[:3], slope[3]]

    return value, gradient


def point(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(4, generator=generator, dtype=torch.float64)
    return [drawn[:3], drawn[3]]


@hypothesis.given(st.integers(0, 10**6), st.integers(1, 6), st.floats(-5, 5))
def test_quadratics_are_exact_along_any_path(seed, steps, start):
    value, gradient = quadratic(seed)
    path = PathIntegral(start)
    first = point(seed)
    for i in range(steps + 1):
        here = point(seed + i)
        found = path.move(here, gradient(*here))
        assert found == pytest.approx(
            start + value(*here) - value(*first), rel=1e-9, abs=1e-9
        )


def test_the_error_of_a_smooth_function_is_of_third_order_in_the_step():
    def error(steps):
        path = PathIntegral(math.sin(0.0))
        for t in torch.linspace(0.0, 1.5, steps + 1, dtype=torch.float64):
            found = path.move([t], [t.cos()])
        return abs(found - math.sin(1.5))

    # Third order in one step, so second over a path of given length.
    assert error(20) / error(40) == pytest.approx(4.0, rel=0.02)


def test_points_and_gradients_are_copied():
    path, p, g = PathIntegral(), torch.zeros(1), torch.ones(1)
    path.move([p], [g])
    p += 2.0
    g += 2.0
    assert path.move([p], [g]) == pytest.approx(4.0)


def test_a_gradient_that_is_not_finite_leaves_the_path_where_it_was():
    path = PathIntegral(1.0)
    path.move([torch.zeros(1)], [torch.ones(1)])
    for bad in (math.nan, math.inf):
        assert math.isnan(path.move([torch.full((1,), 9.0)], [torch.tensor([bad])]))
    assert path.value == 1.0
    assert path.move([torch.ones(1)], [torch.ones(1)]) == pytest.approx(2.0)


def test_a_parameter_at_minus_infinity_that_stays_adds_nothing():
    path, bound = PathIntegral(1.0), torch.tensor([-math.inf, 0.0])
    path.move([bound], [torch.tensor([0.0, 1.0])])
    moved = bound + torch.tensor([0.0, 0.5])
    assert path.move([moved], [torch.tensor([0.0, 1.0])]) == pytest.approx(1.5)


def test_a_file_holds_everything_of_a_path():
    path = PathIntegral(0.25)
    path.move([torch.zeros(2), torch.tensor(1.0)], [torch.ones(2), torch.tensor(2.0)])
    again = stored(path)
    here = [torch.ones(2), torch.tensor(0.5)]
    slope = [torch.zeros(2), torch.tensor(0.0)]
    assert again.move(here, slope) == path.move(here, slope)
