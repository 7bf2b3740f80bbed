"""Draws of networks: their shapes, summary, predictions, files."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sgdgp
from sgdgp.networks import Bernoulli, Categorical, Gaussian
from sgdgp.networks.sampling import Draws
from sgdgp.tangent import Tangent

X = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 0.1]], dtype=torch.float64)


def network(hidden: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 2))
    return net.double().eval()


def model(likelihood: Any = None, hidden: int = 3) -> Any:
    return SimpleNamespace(tangent=Tangent(network(hidden)), likelihood=likelihood)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_draws(chains: int = 2, count: int = 8, **fields: Any) -> Draws:
    tangent = Tangent(network())
    weights = normal(chains, count, tangent.num_weights)
    values: dict[str, Any] = {
        "energies": weights.square().sum(2) / 2,
        "acceptance": torch.full((chains, count), 0.8),
        "divergent": torch.zeros(chains, count, dtype=torch.bool),
        "outputs": normal(chains, count, 3, seed=1),
        "step_size": 0.1,
        "num_gradients": 100,
        "seconds": 2.0,
        **fields,
    }
    return Draws(weights, tangent.names, tangent.shapes, **values)


def test_outputs_are_those_of_networks_with_these_weights():
    draws, net = some_draws(), network()
    found = draws.function(model(), X)
    assert found.shape == (2, 8, 3, 2)
    nn.utils.vector_to_parameters(draws.weights[1, 5], net.parameters())
    torch.testing.assert_close(found[1, 5], net(X).detach())


def test_predictions_are_means_over_the_draws():
    draws = some_draws()
    f = draws.function(model(), X).flatten(0, 1)
    gaussian = draws.predict(model(Gaussian(noise=0.3)), X)
    torch.testing.assert_close(gaussian.mean, f.mean(0))
    torch.testing.assert_close(gaussian.variance, f.var(0, correction=0))
    assert gaussian.noise == 0.3
    classes = draws.predict(model(Categorical()), X)
    torch.testing.assert_close(classes, f.softmax(2).mean(0))
    labels = draws.predict(model(Bernoulli()), X)
    torch.testing.assert_close(labels, f.sigmoid().mean(0))
    positions = draws.predict(model(Categorical(ignore_index=-1, classes=1)), X)
    torch.testing.assert_close(positions, torch.ones(3, 2, 1, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"expected one with Categorical\(\)"):
        draws.predict(model(lambda f, y: f.sum()), X)


def test_draws_of_another_architecture_are_refused_by_the_tensor_that_differs():
    with pytest.raises(ValueError, match=r"'0.weight' \(4, 2\).*found '0.weight' \(3"):
        some_draws().function(model(hidden=4), X)
    last = SimpleNamespace(tangent=Tangent(network(), weights="2.*"), likelihood=None)
    with pytest.raises(ValueError, match="of another architecture"):
        some_draws().function(last, X)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match=r"weights: expected shape \(chains, draws, 6"):
        Draws(normal(2, 4, 5), ["a"], [(2, 3)])
    with pytest.raises(ValueError, match="names: expected 1, one for each"):
        Draws(normal(2, 4, 6), ["a", "b"], [(2, 3)])
    with pytest.raises(ValueError, match=r"energies: expected chains and draws \(2, 4"):
        Draws(normal(2, 4, 6), ["a"], [(2, 3)], energies=normal(2, 3))


def test_the_summary_has_figures_and_no_word_against_good_draws():
    draws = some_draws(4, 100)
    assert draws.caveats() == ()
    text = str(draws)
    assert "4 chains x 100 draws of 17 weights, 100 gradients in 2.0 s (50 a" in text
    assert "acceptance 0.80, step size 0.1, 0 divergent" in text
    assert text.count("R-hat median") == 2
    assert repr(draws) == "Draws(4 chains x 100 draws of 17 weights)"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"outputs": normal(4, 100, 3) + 5 * torch.arange(4.0)[:, None, None]},
            "R-hat",
        ),
        ({"outputs": torch.zeros(4, 100, 3)}, "not moved"),
        ({"acceptance": torch.full((4, 100), 0.07)}, "Only 7% .* step size 0.1 is too"),
        ({"divergent": torch.ones(4, 100) > 0}, "400 of 400 trajectories diverged"),
        ({"warnings": ["Interrupted."]}, "Interrupted"),
    ],
)
def test_the_summary_says_what_is_wrong(fields: dict[str, Any], sentence: str):
    assert re.search(f"(?s){sentence}", str(some_draws(4, 100, **fields)))


def test_one_chain_and_one_draw_are_said_so():
    assert "One chain only" in str(some_draws(1, 8))
    assert "1 draws of each chain only" in str(some_draws(4, 1))


def test_members_of_an_ensemble_are_not_said_to_be_short_chains():
    assert some_draws(1, 1, acceptance=None).caveats() == ()


def test_weights_have_diagnostics_of_their_own():
    draws = some_draws(4, 200)
    assert draws.r_hat().shape == draws.ess().shape == draws.ess("tail").shape == (17,)
    assert float(draws.r_hat().max()) < 1.05
    assert torch.equal(draws.flat[201], draws.weights[1, 1])
    with pytest.raises(ValueError, match=r'kind: expected "bulk" or "tail", found .al'):
        draws.ess("all")  # type: ignore[arg-type]


def test_a_file_gives_back_every_field(tmp_path):
    draws = some_draws(warnings=["Interrupted."])
    draws.save(tmp_path / "draws.safetensors")
    for found in (
        Draws.load(tmp_path / "draws.safetensors"),
        sgdgp.load(tmp_path / "draws.safetensors"),
    ):
        for field in dataclasses.fields(Draws):
            expected, value = getattr(draws, field.name), getattr(found, field.name)
            if isinstance(expected, Tensor):
                assert torch.equal(value, expected)
            else:
                assert value == expected


@pytest.mark.parametrize("version", ["0.23.1", "1.3.0"])
def test_arviz_gets_tensors_by_name(monkeypatch, version: str):
    seen: dict[str, Any] = {}

    def from_dict(groups: Any = None, **named: Any) -> str:
        seen.update(groups or named)
        return "data"

    stand_in = types.ModuleType("arviz")
    stand_in.from_dict, stand_in.__version__ = from_dict, version  # type: ignore
    monkeypatch.setitem(sys.modules, "arviz", stand_in)
    draws = some_draws(energies=None)
    assert draws.to_arviz() == "data"
    assert {name: part.shape for name, part in seen["posterior"].items()} == {
        "0.weight": (2, 8, 3, 2),
        "0.bias": (2, 8, 3),
        "2.weight": (2, 8, 2, 3),
        "2.bias": (2, 8, 2),
    }
    assert set(seen["sample_stats"]) == {"acceptance_rate", "diverging"}


def test_without_arviz_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'sgdgp\[arviz\]'"):
        some_draws().to_arviz()


def test_no_draws_have_no_outputs_and_nan_is_no_mixing():
    none = Draws(torch.zeros(2, 0, 17), ("a",), [(17,)])
    with pytest.raises(ValueError, match="draws: expected at least one, found none"):
        none.function(model(), X)
    broken = some_draws(outputs=torch.full((2, 8, 1), torch.nan))
    assert "outputs of some networks are NaN" in str(broken)
