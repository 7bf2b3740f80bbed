"""Units of networks of many layers are followed, and what is left is a symmetry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgdgp.networks.sampling.symmetry import SymmetryGroup
from sgdgp.tangent import Tangent


class Residual(nn.Module):
    """A small residual CNN with something between its convolutions."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 4, 3, padding=1)
        self.between = between or nn.Identity()
        self.two = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        h = F.relu(self.stem(x))
        h = h + self.two(torch.relu(self.between(self.one(h))))
        return self.head(F.max_pool2d(h, 2).flatten(1))


class Attention(nn.Module):
    """A transformer's block, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(7, 8), nn.Parameter(torch.randn(5, 8))
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.RMSNorm(8)])
        self.dense = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x) + self.position
        z = self.norms[0](h)
        q, k, v = (
            layer(z).view(-1, 5, 2, 4).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        z = torch.softmax(q @ k.mT / 2, -1) @ v
        h = h + self.o(z.transpose(1, 2).reshape(-1, 5, 8))
        return self.head((h + self.dense(self.norms[1](h))).mean(1))


class Shared(nn.Module):
    """One layer twice, a decoder that is the encoder, and scales of a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.inner = nn.Linear(3, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        h = torch.tanh(self.encode(x))
        for _ in range(2):
            h = h + self.scale * self.inner(h).tanh()
        return F.linear(h, self.encode.weight.t())


class Gates(nn.Module):
    """Channels that are weighed by their means, maxima of pieces, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)
        self.excite, self.pieces = nn.Linear(3, 6), nn.Linear(6, 12)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.stem(x))
        h = (
            h
            * torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))[
                :, :, None, None
            ]
        )
        h = self.pieces(h.amax((2, 3))).view(-1, 4, 3).max(-1).values
        return self.head(torch.where(h > 0, h, 0.1 * h) / 2)


def batch_norm(size: int) -> nn.BatchNorm2d:
    """One that has seen data."""
    norm = nn.BatchNorm2d(size)
    norm.running_mean.normal_()
    norm.running_var.exponential_()
    return norm


def network_of(*layers: nn.Module) -> nn.Module:
    """In evaluation mode, with weights that differ."""
    network = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.double().parameters():
        parameter.data.normal_(generator=generator).mul_(0.5)
    return network.eval()


IMAGES = torch.randn(2, 1, 4, 4, dtype=torch.float64)

NETWORKS = {
    "dense": (
        network_of(
            nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)
        ),
        torch.randn(5, 2, dtype=torch.float64),
        {"0": (3, True, False), "2": (4, False, True)},
    ),
    "convolutions": (
        network_of(
            nn.Conv1d(2, 4, 3),
            nn.ELU(),
            nn.AvgPool1d(2),
            nn.ConvTranspose1d(4, 6, 2),
            nn.Hardtanh(),
            nn.Conv1d(6, 6, 1, groups=6),
            nn.Flatten(),
            nn.Linear(24, 5),
            nn.Softsign(),
            nn.Dropout(),
            nn.Linear(5, 2),
        ),
        torch.randn(3, 2, 8, dtype=torch.float64),
        {"0": (4, False, False), "3": (6, True, False), "7": (5, True, False)},
    ),
    "residual": (
        network_of(Residual()),
        IMAGES,
        {"stem": (6, False, True), "one": (4, False, True)},
    ),
    "residual, parametric": (
        network_of(Residual(nn.PReLU(4))),
        IMAGES,
        {"stem": (6, False, True), "one": (4, False, True)},
    ),
    "residual, group norm of all": (
        network_of(Residual(nn.GroupNorm(1, 4))),
        IMAGES,
        {"stem": (6, False, True), "one": (4, False, False)},
    ),
    "residual, batch norm without data": (
        network_of(Residual(nn.BatchNorm2d(4))),
        IMAGES,
        {"stem": (6, False, True), "one": (4, False, False)},
    ),
    "shared": (
        network_of(Shared()),
        torch.randn(4, 3, dtype=torch.float64),
        {"encode": (6, True, False)},
    ),
    "gates": (
        network_of(Gates()),
        IMAGES,
        {
            "stem": (6, False, False),
            "squeeze": (3, False, True),
            "pieces": (4, False, False),
            "pieces'": (3, False, False),
        },
    ),
    "attention": (
        network_of(Attention()),
        torch.randint(7, (3, 5)),
        {
            "position": (8, False, False),
            "q": (2, False, False),
            "q'": (4, False, False),
            "v": (4, True, True),
            "dense.0": (6, False, False),
        },
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_units_are_found_and_exchanged(name: str):
    """The members that leave the function as it is, to 1e-10 (row A2)."""
    network, x, expected = NETWORKS[name]
    group = SymmetryGroup.of(network, x)
    assert {a.name: (a.size, a.signs, a.scales) for a in group.axes} == expected
    assert group.fixed == {}
    for seed in range(3):
        moved = group.sample(seed).apply_to(network)
        assert not torch.equal(
            torch.cat([p.flatten() for p in moved.parameters()]),
            torch.cat([p.flatten() for p in network.parameters()]),
        )
        torch.testing.assert_close(moved(x), network(x), rtol=1e-10, atol=1e-10)


def test_channels_in_groups_hold_still_and_say_why():
    network = network_of(Residual(nn.GroupNorm(2, 4)))
    group = SymmetryGroup.of(network, IMAGES)
    assert [axis.name for axis in group.axes] == ["stem"]
    assert "'between' (GroupNorm) normalises groups of channels" in group.fixed["one"]


def test_running_statistics_go_with_their_units_or_hold_them():
    network = network_of(Residual(batch_norm(4)))
    group = SymmetryGroup.of(network, IMAGES)
    assert [axis.name for axis in group.axes] == ["stem"]
    assert "'between.running_mean'" in group.fixed["one"]
    group = SymmetryGroup.of(network, IMAGES, buffers="permuted")
    assert [axis.name for axis in group.axes] == ["stem", "one"]
    moved = group.sample().apply_to(network)
    torch.testing.assert_close(moved(IMAGES), network(IMAGES), rtol=0, atol=1e-10)


def test_a_constant_that_tells_units_apart_holds_them():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 3), nn.Linear(3, 4)
            self.head = nn.Linear(4, 1)

        def forward(self, x):
            h = self.one(x).tanh() + torch.arange(3, dtype=x.dtype)
            return self.head(self.two(h).tanh())

    group = SymmetryGroup.of(network_of(Positions()))
    assert [axis.name for axis in group.axes] == ["two"]
    assert "joins them to what cannot be exchanged" in group.fixed["one"]


def test_constant_weights_hold_their_units():
    network = NETWORKS["dense"][0]
    group = SymmetryGroup.of(network, weights=["2.*", "4.*"])
    assert [axis.name for axis in group.axes] == ["2"]
    assert group.num_weights == 26
    assert "the constant weights '0.weight'" in group.fixed["0"]


def test_the_network_stays_as_it_is():
    network, x, _ = NETWORKS["residual"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    SymmetryGroup.of(network, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("network", "x", "words"),
    [
        (
            nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2)),
            torch.randn(5, 2, 3),
            r"layer '1' \(LSTM\) calls 'lstm'.*give it by hand: SymmetryGroup.given",
        ),
        (nn.Linear(3, 2), None, "expected hidden units .* found none"),
        (nn.Conv1d(1, 2, 3), None, "x: the first layer of the network is Conv1d"),
    ],
)
def test_what_cannot_be_followed_is_refused(network, x, words):
    with pytest.raises(ValueError, match=words):
        SymmetryGroup.of(network.eval(), x)


class Between(nn.Module):
    """Two layers with something between them that is not a layer."""

    def __init__(self, between, hidden: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, hidden), nn.Linear(hidden, 2)
        self.between, self.table = between, nn.Embedding(hidden, 2)

    def forward(self, x):
        return self.between(self, F.gelu(self.one(x)))


def changed_in_place(network, h):
    h[:, 0] = 1
    return network.two(h)


def test_what_is_changed_in_place_is_refused():
    with pytest.raises(ValueError, match="calls 'setitem' of hidden units"):
        SymmetryGroup.of(Between(changed_in_place).eval())


def test_who_asks_which_unit_is_largest_tells_them_apart():
    first = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    largest = Between(lambda net, h: net.two(h) + net.table(h.max(1)[1]))
    group = SymmetryGroup.of(nn.Sequential(first, largest).eval())
    assert [axis.name for axis in group.axes] == ["0.0", "0.2"]
    assert "which unit is largest" in group.fixed["1.one"]
    value = Between(lambda net, h: net.two(h) * h.max(1, keepdim=True)[0])
    assert SymmetryGroup.of(value.eval()).axes[0].size == 4


def test_neighbours_of_a_convolution_hold_still():
    network = network_of(
        nn.Linear(5, 12),
        nn.GELU(),
        nn.Unflatten(1, (3, 4)),
        nn.ConvTranspose1d(3, 6, 2),
        nn.InstanceNorm1d(6),
        nn.Tanh(),
        nn.Conv1d(6, 1, 2),
    )
    group = SymmetryGroup.of(network)
    assert [(axis.size, axis.signs) for axis in group.axes] == [(3, False), (6, True)]
    units = network_of(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 6), nn.GroupNorm(5, 5), nn.Linear(6, 1)
    )
    group = SymmetryGroup.of(units, torch.randn(2, 5, dtype=torch.float64))
    assert [(axis.size, axis.signs) for axis in group.axes] == [(6, False)]


def test_what_is_taken_from_the_output_counts():
    network = Between(lambda net, h: {"logits": net.two(h), "hidden": h}).eval()
    tangent = Tangent(network, output=lambda found: found["logits"])
    assert [axis.size for axis in SymmetryGroup.of(tangent).axes] == [4]
    with pytest.raises(ValueError, match="found none"):
        SymmetryGroup.of(network)


class Hidden(nn.Module):
    """Tells two units apart behind the back of torch's functions."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, size), nn.Linear(size, 1)

    def forward(self, x):
        return self.two(self.one(x).tanh()) + float(self.one.bias.tolist()[0])


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_a_group_that_changes_the_function_is_refused(size):
    with pytest.raises(ValueError, match="its outputs change by"):
        SymmetryGroup.of(network_of(Hidden(size)))
