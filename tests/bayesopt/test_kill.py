"""SIGKILL at any moment of Thompson sampling: nothing is lost, nothing there twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bayesopt.killed_sampling import AT_ONCE, BATCH, INITIAL, KILLS, STEPS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

ROOT = Path(__file__).resolve().parents[2]

OBSERVATIONS = INITIAL + STEPS * BATCH


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All runs, killed in one process that imports once."""
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.bayesopt.killed_sampling",
            str(tmp_path_factory.mktemp("runs")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def assert_as_undisturbed(reports, names):
    """The same observations in the same order, and no evaluation without need."""
    expected = reports["undisturbed"]
    assert expected["evaluations"] == len(expected["y"]) == OBSERVATIONS
    assert expected["steps"] == list(range(STEPS + 1))
    for name in names:
        found = reports[name]
        assert found["x"] == expected["x"]
        assert found["y"] == expected["y"]
        assert found["steps"] == expected["steps"]
        # Only a call that was under way is made again.
        again = found["evaluations"] - OBSERVATIONS
        assert 0 <= again <= AT_ONCE * found["kills"]


def test_kills_at_random_moments(reports):
    names = [f"moment {i}" for i in range(KILLS)]
    # The last moments may fall behind the end of a run; most must not.
    assert sum(reports[name]["kills"] for name in names) >= KILLS - 2
    assert_as_undisturbed(reports, names)


def test_many_kills_of_one_run(reports):
    assert reports["again"]["kills"] >= 3
    assert_as_undisturbed(reports, ["again"])


def test_a_kill_at_every_write(reports):
    names = [name for name in reports if name.startswith("write")]
    # A record at the start, two of the initial values, for every step its proposals and
    # two of their values; the posteriors of steps 1 and 3; one run that was not killed.
    assert len(names) == 1 + 2 + 3 * STEPS + 2 + 1
    assert sum(reports[name]["kills"] for name in names) == len(names) - 1
    assert_as_undisturbed(reports, names)
