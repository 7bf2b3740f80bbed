"""The command: what is run, kept, resumed, refused and shown."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.networks import __main__ as command
from benchmarks.networks import laplace_baselines
from benchmarks.networks.figures import draw, pooled_reliability
from benchmarks.networks.methods import METHODS, methods_for
from benchmarks.networks.run import run
from benchmarks.networks.settings import SETTINGS
from benchmarks.networks.store import read_result, read_results, write_result
from benchmarks.networks.table import summary
from tests.benchmarks.networks_helpers import TINY, write_images


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_images(tmp_path)
    monkeypatch.setenv("SGDGP_DATA", str(tmp_path))
    monkeypatch.setitem(SETTINGS, "mlp", TINY)
    return tmp_path / "results"


def _measure(folder: Path, *methods: str, seed: int = 0) -> dict[str, Any]:
    return run(
        "mlp", seed, methods, num_samples=4, folder=folder, tell=lambda line: None
    )


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[command.Job]:
    """Jobs that the command would have started."""
    jobs: list[command.Job] = []

    def note(job: command.Job, folder: Path) -> int:
        jobs.append(job)
        return 0

    monkeypatch.setattr(command, "execute", note)
    return jobs


def _arguments(folder: Path, *more: str) -> list[str]:
    return ["--settings", "mlp", "--results", str(folder), *more]


def test_a_run_keeps_every_score_of_every_method(folder: Path) -> None:
    _measure(folder, "network")
    _measure(folder, "sgdgp", "exact")
    result = read_result(folder, "mlp", 0)
    assert list(result["methods"]) == [
        "network",
        "network, temperature",
        "sgdgp, evidence",
        "sgdgp, calibrated",
        "exact, evidence",
        "exact, calibrated",
    ]
    for found in result["methods"].values():
        for key in ("nll", "ece", "brier", "joint", "auroc", "accuracy", "seconds"):
            assert isinstance(found[key], float)
        assert found["samples"] == 4
    assert result["network"]["training_images"] == 60
    about = result["methods"]["sgdgp, evidence"]["about"]
    assert about["precision"][0] > 0
    assert about["weights"] == 370


def test_only_missing_methods_are_run(
    folder: Path, executed: list[command.Job], capsys: pytest.CaptureFixture[str]
) -> None:
    _measure(folder, "network")
    wanted = ["--seeds", "0", "1", "--methods", "network", "sgdgp"]
    assert command.main(_arguments(folder, *wanted)) == 0
    assert [(job.seed, job.methods) for job in executed] == [
        (0, ("sgdgp",)),
        (1, ("network", "sgdgp")),
    ]
    assert "| network | " in capsys.readouterr().out
    executed.clear()
    command.main(_arguments(folder, *wanted, "--overwrite"))
    assert [job.methods for job in executed] == [("network", "sgdgp")] * 2
    executed.clear()
    assert command.main(_arguments(folder, "--table")) == 0
    assert executed == []


def test_a_failed_run_is_named_and_the_others_are_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _measure(folder, "network")
    monkeypatch.setattr(command, "execute", lambda job, folder: int(job.seed == 1))
    wanted = ("--seeds", "1", "2", "--methods", "ensemble")
    assert command.main(_arguments(folder, *wanted)) == 1
    printed = capsys.readouterr()
    assert printed.err == "failed: mlp 1\n"
    assert "| network | " in printed.out


def test_a_job_is_a_process_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    def note(
        arguments: Sequence[str], env: dict[str, str], check: bool
    ) -> subprocess.CompletedProcess[str]:
        started.update(arguments=arguments, env=env)
        return subprocess.CompletedProcess(arguments, 5)

    monkeypatch.setattr(subprocess, "run", note)
    job = command.Job("mlp", 3, ("network", "kfac"), 32)
    assert command.execute(job, Path("there")) == 5
    assert started["arguments"][:3] == [sys.executable, "-m", "benchmarks.networks.run"]
    assert started["arguments"][3:] == ["mlp", "3", "32", "there", "network", "kfac"]
    assert started["env"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--settings", "minst"], "settings: found 'minst', expected some of mnist"),
        (["--methods", "laplace"], "methods: found 'laplace', expected some of netw"),
        (["--workers", "0"], "workers: found 0, expected at least 1"),
        (["--samples", "1"], "samples: found 1, expected at least 2"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    folder: Path,
    executed: list[command.Job],
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    said: str,
) -> None:
    assert command.main(_arguments(folder, *wrong)) == 2
    assert said in capsys.readouterr().err
    assert executed == []


def test_without_laplace_torch_its_methods_are_refused_with_what_to_install(
    folder: Path,
    executed: list[command.Job],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(laplace_baselines.MissingLaplaceError):
        laplace_baselines.import_laplace()
    assert command.main(_arguments(folder, "--methods", "kfac")) == 2
    assert "pip install --no-deps laplace-torch==0.3" in capsys.readouterr().err
    assert executed == []


def test_the_exact_posterior_is_for_the_perceptron_only() -> None:
    assert "exact" in methods_for("mlp", list(METHODS))
    assert "exact" not in methods_for("mnist", list(METHODS))


def _stored(seed: int, nll: float, **more: Any) -> dict[str, Any]:
    scores = dict.fromkeys(["ece", "brier", "accuracy", "joint", "auroc"], 0.5)
    counts = {"confidence": [None, 0.5], "accuracy": [None, 1.0], "counts": [0, 4]}
    found = {
        "method": "network",
        "nll": nll,
        **scores,
        "seconds": 2.0,
        "peak_rss_mb": None,
        "reliability": counts,
        **more,
    }
    return {
        "format": 1,
        "setting": "small",
        "seed": seed,
        "methods": {"network": found},
    }


def test_the_table_has_means_and_standard_errors() -> None:
    text = summary([_stored(0, 0.1), _stored(1, 0.3)])
    assert "**MNIST, 500 images** (seeds 0, 1)" in text
    assert "| network | 0.2000 ± 0.1000 | 0.5000 ± 0.0000 |" in text
    assert "| 2 | - |" in text
    assert "rotated" not in text
    assert summary([]) == "no results"


def test_the_table_says_what_is_missing() -> None:
    other = _stored(1, 0.3)
    other["methods"] = {"ensemble": other["methods"]["network"]}
    text = summary([_stored(0, 0.1), other])
    assert "| network (1 missing) | 0.1000 |" in text


def test_scores_against_clean_labels_are_a_table_of_their_own() -> None:
    clean = {"nll": 0.7, "ece": 0.1, "brier": 0.2, "accuracy": 0.9}
    text = summary([_stored(0, 0.1, clean=clean)])
    assert "**MNIST, 500 images, against the clean labels** (seeds 0)" in text
    assert "| network | 0.7000 | 0.1000 | 0.2000 | 0.9000 |" in text
    assert "against the clean" not in summary([_stored(0, 0.1)])


def test_the_curve_is_a_table_too() -> None:
    curve = {
        "angle": [0, 30, 60, 90, 180],
        "nll": [0.1, 1, 2, 3, 4],
        "entropy": [0] * 5,
    }
    text = summary([_stored(0, 0.1, rotated=curve)])
    assert "| MNIST, 500 images | network | 1.00 | 2.00 | 3.00 | 4.00 |" in text


def test_reliability_is_pooled_by_the_number_of_points() -> None:
    one = {"confidence": [0.5, None], "accuracy": [0.0, None], "counts": [1, 0]}
    two = {"confidence": [0.9, None], "accuracy": [1.0, None], "counts": [3, 0]}
    found = pooled_reliability([{"reliability": one}, {"reliability": two}])
    assert found == ([pytest.approx(0.8)], [pytest.approx(0.75)])


def test_figures_are_small_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    curve = {"angle": [0, 90], "nll": [0.1, 3], "entropy": [0.1, 1]}
    paths = draw([_stored(0, 0.1, rotated=curve)], tmp_path)
    assert [path.name for path in paths] == [
        "reliability-small.png",
        "rotated-small.png",
    ]
    assert all(1_000 < path.stat().st_size < 80_000 for path in paths)


def test_a_result_that_is_none_is_refused(tmp_path: Path) -> None:
    write_result(tmp_path, _stored(0, 0.1))
    (tmp_path / "resnet50.json").write_text("{}")
    assert len(read_results(tmp_path)) == 1
    for content in ("{}", "no json", json.dumps({**_stored(1, 0.1), "format": 7})):
        (tmp_path / "small-1.json").write_text(content)
        with pytest.raises(ValueError, match=r"small-1\.json is no result of this"):
            read_results(tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        read_results(tmp_path / "nowhere")
