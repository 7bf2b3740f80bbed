"""Peers on a tiny set against closed forms."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpytorch
import pytest
import torch
from linear_operator.utils.errors import NotPSDError

import sgdgp
from benchmarks.uci import memory
from benchmarks.uci.data import load_split
from benchmarks.uci.exact import exact_prediction
from benchmarks.uci.peers import exact_gp, run_peer
from benchmarks.uci.run import main as run_main
from benchmarks.uci.run import run
from benchmarks.uci.table import summary
from benchmarks.uci.trainable import default_model
from tests.benchmarks.fake_checkouts import fake_checkout
from tests.benchmarks.uci_helpers import dense_log_likelihood, peer, values_of

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData


def test_the_exact_peer_follows_adam_on_the_dense_marginal_likelihood(
    tiny: TinyData,
) -> None:
    split = load_split("tiny", 0)
    outcome = run_peer(peer("exact", fit_steps=3), split)
    raw = {
        "noise": torch.zeros(1, dtype=torch.float64),
        "signal": torch.zeros(1, dtype=torch.float64),
        "lengthscale": torch.zeros(3, dtype=torch.float64),
        "mean": torch.zeros(1, dtype=torch.float64),
    }
    # GPyTorch's floor of the noise is added after the softplus.
    raw = {name: value.requires_grad_() for name, value in raw.items()}
    optimiser = torch.optim.Adam(raw.values(), lr=0.1)
    losses = []
    for _ in range(3):
        positive = torch.nn.functional.softplus
        scaled = split.x / positive(raw["lengthscale"])
        square = (scaled[:, None] - scaled[None]).square().sum(-1)
        r = (3 * square + 1e-30).sqrt()
        h = positive(raw["signal"]) * (1 + r) * torch.exp(-r)
        h = h + (positive(raw["noise"]) + 1e-4) * torch.eye(81).double()
        prior = torch.distributions.MultivariateNormal(raw["mean"].expand(81), h)
        loss = -prior.log_prob(split.y) / 81
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert [entry["loss"] for entry in outcome.history] == pytest.approx(
        losses, rel=1e-6
    )
    noise = positive(raw["noise"]).item() + 1e-4
    assert outcome.learnt.values.noise_scale**2 == pytest.approx(noise, rel=1e-5)
    assert outcome.learnt.mean == pytest.approx(raw["mean"].item(), abs=1e-6)


def test_the_exact_peer_predicts_what_sgdgp_does_with_cholesky(
    tiny: TinyData, tmp_path: Path
) -> None:
    request = peer("exact", fit_steps=12, dtype="float64", reference="exact")
    result = run(request, tmp_path)
    mean, values = values_of(result)
    assert (result["fit"]["steps"], result["reason"]) == (12, "steps")
    # The closed form, and the log marginal likelihood that was trained on.
    assert result["nll"] == pytest.approx(result["exact"]["nll"], abs=1e-6)
    assert result["rmse"] == pytest.approx(result["exact"]["rmse"], rel=1e-6)
    split = load_split("tiny", 0)
    truth = dense_log_likelihood(split, mean, values) / 81
    assert result["exact"]["log_likelihood_per_row"] == pytest.approx(truth, rel=1e-9)
    # sgdgp itself. 4,096 samples: variances off by 2 % each, the density by less.
    model = default_model(split.x, split.y)
    with torch.no_grad():
        model.mean_module.constant.fill_(mean)
        model.likelihood.noise = split.x.new_tensor(values.noise_scale**2)
        model.covar_module.outputscale = split.x.new_tensor(values.signal_scale**2)
        model.covar_module.base_kernel.lengthscale = split.x.new_tensor(
            values.lengthscale
        )
    posterior = sgdgp.condition(model.eval(), solver="cholesky", num_samples=4096)
    found = posterior.predict(split.x_test, observation_noise=True)
    error = (found.mean - split.y_test).square().mean().sqrt()
    assert result["rmse"] == pytest.approx(float(error), rel=1e-5)
    assert result["nll"] == pytest.approx(
        sgdgp.metrics.negative_log_predictive_density(
            found.mean, found.variance, split.y_test
        ),
        abs=0.01,
    )


def test_the_cg_peer_is_near_the_exact_one(tiny: TinyData, tmp_path: Path) -> None:
    """In its parameters; and with a sharp tolerance in what it predicts from them."""
    largest = gpytorch.settings.max_cholesky_size.value()  # BoTorch may have set it
    with gpytorch.settings.eval_cg_tolerance(1e-10):
        results = {
            name: run(
                peer(name, fit_steps=5, dtype="float64", reference="exact"), tmp_path
            )
            for name in ("exact", "cg")
        }
    scales = [values_of(results[name])[1].noise_scale for name in ("exact", "cg")]
    # Adam's first steps have nearly the same length whatever the gradient's noise.
    assert scales[0] == pytest.approx(scales[1], rel=0.05)
    found = results["cg"]
    assert found["rmse"] == pytest.approx(found["exact"]["rmse"], rel=1e-4)
    assert found["nll"] == pytest.approx(found["exact"]["nll"], abs=1e-4)
    settings = found["settings"]
    assert settings["prediction_tolerance"] == 1e-10
    assert settings["training_tolerance"] == gpytorch.settings.cg_tolerance.value()
    assert settings["preconditioner"] == "pivoted Cholesky, rank 100"
    # Nothing of it stays behind in this process.
    assert gpytorch.settings.max_cholesky_size.value() == largest


def test_scikit_learn_has_the_closed_form_at_what_it_learnt(
    tiny: TinyData, tmp_path: Path
) -> None:
    result = run(peer("sklearn", sklearn_rows=500), tmp_path)
    assert result["rows"] == 81  # all there are
    mean, values = values_of(result)
    assert mean == 0.0
    split = load_split("tiny", 0)
    exact = exact_prediction(split, values)
    error = (exact.mean - split.y_test).square().mean().sqrt()
    assert result["rmse"] == pytest.approx(float(error), rel=1e-4)
    density = sgdgp.metrics.negative_log_predictive_density(
        exact.mean, exact.variance, split.y_test
    )
    assert result["nll"] == pytest.approx(density, abs=1e-4)
    # What it minimises is the negative log marginal likelihood.
    best = min(entry["loss"] for entry in result["fit"]["history"])
    assert best == pytest.approx(-exact.log_likelihood, rel=1e-5)
    assert exact.log_likelihood == pytest.approx(
        dense_log_likelihood(split, 0.0, values), rel=1e-9
    )


def test_scikit_learn_is_given_the_rows_it_was_promised(tiny: TinyData) -> None:
    outcome = run_peer(peer("sklearn", sklearn_rows=30), load_split("tiny", 0))
    assert outcome.rows == 30


def test_the_published_loop_predicts_at_what_it_learnt(
    tiny: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGDGP_ITERATIVE_GP", str(tmp_path))
    with pytest.raises(ValueError, match=r"SGDGP_ITERATIVE_GP=.*found"):
        run_peer(peer("iterative-gp"), load_split("tiny", 0))
    checkout = fake_checkout(tmp_path, "iterative-gp")
    monkeypatch.setenv("SGDGP_ITERATIVE_GP", f"{checkout} {sys.executable}")
    result = run(peer("iterative-gp", fit_steps=3), tmp_path)
    assert (result["fit"]["steps"], result["reason"]) == (3, "steps")
    assert result["noise_scale"] == pytest.approx(0.5 * 0.9**3)
    mean, values = values_of(result)
    split = load_split("tiny", 0)
    exact = exact_prediction(split, values)
    error = (exact.mean - split.y_test).square().mean().sqrt()
    assert (mean, result["rmse"]) == (0.0, pytest.approx(float(error), rel=1e-4))
    assert result["seconds"].keys() == {"fit", "prediction"}
    stopped = run(peer("iterative-gp", max_seconds=1e-9), tmp_path)
    assert stopped["reason"] == "stopped at step 0"
    assert stopped["noise_scale"] == pytest.approx(0.5)


def test_svgp_with_many_points_comes_near_the_exact_fit(
    tiny: TinyData, tmp_path: Path
) -> None:
    options = {"svgp_points": 60, "svgp_epochs": 300, "svgp_batch": 81}
    result = run(peer("svgp", svgp_learning_rate=0.05, **options), tmp_path)
    exact = run(peer("exact", fit_steps=100), tmp_path)
    assert result["fit"]["steps"] == 300
    assert result["settings"]["inducing_points"] == 60
    assert result["rmse"] == pytest.approx(exact["rmse"], rel=0.15)
    assert result["nll"] == pytest.approx(exact["nll"], abs=0.15)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("exact", {}),
        ("cg", {}),
        ("svgp", {"svgp_batch": 20}),
        ("sklearn", {}),
    ],
)
def test_a_peer_that_is_out_of_time_stops_after_a_step(
    tiny: TinyData, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    result = run(peer(name, max_seconds=1e-4, **options), tmp_path)
    assert result["fit"]["steps"] <= 1
    assert result["reason"].startswith(f"stopped at step {result['fit']['steps']}")
    assert result["rmse"] is not None


def test_a_peer_whose_factor_fails_is_recorded(
    tiny: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = exact_gp.ExactMarginalLogLikelihood
    calls = iter(range(10))

    class Failing(objective):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any) -> torch.Tensor:
            if next(calls) == 2:
                raise NotPSDError("not positive definite")
            return super().forward(*arguments)

    monkeypatch.setattr(exact_gp, "ExactMarginalLogLikelihood", Failing)
    result = run(peer("exact"), tmp_path)
    assert (result["fit"]["steps"], result["reason"]) == (
        2,
        "failed at step 3: NotPSDError",
    )

    def refuse(*arguments: Any) -> None:
        raise NotPSDError("not positive definite")

    monkeypatch.setattr(exact_gp, "_predict", refuse)
    result = run(peer("exact", fit_steps=1), tmp_path)
    assert result["rmse"] is result["nll"] is None
    assert result["warnings"] == ["GPyTorch could not predict"]
    assert "failed on 1 of 1" in summary([result])


def test_a_peer_that_does_not_fit_is_left_out(
    tiny: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000.0)
    request = json.dumps(peer("exact").to_dict())
    assert run_main([request, str(tmp_path)]) == memory.LEFT_OUT
    assert "left out: tiny-0-gpytorch-exact" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
