"""Posteriors of small networks against dense linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp import CG
from sgdgp.networks import (
    Categorical,
    Dual,
    Gaussian,
    GPrior,
    Isotropic,
    Layerwise,
    WeightCG,
    WeightSGD,
    linearise,
    linearize,
)

N = 60


@pytest.fixture(scope="module")
def digits():
    """Three blurred classes in 20 dimensions; 120 to train on and 50 to test."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(6, (N + 50,), generator=generator)
    noise = torch.randn(N + 50, 20, generator=generator, dtype=torch.float64)
    return centres[labels] + 0.7 * noise, labels


def trained(hidden, digits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, hidden), nn.Tanh(), nn.Linear(hidden, 6))
    network = network.double()
    x, y = digits
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x[:N]), y[:N]).backward()
        optimiser.step()
    return network.eval()


@pytest.fixture(scope="module")
def mlp(digits):
    """About 2,400 weights, trained for a moment."""
    return trained(88, digits)


@pytest.fixture(scope="module")
def small_mlp(digits):
    """Some 400 weights."""
    return trained(15, digits)


def train(digits):
    x, y = digits
    data = TensorDataset(x[:N], y[:N])
    return DataLoader(data, batch_size=32, shuffle=True, drop_last=True)


class Dense:
    """The exact posterior of the linearised network, by its dense Jacobian."""

    def __init__(self, posterior, digits, likelihood, precision=None):
        x, y = digits
        tangent = posterior.tangent
        self.targets = y[:N]
        self.jacobian = tangent.at(x[:N]).jacobian()
        self.test = tangent.at(x[N:]).jacobian()
        self.likelihood = likelihood
        scales = posterior.prior.root(
            torch.ones(tangent.num_weights, 1, dtype=torch.float64)
        )[:, 0]
        self.root = scales if precision is None else precision**-0.5

    def features(self, outputs):
        """L^T J R, as (N C, D)."""
        scaled = self.jacobian * self.root
        return self.likelihood.hessian_root_transpose(outputs, scaled).flatten(0, 1)

    def optimum(self, steps=30):
        """Outputs of the linear model at its optimum, and the whitened weights."""
        outputs = torch.zeros(self.jacobian.shape[:2], dtype=torch.float64)
        scaled = (self.jacobian * self.root).flatten(0, 1)
        for _ in range(steps):
            features = self.features(outputs)
            targets = self.likelihood.hessian_root_transpose(
                outputs, outputs.unsqueeze(-1)
            )[..., 0] + self.likelihood.residual(outputs, self.targets)
            gram = features @ features.T
            gram.diagonal().add_(1.0)
            mean = features.T @ torch.linalg.solve(gram, targets.flatten())
            outputs = outputs + 0.7 * ((scaled @ mean).view_as(outputs) - outputs)
        return outputs, mean

    def posterior(self, outputs):
        """Gram matrix of the features and a factor of I + Gram."""
        features = self.features(outputs)
        gram = features @ features.T
        eye = torch.eye(len(gram), dtype=gram.dtype)
        return features, gram, torch.linalg.cholesky(gram + eye)

    def effective_dimension(self, outputs):
        _, gram, factor = self.posterior(outputs)
        return float(torch.cholesky_solve(gram, factor).diagonal().sum())

    def variance(self, outputs):
        """Predictive variance of the outputs at the test inputs (50, C)."""
        features, _, factor = self.posterior(outputs)
        test = self.test * self.root
        cross = test.flatten(0, 1) @ features.T
        explained = torch.linalg.solve_triangular(factor, cross.T, upper=False)
        prior = test.square().sum(2)
        return prior - explained.square().sum(0).view_as(prior)


