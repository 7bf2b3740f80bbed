"""Hessian-free variances against the Hessian itself."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks import (
    Bernoulli,
    Categorical,
    CompactGaussian,
    Gaussian,
    HessianFree,
    Isotropic,
    Potential,
    linearise,
    load,
)
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.lbfgs import minimise

NOISE, PRECISION = 0.1, 1.0


def network_of(activation=nn.Tanh, outputs=1, hidden=8):
    torch.manual_seed(1)
    layers = [nn.Linear(1, hidden), activation(), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers).double().eval()


def data_of(likelihood, outputs=1):
    """Two clusters of inputs with a gap between them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, generator=generator, dtype=torch.float64)
    x = torch.where(torch.arange(24)[:, None] < 12, x - 2, x + 1)
    noise = torch.randn(24, 1, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x) + 0.1 * noise
    if isinstance(likelihood, Categorical):
        return x, torch.bucketize(y[:, 0], y.new_tensor([-0.5, 0.5]))
    return x, (y > 0).to(y) if isinstance(likelihood, Bernoulli) else y


def trained(likelihood, x, y, *, steps=60, newton=6, **kwargs):
    """A network, by so many steps towards the optimum of its loss, then to it."""
    network = network_of(**kwargs)
    weights = list(network.parameters())
    options = {"tolerance_grad": 1e-10, "tolerance_change": 0.0, "history_size": 40}
    optimiser = torch.optim.LBFGS(
        weights, max_iter=steps, line_search_fn="strong_wolfe", **options
    )

    def closure():
        optimiser.zero_grad()
        value = loss(dict(network.named_parameters()), network, likelihood, x, y)
        value.backward()
        return value

    optimiser.step(closure)
    for _ in range(newton):
        theta = nn.utils.parameters_to_vector(weights).detach()
        gradient, matrix = (
            derivative(flat_loss)(theta, network, likelihood, x, y)
            for derivative in (grad, hessian)
        )
        values, vectors = torch.linalg.eigh(matrix)
        step = vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(0.1))
        before = flat_loss(theta, network, likelihood, x, y)
        while flat_loss(theta - step, network, likelihood, x, y) > before + 1e-9:
            step = 0.5 * step
        nn.utils.vector_to_parameters(theta - step, weights)
    return network


def named(theta, network):
    """Weights by name."""
    shapes = {name: p.shape for name, p in network.named_parameters()}
    parts = theta.split([shape.numel() for shape in shapes.values()])
    return {n: v.view(shapes[n]) for n, v in zip(shapes, parts, strict=True)}


def loss(weights, network, likelihood, x, y):
    squares = sum(weight.square().sum() for weight in weights.values())
    outputs = functional_call(network, weights, (x,))
    return likelihood.loss(outputs, y).sum() + 0.5 * PRECISION * squares


def flat_loss(theta, network, *data):
    return loss(named(theta, network), network, *data)


def potential_of(network, likelihood, x, y):
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    return Potential.from_network(network, likelihood, loader, precision=PRECISION)


def exact(network, likelihood, data, x):
    """Covariances (b, C, b, C) by the Hessian at the network's weights."""
    theta = nn.utils.parameters_to_vector(network.parameters()).detach()

    def outputs(theta):
        return functional_call(network, named(theta, network), (x,))

    jacobian = jacrev(outputs)(theta)
    flat = jacobian.flatten(0, 1)
    matrix = hessian(flat_loss)(theta, network, likelihood, *data)
    found = flat @ torch.linalg.solve(matrix, flat.T)
    return found.view(*jacobian.shape[:2], *jacobian.shape[:2])


def diagonal(covariance):
    b, c = covariance.shape[:2]
    return covariance.reshape(b * c, b * c).diagonal().view(b, c)


def errors(variance, truth):
    return ((variance - truth) / truth).abs().flatten()


@pytest.fixture(autouse=True)
def _few_shapes_checked(request):
    """Switch the shape checker off where minimisers make thousands of small calls."""
    keeps = "checked" in request.fixturenames
    jaxtyping.config.update("jaxtyping_disable", not keeps)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def checked():
    """A test that keeps it."""


X = torch.linspace(-2.5, 2.5, 15, dtype=torch.float64)[:, None]


