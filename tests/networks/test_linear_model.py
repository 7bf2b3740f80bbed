"""The optimum of the linear model against a search by its gradients."""

from __future__ import annotations

import torch

from sgdgp.networks import WeightCG
from sgdgp.networks.linear_model import optimise
from tests.networks.dense import tiny_system


def test_newton_finds_the_optimum_of_the_linear_model():
    system, _, jacobian, y = tiny_system(precision=0.05)
    start = torch.zeros(1, system.num_weights, dtype=torch.float64).mT
    found = optimise(
        system.data, system.prior, system.likelihood, start, WeightCG(tolerance=1e-6)
    )
    assert found.converged

    v = torch.zeros(system.num_weights, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [v], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
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
