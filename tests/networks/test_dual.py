"""The dual solve gives the weights of the primal equations, with every solver."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgdgp.networks.dual import WhitenedFeatures, WhitenedRows, solve_dual
from sgdgp.networks.likelihoods import Categorical
from sgdgp.solvers import CG, SDD, SGD, AlternatingProjections, Cholesky
from sgdgp.tangent.jacobian import Tangent

N, C = 24, 3
SCALE = 0.7  # of the prior's root


class NetworkRows:
    """Whitened rows of a classifier; counts the examples that it evaluates."""

    num_examples, num_outputs = N, C

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C))
        self._tangent = Tangent(network.to(dtype).eval())
        self._x = torch.randn(N, 4).to(dtype)
        self._likelihood = Categorical()
        self.num_weights = self._tangent.num_weights
        self.asked = []

    def forward(self, indices, w):
        self.asked.append(len(indices))
        at = self._tangent.at(self._x[indices])
        root = self._likelihood.hessian_root_transpose(at.outputs, at.jvp(w))
        return SCALE * root.flatten(0, 1)

    def adjoint(self, indices, u):
        self.asked.append(len(indices))
        at = self._tangent.at(self._x[indices])
        u = SCALE * u.unflatten(0, (len(indices), C))
        return at.vjp(self._likelihood.hessian_root(at.outputs, u))

    def dense(self):
        """phi~ (N C, D) itself."""
        at = self._tangent.at(self._x)
        root = self._likelihood.hessian_root_transpose(at.outputs, at.jacobian())
        return SCALE * root.flatten(0, 1)


def problem(rows, k=3, seed=1):
    """A mean's column, then k - 1 draws; and the weights by dense linear algebra."""
    generator = torch.Generator().manual_seed(seed)
    phi = rows.dense()
    prior = torch.randn(rows.num_weights, k, generator=generator, dtype=phi.dtype)
    prior[:, 0] = 0.0
    targets = torch.randn(N * C, k, generator=generator, dtype=phi.dtype)
    wide = phi.double()
    precision = wide.mT @ wide + torch.eye(rows.num_weights, dtype=torch.float64)
    right = prior.double() + wide.mT @ targets.double()
    return prior, targets, torch.linalg.solve(precision, right)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (Cholesky(), 1e-10),
        (CG(tolerance=1e-8, preconditioner=None), 1e-8),
        (SDD(tolerance=1e-3, block_size=36), 1e-3),
        (AlternatingProjections(tolerance=1e-3, block_size=36), 1e-3),
        (SGD(tolerance=1e-2, block_size=36), 1e-2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_solver_finds_the_weights_of_the_primal_equations(solver, tolerance):
    rows = NetworkRows()
    assert isinstance(rows, WhitenedRows)
    prior, targets, truth = problem(rows)
    found = solve_dual(rows, prior, targets, solver)
    assert found.solution.reason == "converged"
    # |v - v*| = |phi~^T (u - u*)| <= |phi~ (phi~ phi~^T + I)^-1| |r| <= |r| / 2.
    size = (targets - rows.dense() @ prior).norm(dim=0)
    assert bool(((found.weights - truth).norm(dim=0) <= 0.5 * tolerance * size).all())
    assert found.coefficients.shape == (N * C, 3)


def test_float32_networks_are_solved_in_float32():
    rows = NetworkRows(torch.float32)
    prior, targets, truth = problem(rows)
    found = solve_dual(rows, prior, targets, SDD(tolerance=1e-3, block_size=24))
    assert found.weights.dtype == torch.float32
    assert float((found.weights - truth).norm() / truth.norm()) < 1e-3


def test_a_solve_that_starts_at_the_solution_is_done():
    rows = NetworkRows()
    prior, targets, _ = problem(rows)
    first = solve_dual(rows, prior, targets, CG(tolerance=1e-8))
    again = solve_dual(
        rows, prior, targets, SDD(tolerance=1e-4), start=first.coefficients
    )
    assert again.solution.reason == "converged"
    assert again.solution.passes < 4.0


@pytest.mark.parametrize(
    "solver",
    [
        SDD(tolerance=1e-9, max_passes=10.0, block_size=12),
        AlternatingProjections(tolerance=1e-9, max_passes=10.0, block_size=12),
    ],
    ids=["sdd", "ap"],
)
def test_passes_count_the_examples_that_were_evaluated(solver):
    rows = NetworkRows()
    prior, targets, _ = problem(rows)
    found = solve_dual(rows, prior, targets, solver)
    # A pass is N examples forward and N back. Entries of blocks are made one example
    # at a time; SDD looks at a few further rows for its step size.
    assert sum(rows.asked) / (2 * N) == pytest.approx(found.passes, abs=1.0)


def test_a_sweep_asks_for_batches_of_distinct_examples():
    rows = NetworkRows()
    features = WhitenedFeatures(rows, batch_size=10)
    x = torch.arange(N, dtype=torch.float64).unsqueeze(1)
    w = torch.randn(rows.num_weights, 2, dtype=torch.float64)
    v = torch.randn(N * C, 2, dtype=torch.float64)
    phi = rows.dense()
    torch.testing.assert_close(features.forward(x, w), phi @ w)
    torch.testing.assert_close(features.adjoint(x, v), phi.mT @ v)
    assert rows.asked == [10, 10, 4] * 2
    torch.testing.assert_close(features.features(x[5:7]), phi[5 * C : 7 * C])


def test_arguments_that_do_not_fit_are_named():
    rows = NetworkRows()
    prior, targets, _ = problem(rows)
    with pytest.raises(ValueError, match=r"prior: expected shape \(67, k\)"):
        solve_dual(rows, prior[:5], targets, CG())
    with pytest.raises(ValueError, match=r"targets: expected shape \(72, 3\)"):
        solve_dual(rows, prior, targets[:5], CG())
    rows.num_examples = 2**25
    many = torch.zeros(1).expand(2**25 * C, 3)
    with pytest.raises(ValueError, match="at most 16777216 examples"):
        solve_dual(rows, prior.float(), many, CG())