class Case:
    """A regression at its optimum."""

    def __init__(self, activation=nn.Tanh, steps=60, newton=6):
        self.likelihood = Gaussian(noise=NOISE)
        self.data = data_of(self.likelihood)
        self.network = trained(
            self.likelihood,
            *self.data,
            steps=steps,
            newton=newton,
            activation=activation,
        )
        self.potential = potential_of(self.network, self.likelihood, *self.data)

    def truth(self):
        return exact(self.network, self.likelihood, self.data, X)


@pytest.fixture(scope="module")
def case():
    return Case()


@pytest.fixture(scope="module")
def truth(case):
    return case.truth()


def gauss_newton(potential, x):
    data = TangentData(potential.tangent, potential.stream, potential.likelihood)
    outputs = data.network_outputs
    system = WeightSystem(data, potential.prior, potential.likelihood, outputs)
    matrix = system.gram + torch.eye(potential.num_weights, dtype=torch.float64)
    jacobian = potential.tangent.at(x).jacobian()
    rows = potential.prior.root_adjoint(jacobian.flatten(0, 1).mT).mT
    found = rows @ torch.linalg.solve(matrix, rows.mT)
    return found.view(*jacobian.shape[:2], *jacobian.shape[:2])


def test_in_tangent_mode_they_are_those_of_the_linear_model(case, checked):
    found = HessianFree("tangent", tolerance=1e-6).variance(case.potential, X)
    truth = diagonal(gauss_newton(case.potential, X))
    torch.testing.assert_close(found.variance, truth, rtol=1e-6, atol=0)
    assert found.converged == 1.0
    assert found.warnings == ()


def test_in_tangent_mode_they_rise_to_the_truth_with_the_steps(case):
    x = X[4:5]
    truth = gauss_newton(case.potential, x).item()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for steps in (2, 3, 4, 6, 10):
            method = HessianFree("tangent", tolerance=1e-9, steps=steps)
            found.append(method.variance(case.potential, x).variance.item())
    assert found == sorted(found)
    assert found[0] < 0.99 * truth
    assert found[-1] <= truth * (1 + 1e-12)


def test_solves_that_are_cut_short_are_said(case):
    method = HessianFree("tangent", tolerance=1e-9, steps=2)
    with pytest.warns(UserWarning, match="have not converged after 2 passes"):
        found = method.variance(case.potential, X[:1])
    assert found.converged == 0.0


