"""Tables, requests and stored results."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.uci.arguments import parse_bytes, parser, requests
from benchmarks.uci.request import RunRequest, exact_request
from benchmarks.uci.store import read_result, read_results, result_path, write_result
from benchmarks.uci.table import (
    format_figure,
    format_rows,
    mean_and_error,
    row_label,
    summary,
)
from benchmarks.uci.table import main as table_main


def stored(
    request: RunRequest, rmse: float | None, nll: float | None
) -> dict[str, Any]:
    return {
        "dataset": request.dataset,
        "split": request.split,
        "request": request.to_dict(),
        "rmse": rmse,
        "nll": nll,
        "coverage": 0.95,
        "crps": 0.05,
        "calibration_error": 0.01,
        "residual_mean": 1e-3,
        "residual_samples": 2e-3,
        "passes": 12.0,
        "seconds": {"prior_draws": 1.0, "solve": 2.0, "prediction": 3.0},
        "peak_rss_mb": 500.0,
        "reason": "converged",
        "operator": "tiled",
        "solver_used": "sdd",
        "exact": {"rmse": 0.08, "nll": -1.2},
    }


def test_the_error_is_the_sample_deviation_over_the_root_of_the_count() -> None:
    mean, error = mean_and_error([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert mean_and_error([5.0]) == (5.0, None)


def test_figures_and_columns_are_aligned() -> None:
    assert format_figure(0.08123, 0.00114) == "0.0812 ± 0.0011"
    assert format_figure(-1.5, None, 2) == "-1.50"
    lines = format_rows([["", "pol"], ["longer", "0.1"]]).splitlines()
    assert lines == ["        pol", "------  ---", "longer  0.1"]


def test_the_report_has_published_rows_and_means_over_splits() -> None:
    runs = [RunRequest("pol", split, "sdd") for split in (0, 1)]
    text = summary([stored(runs[0], 0.08, -1.1), stored(runs[1], 0.09, -1.2)])
    rmse, nll, details = text.strip().split("\n\n")
    assert "0.0850 ± 0.0050 [2]" in rmse
    assert any("paper, SGD" in line and "0.13" in line for line in rmse.splitlines())
    assert "0.0809" in rmse
    assert "-1.1500 ± 0.0500 [2]" in nll
    assert "-1.17" in nll
    assert "1.0625" in details
    assert "+0.0500" in details
    assert "sdd -> sdd/tiled" in details


def test_low_noise_runs_stand_beside_the_low_noise_rows_only() -> None:
    run = RunRequest("pol", 0, "cg", noise_scale=0.001)
    text = summary([stored(run, 0.08, -1.0)])
    assert "†" in text
    assert "0.16 ± 0.01" in text
    assert "0.0809" not in text


def test_a_broken_run_is_shown_as_failed() -> None:
    runs = [RunRequest("pol", split, "sdd") for split in (0, 1)]
    text = summary([stored(runs[0], 0.08, None), stored(runs[1], None, None)])
    assert "failed on 1 of 2" in text
    assert "failed on 2 of 2" in text


def test_different_settings_are_different_rows() -> None:
    labels = {
        row_label({"request": RunRequest("pol", 0, "sdd", dtype=dtype).to_dict()})
        for dtype in ("float32", "float64")
    }
    assert labels == {"sdd", "sdd (dtype float64)"}


def test_a_stored_result_is_found_by_exactly_its_request(tmp_path: Path) -> None:
    request = RunRequest("pol", 0, "sdd", seed=3)
    result = {**stored(request, 0.08, math.nan), "settings": {"a": torch.tensor(2.0)}}
    path = write_result(tmp_path, request, result)
    assert path == result_path(tmp_path, request)
    found = read_result(tmp_path, request)
    assert found is not None
    assert found["rmse"] == 0.08
    assert found["nll"] is None
    assert found["settings"] == {"a": 2.0}
    assert read_result(tmp_path, RunRequest("pol", 0, "sdd", seed=4)) is None
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert len(read_results(tmp_path)) == 1


def test_the_table_command_reads_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = RunRequest("pol", 0, "sdd")
    write_result(tmp_path, request, stored(request, 0.08, -1.1))
    assert table_main([str(tmp_path)]) == 0
    assert "0.0800 [1]" in capsys.readouterr().out
    (tmp_path / "other.json").write_text(json.dumps([1]))
    assert table_main([str(tmp_path)]) == 2
    assert "other.json" in capsys.readouterr().err


def test_the_stored_command_repeats_the_request() -> None:
    request = RunRequest(
        "bike", 2, "cg", noise_scale=0.001, memory_budget=10**9, dtype="float64"
    )
    words = shlex.split(request.command)
    assert words[:3] == ["python", "-m", "benchmarks.uci"]
    assert requests(parser().parse_args(words[3:])) == [request]
    exact = exact_request(request)
    assert requests(parser().parse_args(shlex.split(exact.command)[3:])) == [exact]


def test_the_reference_comes_before_the_solvers_of_its_split() -> None:
    line = "--datasets pol --splits 0 1 --solvers sdd --reference exact"
    runs = requests(parser().parse_args(line.split()))
    assert [(run.split, run.solver) for run in runs] == [
        (0, "exact"),
        (0, "sdd"),
        (1, "exact"),
        (1, "sdd"),
    ]


@pytest.mark.parametrize(
    ("text", "count"), [("1GB", 10**9), ("500m", 5 * 10**8), ("2e9", 2 * 10**9)]
)
def test_sizes_are_decimal_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples: found 0"):
        RunRequest("pol", 0, "sdd", num_samples=0)
    with pytest.raises(ValueError, match="max_passes: found -1"):
        RunRequest("pol", 0, "sdd", max_passes=-1)
    with pytest.raises(ValueError, match="memory budget: found 'much'"):
        parse_bytes("much")
