"""Stored results as one table."""

from __future__ import annotations

import json

import pytest

from benchmarks.solvers.summary import main, summary


def put(folder, solver, problem, **values):
    result = {
        "solver": solver,
        "problem": problem,
        "tolerance": 0.01,
        "columns": 17,
        "passes": 12.3,
        "seconds": 4.56,
        "reached": True,
        "true": {"mean": 0.008},
        **values,
    }
    (folder / f"{solver}-{problem}.json".replace(":", "-")).write_text(
        json.dumps(result)
    )


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, "slow", "pol:0", seconds=99.0)
    put(tmp_path, "fast", "pol:0")
    put(tmp_path, "fast", "bike:0", passes=20.0)
    put(tmp_path, "lost", "pol:0", reached=False, true={"mean": 0.3})
    put(tmp_path, "lost", "bike:0", reached=False, true={"mean": None})
    put(tmp_path, "other", "pol:0", tolerance=0.1)
    return tmp_path


def test_a_cell_is_passes_and_seconds_or_where_it_ended(folder):
    lines = summary(folder, ["pol:0", "bike:0"], 0.01, 17).splitlines()
    assert lines[0] == "| solver | pol:0 | bike:0 |"
    assert lines[2:] == [
        "| fast | 12 / 4.6 | 20 / 4.6 |",
        "| slow | 12 / 99.0 | - |",
        "| lost | (3e-01 in 5 s) | diverged in 5 s |",
    ]


def test_other_tolerances_and_columns_do_not_count(folder):
    with pytest.raises(ValueError, match="none for pol:0"):
        summary(folder, ["pol:0"], 0.01, 1)


def test_an_empty_folder_is_an_error_in_words(tmp_path, capsys):
    assert main(["--problem", "pol:0", "--results", str(tmp_path)]) == 2
    assert "has none for pol:0" in capsys.readouterr().err
