"""A tiny tangent model with its dense truth, shared by tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks import Categorical
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.priors import DiagonalPrior
from sgdgp.networks.stream import stream_of
from sgdgp.tangent import Tangent

EXAMPLES, CLASSES = 23, 3


def tiny_system(batch: int = 7, precision: float = 0.3, hidden: int = 5):
    """A system over 23 examples, and its features phi (N C, D) at its outputs.

    There are more rows than weights with 5 hidden units, fewer with 12.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
    tangent = Tangent(network.double().eval())
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    data = TangentData(tangent, stream_of(loader, tangent.device))
    scales = 0.5 + torch.rand(
        tangent.num_weights, generator=generator, dtype=torch.float64
    )
    prior = DiagonalPrior(
        tangent.num_weights,
        torch.tensor([precision], dtype=torch.float64),
        scales=scales,
    )
    outputs = torch.randn(EXAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    system = WeightSystem(data, prior, Categorical(), outputs)
    jacobian = tangent.at(x).jacobian() * scales * precision**-0.5
    features = Categorical().hessian_root_transpose(outputs, jacobian).flatten(0, 1)
    return system, features, jacobian, y


def columns(rows: int, count: int, seed: int = 5) -> torch.Tensor:
    """Standard normal columns, laid out as weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, generator=generator, dtype=torch.float64).mT
