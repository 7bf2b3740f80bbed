"""The Thompson sampling benchmark: runs, what is kept, resumed, refused and shown."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.thompson_sampling import __main__ as command
from benchmarks.thompson_sampling.comparison import comparisons
from benchmarks.thompson_sampling.figure import curve, draw
from benchmarks.thompson_sampling.methods import DEFAULT_METHODS
from benchmarks.thompson_sampling.problem import make_problem
from benchmarks.thompson_sampling.request import Request
from benchmarks.thompson_sampling.run import run
from benchmarks.thompson_sampling.store import read_result, read_results, write_result
from benchmarks.thompson_sampling.table import summary

TINY = Request(
    "sdd",
    seed=0,
    lengthscale=0.5,
    seconds=5.0,
    dim=2,
    initial=50,
    steps=3,
    batch=6,
    noise_std=0.1,
    num_features=128,
    objective_features=300,
    num_candidates=100,
    rounds=2,
    ascent_steps=20,
)
OPTIONS = [
    *("--lengthscales", "0.5", "--seconds", "5", "--dim", "2", "--initial", "50"),
    *("--steps", "3", "--batch", "6", "--num-features", "128"),
    *("--objective-features", "300", "--num-candidates", "100", "--rounds", "2"),
    *("--ascent-steps", "20", "--noise-std", "0.1"),
]


def _silent(line: str) -> None:
    """Tell nobody."""


def _finished(
    method: str, seed: int, lengthscale: float, best: float
) -> dict[str, Any]:
    """A result as a run would leave it, without running it."""
    request = replace(TINY, method=method, seed=seed, lengthscale=lengthscale)
    entry = {
        "step": 1,
        "solve": 2.0,
        "maximise_seconds": 1.0,
        "spent_seconds": 3.0,
        "passes": 4.0,
        "residual_mean": 0.25,
        "residual_samples": 0.5,
        "best": best,
    }
    return {
        "request": request.to_dict(),
        "start": 1.0,
        "best": best,
        "history": [entry],
    }


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Runs that the command would have started."""
    started: list[Request] = []

    def note(request: Request, folder: Path) -> int:
        started.append(request)
        return 0

    monkeypatch.setattr(command, "execute", note)
    return started


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the run of ``result`` says."""
    return []


@pytest.fixture(scope="module")
def result(told: list[str]) -> dict[str, Any]:
    """A small run."""
    return run(TINY, tell=told.append)


def test_sample_functions_find_more_than_random_search(result: dict[str, Any]) -> None:
    # Densely searched: the best there is.
    x = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    maximum = float(make_problem(TINY).values(x).max())
    uniform = run(replace(TINY, method="random"), tell=_silent)
    assert uniform["start"] == result["start"]
    assert uniform["best"] <= result["best"]
    assert result["best"] > maximum - 0.05


def test_a_run_keeps_every_step(result: dict[str, Any], told: list[str]) -> None:
    assert len(told) == 3
    assert "sdd 0.5 0 step 1: best" in told[0]
    history = result["history"]
    assert [entry["known"] for entry in history] == [50, 56, 62]
    best = [result["start"], *(entry["best"] for entry in history)]
    assert best == sorted(best)
    assert best[-1] == result["best"]
    assert history[-1]["spent_seconds"] == result["spent_seconds"]
    for entry in history:
        assert entry["passes"] > 0
        assert 0 <= entry["residual_mean"] < 0.1
        assert entry["solver"] == "sdd"
    json.dumps(result)


def test_every_stem_is_of_one_request_and_every_command_repeats_it() -> None:
    requests = [
        TINY,
        replace(TINY, kept=True),
        replace(TINY, seed=1),
        replace(TINY, seconds=6.0),
        replace(TINY, lengthscale=0.1),
        replace(TINY, dtype="float64"),
    ]
    assert len({request.stem for request in requests}) == len(requests)
    for request in requests:
        words = request.command.split()
        assert words[:3] == ["python", "-m", "benchmarks.thompson_sampling"]
        again = command.requests(command.parser().parse_args(words[3:]))
        assert again == [request]


def test_runs_are_ordered_so_that_a_part_of_them_is_a_fair_comparison() -> None:
    runs = command.requests(command.parser().parse_args([]))
    assert len(runs) == 5 * 5 * 5
    assert {run.seed for run in runs[:25]} == {0}
    assert tuple(run.method for run in runs[:5]) == DEFAULT_METHODS
    assert {run.lengthscale for run in runs[:5]} == {0.1}
    assert (runs[0].initial, runs[0].steps, runs[0].batch, runs[0].dim) == (
        10_000,
        10,
        200,
        8,
    )


def test_only_missing_runs_are_executed(
    tmp_path: Path, executed: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    done = replace(TINY, method="random")
    write_result(tmp_path, done, run(done, tell=_silent))
    wanted = [*OPTIONS, "--methods", "random", "cg", "--seeds", "0", "1"]
    wanted += ["--results", str(tmp_path)]
    assert command.main(wanted) == 0
    assert [(one.method, one.seed) for one in executed] == [
        ("cg", 0),
        ("random", 1),
        ("cg", 1),
    ]
    assert "3 of 4 runs to do" in capsys.readouterr().out
    executed.clear()
    assert command.main([*wanted, "--overwrite"]) == 0
    assert len(executed) == 4
    executed.clear()
    assert command.main(["--table", "--results", str(tmp_path)]) == 0
    assert executed == []


def test_a_failed_run_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "execute", lambda request, folder: 1)
    wanted = [*OPTIONS, "--methods", "cg", "--seeds", "7", "--results", str(tmp_path)]
    assert command.main(wanted) == 1
    assert "failed: python -m benchmarks.thompson_sampling --methods cg --seeds 7" in (
        capsys.readouterr().err
    )


def test_a_run_is_a_process_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    def note(
        arguments: Sequence[str], env: dict[str, str], check: bool
    ) -> subprocess.CompletedProcess[str]:
        started.update(arguments=arguments, env=env)
        return subprocess.CompletedProcess(arguments, 5)

    monkeypatch.setattr(subprocess, "run", note)
    assert command.execute(TINY, Path("there")) == 5
    arguments = started["arguments"]
    assert arguments[:3] == [sys.executable, "-m", "benchmarks.thompson_sampling.run"]
    assert Request(**json.loads(arguments[3])) == TINY
    assert arguments[4] == "there"
    assert started["env"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--methods", "ssd"], "methods: found 'ssd', expected some of sdd"),
        (["--workers", "0"], "workers: found 0, expected at least 1"),
        (["--steps", "0"], "steps: found 0, expected at least 1"),
        (["--seconds", "-1"], "seconds: found -1.0, expected a positive number"),
        (
            ["--methods", "botorch", "--batch", "1000", "--initial", "200000"],
            "methods: botorch copies its factor for each of 1000 functions: 326432 GB",
        ),
        (["--dtype", "half"], "dtype: found 'half', expected 'float32' or 'float64'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    tmp_path: Path,
    executed: list[Request],
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    said: str,
) -> None:
    assert command.main([*OPTIONS, *wrong, "--results", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert executed == []


def test_a_damaged_file_is_no_result(tmp_path: Path) -> None:
    path = write_result(tmp_path, TINY, _finished("sdd", 0, 0.5, 2.0))
    (tmp_path / "maximise.json").write_text("{}\n")  # another benchmark's
    assert len(read_results(tmp_path)) == 1
    assert read_result(tmp_path, TINY) is not None
    path.write_text('{"request": {"method": "sdd"}}\n')
    with pytest.raises(ValueError, match="is no result of this benchmark"):
        read_results(tmp_path)


def test_the_table_has_means_over_the_problems_of_all_methods() -> None:
    results = [
        _finished("sdd", 0, 0.5, 3.0),
        _finished("sdd", 1, 0.5, 5.0),
        _finished("sdd", 2, 0.5, 100.0),  # not run by the other one: left out
        _finished("cg", 0, 0.5, 2.0),
        _finished("cg", 1, 0.5, 6.0),
        _finished("botorch", 0, 0.5, 9.0),  # on a few only: a table of its own
    ]
    text = summary(results)
    assert "2 problems that every method was run on" in text
    sdd, cg = (
        next(line for line in text.splitlines() if line.startswith(name))
        for name in ("sdd", "cg")
    )
    assert "4.000 ± 1.000" in sdd
    # The difference is that of pairs: -1 and 1.
    assert "4.000 ± 2.000  0.000 ± 1.000  1 of 2" in cg
    assert "0.250" in cg
    assert "100" not in text
    first, second = comparisons(results)
    assert set(first.methods) == {"sdd", "cg"}
    assert (set(second.methods), second.problems) == (
        {"sdd", "cg", "botorch"},
        ((0.5, 0),),
    )


def test_methods_without_a_common_problem_are_counted() -> None:
    text = summary([_finished("sdd", 0, 0.5, 3.0), _finished("cg", 1, 0.5, 2.0)])
    assert "no problem was run with every method (sdd 1, cg 1)" in text


def test_runs_of_other_settings_have_tables_of_their_own() -> None:
    other = _finished("cg", 0, 0.5, 2.0)
    other["request"]["seconds"] = 9.0
    results = [_finished("sdd", 0, 0.5, 3.0), other]
    assert len(comparisons(results)) == 2
    assert "5 s a solve" in summary(results)
    assert "9 s a solve" in summary(results)
    assert summary([]) == "no results"


def test_the_figure_shows_means_and_the_errors_of_gains(tmp_path: Path) -> None:
    runs = [_finished("sdd", 0, 0.5, 3.0), _finished("sdd", 1, 0.5, 5.0)]
    runs[1]["start"] = 3.0
    seconds, steps, means, errors = curve(runs)
    assert (seconds, steps) == ([0.0, 3.0], [0, 1])
    assert means == [2.0, 4.0]
    assert errors == [0.0, 0.0]  # both have gained two
    others = [_finished("random", seed, 0.5, 2.0) for seed in (0, 1)]
    (path,) = draw([*runs, *others], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
