"""Certificates against dense posteriors, other examples, and what makes them false."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sgdgp.networks import (
    Bernoulli,
    Categorical,
    Certificate,
    Gaussian,
    GPrior,
    Isotropic,
    LearnedPrior,
    LinearisedPosterior,
    certificate,
    certify,
    gibbs,
    linearise,
    load,
)
from sgdgp.networks.bounds import gaussian_kl
from sgdgp.networks.priors import KroneckerPrior, KroneckerSum

DIM, NOISE = 3, 0.01
LIKELIHOODS = {
    "regression": Gaussian(noise=NOISE),
    "classes": Categorical(),
    "labels": Bernoulli(),
}
pytestmark = pytest.mark.filterwarnings("ignore:Learning has not settled")

FIT = {"progress": False, "final_samples": 2, "num_samples": 2, "steps": 2}
"""Where the search for Q begins does not matter."""


@pytest.fixture(autouse=True)
def _few_places(monkeypatch: pytest.MonkeyPatch):
    """A search over more of them takes longer and tests nothing else."""
    monkeypatch.setattr(certificate, "_SCALES", (1.0, 100.0, 1e4))
    monkeypatch.setattr(gibbs, "_POWERS", (0.25, 4.0))


def network(outputs: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, outputs)
    return nn.Sequential(*layers).double().eval()


def task(kind: str, n: int, seed: int, turn: float = 0.0) -> TensorDataset:
    """One of those that are alike up to ``turn``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, DIM, generator=generator, dtype=torch.float64)
    f = torch.stack([(x[:, 0] + turn * x[:, 1]).sin(), x[:, 1] + turn * x[:, 2]], 1)
    noisy = f + NOISE**0.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    if kind == "regression":
        return TensorDataset(x, noisy[:, :1])
    return TensorDataset(
        x, noisy.argmax(1) if kind == "classes" else (noisy > 0).long()
    )


def trained(kind: str, data: TensorDataset, seed: int = 0) -> nn.Sequential:
    likelihood = LIKELIHOODS[kind]
    model = network(1 if kind == "regression" else 2, seed).train()
    x, y = data.tensors
    descent = torch.optim.LBFGS(model.parameters(), max_iter=40)

    def loss() -> Tensor:
        descent.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        value = likelihood.loss(model(x), y).sum() + 0.05 * decay
        value.backward()
        return value

    descent.step(loss)
    return model.eval()


@functools.cache
def learned(
    kind: str, seed: int = 0, strength: float | None = 0.1
) -> tuple[nn.Module, LearnedPrior]:
    data = task(kind, 60, 100 + seed)
    model = trained(kind, data, seed)
    likelihood = LIKELIHOODS[kind]
    return model, LearnedPrior.from_data(model, likelihood, data, strength=strength)


def certified(kind: str, n: int, seed: int = 0, **how) -> Certificate:
    model, prior = learned(kind, seed)
    data = task(kind, n, seed, turn=0.3)
    posterior = linearise(model, LIKELIHOODS[kind], prior=prior).fit(data, **FIT)
    return certify(posterior, data, **{"num_draws": 200, **how})


def share_of(found: Certificate) -> float:
    """Part of delta that McAllester's bound has been given."""
    budget = 2 * (found.mcallester - found.risk_upper) ** 2
    n = found.num_examples
    share = 2 * n**0.5 * math.exp(found.kl - n * budget)
    return share / found.delta


