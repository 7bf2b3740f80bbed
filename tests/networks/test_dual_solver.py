"""The dual solver finds the weights that conjugate gradients find in the primal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.dual import DataRows, Dual, WhitenedRows
from sgdgp.networks.likelihoods import Categorical
from sgdgp.networks.priors.settings import Isotropic
from sgdgp.networks.stream import stream_of
from sgdgp.networks.weight_solvers import WeightCG
from sgdgp.solvers import CG, SDD, Cholesky
from sgdgp.tangent.jacobian import Tangent

N, C = 30, 3


def system_of():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, C, (N,), generator=generator)
    tangent = Tangent(network.eval())
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    data = TangentData(tangent, stream_of(loader, tangent.device))
    prior = Isotropic().build(tangent, lambda count: iter(()))
    return WeightSystem(data, prior, Categorical(), data.network_outputs())


def test_rows_are_the_features_of_the_system():
    system = system_of()
    rows = DataRows(system)
    assert isinstance(rows, WhitenedRows)
    everything = torch.arange(N)
    v = torch.randn(rows.num_weights, 2, dtype=torch.float64)
    image = rows.forward(everything, v)
    assert image.shape == (N * C, 2)
    torch.testing.assert_close(rows.adjoint(everything, image), system.product(v))
    some = torch.tensor([7, 2])
    torch.testing.assert_close(
        rows.forward(some, v), image.unflatten(0, (N, C))[some].flatten(0, 1)
    )


@pytest.mark.parametrize(
    ("solver", "warm"),
    [
        (SDD(block_size=30), False),
        (SDD(block_size=30), True),
        (CG(preconditioner=None), False),
        (Cholesky(), True),
    ],
)
def test_it_finds_what_conjugate_gradients_find(solver, warm):
    system = system_of()
    rhs = torch.randn(system.num_weights, 3, dtype=torch.float64)
    rhs += system.noise(range(3), 0)
    zero = torch.zeros_like(rhs)
    truth = WeightCG(tolerance=1e-9).solve(system, rhs, zero).weights
    start = truth + 0.1 * torch.randn_like(truth) if warm else zero
    found = Dual(solver, tolerance=1e-2).solve(system, rhs, start)
    assert found.reason == "converged"
    error = (found.weights - truth).norm(dim=0) / truth.norm(dim=0)
    assert float(error.max()) < 1e-2
    torch.testing.assert_close(
        found.residuals, rhs - system.product(found.weights) - found.weights
    )


def test_it_stops_when_told_to_and_at_its_budget():
    system = system_of()
    rhs = torch.randn(system.num_weights, 2, dtype=torch.float64)
    zero = torch.zeros_like(rhs)
    stopped = Dual(tolerance=1e-9).solve(
        system, rhs, zero, watch=lambda passes, errors, weights: True
    )
    assert stopped.reason == "interrupted"
    assert stopped.passes < 10
    spent = Dual(tolerance=1e-12, max_passes=20.0).solve(system, rhs, zero)
    assert spent.reason == "budget"
    assert spent.passes < 23


def test_a_solver_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="expected SDD"):
        Dual(WeightCG())
