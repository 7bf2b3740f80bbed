"""HMC against posteriors in closed form, the laws of its dynamics, and its files."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgdgp.core.errors import CheckpointError
from sgdgp.networks import Categorical, Gaussian, linearise
from sgdgp.networks.potential import Potential
from sgdgp.networks.priors import DiagonalPrior, KroneckerPrior, KroneckerSum
from sgdgp.networks.sampling import Draws, hmc, mass_matrix
from sgdgp.networks.sampling.hamiltonian import DualAveraging, trajectory
from sgdgp.networks.sampling.mass_matrix import given_mass, tangent_mass
from tests.networks.sampling import killed_chains

NOISE = 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear() -> Potential:
    """A linear regression, whose posterior is Gaussian."""
    x = normal(12, 3) * torch.tensor([1.0, 10.0, 0.1])
    net = nn.Linear(3, 1).double().eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.3, -0.2, 0.5]]))
        net.bias.zero_()
    y = net(x).detach() + NOISE**0.5 * normal(12, 1, seed=1)
    return Potential.from_network(net, Gaussian(noise=NOISE), [(x, y)], precision=2.0)


def gaussian(potential: Potential) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a linear network's weights."""
    batch = next(iter(potential.stream))
    phi = torch.cat([batch.x, torch.ones_like(batch.x[:, :1])], 1)
    eye = torch.eye(4, dtype=torch.float64)
    covariance = (phi.mT @ phi / NOISE + 2 * eye).inverse()
    return covariance @ phi.mT @ batch.y[:, 0] / NOISE, covariance


def classes(hidden: int = 3) -> Potential:
    x = normal(20, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0)
    return Potential.from_network(net.double().eval(), Categorical(), [(x, y)])


def quiet(potential: Any, **settings: Any) -> Draws:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hmc(potential, progress=False, **settings)


# What is drawn


@pytest.mark.parametrize("mass", ["tangent", "diagonal"])
def test_draws_of_a_gaussian_posterior_have_its_mean_and_covariance(mass: str):
    potential = linear()
    mean, covariance = gaussian(potential)
    given = {
        "tangent": None,
        "diagonal": covariance.inverse().diagonal(),
    }[mass]
    draws = hmc(potential, chains=20, draws=50, warmup=20, mass=given, progress=False)
    assert float(draws.acceptance.mean()) > 0.6
    deviation = covariance.diagonal().sqrt()
    # Chains that go from side to side know the mean better than independent draws.
    error = deviation / draws.ess().clamp_max(1000).sqrt()
    assert float(((draws.flat.mean(0) - mean) / error).abs().max()) < 4
    white = torch.linalg.cholesky(covariance)
    z = torch.linalg.solve_triangular(white, (draws.flat - mean).mT, upper=False)
    found = z @ z.mT / z.shape[1]
    torch.testing.assert_close(found, torch.eye(4).double(), atol=0.2, rtol=0)
    assert float(draws.r_hat().max()) < 1.1
    energies = potential(draws.weights[1])
    torch.testing.assert_close(draws.energies[1], energies)


def test_a_linearised_posterior_is_sampled_with_its_own_prior_and_noise():
    potential = linear()
    fit = linearise(potential.tangent.network, Gaussian(noise=NOISE)).fit
    batch = next(iter(potential.stream))
    data = [(batch.x, batch.y)]
    posterior = fit(data, precision=2.0, steps=0, final_samples=2, progress=False)
    draws = hmc(posterior, chains=20, draws=50, warmup=20, progress=False)
    eye = torch.eye(4, dtype=torch.float64)
    precision = posterior.prior.matmul(eye)
    phi = torch.cat([batch.x, torch.ones_like(batch.x[:, :1])], 1)
    variance = (phi.mT @ phi / NOISE + precision).inverse().diagonal()
    ratio = draws.flat.var(0) / variance
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=0.2, rtol=0)


def test_the_step_size_is_learned_so_that_four_of_five_are_accepted():
    draws = quiet(classes(), chains=20, draws=10, warmup=40, leapfrog=2)
    assert 0.6 < float(draws.acceptance.mean()) < 0.95
    assert draws.step_size is not None
    assert draws.step_size > 0.15
    averaging = DualAveraging(math.log(100.0))
    step = 1.0
    for _ in range(300):  # acceptance falls with the step size, and is .8 at .7
        step = averaging.update(max(0.0, 1 - 0.2 * (step / 0.7) ** 2))
    assert math.exp(averaging.log_average) == pytest.approx(0.7, rel=0.1)