@pytest.mark.parametrize("prior", [Isotropic(), GPrior()], ids=["isotropic", "g"])
def test_samples_have_the_exact_covariance(mlp, digits, prior):
    samples = 500
    posterior = linearise(mlp, Categorical(), prior).fit(
        train(digits),
        steps=0,
        precision=2.0,
        num_samples=2,
        final_samples=samples,
        solver=WeightCG(tolerance=1e-6),
    )
    assert 2300 < posterior.tangent.num_weights < 2500
    dense = Dense(posterior, digits, Categorical())
    outputs, mean = dense.optimum()
    whitened = posterior.weight_mean[:, 0] / dense.root
    assert float((whitened - mean).norm()) < 1e-3 * float(mean.norm())

    # The posterior precision whitens the samples: their covariance is the identity.
    features, _, _ = dense.posterior(outputs)
    v = posterior.weight_samples / dense.root.reshape(-1, 1)
    squares = (v * (v + features.T @ (features @ v))).sum(0)
    weights = len(v)
    # Chi-squared with as many degrees of freedom as weights.
    error = (2 * weights / samples) ** 0.5
    assert abs(float(squares.mean()) - weights) < 4 * error
    assert 0.8 < float(squares.var()) / (2 * weights) < 1.25

    exact = dense.variance(outputs)
    _, fluctuations = posterior.fluctuations(digits[0][N:])
    ratio = fluctuations.square().mean(2) / exact
    # Each is chi-squared / samples; 300 of them, correlated.
    assert float((ratio - 1).abs().max()) < 5 * (2 / samples) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 0.05


@pytest.mark.parametrize("solver", ["cg", "auto"])  # by samples, and without
def test_the_effective_dimension_is_the_exact_one(mlp, digits, solver):
    posterior = linearise(mlp, Categorical(), Isotropic()).fit(
        train(digits),
        steps=1,
        precision=3.0,
        num_samples=100,
        final_samples=2,
        solver=solver,
    )
    step = posterior.history[0]
    dense = Dense(posterior, digits, Categorical(), precision=torch.tensor(3.0))
    exact = dense.effective_dimension(dense.optimum()[0])
    wrong = abs(posterior.effective_dimension - exact)
    assert wrong < 4 * step.standard_error + 1e-6
    assert step.standard_error < 0.02 * exact
    assert (step.standard_error == 0) == (solver == "auto")


@pytest.mark.parametrize(
    "prior", [Isotropic(), GPrior(), Layerwise("layers")], ids=["one", "g", "layers"]
)
def test_learning_ends_at_the_fixed_point_of_the_exact_evidence(
    small_mlp, digits, prior
):
    posterior = linearise(small_mlp, Categorical(), prior).fit(
        train(digits),
        steps=20,
        num_samples=500,
        final_samples=2,
        solver=WeightCG(tolerance=0.01),
    )
    dense = Dense(posterior, digits, Categorical())
    outputs, mean = dense.optimum()
    features, _, factor = dense.posterior(outputs)
    solved = torch.cholesky_solve(features, factor)
    determined = (features * solved).sum(0).unsqueeze(1)
    ones = torch.ones_like(determined)
    gamma = posterior.prior.group_sums(determined, ones)[:, 0]
    squares = posterior.prior.group_sums(mean.unsqueeze(1), mean.unsqueeze(1))[:, 0]
    matters = gamma > 0.01 * gamma.sum()
    assert bool(matters.any())
    torch.testing.assert_close(
        (gamma / squares)[matters],
        torch.ones(int(matters.sum()), dtype=torch.float64),
        rtol=0.02,
        atol=0.0,
    )


