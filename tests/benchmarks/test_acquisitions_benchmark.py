"""The acquisitions' benchmark: what is run, kept, resumed, refused and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.acquisitions import __main__ as command
from benchmarks.acquisitions import run
from benchmarks.acquisitions.models import MODELS
from benchmarks.acquisitions.problems import PROBLEMS, Objective
from benchmarks.acquisitions.table import is_as_good, read_runs, summary
from benchmarks.json_file import write_json

THEIRS, OURS = MODELS


def record(function: str, seed: int, model: str, best: float) -> dict[str, object]:
    return {
        "function": function,
        "seed": seed,
        "model": model,
        "optimum": 1.0,
        "best": [0.0, best],
        "seconds": {"fits": 1.0, "acquisition": 2.0},
    }


def store(folder: Path, *records: dict[str, object]) -> None:
    for one in records:
        path = run.path_of(folder, one["function"], one["seed"], one["model"])
        write_json(path, one)


@pytest.mark.parametrize("name", PROBLEMS)
def test_functions_live_in_the_unit_cube_and_end_below_their_optimum(name: str) -> None:
    objective = Objective(name)
    x = torch.rand(100, 6, generator=torch.Generator().manual_seed(0)).double()
    values = objective(x)
    assert values.shape == (100, 1)
    assert bool((values < objective.optimum).all())
    assert float(values.std()) > 0


def test_both_models_begin_alike_and_a_run_is_repeated_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("RESTARTS", 1), ("CANDIDATES", 4), ("ITERATIONS", 2)):
        monkeypatch.setattr(run, name, few)
    found = {model: run.optimised("levy6", 0, model, steps=1) for model in MODELS}
    for model, result in found.items():
        assert result["evaluations"] == run.INITIAL + run.BATCH
        assert result["best"][0] == found[THEIRS]["best"][0]
        assert result["best"][1] >= result["best"][0]
        assert result["model"] == model
        store(tmp_path, result)
    again = run.optimised("levy6", 0, OURS, steps=1)
    assert again["best"] == found[OURS]["best"]
    assert {one["model"] for one in read_runs(tmp_path)} == set(MODELS)


def test_runs_that_are_there_are_not_repeated(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    executed = []

    def note(job: command.Job, folder: Path) -> int:
        executed.append(job)
        store(folder, record(job.function, job.seed, job.model, 0.5))
        return 0

    monkeypatch.setattr(command, "execute", note)
    arguments = ["--functions", "levy6", "--results", str(tmp_path)]
    assert command.main([*arguments, "--seeds", "0"]) == 0
    assert command.main([*arguments, "--seeds", "0", "1"]) == 0
    expected = [(seed, model) for seed in (0, 1) for model in MODELS]
    assert [(job.seed, job.model) for job in executed] == expected
    assert "levy6" in capsys.readouterr().out


def test_a_run_that_fails_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "execute", lambda job, folder: 1)
    arguments = ["--functions", "levy6", "--seeds", "3", "--results", str(tmp_path)]
    assert command.main(arguments) == 1
    assert f"failed: levy6 3 {OURS}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--functions", "sphere"], "functions: found 'sphere'"),
        (["--workers", "0"], "workers: found 0"),
        (["--seeds", "-1"], "seeds: found -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_the_table_pairs_the_seeds_that_both_models_have(tmp_path: Path) -> None:
    for seed, (theirs, ours) in enumerate([(0.5, 0.6), (0.4, 0.8), (0.6, 0.5)]):
        store(tmp_path, record("levy6", seed, THEIRS, theirs))
        store(tmp_path, record("levy6", seed, OURS, ours))
    store(tmp_path, record("levy6", 3, OURS, 9.0), record("ackley6", 0, OURS, 9.0))
    lines = summary(read_runs(tmp_path)).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "levy6 (1.000)",
        "3",
        "0.500 ± 0.058",
        "0.633 ± 0.088",
        "0.133 ± 0.145",
        "2 / 1",
        "yes",
        "3 / 3",
    ]


def test_as_good_means_not_worse_by_more_than_a_standard_error() -> None:
    assert is_as_good([-0.1, 0.0, 0.0, 0.0])  # -0.025 with a standard error of 0.025
    assert not is_as_good([-0.2, -0.1, -0.3])
    assert is_as_good([-0.2]) is None


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "levy6-0-other.json").write_text(json.dumps({"function": "levy6"}))
    with pytest.raises(ValueError, match="no run of this benchmark"):
        read_runs(tmp_path)
    assert summary([]) == "no results"
