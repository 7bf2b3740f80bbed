"""Peak memory is that of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.uci.memory import peak_rss_mb

ROOT = Path(__file__).parents[2]
CODE = """
from benchmarks.uci.memory import peak_rss_mb
{allocation}
print(peak_rss_mb())
"""


def peak_of_child(allocation: str) -> float:
    command = [sys.executable, "-c", CODE.format(allocation=allocation)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(result.stdout)


def test_a_child_does_not_inherit_the_peak_of_its_parent() -> None:
    ballast = np.ones(30_000_000)  # 240 MB
    assert peak_rss_mb() > 240
    assert peak_of_child("") < 100
    assert ballast[-1] == 1


def test_memory_that_was_given_back_still_counts() -> None:
    difference = peak_of_child("block = b'x' * 200_000_000; del block") - (
        peak_of_child("")
    )
    assert 190 < difference < 220