# Where chains begin


def test_chains_begin_about_the_network_at_the_prior_or_where_they_are_told():
    potential, first = classes(), []

    def stop(progress: Any) -> bool:
        return True

    rows = normal(3, potential.num_weights)
    for start in (None, "prior", rows):
        draws = quiet(
            potential,
            chains=3,
            draws=2,
            warmup=0,
            step_size=1e-9,
            leapfrog=1,
            start=start,
            callback=stop,
        )
        first.append(draws.weights[:, 0])
    torch.testing.assert_close(first[2], rows, atol=1e-6, rtol=0)
    assert float((first[0] - potential.theta).abs().max()) < 5
    assert float((first[0] - first[1]).abs().max()) > 1e-3
    again = quiet(
        potential,
        chains=3,
        draws=2,
        warmup=0,
        step_size=1e-9,
        leapfrog=1,
        seed=1,
        callback=stop,
    )
    assert float((first[0] - again.weights[:, 0]).abs().max()) > 1e-3


def test_chains_of_a_loss_function_begin_at_the_network():
    found = Potential.from_network(
        network := nn.Linear(1, 1).eval(),
        lambda f, y: (f - y).abs().sum(),
        [(torch.ones(3, 1), torch.ones(3, 1))],
        precision=1e-6,  # a draw of the prior would be a thousand away
    )
    draws = quiet(
        found, chains=2, draws=1, warmup=0, step_size=1e-9, leapfrog=1, seed=1
    )
    theta = nn.utils.parameters_to_vector(network.parameters()).detach()
    torch.testing.assert_close(draws.weights[:, 0], theta.expand(2, -1))


def test_layers_without_kronecker_factors_have_the_mass_of_the_prior(monkeypatch):
    def refused(*args: Any) -> None:
        raise ValueError("no factors of this layer")

    monkeypatch.setattr(mass_matrix, "_MOST_DENSE", 0)
    monkeypatch.setattr(mass_matrix, "kronecker_curvature", refused)
    settings = {"draws": 1, "warmup": 0, "step_size": 1e-9, "leapfrog": 1}
    with pytest.warns(UserWarning, match="the prior's precision: no factors of this"):
        draws = hmc(potential := linear(), chains=2, progress=False, **settings)
    torch.testing.assert_close(draws.weights[:, 0], potential.theta.expand(2, -1))


def test_chains_in_permuted_copies_have_the_same_energies_to_draw():
    """Each has the mass matrix of its own copy."""
    potential = classes()
    theta = potential.theta
    tensors = {n: t[0] for n, t in potential.tangent.weights_of(theta[None]).items()}
    order = torch.tensor([2, 0, 1])
    tensors["0.weight"] = -tensors["0.weight"][order]
    tensors["0.bias"] = -tensors["0.bias"][order]
    tensors["2.weight"] = -tensors["2.weight"][:, order]
    other = torch.cat([t.flatten() for t in tensors.values()])
    rows = torch.stack([theta, other])
    mass = tangent_mass(potential, rows)
    velocity = mass.velocity(potential.value_and_gradient(rows)[1])
    speeds = mass.kinetic(velocity)
    torch.testing.assert_close(speeds[0], speeds[1])
    torch.testing.assert_close(
        tangent_mass(potential).kinetic(velocity[:1]), speeds[:1]
    )


def test_from_the_prior_the_mass_matrices_are_those_of_where_chains_have_come_to():
    draws = quiet(classes(), chains=3, draws=10, warmup=24, start="prior", leapfrog=2)
    assert float(draws.acceptance.mean()) > 0.5
    assert draws.step_size > 0.2


# Dynamics