class TestCertificate:
    @pytest.mark.parametrize("kind", LIKELIHOODS)
    def test_its_numbers_are_those_of_its_posterior(self, kind):
        found = certified(kind, 25, final_samples=2048)
        assert found.risk <= found.risk_upper <= found.bound <= found.mcallester
        assert found.num_draws == 0
        assert found.risk == found.risk_upper
        # Samples are those of Q, which has the risk that is stated.
        again = found.gibbs_risk(task(kind, 25, 0, turn=0.3))
        assert again == pytest.approx(found.risk, abs=0.02)
        # The divergence of Gaussians over all weights.
        q, prior = found.posterior, found.posterior.prior
        samples = prior.whiten(q.weight_samples)
        seen = torch.cov(samples)
        assert float((seen.diagonal() - 1).mean()) < 0
        mean = prior.whiten(q.weight_mean)
        assert float(mean.square().sum()) / 2 <= found.kl + 1e-9

    def test_divergence_is_that_of_dense_gaussians(self):
        """At precisions where Q is what a likelihood leaves: no search, no polish."""
        found = certified("regression", 8, final_samples=512)
        q = found.posterior
        whitened = q.prior.whiten(q.weight_mean)
        tangent, x = q.tangent, task("regression", 8, 0, turn=0.3).tensors[0]
        rows = q.prior.root_adjoint(tangent.at(x).jacobian()[:, 0].mT).mT
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        along = rows.mT @ vectors / values.sqrt()
        # The mean lies in the rows; variances there are all that Q differs in.
        torch.testing.assert_close(along @ (along.mT @ whitened), whitened)
        samples = q.prior.whiten(q.weight_samples)
        off = samples - along @ (along.mT @ samples)
        expected = (tangent.num_weights - 8) * samples.shape[1]
        assert float(off.square().sum()) == pytest.approx(expected, rel=0.1)
        size = tangent.num_weights
        variance = (along.mT @ samples).square().mean(1)
        covariance = torch.eye(size).double() + (along * (variance - 1)) @ along.mT
        precision = torch.linalg.inv(covariance)
        one = KroneckerSum(
            [(torch.ones(1).double(), precision)], torch.zeros(1, size).double()
        )
        ones = torch.ones(1, dtype=torch.float64)
        dense = KroneckerPrior(size, ones, blocks=[one])
        itself = KroneckerPrior(size, ones, blocks=[torch.ones(size).double()])
        kl = gaussian_kl(dense, itself, whitened).value
        assert kl == pytest.approx(found.kl, rel=0.1, abs=0.2)

    @pytest.mark.parametrize("kind", LIKELIHOODS)
    def test_other_examples_have_no_higher_risk(self, kind):
        found = certified(kind, 30, 1)
        risk = found.gibbs_risk(task(kind, 500, 1001, turn=0.3))
        assert risk <= found.bound <= found.mcallester

    def test_a_task_like_the_source_has_a_bound_that_says_something(self):
        model, prior = learned("classes")
        data = task("classes", 150, 7)
        posterior = linearise(model, Categorical(), prior=prior).fit(data, **FIT)
        found = certify(posterior, data, num_draws=1000)
        assert not found.is_vacuous
        assert found.bound < 0.3
        assert "below" in str(found)
        assert all(sentence in str(found) for sentence in found.assumptions)

    def test_strengths_and_precisions_share_delta(self):
        model, prior = learned("regression")
        data = task("regression", 6, 0)
        posterior = linearise(model, LIKELIHOODS["regression"], prior=prior).fit(
            data, **FIT
        )
        tried = replace(prior, tried=(0.0, 0.1, 10.0))
        one, more = (
            certify(replace(posterior, settings=p), data) for p in (prior, tried)
        )
        assert more.num_priors == 4 * one.num_priors
        assert one.strength == 0.1
        assert "4 strengths" in str(more)
        # What stands is the bound with the share of delta of one prior, not of all.
        shares = []
        for found in (one, more):
            shares.append(share_of(found))
            own = float(found.precisions[0]) == 1.0
            expected = 0.5 if own else 0.5 / (one.num_priors - 1)
            if found is more:
                expected *= 0.5 if found.strength == 1.0 else 0.5 / 3
            assert shares[-1] == pytest.approx(expected, rel=1e-6)

    def test_another_task_goes_on_from_the_strength_that_was_chosen(self):
        model, prior = learned("regression")
        data, likelihood = task("regression", 6, 0), LIKELIHOODS["regression"]
        prior = replace(prior, tried=(10.0,))
        posterior = linearise(model, likelihood, prior=prior).fit(data, **FIT)
        found = certify(posterior, data)
        assert found.strength != prior.strength
        assert found.posterior.settings.strength == found.strength
        (alpha,) = found.precisions
        later = prior.updated(found.posterior, compress=False)
        for old, new in zip(
            prior.curvature.blocks, later.curvature.blocks, strict=True
        ):
            factor = alpha * found.strength
            torch.testing.assert_close(new.terms[0][0], factor * old.terms[0][0])

    def test_samples_are_the_same_however_many_fit_into_memory(self, monkeypatch):
        one = certified("classes", 8, final_samples=7).posterior
        widths = []
        forward = certificate.TangentData.forward

        def counted(self, w, *args):
            widths.append(w.shape[1])
            return forward(self, w, *args)

        monkeypatch.setattr(certificate.TangentData, "forward", counted)
        monkeypatch.setattr(certificate, "_LIVE_COLUMNS", 1e9)
        other = certified("classes", 8, final_samples=7).posterior
        assert max(widths) < 7
        torch.testing.assert_close(other.weight_samples, one.weight_samples)

    def test_a_new_head_has_a_precision_of_its_own(self):
        model, prior = learned("classes")
        data = task("regression", 20, 0)
        fresh = network(1)
        fresh[0].load_state_dict(model[0].state_dict())
        grown = prior.extended(new="2.*")
        likelihood = LIKELIHOODS["regression"]
        posterior = linearise(fresh, likelihood, prior=grown).fit(data, **FIT)
        with pytest.raises(ValueError, match="no regression"):
            certify(posterior, data)
        found = certify(posterior, data, tolerance=0.5)
        assert len(found.precisions) == 2
        assert "2.*" in str(found)

    def test_a_task_after_another(self, tmp_path):
        """The mean has moved, but the network is linear where it was."""
        model, prior = learned("regression")
        first, second = (task("regression", 10, seed) for seed in (0, 1))
        likelihood = LIKELIHOODS["regression"]
        posterior = linearise(model, likelihood, prior=prior).fit(first, **FIT)
        later = prior.updated(posterior)
        later.save(tmp_path / "prior.safetensors")
        later = LearnedPrior.load(tmp_path / "prior.safetensors")
        posterior = linearise(model, likelihood, prior=later).fit(second, **FIT)
        assert bool(posterior.centre.any())
        found = certify(posterior, second)
        assert found.gibbs_risk(task("regression", 100, 2)) <= found.bound
        with pytest.raises(ValueError, match="10 of 10"):
            certify(posterior, first)

    @pytest.mark.parametrize("kind", LIKELIHOODS)
    def test_a_pickle_has_the_same_risk(self, kind):
        found = certified(kind, 5)
        there = pickle.loads(pickle.dumps(found))
        data = task(kind, 20, 3)
        assert there.gibbs_risk(data) == found.gibbs_risk(data)
        assert str(there) == str(found)
        there.posterior.scale = 4.0
        assert there.gibbs_risk(data) == pytest.approx(found.gibbs_risk(data))
        x = data.tensors[0]
        with pytest.raises((TypeError, ValueError), match=r"y: .* expect"):
            there.gibbs_risk(TensorDataset(x, torch.zeros(20, 7).double()))

    def test_examples_that_are_there_twice_are_said(self):
        found = certified("regression", 6)
        data = TensorDataset(
            *(torch.cat([t, t]) for t in task("regression", 6, 0, turn=0.3).tensors)
        )
        twice = certify(found.posterior, data)
        assert "6 examples, which have the inputs of others" in str(twice)
        assert "inputs of others" not in str(found)

    def test_positions_without_a_label_and_inference_mode(self):
        """Whose margins have no variance, of which there is no slope."""
        likelihood = Categorical(ignore_index=-100)
        x, y = task("classes", 24, 0).tensors
        y = y.clone()
        y[::3] = -100
        source, data = (
            TensorDataset(x[a].unflatten(0, (4, 3)), y[a].unflatten(0, (4, 3)))
            for a in (slice(12), slice(12, 24))
        )
        model = network(3)
        with torch.inference_mode():
            prior = LearnedPrior.from_data(model, likelihood, source, strength=0.1)
            posterior = linearise(model, likelihood, prior=prior).fit(data, **FIT)
            found = certify(posterior, data, num_draws=200, final_samples=512)
            again = found.gibbs_risk(data)
        assert again == pytest.approx(found.risk, abs=0.1)

    def test_a_loss_of_the_users(self):
        def far(outputs: Tensor, y: Tensor) -> Tensor:
            return (outputs - y.unsqueeze(-1)).abs().clamp(max=1).mean(1)

        found = certified("regression", 20, loss=far)
        assert found.loss == "far"
        assert found.num_draws == 200
        assert found.risk < found.risk_upper
        assert found.tolerance is None
        again = found.gibbs_risk(task("regression", 20, 0, turn=0.3))
        assert again == pytest.approx(found.risk, abs=0.03)


