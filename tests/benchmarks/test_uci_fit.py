"""Runs that learn their hyperparameters, and the table beside their peers."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.uci import against
from benchmarks.uci.data import load_split
from benchmarks.uci.exact import exact_prediction
from benchmarks.uci.peers.outcome import Clock, thin
from benchmarks.uci.request import FIT, RunRequest
from benchmarks.uci.run import run
from benchmarks.uci.table import summary
from benchmarks.uci.trainable import centred, default_model, learnt
from tests.benchmarks.uci_helpers import peer, values_of

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData


@dataclasses.dataclass(frozen=True)
class FakeEntry:
    step: int
    passes: float
    seconds: float
    residual: float
    parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FakeFitted:
    reason: str
    steps: int
    passes: float
    history: tuple[FakeEntry, ...]
    warnings: tuple[str, ...] = ("a warning",)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Training that sets known values, and remembers how it was called."""
    seen: dict[str, Any] = {"reason": "steps"}

    def fit(model: Any, x: Any, y: Any, **options: Any) -> FakeFitted:
        seen["fit"] = options
        seen["optimiser"] = options["optimizer"](model.parameters())
        with torch.no_grad():
            model.mean_module.constant.fill_(0.3)
            model.likelihood.noise = 0.04
            model.covar_module.outputscale = 1.21
            model.covar_module.base_kernel.lengthscale = x.new_tensor([0.8, 1.5, 1.0])
        history = tuple(FakeEntry(i, i, i, 0.1, {"noise": 0.5}) for i in range(300))
        return FakeFitted(seen["reason"], 300, 299.0, history)

    def initialise(model: Any, x: Any, y: Any, *, seed: int) -> None:
        seen["initialise"] = seed

    module = ModuleType("sgdgp.training")
    module.fit = fit  # type: ignore[attr-defined]
    module.initialise = initialise  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgdgp.training", module)
    return seen


def test_a_fit_is_followed_by_a_solve_at_what_it_learnt(
    tiny: TinyData, tmp_path: Path, calls: dict[str, Any]
) -> None:
    request = RunRequest(
        "tiny",
        0,
        "cholesky",
        hyperparameters=FIT,
        num_samples=256,
        dtype="float64",
        seed=4,
        fit_steps=300,
        fit_passes_per_step=3.0,
        fit_learning_rate=0.2,
        initialise="subsets",
        max_seconds=9.0,
        reference="exact",
    )
    result = run(request, tmp_path)
    assert calls["initialise"] == 4
    options = calls["fit"]
    assert (options["steps"], options["passes_per_step"]) == (300, 3.0)
    assert options["seed"] == 4
    # What the start, which does nothing here, has left of it.
    assert 8.0 < options["max_seconds"] < 9.0
    assert isinstance(calls["optimiser"], torch.optim.Adam)
    assert calls["optimiser"].param_groups[0]["lr"] == 0.2
    fit = result["fit"]
    assert (fit["steps"], fit["passes"], fit["reason"]) == (300, 299.0, "steps")
    assert fit["warnings"] == ["a warning"]
    assert len(fit["history"]) == 64
    assert (fit["history"][0]["step"], fit["history"][-1]["step"]) == (0, 299)
    mean, values = values_of(result)
    assert mean == pytest.approx(0.3)
    assert values.noise_scale == pytest.approx(0.2)
    assert values.signal_scale == pytest.approx(1.1)
    # The mean of the model is in the predictions, the curve and the reference alike.
    exact = exact_prediction(centred(load_split("tiny", 0), mean), values)
    error = exact.mean + mean - load_split("tiny", 0).y_test
    truth = float(error.square().mean().sqrt())
    assert result["rmse"] == pytest.approx(truth, rel=1e-6)
    assert result["curve"][-1]["rmse"] == pytest.approx(truth, rel=1e-6)
    assert result["exact"]["rmse"] == pytest.approx(truth, rel=1e-9)
    assert result["exact"]["mean_rms_difference"] < 1e-6
    # 256 samples: variances off by 9 % each.
    assert result["nll"] == pytest.approx(result["exact"]["nll"], abs=0.05)
    assert result["seconds"].keys() == {
        "initialise",
        "fit",
        "prior_draws",
        "solve",
        "prediction",
    }
    assert result["cpu_seconds"] > 0


