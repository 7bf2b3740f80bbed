"""Calibration on held-out examples: the scale, the temperature, the verdict."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgdgp import metrics
from sgdgp.networks.calibration import (
    Entry,
    best_scale,
    best_temperature,
    compare,
    conclude,
    paired_difference,
)
from sgdgp.networks.likelihoods import Categorical, Gaussian, Likelihood
from sgdgp.networks.predictive import monte_carlo, probit, variance_of

ROWS = (
    "network",
    "network with temperature",
    "posterior (evidence)",
    "posterior (calibrated)",
)


def doubtful(
    n: int = 4000, k: int = 16, truth: float = 4.0, classes: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, fluctuations, and classes drawn with ``truth`` times their variance.

    Half of the examples have no doubt at all, so that no temperature fits both.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    f = 3 * draw(n, classes)
    deviation = 2.0 * (torch.arange(n) % 2).double()[:, None]
    g = deviation.unsqueeze(-1) * draw(n, classes, k)
    logits = f + math.sqrt(truth) * deviation * draw(n, classes)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return f, g, y


@given(
    exponent=st.floats(-3.9, 3.9),
    width=st.floats(0.1, 3.0),
)
def test_the_minimum_of_a_smooth_loss_is_found_to_a_tenth_of_a_percent(
    exponent: float, width: float
):
    best = 10**exponent

    def loss(scale: float) -> float:
        return ((math.log(scale / best) / width) ** 2) if scale > 0 else math.inf

    assert best_scale(loss) == pytest.approx(best, rel=2e-3)


def test_a_loss_that_any_variance_raises_is_best_at_zero():
    assert best_scale(lambda scale: scale) == 0.0


def test_a_loss_that_all_variance_lowers_is_best_at_the_last_scale():
    assert best_scale(lambda scale: -scale) == pytest.approx(1e4, rel=2e-3)


def test_refining_never_loses_the_minimum_of_the_grid():
    """A narrow dip at scale 1, beside a broad slope that leads elsewhere."""

    def loss(scale: float) -> float:
        return -1.0 if scale == 1.0 else scale

    assert best_scale(loss) == 1.0


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_temperature_is_the_minimum_of_the_loss(temperature: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(3000, 5, generator=generator, dtype=torch.float64)
    y = torch.multinomial(f.softmax(1), 1, generator=generator).squeeze(1)
    f = (temperature * f).to(dtype)
    found = best_temperature(f, y)
    assert found == pytest.approx(temperature, rel=0.1)

    def loss(t: float) -> float:
        return float(Categorical().loss(f.double() / t, y).mean())

    slope = (loss(found * 1.001) - loss(found / 1.001)) / 0.002
    assert abs(slope) < 1e-4


def test_temperatures_of_separable_and_of_hopeless_networks_stay_in_bounds():
    f, y = torch.eye(3), torch.arange(3)
    assert best_temperature(f, y) == pytest.approx(0.01, rel=1e-3)
    assert best_temperature(f, (y + 1) % 3) == pytest.approx(100.0, rel=1e-3)
    assert 0.01 <= best_temperature(0 * f, y) <= 100.0


def test_the_calibrated_scale_recovers_that_of_the_data():
    f, g, y = doubtful(n=6000, k=32)
    found = compare(Categorical(), f, y, fluctuations=g, link="monte_carlo")
    # The loss is flat near its minimum: a curvature of about n / 40 in log scale.
    assert found.scale == pytest.approx(4.0, rel=0.15)
    assert found.recommendation == "posterior"
    assert found.scores[ROWS[3]]["nll"] < found.scores[ROWS[1]]["nll"]
    assert "lower than that of the network with temperature" in found.reason


@pytest.mark.parametrize("link", ["probit", "monte_carlo"])
def test_every_entry_has_the_scores_of_its_probabilities(link):
    f, g, y = doubtful(n=600)
    found = compare(Categorical(), f, y, fluctuations=g, link=link)

    def predicted(scale: float) -> Tensor:
        if link == "probit":
            return probit(f, scale * variance_of(g))
        return monte_carlo(f, math.sqrt(scale) * g)

    probabilities = {
        ROWS[0]: f.softmax(1),
        ROWS[1]: (f / found.fitted).softmax(1),
        ROWS[2]: predicted(1.0),
        ROWS[3]: predicted(found.scale),
    }
    assert tuple(found.scores) == ROWS
    for name, p in probabilities.items():
        scores = found.scores[name]
        nll = metrics.negative_log_likelihood(p, y)
        assert scores["nll"] == pytest.approx(nll)
        ece = metrics.expected_calibration_error(p, y)
        assert scores["ece"] == pytest.approx(ece, abs=1e-9)
        assert scores["brier"] == pytest.approx(metrics.brier_score(p, y))
        assert scores["accuracy"] == pytest.approx(metrics.accuracy(p, y))
        reference = metrics.negative_log_likelihood(probabilities[ROWS[0]], y)
        assert found.gains[name][0] == pytest.approx(nll - reference, abs=1e-9)


def test_the_calibrated_posterior_is_never_worse_than_network_or_evidence():
    for truth in (0.0, 0.3, 3.0):
        f, g, y = doubtful(n=500, truth=truth)
        found = compare(Categorical(), f, y, fluctuations=g)
        nll = {name: scores["nll"] for name, scores in found.scores.items()}
        assert nll[ROWS[3]] <= min(nll[ROWS[0]], nll[ROWS[2]]) + 1e-12
        assert nll[ROWS[1]] <= nll[ROWS[0]] + 1e-12


def test_an_evidence_that_loses_to_the_network_is_said_to():
    f, g, y = doubtful(truth=0.0)
    found = compare(Categorical(), f, y, fluctuations=3 * g)
    assert found.gains[ROWS[2]][0] > 0
    assert len(found.warnings) == 1
    assert "evidence alone the posterior is worse" in found.warnings[0]
    assert found.warnings[0] in str(found)


def test_fluctuations_that_only_hurt_are_scaled_to_nothing():
    """The network is too flat already: variance would flatten it more."""
    f, g, y = doubtful(truth=0.0)
    found = compare(Categorical(), f / 3, y, fluctuations=g)
    assert found.scale == 0.0
    assert found.recommendation == "network with temperature"
    assert found.fitted == pytest.approx(1 / 3, rel=0.1)
    assert "adds nothing" in found.reason


def test_variances_are_enough_for_the_probit():
    f, g, y = doubtful(n=500)
    full = compare(Categorical(), f, y, fluctuations=g)
    found = compare(Categorical(), f, y, variance=variance_of(g))
    assert found.scale == full.scale
    assert math.isnan(found.scores[ROWS[3]]["joint"])
    assert found.scores[ROWS[3]]["nll"] == full.scores[ROWS[3]]["nll"]


def test_examples_in_parts_give_the_scores_of_all_at_once(monkeypatch):
    f, g, y = doubtful(n=300)
    whole = compare(Categorical(), f, y, fluctuations=g, link="monte_carlo")
    monkeypatch.setattr("sgdgp.networks.calibration._CHUNK", 7 * 4 * 16)
    parts = compare(Categorical(), f, y, fluctuations=g, link="monte_carlo")
    assert parts.scale == pytest.approx(whole.scale, rel=1e-9)
    for name in ROWS:
        assert parts.scores[name] == pytest.approx(whole.scores[name], rel=1e-9)


def test_regression_recovers_the_scale_of_the_data():
    generator = torch.Generator().manual_seed(0)
    n, k, truth = 20_000, 32, 9.0
    f, noise, hidden = torch.randn(3, n, 2, generator=generator, dtype=torch.float64)
    deviation = torch.rand(n, 2, generator=generator, dtype=torch.float64) + 0.1
    g = deviation[..., None] * torch.randn(n, 2, k, generator=generator).double()
    y = f + math.sqrt(truth) * deviation * hidden + 0.3 * noise
    found = compare(Gaussian(0.09), f, y, fluctuations=g)
    # K samples know a variance to a relative sqrt(2 / K), which biases the scale.
    assert found.scale == pytest.approx(truth, rel=0.1)
    assert found.recommendation == "posterior"
    calibrated = found.scores["posterior (calibrated)"]
    assert calibrated["coverage"] == pytest.approx(0.95, abs=0.01)
    assert found.scores["posterior (evidence)"]["coverage"] < 0.9
    fitted = found.scores["network with fitted noise"]
    expected = torch.full((2 * n,), found.fitted, dtype=torch.float64)
    flat = f.flatten(), expected, y.flatten()
    assert fitted["nll"] == pytest.approx(
        metrics.negative_log_predictive_density(*flat), rel=1e-9
    )
    assert fitted["rmse"] == calibrated["rmse"] == metrics.rmse(f.flatten(), flat[2])


def test_fitted_noise_is_per_output_where_the_likelihood_has_it():
    f = torch.zeros(100, 2)
    y = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    found = compare(Gaussian([1.0, 1.0]), f, y, variance=torch.ones(100, 2))
    assert found.fitted == pytest.approx(tuple(y.square().mean(0).tolist()))


def entries(*nll: Tensor, joint: tuple[float, ...]) -> dict[str, Entry]:
    return {
        name: Entry(values.double(), {"nll": float(values.mean()), "joint": score})
        for name, values, score in zip(ROWS, nll, joint, strict=True)
    }


def test_undecided_likelihoods_leave_the_verdict_to_the_joint_one():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(100, generator=generator)
    near = base + torch.randn(100, generator=generator)
    for joint, expected in [(-0.1, "posterior"), (-0.3, "network")]:
        scores = (-0.2, -0.2, -0.2, joint)
        found = conclude(entries(base, base, near, near, joint=scores), 1.0, 1.0)
        assert found.recommendation == expected
        assert "cannot be told apart" in found.reason
        assert "joint log-likelihood" in found.reason


def test_an_undecided_comparison_without_joint_scores_keeps_the_network():
    base = torch.rand(100, generator=torch.Generator().manual_seed(0))
    near = base + 0.5 * (-1.0) ** torch.arange(100) - 0.01
    other = base - 0.5 * (-1.0) ** torch.arange(100) + 0.01
    joint = (-0.2, -0.2, math.nan, math.nan)
    # The temperature's gain is no more certain than the posterior's.
    found = conclude(entries(base, near, near, other, joint=joint), 1.0, 1.0)
    assert found.recommendation == "network"
    assert "the simpler one will do" in found.reason


def test_a_posterior_that_is_worse_beyond_doubt_is_not_recommended():
    base = torch.rand(100, generator=torch.Generator().manual_seed(0))
    worse, better = base + 0.1, base - 0.1 * base
    found = conclude(entries(base, better, worse, worse, joint=(0.0,) * 4), 1.0, 2.0)
    assert found.recommendation == "network with temperature"
    assert "higher than that of the network with temperature" in found.reason


def test_paired_difference_is_that_of_the_pairs_not_of_the_means():
    left = torch.randn(100, generator=torch.Generator().manual_seed(0)).double() * 100
    gain, error = paired_difference(left + 1, left)
    assert gain == pytest.approx(1.0)
    assert error == pytest.approx(0.0, abs=1e-9)


def test_the_table_shows_every_entry_and_what_is_recommended():
    f, g, y = doubtful(n=300)
    text = str(compare(Categorical(), f, y, fluctuations=g))
    lines = text.splitlines()
    assert [line[: len(row)] for line, row in zip(lines[1:], ROWS, strict=False)] == [
        *ROWS
    ]
    for column in ("nll", "ece", "brier", "accuracy", "joint"):
        assert column in lines[0]
    assert "300 examples" in text
    assert "Recommended: posterior" in text


def test_in_a_notebook_it_is_a_table_and_as_an_object_a_line():
    f, g, y = doubtful(n=300)
    found = compare(Categorical(), f, y, fluctuations=g)
    table = found._repr_html_()
    assert table.count("<tr>") == 1 + len(ROWS)
    nll = found.scores["network"]["nll"]
    assert f">network</th><td style='text-align: left'>{nll:.4f}</td>" in table
    assert "Recommended: posterior" in table
    assert repr(found) == (
        f"Comparison(num_examples=300, scale={found.scale:.3g}, "
        "recommendation='posterior')"
    )


def test_what_cannot_be_compared_is_refused():
    f, g, y = doubtful(n=10)
    with pytest.raises(ValueError, match="fluctuations: they are needed"):
        compare(Categorical(), f, y)
    with pytest.raises(ValueError, match="fluctuations: they are needed"):
        compare(Categorical(), f, y, variance=0 * f, link="monte_carlo")
    with pytest.raises(ValueError, match="link: expected"):
        compare(Categorical(), f, y, fluctuations=g, link="logit")
    with pytest.raises(ValueError, match="found 9 targets and 10 outputs"):
        compare(Categorical(), f, y[:9], fluctuations=g)
    with pytest.raises(ValueError, match="at least two held-out examples"):
        compare(Categorical(), f[:1], y[:1], fluctuations=g[:1])
    with pytest.raises(ValueError, match="variance: expected finite"):
        compare(Categorical(), f, y, fluctuations=math.nan * g)
    with pytest.raises(ValueError, match=r"variance: .* \(10, 4\), found \(9, 4\)"):
        compare(Categorical(), f, y, fluctuations=g[:9])
    with pytest.raises(ValueError, match="variance: expected no negative"):
        compare(Categorical(), f, y, variance=f)

    class Other(Categorical.__bases__[0]):
        hessian_root = hessian_root_transpose = hessian = gradient = None
        residual = log_prob = None

        def check_targets(self, y: Tensor, num_outputs: int) -> None:
            pass

    other: Likelihood = Other()
    with pytest.raises(TypeError, match="found Other"):
        compare(other, f, y, fluctuations=g)
