"""The benchmark of warm solves, on a small problem."""

from __future__ import annotations

import json

from benchmarks.thompson_sampling.request import Request
from benchmarks.thompson_sampling.warm import line, main, measured


def test_steps_are_compared_at_the_same_residual():
    # With so much noise that iterations, not a factor, solve it.
    sizes = {"dim": 4, "initial": 2100, "batch": 21, "steps": 2, "num_features": 64}
    request = Request("auto", 0, 0.3, 1.0, noise_std=0.1, **sizes)
    first, second = measured(request, 1e-2)
    assert (first["known"], second["known"]) == (2100, 2121)
    for row in (first, second):
        assert row["cold_residual"] <= 1.01e-2
        assert row["warm_residual"] <= 1.01e-2
        assert "passes" in line(row)
    # Nothing is known before the first step.
    assert first["ratio"] > 0.8
    assert second["ratio"] < 0.5


def test_the_command_writes_what_it_measured(tmp_path):
    path = tmp_path / "warm.json"
    sizes = ["--initial", "300", "--batch", "3", "--steps", "1", "--threads", "1"]
    main(
        [*sizes, "--lengthscales", "0.3", "--tolerances", "0.1", "--output", str(path)]
    )
    (row,) = json.loads(path.read_text())["steps"]
    assert row["known"] == 300
