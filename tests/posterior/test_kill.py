"""SIGKILL at any moment: called again, the run ends where it would have ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.posterior.killed_runs import (
    KILLS,
    STEPS,
    TOLERANCE,
    conditioned,
    model,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

ROOT = Path(__file__).resolve().parents[2]

N = 700

LOST = 15
"""Passes a kill may cost: what was done since the last write, the residual of the
stored weights (one pass), and the momentum or conjugacy that a restart loses."""


def killed(n, folder, *tasks):
    """The report of tests/posterior/killed_runs.py, run in a process of its own."""
    module = "tests.posterior.killed_runs"
    finished = subprocess.run(
        [sys.executable, "-m", module, str(n), str(folder), *tasks],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of the default suite, killed in one process that imports once."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, killed(N, folder, "sdd:moments", "sdd:writes", "cg:again")


def assert_same_answer(solver, n, folder, names):
    """Each file holds a solution as good as the undisturbed one, and equal to it."""
    undisturbed = conditioned(solver, n, folder / "undisturbed")
    with torch.no_grad():
        given = model(n)
        x = given.train_inputs[0].double()
        system = given.double().kernel(x).to_dense() + 0.1 * torch.eye(n).double()
    new = torch.randn(50, 3, generator=torch.Generator().manual_seed(9))
    expected = undisturbed.solution.weights.double()
    rhs = system @ expected  # up to the tolerance
    sizes = (expected * rhs).sum(0).sqrt()
    for name in names:
        resumed = conditioned(solver, n, folder / name)
        assert resumed.solution.reason == "converged"
        gap = resumed.solution.weights.double() - expected
        image = system @ gap
        # Both residuals are below the tolerance, so their difference is below two.
        limit = 2 * TOLERANCE / (1 - TOLERANCE)
        assert bool((image.norm(dim=0) <= limit * rhs.norm(dim=0)).all())
        assert bool(((gap * image).sum(0).sqrt() <= 2 * TOLERANCE * sizes).all())
        for values, others in (
            (resumed.mean(new), undisturbed.mean(new)),
            (resumed.samples(new), undisturbed.samples(new)),
        ):
            # The residual bounds the weights' error; predictions follow it up to a
            # factor of order one: measured 2.1 tolerances at most.
            assert (values - others).norm() <= 4 * TOLERANCE * others.norm()


def assert_little_lost(report, name):
    found = report[name]
    assert found["performed"] <= report["undisturbed"] + LOST * (found["kills"] + 1)
    # What is in the file never shrinks, and what is there is there for good.
    assert found["stored"] == sorted(found["stored"])


def assert_moments(report, solver, n, folder):
    names = [str(i) for i in range(KILLS)]
    for name in names:
        assert_little_lost(report, name)
    # The last moments may fall behind the end of a run; most must not.
    assert sum(report[name]["kills"] for name in names) >= 7
    assert_same_answer(solver, n, folder, names)


def test_ten_kills_at_random_moments_of_ten_runs(runs):
    folder, reports = runs
    assert_moments(reports["sdd"], "sdd", N, folder / "sdd")


def test_ten_kills_of_one_run(runs):
    folder, reports = runs
    assert reports["cg"]["again"]["kills"] >= 5
    assert_little_lost(reports["cg"], "again")
    assert_same_answer("cg", N, folder / "cg", ["again"])


def test_a_kill_inside_a_write_leaves_the_last_file_or_the_next(runs):
    folder, reports = runs
    for step in STEPS:
        found = reports["sdd"][step]
        assert found["killed"]
        assert "run" in found["left"]
        assert (len(found["left"]) == 2) == (step != "after the move")
        assert 0 < found["stored"][0] < found["stored"][1]
        assert found["at the end"] == ["run"]
    assert_same_answer("sdd", N, folder / "sdd", [f"{step}/run" for step in STEPS])


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["sdd", "cg"])
def test_ten_kills_at_random_moments_of_3000_points(solver, tmp_path):
    report = killed(3000, tmp_path, f"{solver}:moments")
    assert_moments(report[solver], solver, 3000, tmp_path / solver)
