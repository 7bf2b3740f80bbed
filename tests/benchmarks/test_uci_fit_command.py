"""Fits and peers through the command line: requests, runs, refusals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.uci import memory
from benchmarks.uci.__main__ import main
from benchmarks.uci.arguments import parser, requests
from benchmarks.uci.request import FIT, PEERS, RunRequest
from benchmarks.uci.run import main as run_main
from tests.benchmarks.fake_checkouts import fake_checkout

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData


ROOT = Path(__file__).parents[2]


def test_results_from_before_the_fit_keep_their_file_names() -> None:
    assert RunRequest("pol", 0, "sdd").stem == "pol-0-sdd-d8bb6f51"
    old = RunRequest(
        "bike",
        2,
        "cg",
        noise_scale=0.001,
        max_passes=20.0,
        memory_budget=10**9,
        dtype="float64",
        seed=3,
    )
    assert old.stem == "bike-2-cg-ad727b2e"


def test_every_stored_result_is_found_by_its_request() -> None:
    paths = sorted((ROOT / "benchmarks" / "uci" / "measured").glob("*.json"))
    assert paths
    for path in paths:
        stored = json.loads(path.read_text())
        request = RunRequest(**stored["request"])
        assert path.stem == request.stem
        assert stored["request"] == request.to_dict()


def test_the_stored_commands_repeat_fits_and_peers() -> None:
    line = "--datasets pol --hyperparameters fit --solvers sdd --fit-steps 30 --seed 3 "
    line += f"--peers {' '.join(PEERS)} --max-seconds 60 --svgp-points 50 "
    line += "--initialise subsets --reference exact"
    runs = requests(parser().parse_args(line.split()))
    assert [request.solver for request in runs] == ["sdd", *PEERS.values()]
    for request in runs:
        again = requests(parser().parse_args(shlex.split(request.command)[3:]))
        assert again == [request]


def test_an_option_changes_only_the_runs_it_concerns() -> None:
    line = ["--datasets", "pol", "--hyperparameters", "fit", "--peers", *PEERS]

    def stems(*more: str) -> dict[str, str]:
        runs = requests(parser().parse_args([*line, *more]))
        return {request.solver: request.stem for request in runs}

    def changed(*more: str) -> set[str]:
        before, after = stems(), stems(*more)
        return {solver for solver in before if before[solver] != after[solver]}

    assert changed("--svgp-epochs", "3") == {"gpytorch-svgp"}
    assert changed("--sklearn-rows", "30") == {"sklearn"}
    assert changed("--cg-rank", "15") == {"gpytorch-cg"}
    by_samples = {"auto", "iterative-gp"}
    by_adam = by_samples | {"gpytorch-exact", "gpytorch-cg"}
    assert changed("--fit-passes-per-step", "3") == by_samples
    assert changed("--fit-steps", "3") == by_adam
    assert changed("--num-samples", "3") == by_samples


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="fit_steps: found 0"):
        RunRequest("pol", 0, "sdd", hyperparameters=FIT, fit_steps=0)
    with pytest.raises(ValueError, match=r"noise_scale: found 0.1 .*leave it out"):
        RunRequest("pol", 0, "sdd", hyperparameters=FIT, noise_scale=0.1)
    with pytest.raises(ValueError, match=r"peers: found .*'published'"):
        RunRequest("pol", 0, "sklearn")


def medium(tiny: TinyData) -> None:
    tiny.write("medium", tiny.table(200), tiny.mask(200))


FIT_LINE = "--datasets medium --hyperparameters fit --fit-steps 4 --num-samples 8"


def execute_here(request: RunRequest, folder: Path) -> int:
    """As in a process of its own, without the seconds that starting one takes."""
    return run_main([json.dumps(request.to_dict()), str(folder)])


def test_the_command_line_runs_every_peer_and_compares_them(
    tiny: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    medium(tiny)
    monkeypatch.setattr("benchmarks.uci.__main__.execute", execute_here)
    checkout = fake_checkout(tmp_path, "iterative-gp")
    monkeypatch.setenv("SGDGP_ITERATIVE_GP", str(checkout))
    folder = tmp_path / "results"
    line = [*FIT_LINE.split(), "--solvers", "--peers", *PEERS, "--svgp-points", "20"]
    line += ["--svgp-epochs", "3", "--sklearn-rows", "60", "--results", str(folder)]
    line += ["--reference", "exact", "--plot"]
    assert main(line) == 0
    out = capfd.readouterr().out
    stored = {
        result["solver"]: result
        for result in (json.loads(path.read_text()) for path in folder.glob("*.json"))
    }
    assert stored.keys() == set(PEERS.values())
    for solver, result in stored.items():
        # A published code works in a process of its own, here with NumPy alone.
        assert result["peak_rss_mb"] > (20 if solver == "iterative-gp" else 50)
        assert result["rows"] == (60 if solver == "sklearn" else 180)
        assert f"{result['rmse']:.4f} [1]" in out
    assert "Learnt hyperparameters" in out
    assert main(line) == 0
    assert "5 of 5 runs reused" in capfd.readouterr().out


def test_the_command_line_fits_from_raw_data(
    tiny: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    medium(tiny)
    folder = tmp_path / "results"
    line = [*FIT_LINE.split(), "--initialise", "subsets", "--results", str(folder)]
    line += ["--reference", "exact", "--peers", "exact"]
    assert main(line) == 0
    own, exact = (
        json.loads(next(folder.glob(f"medium-0-{solver}-*.json")).read_text())
        for solver in ("auto", "gpytorch-exact")
    )
    assert own["fit"]["steps"] <= 4
    assert own["fit"]["start"] == "subsets"
    # It began at a better place, so it ends at one.
    name = "log_likelihood_per_row"
    assert own["exact"][name] > exact["exact"][name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--hyperparameters", "published"],
            "peers: found hyperparameters 'published'",
        ),
        (["--noise-scale", "0.1"], "noise_scale: found 0.1 with hyperparameters 'fit'"),
        (["--fit-steps", "0"], "fit_steps: found 0"),
        (["--max-seconds", "-1"], "max_seconds: found -1"),
    ],
)
def test_bad_arguments_end_before_the_first_run(
    tiny: TinyData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    line = ["--datasets", "tiny", "--hyperparameters", "fit", "--peers", "exact"]
    assert main([*line, "--results", str(tmp_path / "results"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_run_that_was_left_out_is_no_failure(
    tiny: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--datasets", "tiny", "--hyperparameters", "fit", "--solvers"]
    line += ["--peers", "exact", "--results", str(tmp_path)]
    monkeypatch.setattr(
        "benchmarks.uci.__main__.execute", lambda run, folder: memory.LEFT_OUT
    )
    assert main(line) == 0
