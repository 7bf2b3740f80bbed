"""Runs of the race, in this process and through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import sgdgp
from benchmarks.solvers.__main__ import main
from benchmarks.solvers.contenders import contender, with_limits
from benchmarks.solvers.problem import Problem
from benchmarks.solvers.problems import make_problem, parse_problem
from benchmarks.solvers.race import judged, race
from benchmarks.solvers.request import RaceRequest
from benchmarks.solvers.stopwatch import Stopwatch
from benchmarks.solvers.store import read_result
from benchmarks.solvers.task import Outcome, Task
from sgdgp.solvers import CG, SDD, Cholesky

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData

SPEC = parse_problem("synthetic:1e3", n=300, columns=3)
KEYS = {
    "passes",
    "seconds",
    "cpu_seconds",
    "peak_rss_mb",
    "rss_growth_mb",
    "reason",
    "true",
    "claimed",
    "reached",
    "finite",
    "honest",
    "worse_than_start",
    "command",
    "versions",
    "machine",
    "settings",
    "warnings",
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(SPEC)


def task(problem: Problem, tolerance: float = 1e-4) -> Task:
    return Task(problem, tolerance, 300.0, 60.0, 2**30, 0, Stopwatch())


def request(solver: str, tolerance: float = 1e-2, **options: object) -> RaceRequest:
    return RaceRequest(SPEC, solver, tolerance, 300.0, 60.0, **options)


@pytest.mark.parametrize(
    "solver",
    [
        "auto",
        "cg",
        "cg-none",
        "cg-nystrom",
        "sdd",
        "sdd-1-b30",
        "published-ap",
        "gpytorch-cg",
    ],
)
def test_every_contender_arrives_and_tells_the_truth(
    problem: Problem, tmp_path: Path, solver: str
) -> None:
    asked = request(solver)
    result = race(asked, problem, tmp_path)
    assert result.keys() >= KEYS
    assert (result["n"], result["d"], result["columns"]) == (300, 3, 3)
    assert result["reached"]
    assert result["honest"]
    assert result["finite"]
    assert not result["worse_than_start"]
    assert result["true"]["mean"] <= min(1e-2, result["true"]["worst"])
    assert 0 < result["passes"] <= 300
    assert result["seconds"] > 0
    stored = read_result(tmp_path, asked)
    assert stored is not None
    assert stored["true"] == result["true"]
    assert read_result(tmp_path, request(solver, 1e-3)) is None


@pytest.mark.parametrize("solver", ["gpytorch-cg", "gpytorch-cg-100"])
def test_gpytorch_agrees_with_cholesky(problem: Problem, solver: str) -> None:
    outcome = contender(solver)(task(problem))
    exact = contender("cholesky")(task(problem)).weights
    assert outcome.reason == "converged"
    error = (outcome.weights - exact).norm() / exact.norm()
    # Residual 1e-4 at a condition number of 1e3.
    assert float(error) < 0.05
    assert float(problem.true_residuals(outcome.weights).mean()) < 2e-4
    # GPyTorch never does fewer than eleven iterations, and one product to start.
    assert outcome.passes > 12


def test_gpytorch_stands_still_when_the_time_is_up(problem: Problem) -> None:
    late = replace(task(problem, 1e-6), max_seconds=1e-9)
    outcome = contender("gpytorch-cg")(late)
    assert outcome.reason == "budget"
    assert float(outcome.weights.abs().max()) == 0.0


def test_gpytorch_is_asked_again_when_its_claim_is_a_little_too_early(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = contender("cholesky")(task(problem)).weights
    asked: list[float] = []

    def hasty(given: Task) -> Outcome:
        asked.append(given.tolerance)
        # A multiple of the solution has that residual in every column.
        weights = (1.0 - 1.3 * given.tolerance) * exact[: given.problem.n]
        return Outcome(weights, 1.0, "converged", None, "hasty", "dense")

    monkeypatch.setattr("benchmarks.solvers.race.contender", lambda name: hasty)
    result = race(request("hasty"), problem, tmp_path)
    assert asked[1:] == pytest.approx([1e-2, 1e-2 * 0.9 / 1.3], rel=1e-3)
    assert result["reached"]
    assert result["asked_tolerance"] == asked[-1]


def test_the_papers_step_that_is_too_long_is_reported_as_diverged(
    problem: Problem, tmp_path: Path
) -> None:
    result = race(request("sdd-1000"), problem, tmp_path)
    assert result["reason"] == "diverged"
    assert result["worse_than_start"]
    assert not result["reached"]


def test_a_traced_run_sees_the_residual_fall(problem: Problem, tmp_path: Path) -> None:
    result = race(request("sdd", 1e-3, trace=True), problem, tmp_path)
    curve = result["curve"]
    assert len(curve) > 5
    assert [p["passes"] for p in curve] == sorted(p["passes"] for p in curve)
    assert [p["seconds"] for p in curve] == sorted(p["seconds"] for p in curve)
    assert curve[-1]["mean"] == pytest.approx(result["true"]["mean"])
    assert curve[-1]["mean"] < 0.05 * curve[0]["mean"]


def test_limits_reach_the_solvers_that_have_them(problem: Problem) -> None:
    given = task(problem, 3e-3)
    assert with_limits(CG(), given) == CG(3e-3, 300.0, 60.0)
    assert with_limits(SDD(block_size=7), given) == SDD(3e-3, 300.0, 60.0, 7)
    assert with_limits(Cholesky(), given) == Cholesky(tolerance=3e-3)


@pytest.mark.parametrize(
    ("reason", "claims", "worst", "honest"),
    [
        ("converged", True, 0.009, True),
        ("converged", True, 0.02, False),
        ("budget", True, 0.02, True),
        ("converged", False, 0.02, True),  # a peer promises the mean alone
    ],
)
def test_a_claim_is_held_against_the_true_residual(
    reason: str, claims: bool, worst: float, honest: bool
) -> None:
    claimed = torch.tensor([0.001]) if claims else None
    outcome = Outcome(torch.zeros(2, 1), 1.0, reason, claimed, "some", "dense")
    assert judged(0.01, outcome, 0.005, worst)["honest"] is honest


def test_weights_that_are_not_finite_are_seen() -> None:
    outcome = Outcome(torch.full((2, 1), torch.nan), 1.0, "budget", None, "x", "y")
    found = judged(0.01, outcome, float("nan"), float("nan"))
    assert not found["finite"]
    assert found["worse_than_start"]
    assert not found["reached"]


def test_the_clock_stands_still_in_a_pause_also_in_one_within_another() -> None:
    clock = Stopwatch()
    with clock.paused():
        wall, cpu = clock.seconds, clock.cpu_seconds
        with clock.paused():
            sum(range(300_000))
        sum(range(300_000))
        assert (clock.seconds, clock.cpu_seconds) == (wall, cpu)
    before = clock.cpu_seconds
    sum(range(300_000))
    assert clock.cpu_seconds > before >= cpu
    assert clock.seconds > wall > 0


def test_the_command_line_races_stores_reuses_and_draws(
    tiny: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    line = ["--problem", "tiny:0", "--columns", "2", "--solvers", "gpytorch-cg"]
    line += ["--tolerances", "1e-2", "--threads", "1", "--results", str(folder)]
    assert main(line) == 0
    out = capfd.readouterr().out
    assert "tiny:0: n = 81, d = 3, 2 columns" in out
    (path,) = folder.glob("*.json")
    stored = json.loads(path.read_text())
    assert stored["reached"]
    assert stored["machine"]["threads"] == 1
    assert stored["versions"]["sgdgp"] == sgdgp.__version__
    assert "--problem tiny:0 --solvers gpytorch-cg" in stored["command"]
    assert main([*line, "--plot", "--markdown"]) == 0
    out = capfd.readouterr().out
    assert "1 runs reused" in out
    assert "| gpytorch-cg |" in out
    assert (folder / "tiny-0.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--problem", "race:9"], "race:1, race:2 or race:3"),
        (["--problem", "race:1", "--solvers", "magic"], "gpytorch-cg"),
        (["--problem", "race:1", "--tolerances", "-1"], "tolerance"),
        (["--problem", "race:1", "--max-passes", "0"], "max_passes"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_do(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--results", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_missing_data_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGDGP_DATA", str(tmp_path / "nowhere"))
    assert main(["--problem", "pol:0", "--results", str(tmp_path)]) == 2
    assert "SGDGP_DATA" in capsys.readouterr().err
