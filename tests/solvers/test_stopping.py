"""When a true residual is checked, and when a solve is given up."""

from __future__ import annotations

import math

import pytest
import torch

from sgdgp.solvers import stopping
from sgdgp.solvers.stopping import Monitor, rounding_floor
from tests.solvers.problems import problem


def test_a_running_residual_asks_for_a_check_and_ends_nothing():
    monitor = Monitor(0.01, torch.ones(2))
    assert not monitor.wants_check(torch.tensor([0.005, 0.011]), 3.0)
    assert monitor.wants_check(torch.tensor([0.005, 0.0099]), 3.0)
    assert monitor.verdict(torch.tensor([0.009, 0.0101]), 4.0) is None
    # A claim that was refuted is not checked again at once.
    assert not monitor.wants_check(torch.tensor([0.005, 0.006]), 5.0)
    assert monitor.wants_check(torch.tensor([0.005, 0.006]), 6.0)
    assert monitor.verdict(torch.tensor([0.009, 0.010]), 7.0) == "converged"


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.5])
def test_a_check_tells_how_far_the_running_residual_is_off(ratio):
    monitor = Monitor(0.01, torch.ones(1))
    assert monitor.wants_check(torch.ones(1), 25.0)
    assert monitor.verdict(torch.tensor([ratio]), 26.0) is None
    for true, wanted in ((0.0107, False), (0.0095, True)):
        assert monitor.wants_check(torch.tensor([true / ratio]), 28.0) == wanted
    # What it has told wears off.
    assert monitor.wants_check(torch.tensor([0.0107 / ratio]), 33.0)


def test_refuted_claims_cost_a_bounded_share_of_the_passes():
    monitor = Monitor(0.01, torch.ones(1))
    passes, checks = 1.0, []
    while passes < 300.0:
        passes += 1.0
        if monitor.wants_check(torch.tensor([1e-6]), passes):
            passes += 1.0
            checks.append(passes)
            monitor.verdict(torch.tensor([0.02 - 1e-5 * passes]), passes)
    assert len(checks) < 50
    assert sum(c > 100.0 for c in checks) < 15


def test_columns_are_worth_a_check_when_half_of_them_seem_done():
    done, far = 0.005, 0.5
    for columns, wanted in (([done, done, far, far], True), ([done, far, far], False)):
        monitor = Monitor(0.01, torch.ones(len(columns)))
        assert not monitor.wants_check(torch.tensor(columns), 5.0)
        assert monitor.wants_check(torch.tensor(columns), 12.0) == wanted


def test_a_true_residual_is_checked_regularly_without_any_claim():
    monitor = Monitor(0.01, torch.ones(1))
    assert not monitor.wants_check(torch.ones(1), 24.0)
    assert monitor.wants_check(torch.ones(1), 25.0)


def test_no_gain_over_the_patience_is_stagnation():
    monitor = Monitor(0.01, torch.ones(1), patience=50.0)
    assert monitor.verdict(torch.tensor([0.500]), 10.0) is None
    assert monitor.verdict(torch.tensor([0.499]), 40.0) is None
    assert monitor.verdict(torch.tensor([0.499]), 60.0) == "stagnated"
    steady = Monitor(0.01, torch.ones(1), patience=50.0)
    for i in range(20):
        assert steady.verdict(torch.tensor([0.9 * 0.95**i]), 50.0 * i) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_divergence(bad):
    monitor = Monitor(0.01, torch.ones(1))
    assert monitor.is_diverging(torch.full((4, 1), bad), 10)


def test_the_guard_needs_a_residual_three_times_the_first_one():
    num_blocks = 10
    for factor, diverging in ((2.9, False), (3.1, True)):
        monitor = Monitor(0.01, torch.ones(1))
        block = torch.full((5, 1), factor / math.sqrt(5 * num_blocks))
        assert any(monitor.is_diverging(block, num_blocks) for _ in range(60)) == (
            diverging
        )


def test_one_unlucky_block_is_no_divergence():
    monitor = Monitor(0.01, torch.ones(1))
    unlucky = torch.full((5, 1), 10.0 / math.sqrt(5 * 200))
    assert not monitor.is_diverging(unlucky, 200)


def test_the_rounding_floor_is_what_rounding_the_weights_does():
    p = problem("matern32", 400, noise=1e-3)
    found = p.answer / p.rhs.norm(dim=0)
    rounded = found.float().double()
    change = (p.matrix @ (rounded - found)).norm(dim=0)
    diagonal = p.matrix.diagonal().unsqueeze(1)
    largest = float(torch.linalg.eigvalsh(p.matrix)[-1] / diagonal.mean())
    floor = rounding_floor(largest, diagonal, found.float())
    assert 1.0 < floor / float(change.max()) < 100.0


@pytest.mark.parametrize("calls", [1, 8])
def test_a_device_is_looked_at_now_and_then_and_nothing_is_missed(monkeypatch, calls):
    monkeypatch.setattr(stopping, "_calls_per_look", lambda device: calls)
    monitor = Monitor(1e-2, torch.ones(1))
    looks = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: looks.append(1) or stack(parts))
    small = torch.full((4, 1), 0.1)
    blocks = [small, torch.full((4, 1), math.nan), *[small] * 6]
    found = [monitor.is_diverging(block, 10) for block in blocks]
    assert len(looks) == len(blocks) // calls
    assert found.index(True) == (1 if calls == 1 else 7)
