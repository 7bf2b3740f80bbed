"""Files of posteriors and fits of networks: what comes back, what is refused."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

import sgdgp
from sgdgp.core.errors import CheckpointError, NotStorableError, StorageError
from sgdgp.networks.expectation_maximisation import EMStep, PrecisionUpdate
from sgdgp.networks.fitting import RunState
from sgdgp.networks.likelihoods import Categorical, Gaussian
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.priors import DiagonalPrior, Layerwise
from sgdgp.networks.storage import RunKeeper, load_fields, save_fields
from sgdgp.tangent import Tangent

STEP = EMStep((1.5,), (3.0,), 0.25, None, 12.5, (1e-3, float("inf")), 7.0, 1.25)


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


@pytest.fixture
def tangent(network) -> Tangent:
    return Tangent(network, weights="no_norms")


def _fields(tangent: Tangent) -> dict[str, object]:
    d = tangent.num_weights
    return {
        "samples": torch.arange(5.0 * d).reshape(5, d).mT,
        "prior": DiagonalPrior(d, torch.tensor([2.5]), scales=torch.rand(d) + 1),
        "likelihood": Gaussian(per_output=True).with_noise((0.5, 0.25)),
        "history": (STEP,),
        "scale": 0.75,
        "warnings": ("one", "two"),
        "settings": {"seed": 3, "name": None, "list": [1, True]},
    }


def _saved(tmp_path, tangent):
    path = tmp_path / "posterior.safetensors"
    save_fields(path, tangent, _fields(tangent))
    return path


def test_all_fields_come_back(tmp_path, tangent, network):
    path = _saved(tmp_path, tangent)
    before = _fields(tangent)
    found, after = load_fields(path, network)
    assert found.names == tangent.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert list(after) == list(before)
    assert torch.equal(after["samples"], before["samples"])
    assert after["samples"].mT.is_contiguous()
    w = torch.ones(tangent.num_weights, 1)
    again = load_fields(path, network)[1]["prior"]
    assert torch.equal(after["prior"].root(w), again.root(w))
    assert after["prior"].precisions.tolist() == [2.5]
    for name in ("likelihood", "history", "scale", "warnings", "settings"):
        assert after[name] == before[name]
        assert type(after[name]) is type(before[name])


def test_a_posterior_comes_back_and_predicts_the_same(tmp_path, tangent, network):
    d = tangent.num_weights
    posterior = LinearisedPosterior(
        tangent=tangent,
        likelihood=Categorical(),
        prior=DiagonalPrior(d, torch.tensor([2.5])),
        weight_samples=torch.randn(6, d).mT,
        weight_mean=torch.randn(1, d).mT,
        num_examples=12,
        history=(STEP,),
        warnings=("slow",),
        scale=0.5,
    )
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    same = sgdgp.load(path, network=copy.deepcopy(network))
    x = torch.randn(4, 3)
    assert torch.equal(posterior.predict(x), same.predict(x))
    assert torch.equal(posterior.samples(x), same.samples(x))
    assert (same.scale, same.history, same.warnings) == (0.5, (STEP,), ("slow",))


def test_a_copy_of_the_network_is_the_same_network(tmp_path, tangent, network):
    path = _saved(tmp_path, tangent)
    twin = copy.deepcopy(network)
    # Evaluation does not use how many batches training has seen.
    twin[1].num_batches_tracked += 7
    assert load_fields(path, twin)[0].num_weights == tangent.num_weights


def _other_values(network: nn.Module) -> None:
    network[2].bias.data[0] += 1e-6


def _other_statistics(network: nn.Module) -> None:
    network[1].running_var.mul_(2)


def _other_shape(network: nn.Module) -> None:
    network[2] = nn.Linear(4, 3)


def _other_layer(network: nn.Module) -> None:
    network[1] = nn.Identity()


def _double(network: nn.Module) -> None:
    network.double()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _other_values,
            r"belongs to another one. .* here: weights 2.bias. Load",
        ),
        (_other_statistics, "Different here: weights 1.running_var. Load"),
        (
            _other_shape,
            r"2.weight is float32 \(3, 4\), expected float32 \(2, 4\)",
        ),
        (
            _other_layer,
            "layer 1 is Identity, expected BatchNorm1d; weights 1.weight is only in",
        ),
        (_double, r"weights 0.weight is float64 \(4, 3\), .* and 3 more"),
    ],
)
def test_another_network_is_refused_by_what_differs(
    tmp_path, tangent, network, change, words
):
    path = _saved(tmp_path, tangent)
    other = copy.deepcopy(network)
    change(other)
    with pytest.raises(StorageError, match=words):
        load_fields(path, other)


def test_arguments_of_a_wrong_kind_are_refused(tmp_path, tangent):
    with pytest.raises(TypeError, match=r"network: expected a torch\.nn\.Module"):
        load_fields(tmp_path / "x", {})


class Own(Categorical):
    """A likelihood of the user's own."""