@pytest.mark.parametrize("kind", ["tangent", "prior", "diagonal", "kronecker"])
def test_masses_agree_with_their_matrix(kind: str):
    potential = classes()
    like, size = potential.theta, potential.num_weights
    ones = torch.ones(1, dtype=torch.float64)
    if kind == "kronecker":
        blocks = []
        for shape in potential.tangent.shapes:
            out, rest = shape[0], math.prod(shape[1:])
            a, b = normal(out, out), normal(rest, rest)
            term = (a @ a.mT, b @ b.mT)
            blocks.append(KroneckerSum([term], 1.5))
        prior = KroneckerPrior(size, ones, blocks=blocks)
        mass, eye = given_mass(potential, prior), torch.eye(size, dtype=torch.float64)
        matrix = prior.matmul(eye)
    else:
        given = {
            "tangent": None,
            "prior": DiagonalPrior(size, 3 * ones),
            "diagonal": like.square() + 0.1,
        }[kind]
        mass = (
            tangent_mass(potential) if given is None else given_mass(potential, given)
        )
        matrix = None
    z = normal(5, size)
    u = mass.draw(z)
    torch.testing.assert_close(mass.kinetic(u), 0.5 * z.square().sum(1))
    momentum = torch.func.vmap(torch.func.grad(lambda v: mass.kinetic(v[None])[0]))(u)
    torch.testing.assert_close(mass.velocity(momentum), u)
    if matrix is not None:
        torch.testing.assert_close(momentum, u @ matrix)


def test_a_trajectory_backwards_ends_where_it_began():
    potential = classes()
    mass = tangent_mass(potential)
    theta = potential.theta + mass.draw(normal(3, potential.num_weights))
    velocity = mass.draw(normal(3, potential.num_weights, seed=1))
    gradient = potential.value_and_gradient(theta)[1]
    args = (0.2, 7)
    there, speed, _, slope = trajectory(
        potential, mass, theta, velocity, gradient, *args
    )
    back, speed, _, _ = trajectory(potential, mass, there, -speed, slope, *args)
    assert float((there - theta).abs().max()) > 0.1
    torch.testing.assert_close(back, theta, atol=1e-12, rtol=0)
    torch.testing.assert_close(-speed, velocity, atol=1e-12, rtol=0)