def test_without_a_start_from_subsets_there_is_none(
    tiny: TinyData, tmp_path: Path, calls: dict[str, Any]
) -> None:
    run(RunRequest("tiny", 0, "cholesky", hyperparameters=FIT), tmp_path)
    assert "initialise" not in calls
    assert calls["fit"]["steps"] == 100


def test_an_interrupted_fit_is_no_result(
    tiny: TinyData, tmp_path: Path, calls: dict[str, Any]
) -> None:
    calls["reason"] = "interrupted"
    with pytest.raises(KeyboardInterrupt):
        run(RunRequest("tiny", 0, "cholesky", hyperparameters=FIT), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_fit_is_kept_where_the_exact_figures_do_not_fit(
    tiny: TinyData,
    tmp_path: Path,
    calls: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*arguments: Any) -> None:
        raise ValueError("exact reference: needs 11 GB")

    monkeypatch.setattr(against, "exact_prediction", refuse)
    request = RunRequest(
        "tiny", 0, "cholesky", hyperparameters=FIT, reference="exact", num_samples=8
    )
    assert run(request, tmp_path)["exact"] is None
    assert "needs 11 GB" in capsys.readouterr().err


def test_the_table_sets_fits_beside_their_peers(
    tiny: TinyData, tmp_path: Path, calls: dict[str, Any]
) -> None:
    own = RunRequest("tiny", 0, "cholesky", hyperparameters=FIT, num_samples=8)
    results = [
        run(own, tmp_path),
        run(peer("exact", fit_steps=3, max_seconds=50.0, reference="exact"), tmp_path),
        run(peer("sklearn", sklearn_rows=40), tmp_path),
    ]
    text = summary(results)
    parts = {part.splitlines()[0].split(",")[0]: part for part in text.split("\n\n")}
    lines = parts["Learnt hyperparameters"].splitlines()
    rmse = f"{results[0]['rmse']:.4f}"
    assert lines[3].split("8)")[1].split()[:3] == ["0", "81", rmse]
    exact = f"{results[1]['exact']['log_likelihood_per_row']:+.4f}"
    assert exact in lines[4]
    assert "sklearn (sklearn rows 40)" in lines[5]
    assert f"{results[2]['nll']:.4f}" in parts["NLL"]
    assert "gpytorch-exact" not in parts["Details"]
    assert "cholesky" in parts["Details"]


def test_learnt_values_are_read_in_double_precision(tiny: TinyData) -> None:
    split = load_split("tiny", 0, dtype=torch.float32)
    model = default_model(split.x, split.y)
    found = learnt(model.mean_module, model.covar_module, model.likelihood)
    assert found.mean == 0.0
    assert found.values.noise_scale**2 == pytest.approx(math.log(2) + 1e-4, rel=1e-6)
    assert found.values.lengthscale == pytest.approx((math.log(2),) * 3, rel=1e-6)


def test_a_thin_history_keeps_its_ends() -> None:
    assert thin(list(range(5))) == [0, 1, 2, 3, 4]
    assert thin(list(range(101)), limit=5) == [0, 25, 50, 75, 100]


def test_a_clock_counts_phases_apart() -> None:
    clock = Clock(max_seconds=1e-9)
    with clock.phase("fit"):
        assert clock.expired
    with clock.phase("prediction"):
        sum(range(200_000))
    assert clock.seconds.keys() == clock.cpu_seconds.keys() == {"fit", "prediction"}
    assert clock.cpu_seconds["prediction"] > 0
    assert not Clock().expired
