"""A network with its curvature, and one of each kind of prior, shared by tests."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sgdgp.core.codec import decode, encode
from sgdgp.networks import GPrior, Isotropic, Kronecker, Layerwise
from sgdgp.networks.priors import PriorSettings, WeightPrior
from sgdgp.tangent import Tangent

SETTINGS = [
    Isotropic(),
    Layerwise(),
    Layerwise("layers"),
    GPrior(probes=8),
    GPrior(probes=8, layerwise=True),
    Kronecker(probes=8),
    Kronecker(probes=8, layerwise="layers"),
]
"""A new prior gets the statements that hold for all of them by standing here."""

PROBED = [GPrior(), Kronecker()]
"""Those that are estimated from probes of the curvature."""


class Network(nn.Module):
    """Linear, batch norm, convolution, linear: matrices, kernels and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.kernel = nn.Conv1d(2, 3, 2)
        self.norm2 = nn.LayerNorm(9)
        self.last = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        x = self.kernel(x.reshape(-1, 2, 4)).flatten(1)
        return self.last(self.norm2(x))


def tangent_of_a_network() -> Tangent:
    """The same network every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tangent(Network().double().eval())


class Curvature:
    """Whitened Jacobian rows (batches, rows, D) and their probes."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.asked: list[int] = []

    @classmethod
    def random(cls, num_weights: int, batches: int = 3, rows: int = 5) -> Curvature:
        g = torch.Generator().manual_seed(1)
        scale = torch.logspace(-1, 1, num_weights, dtype=torch.float64)
        return cls(
            torch.randn(batches, rows, num_weights, generator=g, dtype=torch.float64)
            * scale[torch.randperm(num_weights, generator=g)]
        )

    @property
    def matrix(self) -> Tensor:
        flat = self.rows.flatten(0, 1)
        return flat.mT @ flat

    def probes(self, count: int) -> Iterator[Tensor]:
        self.asked.append(count)
        g = torch.Generator().manual_seed(2)
        for rows in self.rows:
            signs = torch.randn(count, rows.shape[0], generator=g).sign().to(rows)
            yield (signs @ rows).mT


def no_probes(count: int) -> Iterator[Tensor]:
    """For priors that need none."""
    raise AssertionError("no probes are needed")


def built(setting: PriorSettings, tangent: Tangent, seed: int = 3):
    """A prior at precision one, and at others."""
    prior = setting.build(tangent, Curvature.random(tangent.num_weights).probes)
    g = torch.Generator().manual_seed(seed)
    precisions = torch.rand(prior.num_groups, generator=g, dtype=torch.float64) + 0.1
    return prior, prior.with_precisions(precisions)


def dense_root(prior: WeightPrior) -> Tensor:
    """R itself (D, D)."""
    return prior.root(torch.eye(prior.num_weights, dtype=torch.float64).mT)


def stored(prior: WeightPrior) -> WeightPrior:
    """A prior that has been in a file."""
    tensors: dict[str, Tensor] = {}
    state = json.loads(json.dumps(encode(prior, "prior", tensors)))
    return decode(state, tensors, torch.device("cpu"))
