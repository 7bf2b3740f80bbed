"""Right-hand sides: what is solved for, and that new columns are solved alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from gpytorch.kernels import MaternKernel

import sgdgp
from tests.models import gp


@dataclass(frozen=True)
class Recording(sgdgp.CG):
    """CG that keeps the right-hand sides and noise draws it is given."""

    seen: list = field(default_factory=list, repr=False, compare=False)

    def solve(self, operator, noise, rhs, **kwargs):
        self.seen.append((rhs, kwargs["noise_draws"], noise))
        return super().solve(operator, noise, rhs, **kwargs)


def test_new_functions_cost_only_their_own_columns():
    solver = Recording(tolerance=1e-8)
    posterior = sgdgp.condition(
        gp(MaternKernel(nu=1.5), n=200), solver=solver, num_samples=6
    )
    before = posterior.solution
    drawn = posterior.draw(2)
    assert [rhs.shape[1] for rhs, _, _ in solver.seen] == [7, 2]
    assert drawn.solution.weights.shape == (200, 2)
    # The same preconditioned system: a new column needs what an old one needed.
    assert drawn.solution.passes <= 1.2 * before.passes
    # The mean was not solved for again: it is the posterior's.
    assert torch.equal(drawn.paths.weights[:, 0], before.weights[:, 0])
    assert posterior.solution is before


def test_noise_draws_are_the_noise_part_of_the_right_hand_sides():
    solver = Recording()
    posterior = sgdgp.condition(
        gp(MaternKernel(nu=1.5), n=400, noise=0.3), solver=solver, num_samples=5
    )
    rhs, noise_draws, noise = solver.seen[0]
    assert noise_draws.shape == rhs.shape
    assert not bool(noise_draws[:, 0].any())
    x = posterior.paths.operator.x
    values = posterior.paths.draws(x)
    torch.testing.assert_close(values + noise_draws[:, 1:], rhs[:, 1:])
    # 2,000 squares of N(0, 0.3): the mean is off by 3 % (one standard error).
    variance = float(noise_draws[:, 1:].square().mean())
    assert abs(variance / float(noise[0]) - 1) < 0.1
    posterior.draw(2)
    rhs, noise_draws, _ = solver.seen[1]
    assert noise_draws.shape == rhs.shape == (400, 2)
    assert bool((noise_draws != 0).all())