def test_the_error_of_the_energy_falls_fourfold_for_half_the_step():
    potential = classes()
    mass = tangent_mass(potential)
    theta = potential.theta + mass.draw(normal(8, potential.num_weights))
    velocity = mass.draw(normal(8, potential.num_weights, seed=1))
    energy, gradient = potential.value_and_gradient(theta)
    errors = []
    for count in (8, 16, 32):
        _, speed, after, _ = trajectory(
            potential, mass, theta, velocity, gradient, 0.8 / count, count
        )
        change = after + mass.kinetic(speed) - energy - mass.kinetic(velocity)
        errors.append(float(change.abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


# What goes wrong


def test_too_large_a_step_is_said_aloud_and_no_step_that_is_not_finite_is_taken():
    potential = linear()

    def cliff(outputs: Tensor, y: Tensor) -> Tensor:
        loss = (outputs - y).square().sum()
        return loss * math.inf if float(outputs.detach().abs().max()) > 12 else loss

    batch = next(iter(potential.stream))
    network, data = potential.tangent.network, [(batch.x, batch.y)]
    cut = Potential.from_network(network, cliff, data)
    covariance = gaussian(potential)[1]
    with pytest.warns(UserWarning, match="diverged") as caught:
        draws = hmc(
            cut,
            draws=40,
            warmup=0,
            step_size=2.5,
            leapfrog=4,
            progress=False,
            mass=covariance.inverse(),
            start=cut.theta.expand(4, 4),
        )
    told = [str(warning.message) for warning in caught]
    assert told == list(draws.warnings)
    assert not draws.weights.requires_grad
    assert any(
        re.search("Only .*% of the proposals .* 2.5 is too large", t) for t in told
    )
    assert any("trajectories diverged" in t for t in told)
    assert bool(draws.weights.isfinite().all())
    assert bool(draws.energies.isfinite().all())
    assert all(sentence in str(draws) for sentence in told)


def test_chains_in_different_places_are_not_summarised_as_one():
    potential = classes()
    rows = potential.theta + 20 * torch.arange(2)[:, None] * normal(1, 21)
    with pytest.warns(
        UserWarning, match="have not mixed: the largest R-hat of the out"
    ):
        hmc(
            potential,
            chains=2,
            draws=10,
            warmup=0,
            step_size=0.01,
            leapfrog=1,
            start=rows,
            progress=False,
        )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"chains": 0}, ValueError, "chains: expected at least 1"),
        ({"draws": 2.5}, TypeError, "draws: expected an int"),
        ({"warmup": 0}, ValueError, "step_size: needed where there is no warmup"),
        ({"step_size": -1}, ValueError, "step_size: expected a positive finite"),
        ({"leapfrog": 0}, ValueError, "leapfrog: expected at least 1"),
        ({"start": "random"}, TypeError, 'start: expected None, "prior" or weights'),
        ({"start": torch.zeros(3, 4)}, ValueError, r"start: .*\(4, 4\), found \(3, 4"),
        ({"start": torch.full((4, 4), math.nan)}, ValueError, "start: expected finite"),
        (
            {"start": torch.full((4, 4), 1e200, dtype=torch.float64)},
            ValueError,
            "where chain 0 begins is inf",
        ),
        ({"mass": "identity"}, TypeError, "mass: expected a prior of"),
        (
            {"mass": torch.zeros(4)},
            ValueError,
            "mass: expected positive finite numbers",
        ),
        (
            {"mass": -torch.eye(4)},
            ValueError,
            "mass: expected a symmetric positive def",
        ),
        (
            {"mass": torch.eye(4) + torch.ones(4, 4).triu(1)},
            ValueError,
            "mass: expected a symmetric matrix, found entries that differ .* by 1",
        ),
        ({"mass": torch.ones(3)}, ValueError, r"mass: expected shape \(4,\) or \(4, 4"),
        ({"draws": 10**13}, ValueError, "GiB of memory.* give checkpoint="),
        ({"seed": 0.5}, TypeError, "seed: expected an int or a torch.Generator"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected a positive"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], error: type, message: str):
    with pytest.raises(error, match=message):
        hmc(linear(), **settings)


def test_only_posteriors_are_sampled():
    with pytest.raises(
        TypeError, match="model: expected a LinearisedPosterior or a Po"
    ):
        hmc(nn.Linear(1, 1))


# Files and followers


def same(one: Draws, other: Draws) -> None:
    for name in ("weights", "energies", "acceptance", "divergent", "outputs"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.step_size == other.step_size
    assert one.num_gradients == other.num_gradients


@functools.cache
def whole_run() -> Draws:
    return killed_chains.run()


def stopper(step: int) -> Any:
    return lambda progress: progress.step >= step


@pytest.mark.parametrize("step", [3, 9])
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path: Path, step: int):
    expected = whole_run()
    path = tmp_path / "run"
    stopped = killed_chains.run(checkpoint=path, callback=stopper(step))
    assert stopped.num_draws == max(0, step - 6)
    assert "The run was stopped after" in str(stopped)
    same(killed_chains.run(checkpoint=path), expected)
    same(killed_chains.run(checkpoint=path), expected)
    longer = killed_chains.run(checkpoint=path, draws=8)
    same(longer, killed_chains.run(draws=8))


@pytest.mark.filterwarnings("ignore")
def test_a_run_from_the_prior_goes_on_with_its_mass_matrices(tmp_path: Path):
    path = tmp_path / "run"
    for step in (2, 8):
        killed_chains.run(checkpoint=path, start="prior", callback=stopper(step))
    found = killed_chains.run(checkpoint=path, start="prior")
    same(found, killed_chains.run(start="prior"))


@pytest.mark.filterwarnings("ignore")
def test_after_sigkill_the_run_ends_where_it_would_have_ended(tmp_path: Path):
    path = tmp_path / "run"
    module = "tests.networks.sampling.killed_chains"
    child = subprocess.run(
        [sys.executable, "-m", module, str(path), "9"], check=False, timeout=120
    )
    assert child.returncode == -signal.SIGKILL
    heard: list[Any] = []
    same(killed_chains.run(checkpoint=path, callback=heard.append), whole_run())
    assert [progress.step for progress in heard] == list(range(10, 13))


@pytest.mark.filterwarnings("ignore")
def test_other_runs_and_damaged_draws_are_refused(tmp_path: Path):
    path = tmp_path / "run"
    killed_chains.run(checkpoint=path, callback=stopper(9))
    with pytest.raises(CheckpointError, match="setting seed is 4, expected 3"):
        killed_chains.run(checkpoint=path, seed=4)
    with pytest.raises(CheckpointError, match="setting warmup is 9, expected 6"):
        killed_chains.run(checkpoint=path, warmup=9)
    draws = path.with_name("run.draws")
    content = draws.read_bytes()
    for damaged in (content[:8], content[:8] + b"x" + content[9:]):
        draws.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"draws in .* are missing, damaged or"
        ):
            killed_chains.run(checkpoint=path)
    draws.unlink()
    with pytest.raises(CheckpointError, match=r"draws in .* are missing, damaged or"):
        killed_chains.run(checkpoint=path)


