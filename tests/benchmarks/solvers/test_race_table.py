"""What a table says of its runs."""

from __future__ import annotations

from typing import Any

from benchmarks.solvers.plot import curve_of
from benchmarks.solvers.table import Row, one_line, remarks, text_table


def result(tolerance: float, **changes: Any) -> dict[str, Any]:
    return {
        "problem": "race:1",
        "solver": "sdd",
        "solver_used": "sdd",
        "tolerance": tolerance,
        "passes": 12.0,
        "seconds": 3.5,
        "cpu_seconds": 7.0,
        "rss_growth_mb": 100.0,
        "reason": "converged",
        "reached": True,
        "finite": True,
        "honest": True,
        "worse_than_start": False,
        "true": {"mean": 0.9 * tolerance, "worst": tolerance},
        "claimed": {"mean": 0.9 * tolerance, "worst": tolerance},
        **changes,
    }


def test_every_tolerance_has_passes_seconds_and_cpu_seconds() -> None:
    rows = [
        Row("sdd", {0.1: result(0.1), 0.01: result(0.01, rss_growth_mb=200.0)}),
        Row("auto", {0.1: result(0.1, solver_used="cholesky")}),
        Row("sdd-9", {0.1: result(0.1, reached=False, reason="budget")}),
        Row("broken", {0.1: None}),
    ]
    text = text_table("title", rows, [0.1, 0.01], markdown=False)
    assert text.splitlines()[0] == "title"
    assert "1e-1 passes / s / CPU s" in text
    assert "12.0 / 3.50 / 7.00" in text
    assert "> 12.0 / 3.50 / 7.00" in text
    assert "auto (cholesky)" in text
    assert "200" in text
    assert "failed" in text
    lines = text_table("title", rows, [0.1, 0.01], markdown=True).splitlines()
    assert {line.count("|") for line in lines[2:]} == {10}


def test_what_is_wrong_is_said() -> None:
    assert remarks(result(0.1)) == ""
    assert remarks(result(0.1, finite=False, worse_than_start=True)) == "NaN"
    assert remarks(result(0.1, worse_than_start=True)) == "worse than start"
    assert remarks(result(0.1, honest=False)) == "false claim"
    assert "false claim" in one_line(result(0.1, honest=False))


def test_a_run_that_was_killed_has_its_time_in_the_table() -> None:
    killed = {
        "problem": "pol:0",
        "solver": "cholesky",
        "tolerance": 0.1,
        "passes": None,
        "seconds": 900.0,
        "cpu_seconds": None,
        "reason": "timeout",
        "reached": False,
    }
    text = text_table("t", [Row("cholesky", {0.1: killed})], [0.1], markdown=False)
    assert "> 900 s" in text
    assert "timeout" in text
    assert "timeout" in one_line(killed)


def test_a_curve_is_the_trace_or_else_the_runs() -> None:
    runs = [result(0.01, passes=20.0), result(0.1)]
    assert curve_of(None, runs) == [(12.0, 3.5, 0.9 * 0.1), (20.0, 3.5, 0.9 * 0.01)]
    trace = {
        "curve": [
            {"passes": 0.0, "seconds": 0.1, "mean": 1.0},
            {"passes": 1.0, "seconds": 0.2, "mean": 0.5},
            {"passes": 2.0, "seconds": 0.3, "mean": None},
        ]
    }
    assert curve_of(trace, runs) == [(1.0, 0.2, 0.5)]
