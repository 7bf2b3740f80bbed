"""The rows of chains in the study of reference posteriors."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.reference_posteriors.chains import (
    Teacher,
    check_bad_runs,
    check_cost,
    check_teacher,
    classical_r_hat,
)
from sgdgp.networks import Draws

GOOD = {
    "reduction": 0.99,
    "reduction without signs": 0.5,
    "raw R-hat": 20.0,
    "R-hat": 1.02,
    "R-hat of ranks": 1.03,
    "R-hat without signs": 10.0,
    "raw error": 1.0,
    "error": 0.01,
    "correlation": 0.999,
    "deviations": 1.0,
    "function deviations": 1.0,
    "function variances": 1.0,
}


def test_figures_of_the_teacher_that_fall_short_are_seen():
    assert [c.holds for c in check_teacher([{"3": GOOD, "4": GOOD}])] == [True] * 16
    bad = {
        "reduction": (0.9, 0),
        "raw R-hat": (9.0, 1),
        "R-hat of ranks": (1.2, 1),
        "raw error": (0.4, 2),
        "error": (0.06, 2),
        "reduction without signs": (0.96, 3),
        "correlation": (0.96, 4),
        "deviations": (1.2, 5),
        "function deviations": (0.94, 6),
        "function variances": (1.06, 7),
    }
    for key, (value, place) in bad.items():
        records = [{"3": GOOD, "4": GOOD}, {"3": {**GOOD, key: value}, "4": GOOD}]
        held = [c.holds for c in check_teacher(records)]
        assert [i for i, holds in enumerate(held) if not holds] == [place], key


def test_bad_runs_that_are_not_reported_are_seen():
    run = {"R-hat": 2.0, "acceptance": 0.1}
    record = {
        "modes": {**run, "warnings": ["The chains have not mixed: ..."]},
        "step": {**run, "warnings": ["... the step size 0.25 is too large."]},
        "modes, R-hat of aligned weights": 2.0,
        "modes, words of alignment": ["..."],
    }
    assert all(c.holds for c in check_bad_runs([record]))
    silent = copy.deepcopy(record)
    silent["modes"]["warnings"] = silent["step"]["warnings"] = []
    silent["modes, words of alignment"] = []
    assert not any(c.holds for c in check_bad_runs([record, silent]))


def test_costs_that_fall_short_are_seen():
    good = {"ratio": 0.9, "same after kill -9": True}
    assert [c.holds for c in check_cost([good])] == [True, True]
    bad = {"ratio": 0.7, "same after kill -9": False}
    assert [c.holds for c in check_cost([good, bad])] == [False, False]


def test_the_classical_r_hat_knows_distances():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 200, 1, generator=generator, dtype=torch.float64)
    draws = Draws(weights, ["w"], [(1,)])
    assert classical_r_hat(draws) == pytest.approx(1, abs=0.02)
    apart = Draws(weights + 100 * torch.arange(4.0)[:, None, None], ["w"], [(1,)])
    assert classical_r_hat(apart) > 50


def test_a_student_finds_its_teacher():
    teacher = Teacher(3, 0)
    potential = teacher.potential()
    row = teacher.optima(1, 2)
    error = potential.outputs(row, teacher.x_test)[0] - teacher.f_test
    assert float(potential.value_and_gradient(row)[1].abs().max()) < 0.1
    assert float(error.square().mean().sqrt()) < 0.05
