"""R-hat and effective sample sizes of chains whose mixing is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgdgp.networks.sampling.diagnostics import bulk_ess, split_r_hat, tail_ess


def autoregressive(rho: float, chains: int = 4, count: int = 1000) -> Tensor:
    """Chains x_t = rho x_t-1 + noise with variance 1, from equilibrium."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(chains, count, generator=generator, dtype=torch.float64)
    x = [noise[:, 0]]
    for t in range(1, count):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * noise[:, t])
    return torch.stack(x, 1)


LISTED = torch.tensor([(i * i * 37 + 11 * i) % 101 for i in range(40)]).view(2, 20)
ARVIZ = [0.9838868611503139, 33.04941092010859, 40.816326530612244]
"""R-hat, bulk and tail sample size of these two chains by arviz-stats 0.8."""


def test_nan_is_worth_nothing():
    draws = torch.stack([LISTED.double(), LISTED.double()], 2)
    draws[1, 3, 0] = torch.nan
    for function in (split_r_hat, bulk_ess, tail_ess):
        assert function(draws).isnan().tolist() == [True, False]


def test_independent_draws_are_mixed_and_worth_their_number():
    draws = autoregressive(0.0)
    assert float(split_r_hat(draws)) < 1.005
    assert float(bulk_ess(draws)) == pytest.approx(4000, rel=0.1)
    assert float(tail_ess(draws)) == pytest.approx(4000, rel=0.1)


@pytest.mark.parametrize("rho", [-0.5, 0.5, 0.9])
def test_the_effective_number_is_that_of_an_autoregression(rho: float):
    expected = 4000 * (1 - rho) / (1 + rho)
    assert float(bulk_ess(autoregressive(rho))) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_a_chain_elsewhere_is_not_mixed(shift: float):
    draws = autoregressive(0.0)
    draws[1] += shift
    assert float(split_r_hat(draws)) > 1.4
    assert float(bulk_ess(draws)) < 20


def test_a_drift_and_another_scale_are_not_mixed():
    drifting = autoregressive(0.0) + torch.linspace(-3, 3, 1000, dtype=torch.float64)
    assert float(split_r_hat(drifting)) > 1.3
    assert float(split_r_hat(drifting[:1])) > 1.3
    wider = autoregressive(0.0)
    wider[0] *= 10  # the same mean
    assert float(split_r_hat(wider)) > 1.05


def test_infinite_variance_and_monotone_maps_change_nothing():
    draws = autoregressive(0.5)
    for function in (split_r_hat, bulk_ess, tail_ess):
        expected = function(draws)
        torch.testing.assert_close(
            function((3 * draws).exp()), expected, rtol=0.02, atol=0
        )
    torch.testing.assert_close(bulk_ess((3 * draws).exp()), bulk_ess(draws))


def test_listed_numbers_are_those_of_another_implementation():
    found = [float(f(LISTED.double())) for f in (split_r_hat, bulk_ess, tail_ess)]
    assert found == pytest.approx(ARVIZ, rel=1e-6)


def test_quantities_are_apart_and_any_number_of_axes():
    one, other = autoregressive(0.0), autoregressive(0.9)
    both = torch.stack([one, other, one, other], 2).view(4, 1000, 2, 2)
    for function in (split_r_hat, bulk_ess, tail_ess):
        found = function(both)
        assert found.shape == (2, 2)
        assert torch.equal(found[:, 0], function(one).expand(2))
        assert torch.equal(found[:, 1], function(other).expand(2))


def test_what_never_moves_has_no_r_hat_and_every_draw_counts():
    still = torch.full((2, 10), 0.1)
    assert split_r_hat(still).isnan()
    assert float(bulk_ess(still)) == 20
    apart = still + torch.arange(2.0)[:, None]
    assert float(split_r_hat(apart)) > 1e6
    assert float(bulk_ess(apart)) < 6


@pytest.mark.parametrize("function", [split_r_hat, bulk_ess, tail_ess])
def test_too_few_draws_are_refused(function):
    with pytest.raises(ValueError, match=r"at least 4 draws, found shape \(2, 3\)"):
        function(torch.randn(2, 3))
