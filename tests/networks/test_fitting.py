"""A fit that is stopped goes on where it was, and ends where it would have ended."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.core.errors import CheckpointError
from sgdgp.networks import Categorical, Gaussian, Isotropic, WeightCG, linearise
from sgdgp.networks.storage import RunKeeper
from sgdgp.networks.weight_solvers import prior_draws
from sgdgp.tangent import Tangent

SETTINGS = {
    "num_samples": 4,
    "final_samples": 6,
    "steps": 2,
    "precision": 5.0,
    "solver": WeightCG(tolerance=1e-2),
    "progress": False,
}


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long())


@pytest.fixture(scope="module")
def loader(data) -> DataLoader:
    return DataLoader(data, batch_size=16)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for parameter in network.parameters():
        parameter.data = torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    return network.eval()


@pytest.fixture(scope="module")
def whole(network, loader):
    """The fit without an interruption."""
    return linearise(network, Categorical(), Isotropic()).fit(loader, **SETTINGS)


def assert_same(found, expected, tolerance: float = 0.05) -> None:
    """Equal up to what the solver's tolerance leaves open, or a stricter bound."""
    assert found.reason == "finished"
    assert len(found.history) == len(expected.history)
    ratios = found.precisions / expected.precisions
    assert float((ratios - 1).abs().max()) < tolerance
    for name in ("weight_samples", "weight_mean"):
        value, truth = getattr(found, name), getattr(expected, name)
        assert float((value - truth).norm()) < tolerance * float(truth.norm())


def stop_after(passes: float):
    return lambda progress: progress.passes > passes


@pytest.mark.parametrize("share", [0.3, 0.98])
def test_an_interrupted_fit_resumes_to_the_same_posterior(
    network, loader, whole, tmp_path, share: float
):
    path = tmp_path / "fit.safetensors"
    linear = linearise(network, Categorical(), Isotropic())
    stop = stop_after(share * whole.passes)
    first = linear.fit(loader, **SETTINGS, checkpoint=path, callback=stop)
    assert first.reason == "interrupted"
    assert path.exists()
    second = linear.fit(loader, **SETTINGS, checkpoint=path)
    assert_same(second, whole)
    assert second.passes > first.passes


@pytest.mark.parametrize("written", [2])
def test_a_killed_fit_resumes_from_the_last_file(
    network, loader, whole, tmp_path, monkeypatch, written: int
):
    """Only the writes between stages count: nothing is written when it dies."""
    path = tmp_path / "fit.safetensors"
    linear = linearise(network, Categorical(), Isotropic())
    keep, count = RunKeeper.keep, 0

    def keep_then_die(self, state, *, now=False):
        nonlocal count
        if count == written:
            raise Killed
        count += 1
        keep(self, state, now=True)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "keep", keep_then_die)
        with pytest.raises(Killed):
            linear.fit(loader, **SETTINGS, checkpoint=path)
    assert path.exists()
    assert_same(linear.fit(loader, **SETTINGS, checkpoint=path), whole, 1e-9)


def test_a_finished_fit_is_read_and_not_repeated(network, loader, whole, tmp_path):
    path = tmp_path / "fit.safetensors"
    linear = linearise(network, Categorical(), Isotropic())
    first = linear.fit(loader, **SETTINGS, checkpoint=path)
    calls = []
    second = linear.fit(
        loader, **SETTINGS, checkpoint=path, callback=lambda p: bool(calls.append(p))
    )
    assert not calls
    assert torch.equal(first.weight_samples, second.weight_samples)
    assert_same(second, whole, 1e-9)


def test_more_samples_are_drawn_after_a_finished_fit(network, loader, whole, tmp_path):
    path = tmp_path / "fit.safetensors"
    linear = linearise(network, Categorical(), Isotropic())
    linear.fit(loader, **SETTINGS, checkpoint=path)
    more = linear.fit(loader, **{**SETTINGS, "final_samples": 9}, checkpoint=path)
    assert more.num_samples == 9
    torch.testing.assert_close(
        more.weight_samples[:, :6], whole.weight_samples, rtol=0, atol=0.1
    )


def test_a_learned_noise_resumes_too(network, data, tmp_path):
    x, y = data.tensors
    batches = [(x, torch.nn.functional.one_hot(y, 2).double())]
    linear = linearise(network, Gaussian(per_output=True), Isotropic())
    path = tmp_path / "fit.safetensors"
    settings = {**SETTINGS, "final_samples": 4}
    expected = linear.fit(batches, **settings)
    stop = stop_after(0.6 * expected.passes)
    linear.fit(batches, **settings, checkpoint=path, callback=stop)
    found = linear.fit(batches, **settings, checkpoint=path)
    assert_same(found, expected)
    assert found.noise == pytest.approx(expected.noise, rel=0.05)