def test_they_are_those_of_the_hessian(case, truth, checked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = HessianFree().variance(case.potential, X)
    truth = diagonal(truth)
    wrong = errors(found.variance, truth)
    pair = torch.stack([found.variance.flatten(), truth.flatten()])
    assert torch.corrcoef(pair)[0, 1] >= 0.999
    assert wrong.median() <= 0.01
    assert wrong.quantile(0.95) <= 0.05
    # The Gauss-Newton matrix has others.
    other = diagonal(gauss_newton(case.potential, X))
    assert errors(other, truth).median() > 5 * wrong.median()
    assert found.converged == 1.0
    assert found.drop < 1e-6
    assert found.drift.max() < 1e-3
    assert found.kinks < 0.02
    assert found.asymmetry < 0.05


def test_gradients_alone_lead_to_the_same_optima(case):
    both = [
        HessianFree(precondition=p).variance(case.potential, X[::4])
        for p in (True, False)
    ]
    torch.testing.assert_close(both[0].variance, both[1].variance, rtol=5e-3, atol=0)
    assert both[1].steps > 2 * both[0].steps


def test_errors_fall_with_the_shift_and_faster_in_symmetric_form(case, truth):
    truth = diagonal(truth)
    falls = []
    for symmetric in (False, True):
        worst = []
        for shift in (0.6, 0.06):
            method = HessianFree(
                shift=shift, symmetric=symmetric, tolerance=1e-4, max_asymmetry=1e3
            )
            found = method.variance(case.potential, X)
            worst.append(errors(found.variance, truth).quantile(0.95))
        falls.append(worst[0] / worst[1])
    assert falls[0] >= 5
    assert falls[1] >= 30


def test_covariances_are_those_of_the_hessian(case, truth):
    method = HessianFree(tolerance=1e-4)
    found = method.covariance(case.potential, X)
    torch.testing.assert_close(found, found.permute(2, 3, 0, 1))
    assert (found - truth).norm() <= 0.01 * truth.norm()
    across = method.covariance(case.potential, X[:2], at=X)
    assert (across - truth[:2]).norm() <= 0.01 * truth[:2].norm()
    tangent = HessianFree("tangent", tolerance=1e-6).covariance(case.potential, X)
    torch.testing.assert_close(tangent, gauss_newton(case.potential, X))


def test_an_optimum_that_is_none_is_found_before_it_is_taken_for_variance():
    case, x = Case(steps=20, newton=0), X[::3]
    best = trained(case.likelihood, *case.data, steps=20, newton=12)
    truth = diagonal(exact(best, case.likelihood, case.data, x))
    one_sided = HessianFree(symmetric=False, control=False, steps=30)
    with pytest.warns(UserWarning, match="Use control=True"):
        plain = one_sided.variance(case.potential, x)
    with pytest.warns(UserWarning, match="was not at the optimum of this loss"):
        control = HessianFree(symmetric=False, steps=30).variance(case.potential, x)
    with pytest.warns(UserWarning, match="which cancel in the difference of both"):
        symmetric = HessianFree(control=False, steps=30).variance(case.potential, x)
    median = errors(plain.variance, truth).median()
    assert bool((plain.variance < 0).any())
    assert control.drop > 0.1
    for found in (control, symmetric):
        assert errors(found.variance, truth).median() <= 0.2 * median
        assert bool((found.variance > 0).all())


def test_probes_are_unbiased_and_know_their_error(case, truth):
    truth = diagonal(truth)
    method = HessianFree(probes=100)
    found = method.variance(case.potential, X, seed=3)
    assert found.standard_error is not None
    away = (found.variance - truth) / found.standard_error
    assert away.abs().max() < 4
    assert 0.3 < away.square().mean() < 3
    again = HessianFree("tangent", probes=8)
    one, two, other = (again.variance(case.potential, X, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.variance, two.variance)
    assert not torch.equal(one.variance, other.variance)


def test_the_papers_amortisation_is_a_covariance_with_the_training_data(case, checked):
    method = HessianFree("tangent", tolerance=1e-8)
    score = method.training_covariance(case.potential, X)
    x = case.data[0]
    signs = case.potential.tangent.outputs(x).sign()
    whole = gauss_newton(case.potential, torch.cat([X, x]))[: len(X), :, len(X) :]
    expected = (whole * signs).mean((2, 3)).abs()
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-12)
    nonlinear = HessianFree(tolerance=1e-4).training_covariance(case.potential, X)
    whole = exact(case.network, case.likelihood, case.data, torch.cat([X, x]))
    expected = (whole[: len(X), :, len(X) :] * signs).mean((2, 3)).abs()
    assert (nonlinear - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("likelihood", "outputs"), [(Categorical(), 3), (Bernoulli(), 1)], ids=str
)
def test_classes_have_variances_of_their_logits(likelihood, outputs, checked):
    data = data_of(likelihood, outputs)
    network = trained(likelihood, *data, outputs=outputs)
    potential = potential_of(network, likelihood, *data)
    truth = diagonal(exact(network, likelihood, data, X))
    found = HessianFree().variance(potential, X)
    assert found.variance.shape == (len(X), outputs)
    assert errors(found.variance, truth).max() <= 0.03


def test_kinks_are_measured_and_said():
    case = Case(nn.ReLU, newton=0)
    with pytest.warns(UserWarning, match="The loss has kinks"):
        found = HessianFree(steps=5).variance(case.potential, X[::3])
    assert found.kinks > 0.15
    assert any("smooth activation" in text for text in found.warnings)
    # The linear model has none.
    assert HessianFree("tangent").variance(case.potential, X[::3]).warnings == ()


def test_a_kink_that_holds_every_output_is_said(case, monkeypatch):
    def stuck(objective, start, **settings):
        found = minimise(objective, start, **settings)
        return replace(
            found,
            points=torch.zeros_like(found.points),
            converged=torch.zeros_like(found.converged),
        )

    monkeypatch.setattr("sgdgp.networks.hessian_free.minimise", stuck)
    with pytest.warns(UserWarning, match="The loss has kinks"):
        found = HessianFree(steps=2).variance(case.potential, X[:1])
    assert not found.variance.any()


def test_a_smooth_network_that_is_at_no_optimum_has_no_kinks(case):
    potential = potential_of(network_of(hidden=4), Gaussian(noise=1e-2), *case.data)
    method = HessianFree(
        control=False, symmetric=False, steps=2, shift=10.0, precondition=False
    )
    with pytest.warns(UserWarning, match="left to gain"):
        found = method.variance(potential, X[::5])
    assert found.kinks > 0.15
    assert not any("kinks" in text for text in found.warnings)


def test_a_loss_function_has_the_variances_of_its_likelihood(case):
    x, y = case.data
    potential = potential_of(
        case.network, lambda f, y: (f - y).square().sum() / (2 * NOISE), x, y
    )
    ours = HessianFree(tolerance=1e-4).variance(potential, X[::5])
    same = HessianFree(tolerance=1e-4).variance(case.potential, X[::5])
    torch.testing.assert_close(ours.variance, same.variance, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match='use mode="nonlinear", or a likelihood'):
        HessianFree("tangent").variance(potential, X)
    with pytest.raises(ValueError, match="a loss that sums over the examples"):
        potential_of(case.network, nn.MSELoss(), x, y)


def test_posteriors_of_linearised_networks_have_them(case):
    x, y = case.data
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    posterior = linearise(case.network, case.likelihood, Isotropic()).fit(
        loader, steps=0, precision=PRECISION, final_samples=400
    )
    sampled = posterior.variance(X)
    _, added = posterior.fluctuations(X)
    torch.testing.assert_close(sampled, added.square().mean(2))
    tangent = posterior.variance(X, HessianFree("tangent"))
    truth = diagonal(gauss_newton(case.potential, X))
    torch.testing.assert_close(tangent, truth, rtol=1e-5, atol=0)
    assert (sampled / tangent).log().abs().max() < 0.3
    nonlinear = HessianFree().variance(case.potential, X).variance
    posterior.scale = 2.0
    found = posterior.variance(X, HessianFree())
    torch.testing.assert_close(found, 2 * nonlinear, rtol=1e-3, atol=0)
    with pytest.raises(TypeError, match="method: expected HessianFree"):
        posterior.variance(X, "tangent")


class Odd(nn.Module):
    """A network that is zero at zero, whatever its weights."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_outputs_without_a_gradient_take_no_step(case):
    torch.manual_seed(0)
    potential = potential_of(Odd().double().eval(), case.likelihood, *case.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone, both, none = (
            HessianFree().variance(potential, torch.tensor(x).double()[:, None])
            for x in ([1.0], [1.0, 0.0], [0.0])
        )
    assert both.steps == alone.steps
    assert both.variance[1] == none.variance == 0
    assert none.converged == 1.0
    assert none.kinks == 0.0


def test_all_that_moves_a_network_says_so(case):
    x, y = case.data
    potential = potential_of(network_of(hidden=3), case.likelihood, x, y)
    method = HessianFree(steps=20)
    for call in (method.covariance, method.training_covariance):
        with pytest.warns(UserWarning, match="was not at the optimum of this loss"):
            call(potential, X[:1])


@pytest.mark.parametrize("place", ["linear", "network"])
def test_their_curvature_is_where_the_samples_have_it(place, tmp_path):
    x, y = data_of(Categorical())
    network, path = network_of(outputs=3), tmp_path / "posterior"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linearised = linearise(
            network, Categorical(), Isotropic(), curvature_at=place, mean="linear"
        )
        fit = linearised.fit([(x, y)], steps=0, precision=0.2, final_samples=8)
    fit.save(path)
    posterior = load(path, network)
    assert posterior.curvature_at == place
    with pytest.raises(ValueError, match=r"Potential.of\(posterior, loader\)"):
        posterior.variance(x, HessianFree())
    phi = posterior.tangent.at(x).jacobian()
    outputs = network(x) if place == "network" else posterior.linear_mean(x)
    probabilities = outputs.detach().softmax(1)
    curvature = torch.diag_embed(probabilities) - torch.einsum(
        "bi,bj->bij", probabilities, probabilities
    )
    matrix = torch.einsum("bid,bij,bje->de", phi, curvature, phi)
    inverse = (matrix + 0.2 * torch.eye(len(matrix)).double()).inverse()
    truth = torch.einsum("bid,de,bie->bi", phi, inverse, phi)
    found = fit.variance(x, HessianFree("tangent", tolerance=1e-6))
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
    exact = CompactGaussian.of_posterior(fit).marginal_variance
    torch.testing.assert_close(exact, inverse.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "hessian"}, 'mode: expected "tangent" or "nonlinear"'),
        ({"shift": 0.0}, "shift: expected a positive"),
        ({"probes": 1}, "probes: expected at least 2"),
        ({"steps": 0}, "steps: expected at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HessianFree(**settings)
