"""Whole runs on a tiny set, in this process and through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.uci.__main__ import main
from benchmarks.uci.curve import Trace
from benchmarks.uci.request import RunRequest, exact_request
from benchmarks.uci.run import run
from benchmarks.uci.store import read_result
from sgdgp.solvers.base import Progress

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData

KEYS = {
    "dataset",
    "split",
    "solver",
    "operator",
    "n",
    "d",
    "rmse",
    "nll",
    "coverage",
    "crps",
    "calibration_error",
    "residual_mean",
    "residual_samples",
    "passes",
    "seconds",
    "peak_rss_mb",
    "versions",
    "seed",
    "reason",
    "warnings",
    "settings",
    "dtype",
    "command",
}


@pytest.fixture
def exact(tiny: TinyData, tmp_path: Path) -> dict:
    return run(exact_request(RunRequest("tiny", 0, "cholesky")), tmp_path / "results")


@pytest.mark.parametrize("solver", ["cholesky", "cg", "sdd", "auto"])
def test_every_solver_reaches_the_exact_figures(
    tiny: TinyData, exact: dict, tmp_path: Path, solver: str
) -> None:
    request = RunRequest("tiny", 0, solver, num_samples=256, dtype="float64")
    result = run(request, tmp_path / "results")
    assert result.keys() >= KEYS
    assert result["seconds"].keys() == {"prior_draws", "solve", "prediction"}
    assert (result["n"], result["d"]) == (81, 3)
    assert result["rmse"] == pytest.approx(exact["rmse"], rel=0.01)
    # 256 samples: variances are off by sqrt(2 / 256) = 9 % each, so the density is
    # off by about half of that at most on average.
    assert result["nll"] == pytest.approx(exact["nll"], abs=0.05)
    assert result["exact"]["mean_rms_difference"] < 0.01
    assert result["curve"][-1]["rmse"] == pytest.approx(result["rmse"], rel=1e-6)
    stored = read_result(tmp_path / "results", request)
    assert stored is not None
    assert stored["rmse"] == result["rmse"]


def test_the_command_line_runs_stores_reuses_and_draws(
    tiny: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    line = ["--datasets", "tiny", "--solvers", "sdd", "--num-samples", "8"]
    line += ["--results", str(folder), "--plot"]
    assert main(line) == 0
    (path,) = folder.glob("*.json")
    first = json.loads(path.read_text())
    assert first["peak_rss_mb"] > 50
    assert first["solver_used"] == "sdd"
    assert (folder / "tiny.png").stat().st_size > 10_000
    out = capfd.readouterr().out
    assert f"{first['rmse']:.4f} [1]" in out
    before = path.stat().st_mtime_ns
    assert main(line) == 0
    assert "1 of 1 runs reused" in capfd.readouterr().out
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--datasets", "poll"], "dataset: found 'poll'"),
        (["--splits", "11"], "splits: found 11"),
        (["--noise-scale", "-1"], "noise_scale: found -1"),
        (["--hyperparameters", "none.json"], "hyperparameters: found 'none.json'"),
        (["--solvers"], "nothing to do"),
    ],
)
def test_bad_arguments_end_before_the_first_run(
    tiny: TinyData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    line = ["--datasets", "tiny", "--results", str(tmp_path / "results"), *change]
    assert main(line) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def progress(passes: float) -> Progress:
    weights = torch.full((4, 3), passes)
    return Progress(passes, 0.1 * passes, torch.ones(3), False, lambda: weights)


def test_a_trace_keeps_a_bounded_evenly_spread_history() -> None:
    trace = Trace(limit=8)
    assert not any(trace(progress(float(i))) for i in range(100))
    taken = [shot.passes for shot in trace.snapshots]
    assert taken == [16.0 * i for i in range(7)]
    assert trace.snapshots[3].weights.tolist() == [48.0] * 4


def test_a_trace_stops_at_its_budget() -> None:
    trace = Trace(max_passes=3)
    assert [trace(progress(float(i))) for i in range(5)] == [False] * 3 + [True] * 2