@functools.cache
def fitted(likelihood: Gaussian) -> tuple[LinearisedPosterior, TensorDataset]:
    model, prior = learned("regression")
    data = task("regression", 12, 0)
    return linearise(model, likelihood, prior=prior).fit(data, **FIT), data


class TestRefusals:
    def test_examples_that_the_prior_has_seen(self):
        posterior, data = fitted(LIKELIHOODS["regression"])
        x, y = (
            torch.cat([a, b[:5]])
            for a, b in zip(
                data.tensors, task("regression", 60, 100).tensors, strict=True
            )
        )
        with pytest.raises(ValueError, match="5 of 17 examples"):
            certify(posterior, TensorDataset(x, y))

    def test_a_prior_that_saw_them_breaks_the_bound_where_that_is_not_refused(self):
        """Labels are coins: no predictor has a risk of less than a half."""
        generator = torch.Generator().manual_seed(0)
        coins = [
            TensorDataset(
                torch.randn(n, DIM, generator=generator, dtype=torch.float64),
                torch.randint(2, (n,), generator=generator),
            )
            for n in (14, 2000)
        ]
        wide = nn.Sequential(nn.Linear(DIM, 40), nn.Tanh(), nn.Linear(40, 2))
        model = wide.double().eval()
        x, y = coins[0].tensors
        descent = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(200):
            descent.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            descent.step()
        prior = LearnedPrior.from_data(model, Categorical(), coins[0], strength=0.0)
        with pytest.raises(ValueError, match="prior has seen"):
            certify(
                linearise(model, Categorical(), prior=prior).fit(coins[0], **FIT),
                coins[0],
            )
        blind = replace(prior, seen=prior.seen[:0])
        posterior = linearise(model, Categorical(), prior=blind).fit(coins[0], **FIT)
        found = certify(posterior, coins[0], num_draws=500)
        assert found.gibbs_risk(coins[1]) > found.bound

    @pytest.mark.parametrize("prior", [GPrior(), Isotropic(), None])
    def test_priors_that_the_examples_may_have_chosen(self, prior):
        data = task("regression", 12, 0)
        posterior = linearise(network(1), LIKELIHOODS["regression"], prior=prior).fit(
            data, **FIT
        )
        with pytest.raises(ValueError, match="LearnedPrior"):
            certify(posterior, data)

    def test_a_network_that_the_examples_may_have_trained(self):
        _, prior = learned("regression")
        data = task("regression", 12, 0)
        other = network(1)
        posterior = linearise(other, LIKELIHOODS["regression"], prior=prior).fit(
            data, **FIT
        )
        with pytest.raises(ValueError, match="weights are not those"):
            certify(posterior, data)

    def test_what_is_constant_in_the_network_may_have_been_trained_too(self):
        """Statistics of batch norms, and a body that is frozen."""
        source, data = (task("regression", n, n) for n in (60, 12))
        likelihood = LIKELIHOODS["regression"]
        normed = network(1).insert(1, nn.BatchNorm1d(6).double()).eval()
        for model, weights in ((normed, None), (network(1), "last_layer")):
            prior = LearnedPrior.from_data(
                model, likelihood, source, strength=0.1, weights=weights
            )
            for change in (0.0, 0.1):
                with torch.no_grad():
                    part = model[1].running_mean if weights is None else model[0].bias
                    part += change
                posterior = linearise(
                    model, likelihood, prior=prior, weights=weights
                ).fit(data, **FIT)
                if not change:
                    assert certify(posterior, data).bound < 1
                    continue
                with pytest.raises(ValueError, match="frozen ones and statistics"):
                    certify(posterior, data)

    def test_all_that_a_source_has_seen_goes_with_its_posterior(self):
        """That of its own prior, and its own data whatever it is told of them."""
        posterior, data = fitted(LIKELIHOODS["regression"])
        later, other = (task("regression", n, n) for n in (7, 5))
        first = task("regression", 60, 100)
        model, likelihood = network(1), LIKELIHOODS["regression"]
        model.load_state_dict(posterior.tangent.network.state_dict())
        told = posterior.settings
        for prior in (
            LearnedPrior.of(posterior, other),
            told.updated(posterior, other),
        ):
            after = linearise(model, likelihood, prior=prior).fit(later, **FIT)
            for seen in (first, data, other):
                with pytest.raises(ValueError, match="prior has seen"):
                    certify(after, seen)
            assert certify(after, later).bound <= 1

    def test_a_posterior_from_a_file_does_not_say_what_its_prior_has_seen(
        self, tmp_path
    ):
        posterior, data = fitted(LIKELIHOODS["regression"])
        posterior.save(tmp_path / "posterior")
        model = posterior.tangent.network
        prior = LearnedPrior.of(load(tmp_path / "posterior", model), data)
        later = task("regression", 7, 7)
        after = linearise(model, LIKELIHOODS["regression"], prior=prior).fit(
            later, **FIT
        )
        with pytest.raises(ValueError, match="not known what the prior has"):
            certify(after, later)

    def test_a_tolerance_from_noise_that_the_examples_have_taught(self):
        posterior, data = fitted(Gaussian())
        with pytest.raises(ValueError, match="noise was learned"):
            certify(posterior, data)
        assert certify(posterior, data, tolerance=0.2).tolerance == 0.2

    @pytest.mark.parametrize(
        ("how", "error", "words"),
        [
            ({"delta": 1.0}, ValueError, r"delta: .*\(0, 1\)"),
            ({"delta": 0.0}, ValueError, "delta"),
            ({"tolerance": -1.0}, ValueError, "tolerance: expected a positive"),
            ({"tolerance": [1.0, 1.0]}, ValueError, "one for each output"),
            ({"tolerance": "a"}, TypeError, "tolerance: expected a positive"),
            ({"tolerance": True}, TypeError, "tolerance: expected a number"),
            ({"loss": 3}, TypeError, "loss: expected a function"),
            ({"loss": lambda f, y: f[:, 0].square() * 1e3}, ValueError, "losses in"),
            ({"loss": lambda f, y: f, "tolerance": 1.0}, ValueError, "tolerance: it"),
            ({"num_draws": 1}, ValueError, "num_draws"),
        ],
    )
    def test_arguments_that_make_no_certificate(self, how, error, words):
        posterior, data = fitted(LIKELIHOODS["regression"])
        with pytest.raises(error, match=words):
            certify(posterior, data, **how)

    def test_no_examples_and_too_many(self):
        posterior, data = fitted(LIKELIHOODS["regression"])
        with pytest.raises(ValueError, match="no examples"):
            certify(posterior, [])
        small = copy.copy(posterior.tangent)
        small.memory_budget = 2**12
        with pytest.raises(ValueError, match="examples fit"):
            certify(replace(posterior, tangent=small), data)
        with pytest.raises(TypeError, match="posterior: expected"):
            certify(network(1), data)
