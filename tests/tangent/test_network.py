"""Weights are chosen by name or kind, and unusable networks are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgdgp.tangent import Tangent
from tests.networks.kinds import inputs_of, network_of


def names_of(weights, kind="resnet"):
    network, _ = network_of(kind)
    return set(Tangent(network, weights=weights).names)


def all_names(kind="resnet"):
    return {name for name, _ in network_of(kind)[0].named_parameters()}


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        (None, all_names()),
        ("all", all_names()),
        ("last_layer", {"7.weight", "7.bias"}),
        ("4.norm*", {n for n in all_names() if n.startswith("4.norm")}),
        (["0.*", "7.bias"], {"0.weight", "0.bias", "7.bias"}),
        (
            lambda name, p: p.ndim == 4,
            {
                "0.weight",
                *(f"{i}.{n}.weight" for i in "34" for n in ("first", "second")),
                *(f"{i}.shortcut.weight" for i in "34"),
            },
        ),
        (
            "no_norms",
            {n for n in all_names() if "norm" not in n and not n.startswith("1.")},
        ),
    ],
    ids=["none", "all", "last", "pattern", "patterns", "function", "norms"],
)
def test_weights_are_chosen(weights, chosen):
    assert names_of(weights) == chosen


def test_layer_norms_are_norms():
    chosen = names_of("no_norms", "transformer")
    assert not any("norm" in name for name in chosen)
    assert "positions" in chosen


def test_frozen_weights_are_constants_unless_all_are_asked_for():
    network, _ = network_of("mlp")
    network[0].requires_grad_(False)
    assert set(Tangent(network).names) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    assert Tangent(network, weights="all").num_weights == sum(
        p.numel() for p in network.parameters()
    )


def test_slices_partition_the_weights():
    network, _ = network_of("cnn")
    tangent = Tangent(network)
    covered = [
        i for part in tangent.slices.values() for i in range(tangent.num_weights)[part]
    ]
    assert covered == list(range(tangent.num_weights))
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    back = tangent.weights_of(flat[None])
    assert all(torch.equal(back[n][0], p) for n, p in network.named_parameters())


def test_products_of_chosen_weights_are_columns_of_all():
    network, _ = network_of("resnet")
    x = inputs_of("resnet", 2)
    every = Tangent(network)
    some = Tangent(network, weights=["4.norm*", "7.*"])
    columns = torch.cat(
        [torch.arange(every.num_weights)[every.slices[name]] for name in some.names]
    )
    whole = every.at(x).jacobian()[..., columns]
    assert torch.allclose(some.at(x).jacobian(), whole)
    w = torch.ones(some.num_weights, 1, dtype=torch.float64)
    assert torch.allclose(some.at(x).jvp(w), whole @ w)


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ("layer9.*", ValueError, r"'layer9\.\*' matches no parameter.*'0\.weight'"),
        (["0.*", "x"], ValueError, "'x' matches no parameter"),
        (lambda name, p: False, ValueError, "the function chooses no parameter"),
        (3, TypeError, "expected None, a string, a sequence"),
    ],
)
def test_choices_of_nothing_are_refused(weights, error, words):
    network, _ = network_of("mlp")
    with pytest.raises(error, match=words):
        Tangent(network, weights=weights)


class Functional(nn.Module):
    """Drops out without a layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return nn.functional.dropout(self.layer(x), training=self.training)


def with_parameter(value):
    network = nn.Linear(3, 2).eval()
    network.odd = nn.Parameter(value, requires_grad=value.is_floating_point())
    return network


@pytest.mark.parametrize(
    ("network", "error", "words"),
    [
        (nn.Sequential(nn.Dropout()), ValueError, r"'0' \(Dropout\).*network\.eval"),
        (nn.BatchNorm1d(3), ValueError, r"BatchNorm1d.*network\.eval"),
        (Functional(), ValueError, r"Functional.*network\.eval"),
        (nn.LSTM(2, 2), ValueError, r"LSTM.*network\.eval"),
        (nn.SyncBatchNorm(3).eval(), ValueError, "SyncBatchNorm.*synchronises"),
        (
            nn.BatchNorm1d(3, track_running_stats=False).eval(),
            ValueError,
            "statistics of the batch",
        ),
        (nn.LazyLinear(3).eval(), ValueError, "'weight' is lazy; run the network"),
        (nn.DataParallel(nn.Linear(3, 2)), TypeError, "network.module"),
        (torch.jit.script(nn.Linear(3, 2)), TypeError, "ScriptModule"),
        (lambda x: x, TypeError, "expected a torch.nn.Module"),
        (nn.Tanh(), ValueError, "it has none"),
        (nn.Linear(3, 2).bfloat16(), TypeError, r"bfloat16.*\.float\(\)"),
        (
            nn.Linear(3, 2, dtype=torch.complex64),
            TypeError,
            "'weight' is torch.complex",
        ),
        (with_parameter(torch.ones(2).double()), TypeError, "one dtype"),
        (with_parameter(torch.tensor([1.0, float("nan")])), ValueError, "not finite"),
    ],
)
def test_networks_without_a_tangent_model_are_refused(network, error, words):
    with pytest.raises(error, match=words):
        Tangent(network)


def test_integer_parameters_are_constants():
    network = with_parameter(torch.tensor([1, 2]))
    assert Tangent(network, weights="all").names == ("weight", "bias")


def test_a_plain_network_may_be_in_training_mode():
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).train()
    assert Tangent(network).num_weights == 8