def test_a_class_that_is_not_registered_is_refused_before_anything_is_written(
    tmp_path, tangent
):
    path = tmp_path / "posterior.safetensors"
    with pytest.raises(NotStorableError, match="likelihood is a Own"):
        save_fields(path, tangent, {"likelihood": Own()})
    assert not path.exists()


def _run(tangent: Tangent) -> RunState:
    d = tangent.num_weights
    update = PrecisionUpdate()
    update(torch.ones(1), torch.tensor([3.0]), torch.tensor([2.0]))
    return RunState(
        prior=DiagonalPrior(d, torch.tensor([2.5])),
        likelihood=Categorical(),
        mean=torch.randn(1, d).mT,
        samples=torch.randn(4, d).mT,
        step=2,
        update=update,
        history=[STEP],
        passes=17.0,
    )


SETTINGS = {"seed": 0, "likelihood": Categorical()}


def test_a_run_goes_on_where_it_was(tmp_path, tangent):
    path = tmp_path / "fit.safetensors"
    file = RunKeeper(path, 60, tangent, SETTINGS)
    assert file.load() is None
    run = _run(tangent)
    file.keep(run, now=True)
    assert file.problem is None
    found = RunKeeper(path, 60, tangent, SETTINGS).load()
    for field in fields(RunState):
        before, after = getattr(run, field.name), getattr(found, field.name)
        if isinstance(before, Tensor):
            assert torch.equal(before, after)
            assert before.mT.is_contiguous() == after.mT.is_contiguous()
        elif field.name not in ("prior", "update"):
            assert before == after
    arguments = (torch.ones(1), torch.tensor([1.0]), torch.tensor([2.0]))
    # The second move depends on the first.
    moved = found.update(*arguments)
    assert torch.equal(run.update(*arguments), moved)
    assert not torch.equal(PrecisionUpdate()(*arguments), moved)


def test_a_function_among_the_settings_is_the_same_in_another_process(
    tmp_path, tangent
):
    path = tmp_path / "fit.safetensors"
    first, second = (Layerwise(groups=lambda name: name) for _ in range(2))
    assert str(first) != str(second)
    RunKeeper(path, 60, tangent, {"prior": first}).keep(_run(tangent), now=True)
    assert RunKeeper(path, 60, tangent, {"prior": second}).load() is not None
    with pytest.raises(CheckpointError, match="setting prior is Layerwise"):
        RunKeeper(path, 60, tangent, {"prior": Layerwise()}).load()


def test_a_run_is_written_when_it_is_time(tmp_path, tangent, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    path = tmp_path / "fit.safetensors"
    file = RunKeeper(path, 60, tangent, SETTINGS)
    file.keep(_run(tangent))
    assert not path.exists()
    now = 161.0
    file.keep(_run(tangent))
    assert path.exists()
    path.unlink()
    file.keep(_run(tangent))
    assert not path.exists()


def test_another_fit_is_refused_and_its_file_left(tmp_path, tangent, network):
    path = tmp_path / "fit.safetensors"
    file = RunKeeper(path, 60, tangent, SETTINGS)
    file.keep(_run(tangent), now=True)
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"seed is 1, expected 0\. It is"):
        RunKeeper(path, 60, tangent, {**SETTINGS, "seed": 1}).load()
    with pytest.raises(CheckpointError, match="setting weights is"):
        RunKeeper(path, 60, Tangent(network), SETTINGS).load()
    other = copy.deepcopy(network)
    _other_values(other)
    with pytest.raises(CheckpointError, match=r"fit\. Different here: .*2\.bias\."):
        RunKeeper(path, 60, Tangent(other, weights="no_norms"), SETTINGS).load()
    assert path.read_bytes() == content
    path.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="left as it is"):
        RunKeeper(path, 60, tangent, SETTINGS).load()