def test_gaussian_noise_is_learned_to_the_optimum_of_the_evidence():
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.rand(80, 1, generator=generator, dtype=torch.float64) - 1
    y = torch.cat([(3 * x).sin(), x**2], 1)
    y += 0.1 * torch.randn(80, 2, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    posterior = linearise(network.eval(), Gaussian(), Isotropic()).fit(
        [(x, y)],
        steps=30,
        num_samples=600,
        final_samples=2,
        solver=WeightCG(tolerance=0.005),
    )
    features = posterior.tangent.at(x).jacobian().flatten(0, 1)
    kernel = features @ features.T

    def evidence(log_parameters):
        precision, noise = log_parameters.exp()
        covariance = kernel / precision + noise * torch.eye(160, dtype=torch.float64)
        zero = torch.zeros(160, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(zero, covariance)
        return normal.log_prob(y.flatten())

    found = torch.tensor(
        [float(posterior.precisions), posterior.noise], dtype=torch.float64
    ).log()
    gradient = torch.autograd.functional.jacobian(evidence, found)
    hessian = torch.autograd.functional.hessian(evidence, found)
    # Distance to the optimum in log parameters, by one Newton step. About 8 weights are
    # determined, so that 600 samples have a standard error of 2 %.
    assert float(torch.linalg.solve(hessian, gradient).abs().max()) < 0.05
    prediction = posterior.predict(x)
    assert prediction.mean.shape == prediction.variance.shape == (80, 2)
    assert prediction.noise == posterior.noise


@pytest.mark.parametrize(
    ("network", "precision", "solver", "error"),
    [
        ("small_mlp", 200.0, WeightSGD(tolerance=0.03, max_passes=1000.0), 0.03),
        (
            "mlp",
            20.0,
            Dual(CG(tolerance=1e-10, preconditioner=None), tolerance=1e-8),
            1e-6,
        ),
    ],
    ids=["sgd", "dual"],
)
def test_solvers_agree_with_the_same_noise(
    network, precision, solver, error, digits, request
):
    exact, found = (
        linearise(request.getfixturevalue(network), Categorical(), Isotropic()).fit(
            train(digits),
            steps=0,
            precision=precision,
            num_samples=2,
            final_samples=4,
            solver=each,
        )
        for each in (WeightCG(tolerance=1e-8), solver)
    )
    assert not found.warnings
    for name in ("weight_samples", "weight_mean"):
        value, truth = getattr(found, name), getattr(exact, name)
        assert float((value - truth).norm()) < error * float(truth.norm())


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, x.flatten(1)[:, :3].argmax(1)


def normalised_network(images) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 3),
    ).double()
    x, y = images
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x[:80]), y[:80]).backward()
        optimiser.step()
    return network.eval()


def rescale(network: nn.Module, factor: float) -> nn.Module:
    """The same function with other weights before the normalisation."""
    convolution, norm = network[0], network[1]
    with torch.no_grad():
        convolution.weight *= factor
        norm.running_mean *= factor
        norm.running_var *= factor**2
    norm.eps *= factor**2
    return network


def rescaled_predictions(prior, images):
    x, y = images
    found = []
    for factor in (1.0, 10.0):
        network = rescale(normalised_network(images), factor)
        posterior = linearise(network, Categorical(), prior).fit(
            [(x[:80], y[:80])], final_samples=16, solver=WeightCG(tolerance=1e-4)
        )
        found.append((posterior.network_outputs(x[80:]), posterior.predict(x[80:])))
    (first_outputs, first), (second_outputs, second) = found
    torch.testing.assert_close(first_outputs, second_outputs, rtol=1e-9, atol=1e-9)
    return first, second


def test_the_g_prior_does_not_see_the_scale_of_normalised_weights(images):
    first, second = rescaled_predictions(GPrior(), images)
    torch.testing.assert_close(first, second, rtol=0.0, atol=1e-4)


def test_the_isotropic_prior_does(images):
    first, second = rescaled_predictions(Isotropic(), images)
    assert float((first - second).abs().max()) > 0.01


def test_calibration_compares_with_the_network_and_sets_the_scale(small_mlp, digits):
    x, y = digits
    posterior = linearise(small_mlp, Categorical()).fit(train(digits), steps=3)
    before = posterior.predict(x[N:])
    comparison = posterior.calibrate(TensorDataset(x[N:], y[N:]))
    assert posterior.scale == comparison.scale
    assert set(comparison.scores) >= {"network", "posterior (evidence)"}
    assert comparison.recommendation in str(comparison)
    after = posterior.predict(x[N:])
    rows = torch.arange(50)
    losses = [-p[rows, y[N:]].log().mean() for p in (before, after)]
    assert float(losses[1]) <= float(losses[0]) + 1e-9
    scores = comparison.scores["posterior (calibrated)"]
    assert math.isclose(scores["nll"], float(losses[1]), rel_tol=1e-6)


