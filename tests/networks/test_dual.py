"""The dual solve gives the weights of the primal equations, with every solver."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks import Categorical, Dual, WeightCG
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.dual import WhitenedFeatures
from sgdgp.networks.priors import Isotropic
from sgdgp.networks.stream import stream_of
from sgdgp.solvers import CG, SDD, SGD, AlternatingProjections, Cholesky
from sgdgp.tangent import Tangent

N, C = 24, 3


def system_of(dtype: torch.dtype = torch.float64) -> WeightSystem:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C)).to(dtype)
    x = torch.randn(N, 4, generator=generator).to(dtype)
    y = torch.randint(0, C, (N,), generator=generator)
    tangent = Tangent(network.eval())
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    data = TangentData(tangent, stream_of(loader, tangent.device))
    prior = Isotropic().build(tangent, lambda count: iter(()))
    prior = prior.with_precisions(torch.tensor([2.0]))
    return WeightSystem(data, prior, Categorical(), data.network_outputs)


def dense_features(system: WeightSystem) -> torch.Tensor:
    """phi (N C, D) itself."""
    whole = system.data.stream.take(torch.arange(N))
    jacobian = system.data.tangent.at(whole.x).jacobian()
    root = system.likelihood.hessian_root_transpose(system.outputs, jacobian)
    return root.flatten(0, 1) * 2.0**-0.5


def problem(system: WeightSystem, k: int = 3):
    """Right-hand sides of posterior draws, and their solutions by dense algebra."""
    generator = torch.Generator().manual_seed(1)
    prior = torch.randn(system.num_weights, k, generator=generator)
    rhs = system.noise(range(k), 0) + prior.to(system.outputs)
    features = dense_features(system).double()
    precision = features.mT @ features
    precision.diagonal().add_(1.0)
    return rhs, torch.linalg.solve(precision, rhs.double())


def counted_examples(system: WeightSystem, monkeypatch) -> list[int]:
    """How many examples are read by index from now on, call by call."""
    asked: list[int] = []
    take = system.data.stream.take

    def counted(rows):
        asked.append(len(rows))
        return take(rows)

    monkeypatch.setattr(system.data.stream, "take", counted)
    return asked


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (Cholesky(), 1e-9),
        (CG(preconditioner=None), 1e-7),
        (SDD(block_size=36), 1e-2),
        (AlternatingProjections(block_size=36), 1e-3),
        (SGD(block_size=36), 1e-2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_solver_finds_the_weights_of_the_primal_equations(
    solver, tolerance, warm
):
    system = system_of()
    rhs, truth = problem(system)
    zero = torch.zeros_like(rhs)
    start = truth + 0.1 * torch.randn_like(truth) if warm else zero
    found = Dual(solver, tolerance=tolerance).solve(system, rhs, start)
    assert found.reason == "converged"
    error = (found.weights - truth).norm(dim=0) / truth.norm(dim=0)
    assert float(error.max()) < tolerance
    torch.testing.assert_close(
        found.residuals, rhs - system.product(found.weights) - found.weights
    )


def test_float32_networks_are_solved_in_float32():
    system = system_of(torch.float32)
    rhs, truth = problem(system)
    solver = Dual(SDD(block_size=24), tolerance=1e-3)
    found = solver.solve(system, rhs, torch.zeros_like(rhs))
    assert found.weights.dtype == torch.float32
    assert float((found.weights - truth).norm() / truth.norm()) < 1e-3


@pytest.mark.parametrize(
    "solver",
    [SDD(block_size=12), AlternatingProjections(block_size=12)],
    ids=["sdd", "ap"],
)
def test_passes_count_the_examples_that_were_evaluated(solver, monkeypatch):
    system = system_of()
    rhs, _ = problem(system)
    asked = counted_examples(system, monkeypatch)
    solver = Dual(solver, tolerance=1e-12, max_passes=17.0)
    found = solver.solve(system, rhs, torch.zeros_like(rhs))
    assert found.reason == "budget"
    # A pass is N examples forward and N back, but for the true residual's, which is not
    # read by index. Entries of blocks are made one example at a time; SDD looks at a
    # few further rows for its step size.
    assert sum(asked) / (2 * N) + 1 == pytest.approx(found.passes, abs=1.0)


def test_features_are_those_of_the_system_and_asked_for_in_batches(monkeypatch):
    system = system_of()
    features = WhitenedFeatures(system, batch_size=10)
    x = features.examples()
    assert x[:, 0].tolist() == list(range(N))
    asked = counted_examples(system, monkeypatch)
    w = torch.randn(system.num_weights, 2, dtype=torch.float64)
    v = torch.randn(N * C, 2, dtype=torch.float64)
    images, pulled = features.forward(x, w), features.adjoint(x, v)
    assert asked == [10, 10, 4] * 2
    phi = dense_features(system)
    torch.testing.assert_close(images, phi @ w)
    torch.testing.assert_close(pulled, phi.mT @ v)
    torch.testing.assert_close(features.features(x[5:7]), phi[5 * C : 7 * C])
    torch.testing.assert_close(features.adjoint(x, images), system.product(w))


def test_a_solver_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="expected SDD"):
        Dual(WeightCG())
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        Dual(batch_size=0)


def test_more_examples_than_the_dtype_tells_apart_are_refused():
    system = system_of(torch.float32)
    system.data.stream.num_rows = 2**25
    with pytest.raises(ValueError, match=r"at most 16777216 examples in .*float32"):
        WhitenedFeatures(system, 8).examples()
