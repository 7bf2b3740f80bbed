"""Growth of costs: exponents, and a measurement that is what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scaling.cost import KINDS, problem
from benchmarks.scaling.run import STUDY, exponent, rank_checks


def test_an_exponent_is_that_of_a_power():
    values = [1e3, 3e3, 1e4]
    assert exponent(values, [2e-9 * v**1.7 for v in values]) == pytest.approx(1.7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_has_seconds(kind):
    found = KINDS[kind](300, 2, 3, "auto", 0.1, "float32")
    assert found["seconds"] > 0
    assert kind == "product" or found["cpu_seconds"] > 0
    assert found.get("modelled", False) is (kind == "epoch")


def test_data_are_noisy_values_of_a_function():
    model, x_new = problem(50, 3, "float64")
    assert model.train_targets.dtype == x_new.dtype == torch.float64
    assert len(model.train_targets) == 50


def test_two_processes_that_are_slow_fall_short():
    names = ("product", "cg", "sdd")
    record = {
        name: {"faster": 1.2, "allowed": 1.9, "difference": 1e-6} for name in names
    }
    assert [check.holds for check in rank_checks([record])] == [False, True] * 3


def test_the_rows_that_pages_name_are_there():
    assert {"ranks", "large", "million"} <= set(STUDY.rows)