@pytest.mark.filterwarnings("ignore")
def test_runs_of_another_potential_are_refused(tmp_path: Path):
    base = classes()
    network, batch = base.tangent.network, next(iter(base.stream))

    def run(y: Tensor, loss: Any, **settings: Any) -> Draws:
        potential = Potential.from_network(network, loss, [(batch.x, y)], **settings)
        own = {"chains": 2, "draws": 2, "warmup": 2, "leapfrog": 1}
        return quiet(potential, checkpoint=tmp_path / "run", **own)

    loss = nn.CrossEntropyLoss(reduction="sum")
    run(batch.y, loss)
    smooth = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)
    for y, other, settings in (
        (batch.y.flip(0), loss, {}),
        (batch.y, smooth, {}),
        (batch.y, loss, {"output": lambda outputs: 2 * outputs}),
    ):
        with pytest.raises(CheckpointError, match="the potential where the chains"):
            run(y, other, **settings)


@pytest.mark.filterwarnings("ignore")
def test_draws_are_not_those_of_the_next_run(tmp_path: Path):
    path = tmp_path / "run"
    draws = killed_chains.run(checkpoint=path)
    expected = draws.weights.clone()
    path.unlink()
    killed_chains.run(checkpoint=path, seed=4)
    assert torch.equal(draws.weights, expected)


@pytest.mark.filterwarnings("ignore")
def test_an_interrupt_returns_what_there_is(tmp_path: Path):
    def interrupt(progress: Any) -> None:
        if progress.step == 9:
            raise KeyboardInterrupt

    expected = whole_run()
    with pytest.warns(UserWarning, match="interrupted after 3 of 6 draws"):
        found = killed_chains.run(callback=interrupt, checkpoint=tmp_path / "run")
    assert torch.equal(found.weights, expected.weights[:, :3])
    same(killed_chains.run(checkpoint=tmp_path / "run"), expected)
    early = killed_chains.run(callback=stopper(2))
    assert early.num_draws == 0
    assert "after 0 of 6 draws, in warm-up" in str(early)


@pytest.mark.filterwarnings("ignore")
def test_followers_are_told_of_every_step():
    heard: list[Any] = []
    draws = killed_chains.run(callback=heard.append)
    assert [progress.step for progress in heard] == list(range(1, 13))
    assert heard[-1].num_gradients == draws.num_gradients
    assert heard[-1].num_draws == 6
    rates = torch.tensor([p.acceptance for p in heard[6:]], dtype=torch.float64)
    torch.testing.assert_close(rates, draws.acceptance.mean(0))


def test_where_the_tangent_model_is_singular_the_prior_is_the_mass_matrix():
    ones = torch.ones(4, dtype=torch.float64)
    wide = DiagonalPrior(4, 1e-300 * ones[:1], scales=ones)
    potential = Potential.from_network(
        linear().tangent.network,
        Gaussian(noise=NOISE),
        [(torch.ones(1, 3).double(), normal(1, 1))],
        prior=wide,
    )
    with pytest.warns(UserWarning, match="The mass matrix is the prior's precision"):
        mass = tangent_mass(potential)
    torch.testing.assert_close(mass.kinetic(ones[None]), 2e-300 * ones[:1])


def test_many_weights_have_kronecker_factors_as_their_mass_matrix(monkeypatch):
    name = "sgdgp.networks.sampling.mass_matrix._MOST_DENSE"
    monkeypatch.setattr(name, 0)
    potential = linear()
    scales = torch.tensor([0.5, 1.0, 2.0, 0.3], dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    prior = DiagonalPrior(4, ones, scales=scales)
    mass = tangent_mass(dataclasses.replace(potential, prior=prior))
    x = next(iter(potential.stream)).x
    # One output: the factors are exact; of the three weights' variances the mean is 1.
    expected = x.mT @ x / NOISE + torch.eye(3, dtype=torch.float64)
    u = torch.cat([normal(2, 3), torch.zeros(2, 1, dtype=torch.float64)], 1)
    quadratic = 0.5 * (u[:, :3] @ expected * u[:, :3]).sum(1)
    torch.testing.assert_close(mass.kinetic(u), quadratic)
    bias = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    precision = len(x) / NOISE + 1 / 0.3**2
    torch.testing.assert_close(mass.velocity(bias), bias / precision)