@pytest.mark.parametrize(
    "changed", [{"seed": 5}, {"num_samples": 5}, {"precision": 2.0}], ids=str
)
def test_a_file_of_another_fit_is_refused(network, loader, tmp_path, changed):
    path = tmp_path / "fit.safetensors"
    linear = linearise(network, Categorical(), Isotropic())
    linear.fit(loader, **SETTINGS, checkpoint=path, callback=stop_after(8))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="belongs to another fit"):
        linear.fit(loader, **{**SETTINGS, **changed}, checkpoint=path)
    assert path.read_bytes() == before


def test_a_file_of_other_data_is_refused(network, loader, data, tmp_path):
    path = tmp_path / "fit.safetensors"
    linear = linearise(network, Categorical(), Isotropic())
    linear.fit(loader, **SETTINGS, checkpoint=path, callback=stop_after(8))
    x, y = data.tensors
    other = DataLoader(TensorDataset(x, 1 - y), batch_size=16)
    with pytest.raises(CheckpointError, match="belongs to another fit"):
        linear.fit(other, **SETTINGS, checkpoint=path)


@pytest.mark.parametrize("kind", ["shuffled", "tuple"])
def test_batches_and_their_order_do_not_matter(network, data, kind: str):
    x, y = data.tensors
    sources = {
        "shuffled": DataLoader(data, batch_size=10, shuffle=True, drop_last=True),
        "tuple": ((x[:9], y[:9]), (x[9:], y[9:])),
        "whole": data,
    }
    settings = {**SETTINGS, "steps": 0}
    linear = linearise(network, Categorical(), Isotropic())
    fits = [linear.fit(sources[name], **settings) for name in (kind, "whole")]
    assert_same(*fits, 1e-6)


def test_prior_draws_are_those_of_their_numbers():
    like = torch.zeros(50, 1, dtype=torch.float64)
    draws = prior_draws(like, range(6), seed=3)
    assert draws.shape == (50, 6)
    assert torch.equal(prior_draws(like, range(4, 6), seed=3), draws[:, 4:])
    assert not torch.equal(prior_draws(like, range(6), seed=4), draws)


def exact_evidence(features, y):
    """Precision and noise of y = features w + e where the evidence is largest."""
    logs = torch.tensor([-4.6, -3.9], dtype=torch.float64, requires_grad=True)
    gram, eye = features @ features.mT, torch.eye(len(y), dtype=torch.float64)

    def loss():
        search.zero_grad()
        precision, noise = logs.exp()
        root = torch.linalg.cholesky(gram / precision + noise * eye)
        squares = torch.linalg.solve_triangular(root, y, upper=False).square().sum()
        value = 0.5 * squares + root.diagonal().log().sum()
        value.backward()
        return value

    search = torch.optim.LBFGS([logs], max_iter=500, line_search_fn="strong_wolfe")
    for _ in range(5):
        search.step(loss)
    return logs.detach().exp().tolist()


@pytest.fixture(scope="module")
def regression():
    """A trained network, its inputs, and their targets without shift."""
    torch.manual_seed(1)
    x = torch.randn(60, 3, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(60, 1, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    search = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(300):
        search.zero_grad()
        (network(x) - y).square().mean().backward()
        search.step()
    return network.eval().requires_grad_(False), x, y


def shifted(regression, shift):
    network, x, y = regression
    network = copy.deepcopy(network).requires_grad_()
    network[2].bias.data += shift
    return network, TensorDataset(x, y + shift)


@pytest.mark.parametrize("shift", [0, 30])
def test_learned_noise_is_that_of_the_evidence_wherever_targets_are(regression, shift):
    network, data = shifted(regression, shift)
    jacobian = Tangent(network).at(data.tensors[0]).jacobian()[:, 0]
    precision, noise = exact_evidence(jacobian, data.tensors[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = linearise(network, Gaussian(), Isotropic(), mean="linear").fit(
            data, final_samples=2, progress=False
        )
    assert found.noise == pytest.approx(noise, rel=0.25)
    assert float(found.precisions) == pytest.approx(precision, rel=0.5)
    # Eight samples know no more digits. It settles well before the last step.
    assert len(found.history) < 20


def test_noise_does_not_leave_the_targets_variance_behind(regression):
    """Far from zero the first precision is too large by many orders of magnitude."""
    network, data = shifted(regression, 1000.0)
    found = linearise(network, Gaussian(), Isotropic(), mean="linear").fit(
        data, steps=2, num_samples=2, final_samples=2, progress=False
    )
    assert found.noise < 3 * float(data.tensors[1].var())


def test_learning_that_has_not_settled_warns(regression):
    network, data = shifted(regression, 0.0)
    linear = linearise(network, Gaussian(), Isotropic())
    with pytest.warns(UserWarning, match="has not settled after"):
        linear.fit(data, steps=2, final_samples=2, progress=False)
