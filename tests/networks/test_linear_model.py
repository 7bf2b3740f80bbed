"""The optimum of the linear model against a search by its gradients."""

from __future__ import annotations

import pytest
import torch

from sgdgp.networks import WeightCG, WeightCholesky
from sgdgp.networks.linear_model import optimise
from tests.networks.dense import columns, tiny_system

SOLVERS = {
    "cg": (WeightCG(tolerance=1e-6), 5, 1e-4),
    "few weights": (WeightCholesky(tolerance=1e-9), 5, 1e-8),
    "few rows": (WeightCholesky(tolerance=1e-9), 12, 1e-8),
}
"""Solver, hidden units, and how near it comes."""


@pytest.mark.parametrize("begin", [0.0, 3.0])
@pytest.mark.parametrize("case", SOLVERS)
def test_newton_finds_the_optimum_of_the_linear_model(case, begin):
    solver, hidden, error = SOLVERS[case]
    system, _, jacobian, y = tiny_system(precision=0.05, hidden=hidden)
    start = begin * columns(system.num_weights, 1)
    found = optimise(system.data, system.prior, system.likelihood, start, solver)
    assert found.converged

    v = torch.zeros(system.num_weights, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [v],
        max_iter=900,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective():
        search.zero_grad()
        outputs = jacobian @ v
        loss = torch.nn.functional.cross_entropy(outputs, y, reduction="sum")
        loss = loss + 0.5 * v.square().sum()
        loss.backward()
        return loss

    search.step(objective)
    torch.testing.assert_close(found.mean[:, 0], v.detach(), rtol=0.0, atol=1e-4)
    torch.testing.assert_close(
        found.system.outputs, (jacobian @ v).detach(), rtol=0.0, atol=1e-4
    )
    # The Hessian is at least the identity: it is no further than its gradient is long.
    v.data = found.mean[:, 0].clone()
    objective()
    assert float(v.grad.norm()) < error