def test_more_samples_begin_with_the_same_ones(small_mlp, digits):
    few, many = (
        linearise(small_mlp, Categorical(), Isotropic()).fit(
            train(digits),
            steps=0,
            precision=5.0,
            final_samples=count,
            solver=WeightCG(tolerance=1e-6),
        )
        for count in (3, 9)
    )
    torch.testing.assert_close(
        few.weight_samples, many.weight_samples[:, :3], rtol=0.0, atol=1e-4
    )


def test_the_same_seed_gives_the_same_posterior(small_mlp, digits):
    first, second, other = (
        linearise(small_mlp, Categorical())
        .fit(train(digits), steps=2, final_samples=4, seed=seed)
        .weight_samples
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def test_an_interrupted_fit_says_so(small_mlp, digits):
    posterior = linearise(small_mlp, Categorical()).fit(
        train(digits), callback=lambda progress: progress.passes > 10
    )
    assert posterior.reason == "interrupted"
    assert "interrupted" in posterior.warnings[-1]
    assert posterior.passes < 60


def test_a_budget_that_is_too_small_is_reported(small_mlp, digits):
    posterior = linearise(small_mlp, Categorical()).fit(
        train(digits),
        steps=0,
        precision=1e-3,
        solver=WeightCG(max_passes=3.0, tolerance=1e-6),
    )
    assert any("max_passes" in warning for warning in posterior.warnings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "precision"),
        ({"num_samples": 1}, ValueError, "num_samples"),
        ({"final_samples": 0}, ValueError, "final_samples"),
        ({"precision": -1.0}, ValueError, "precision"),
        ({"solver": "newton"}, ValueError, "solver"),
        ({"solver": 3}, TypeError, "solver"),
        ({"seed": "a"}, TypeError, "seed"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    mlp, digits, arguments, error, message
):
    with pytest.raises(error, match=message):
        linearise(mlp, Categorical()).fit(train(digits), **arguments)


def test_bad_targets_are_refused(mlp, digits):
    x, y = digits
    with pytest.raises(ValueError, match="class indices"):
        linearise(mlp, Categorical()).fit([(x, y + 3)])
    with pytest.raises(TypeError, match="integers"):
        linearise(mlp, Categorical()).fit([(x, y.double())])
    with pytest.raises(ValueError, match="one target per output"):
        linearise(mlp, Gaussian()).fit([(x, y.double())])


def test_both_spellings_are_one_function():
    assert linearize is linearise


def test_bad_arguments_of_linearise_are_refused(mlp):
    with pytest.raises(TypeError, match="likelihood"):
        linearise(mlp, "categorical")
    with pytest.raises(TypeError, match="prior"):
        linearise(mlp, Categorical(), "isotropic")
    with pytest.raises(ValueError, match="curvature_at"):
        linearise(mlp, Categorical(), curvature_at="map")
    with pytest.raises(ValueError, match="eval"):
        linearise(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), Categorical())


def test_with_an_offset_the_model_is_the_expansion_at_the_trained_weights():
    """Its mean is a Gaussian process's about f - J theta; without, one about zero."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1), nn.Sigmoid())
    network = network.double().eval()
    for offset in (False, True):
        posterior = linearise(
            network, Gaussian(noise=0.3), Isotropic(), mean="linear", offset=offset
        ).fit([(x, y)], steps=0, precision=2.0, final_samples=2)
        tangent = posterior.tangent
        j = tangent.at(x).jacobian()[:, 0]
        start = (
            network(x).detach() - j @ tangent.theta if offset else torch.zeros(12, 1)
        )
        k = j @ j.mT / 2.0
        gain = torch.linalg.solve(k + 0.3 * torch.eye(12), y - start)
        torch.testing.assert_close(posterior.linear_mean(x), start + k @ gain)


def test_an_offset_leaves_the_mean_of_classes_to_the_network(mlp, digits):
    model = linearise(mlp, Categorical(), weights="last_layer", offset=True)
    posterior = model.fit(train(digits), steps=0, precision=1.0, final_samples=2)
    assert posterior.mean_of == "network"
