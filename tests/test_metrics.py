"""Metrics against closed forms, integrals, torch.distributions and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgdgp import metrics

GAUSSIAN_METRICS = [
    metrics.negative_log_predictive_density,
    metrics.interval_coverage,
    metrics.calibration_error,
    metrics.crps,
]


def predictions(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and targets with no relation between them."""
    generator = torch.Generator().manual_seed(seed)
    mean, y = torch.randn(2, n, generator=generator, dtype=torch.float64)
    variance = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    return mean, variance, y


def calibrated(n: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Targets drawn from the prediction, with ``scale`` times its deviation."""
    generator = torch.Generator().manual_seed(1)
    mean, noise = torch.randn(2, n, generator=generator, dtype=torch.float64)
    variance = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    return mean, variance, mean + scale * variance.sqrt() * noise


def test_rmse_is_the_euclidean_distance_over_root_n():
    mean, _, y = predictions()
    expected = torch.linalg.vector_norm(mean - y) / math.sqrt(len(y))
    assert metrics.rmse(mean, y) == pytest.approx(float(expected), rel=1e-12)


def test_rmse_of_three_and_four_is_known():
    error = metrics.rmse(torch.zeros(2), torch.tensor([3.0, 4.0]))
    assert error == pytest.approx(math.sqrt(12.5), rel=1e-12)


def test_negative_log_predictive_density_agrees_with_torch_distributions():
    mean, variance, y = predictions()
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).mean()
    found = metrics.negative_log_predictive_density(mean, variance, y)
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_crps_agrees_with_its_defining_integral():
    mean, variance, y = predictions(n=5)
    t = torch.linspace(-15.0, 15.0, 600_001, dtype=torch.float64)
    normal = torch.distributions.Normal(mean[:, None], variance.sqrt()[:, None])
    squares = (normal.cdf(t) - (t >= y[:, None]).double()).square()
    expected = torch.trapezoid(squares, t, dim=-1).mean()
    assert metrics.crps(mean, variance, y) == pytest.approx(float(expected), abs=1e-4)


def test_crps_agrees_with_the_mean_distance_between_samples():
    """CRPS = E|Y - y| - E|Y - Y'| / 2, here with 200,000 draws."""
    mean, scale, y = 0.3, 0.7, -0.5
    generator = torch.Generator().manual_seed(0)
    draws = mean + scale * torch.randn(
        2, 200_000, generator=generator, dtype=torch.float64
    )
    terms = (draws[0] - y).abs() - 0.5 * (draws[0] - draws[1]).abs()
    error_bar = 4 * float(terms.std()) / math.sqrt(terms.numel())
    found = metrics.crps(
        torch.tensor([mean]), torch.tensor([scale**2]), torch.tensor([y])
    )
    assert found == pytest.approx(float(terms.mean()), abs=error_bar)


def test_crps_of_a_narrow_prediction_is_the_absolute_error():
    mean, _, y = predictions()
    variance = torch.full_like(mean, 1e-20)
    expected = float((mean - y).abs().mean())
    assert metrics.crps(mean, variance, y) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_coverage_counts_the_points_inside_the_normal_quantiles(level: float):
    mean, variance, y = predictions(n=1000)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    tail = torch.tensor((1 - level) / 2, dtype=torch.float64)
    inside = (y >= normal.icdf(tail)) & (y <= normal.icdf(1 - tail))
    found = metrics.interval_coverage(mean, variance, y, level)
    assert found == pytest.approx(float(inside.double().mean()), abs=1e-12)


def test_a_95_percent_interval_is_1_96_standard_deviations_wide():
    one = torch.ones(2, dtype=torch.float64)
    y = torch.tensor([1.9599, -1.9600], dtype=torch.float64)
    assert metrics.interval_coverage(0 * one, one, y) == 0.5


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_coverage_of_calibrated_predictions_is_the_level(level: float):
    n = 20_000
    found = metrics.interval_coverage(*calibrated(n), level=level)
    assert found == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / n))


def test_calibration_error_is_the_mean_gap_of_coverage_over_levels():
    mean, variance, y = predictions(n=300)
    gaps = [
        abs(metrics.interval_coverage(mean, variance, y, level) - level)
        for level in metrics.CALIBRATION_LEVELS
    ]
    expected = sum(gaps) / len(gaps)
    found = metrics.calibration_error(mean, variance, y)
    assert found == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_calibrated_predictions_is_sampling_noise():
    n = 20_000
    assert metrics.calibration_error(*calibrated(n)) < 1.5 / math.sqrt(n)


def test_calibration_error_of_doubled_deviations_is_known():
    """With targets twice as spread as predicted, c(p) = erf(erfinv(p) / 2)."""
    n = 20_000
    levels = torch.tensor(metrics.CALIBRATION_LEVELS, dtype=torch.float64)
    expected = (torch.erf(torch.erfinv(levels) / 2) - levels).abs().mean()
    found = metrics.calibration_error(*calibrated(n, scale=2.0))
    assert found == pytest.approx(float(expected), abs=2 / math.sqrt(n))


def test_calibration_error_of_certain_and_wrong_predictions_is_one_half():
    n = 10
    found = metrics.calibration_error(
        torch.zeros(n), torch.full((n,), 1e-12), torch.ones(n)
    )
    assert found == pytest.approx(0.5, abs=1e-12)


@given(
    shift=st.floats(-100, 100),
    scale=st.floats(1e-2, 1e2),
    seed=st.integers(0, 10_000),
)
def test_metrics_follow_a_change_of_units(shift: float, scale: float, seed: int):
    """y -> a y + b: errors scale by a, the density shifts, coverage stays."""
    mean, variance, y = predictions(n=20, seed=seed)
    moved = (scale * mean + shift, scale**2 * variance, scale * y + shift)
    close = {"rel": 1e-6, "abs": 1e-9}
    assert metrics.rmse(moved[0], moved[2]) == pytest.approx(
        scale * metrics.rmse(mean, y), **close
    )
    assert metrics.crps(*moved) == pytest.approx(
        scale * metrics.crps(mean, variance, y), **close
    )
    assert metrics.negative_log_predictive_density(*moved) == pytest.approx(
        metrics.negative_log_predictive_density(mean, variance, y) + math.log(scale),
        **close,
    )
    assert metrics.calibration_error(*moved) == pytest.approx(
        metrics.calibration_error(mean, variance, y), abs=1e-9
    )


@given(seed=st.integers(0, 10_000), stretch=st.floats(1.05, 3.0))
def test_the_right_variance_scores_best_on_average(seed: int, stretch: float):
    """Proper scores: the expected score over targets is least at the truth."""
    mean = torch.zeros(4_000, dtype=torch.float64)
    z = (torch.arange(4_000, dtype=torch.float64) + 0.5) / 4_000
    truth = 0.1 + (seed % 50) / 10
    y = math.sqrt(2 * truth) * torch.erfinv(2 * z - 1)
    variance = torch.full_like(mean, truth)
    for score in (metrics.negative_log_predictive_density, metrics.crps):
        assert score(mean, variance, y) < score(mean, variance * stretch, y)
        assert score(mean, variance, y) < score(mean, variance / stretch, y)


def test_float32_inputs_are_summed_in_float64():
    mean, variance, y = (t.float() for t in predictions(n=100_000))
    for metric in GAUSSIAN_METRICS:
        found = metric(mean, variance, y)
        expected = metric(mean.double(), variance.double(), y.double())
        assert isinstance(found, float)
        assert found == expected


@pytest.mark.parametrize("metric", GAUSSIAN_METRICS)
@pytest.mark.parametrize("value", [0.0, -1e-3])
def test_a_variance_that_is_not_positive_is_refused(metric, value: float):
    mean, variance, y = predictions(n=10)
    variance[[3, 7]] = value
    with pytest.raises(ValueError, match=r"variance: .*found 2 that are.*index 3"):
        metric(mean, variance, y)


@pytest.mark.parametrize("metric", GAUSSIAN_METRICS)
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_counted_and_located(metric, position: int, value: float):
    arguments = predictions(n=10)
    arguments[position][4] = value
    name = ("mean", "variance", "y")[position]
    with pytest.raises(ValueError, match=rf"{name}: .*found 1 NaN or.*index \(4,\)"):
        metric(*arguments)


@pytest.mark.parametrize("metric", GAUSSIAN_METRICS)
def test_shapes_that_do_not_match_are_named(metric):
    mean, variance, y = predictions(n=10)
    with pytest.raises(ValueError, match=r"y: .* as in mean, 10, found 9"):
        metric(mean, variance, y[:9])
    with pytest.raises(ValueError, match=r"mean: .*found \(10, 1\)"):
        metric(mean[:, None], variance, y)
    with pytest.raises(ValueError, match=r"mean: .*found \(0,\)"):
        metric(mean[:0], variance[:0], y[:0])


def test_what_is_not_a_floating_point_tensor_is_refused():
    mean, variance, y = predictions(n=10)
    with pytest.raises(TypeError, match=r"y: expected a torch\.Tensor, found list"):
        metrics.rmse(mean, y.tolist())
    with pytest.raises(TypeError, match=r"y: .*found torch\.int64"):
        metrics.crps(mean, variance, y.long())


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_levels_that_are_not_probabilities_are_refused(level: float):
    arguments = predictions(n=10)
    with pytest.raises(ValueError, match="level: expected prob"):
        metrics.interval_coverage(*arguments, level=level)
    with pytest.raises(ValueError, match="levels: expected prob"):
        metrics.calibration_error(*arguments, levels=[0.5, level])
    with pytest.raises(ValueError, match=r"levels: .*found none"):
        metrics.calibration_error(*arguments, levels=[])


def class_predictions(
    n: int = 500, classes: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Probabilities (n, C) and classes drawn from flatter ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial((logits / 2).softmax(1), 1, generator=generator)
    return logits.softmax(1), drawn.squeeze(1)


def test_class_scores_agree_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = class_predictions()
    assert metrics.negative_log_likelihood(p, y) == pytest.approx(
        sklearn.log_loss(y, p), rel=1e-9
    )
    assert metrics.accuracy(p, y) == pytest.approx(
        sklearn.accuracy_score(y, p.argmax(1)), rel=1e-12
    )
    one_hot = torch.nn.functional.one_hot(y, 4)
    assert metrics.brier_score(p, y) == pytest.approx(
        4 * sklearn.mean_squared_error(one_hot, p), rel=1e-9
    )


@given(
    inside=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    outside=st.lists(st.integers(0, 6), min_size=1, max_size=30),
)
def test_auroc_with_ties_agrees_with_scikit_learn(inside, outside):
    sklearn = pytest.importorskip("sklearn.metrics")
    label = [0] * len(inside) + [1] * len(outside)
    expected = sklearn.roc_auc_score(label, inside + outside)
    found = metrics.auroc(torch.tensor(inside).double(), torch.tensor(outside).double())
    assert found == pytest.approx(expected, abs=1e-12)


def test_auroc_of_separated_scores_is_one_and_of_equal_ones_a_half():
    low, high = torch.zeros(3), torch.ones(5)
    assert metrics.auroc(low, high) == 1.0
    assert metrics.auroc(high, low) == 0.0
    assert metrics.auroc(low, low) == 0.5
    assert metrics.auroc(low, torch.full((2,), math.inf)) == 1.0


def test_calibration_gap_of_classes_agrees_with_a_loop_over_bins():
    p, y = class_predictions()
    confidence, predicted = p.max(1)
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            right = (predicted == y)[inside].double().mean()
            gap = (right - confidence[inside].mean()).abs()
            expected += float(gap * inside.double().mean())
    found = metrics.expected_calibration_error(p, y)
    assert found == pytest.approx(expected, abs=1e-12)
    diagram = metrics.reliability_diagram(p, y)
    assert diagram.error == found
    assert int(diagram.counts.sum()) == len(y)


def test_calibration_gap_of_known_predictions_is_known():
    """All say 0.8, six of ten are right."""
    p = torch.tensor([[0.8, 0.2]]).expand(10, 2)
    y = torch.tensor([0] * 6 + [1] * 4)
    assert metrics.expected_calibration_error(p, y) == pytest.approx(0.2, abs=1e-7)
    one = metrics.reliability_diagram(torch.eye(2), torch.tensor([0, 1]))
    assert int(one.counts[-1]) == 2
    assert one.error == 0.0


def test_a_sure_and_wrong_prediction_costs_what_the_definitions_say():
    p, y = torch.eye(2), torch.tensor([1, 0])
    assert metrics.negative_log_likelihood(p, y) == math.inf
    assert metrics.brier_score(p, y) == 2.0
    assert metrics.expected_calibration_error(p, y) == 1.0
    assert metrics.accuracy(p, y) == 0.0


def test_the_true_probabilities_score_best_on_average():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    truth = logits.softmax(1)
    counts = (truth * 10_000).round().long().flatten()
    y = torch.arange(3).repeat_interleave(counts)
    for score in (metrics.negative_log_likelihood, metrics.brier_score):
        best = score(truth.expand(len(y), 3), y)
        for temperature in (0.8, 1.25):
            other = (logits / temperature).softmax(1).expand(len(y), 3)
            assert score(other, y) > best


CLASS_METRICS = [
    metrics.negative_log_likelihood,
    metrics.accuracy,
    metrics.brier_score,
    metrics.expected_calibration_error,
]


@pytest.mark.parametrize("metric", CLASS_METRICS)
def test_class_scores_of_float32_are_summed_in_float64(metric):
    p, y = class_predictions(20_000)
    found = metric(p.float(), y)
    assert isinstance(found, float)
    assert found == pytest.approx(metric(p, y), abs=1e-6)


@pytest.mark.parametrize("metric", CLASS_METRICS)
def test_what_is_no_class_prediction_is_refused(metric):
    p, y = class_predictions(10)
    with pytest.raises(TypeError, match=r"probabilities: .* found torch\.int64"):
        metric(p.long(), y)
    with pytest.raises(TypeError, match=r"y: .* integers, found torch\.float64"):
        metric(p, y.double())
    with pytest.raises(ValueError, match=r"y: expected shape \(10,\), found \(9,\)"):
        metric(p, y[:9])
    with pytest.raises(ValueError, match=r"y: .* from 0 to 3, found 4"):
        metric(p, torch.full_like(y, 4))
    with pytest.raises(ValueError, match=r"y: .* from 0 to 3, found -100"):
        metric(p, torch.full_like(y, -100))
    with pytest.raises(ValueError, match="apply softmax"):
        metric(p.log(), y)
    with pytest.raises(ValueError, match=r"probabilities: .* found \(0, 4\)"):
        metric(p[:0], y[:0])


def test_scores_that_cannot_be_ranked_are_refused():
    good = torch.zeros(3)
    with pytest.raises(ValueError, match="outside: expected scores, found NaN"):
        metrics.auroc(good, torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"inside: .* found \(0,\)"):
        metrics.auroc(good[:0], good)
    with pytest.raises(TypeError, match=r"outside: .* found torch\.int64"):
        metrics.auroc(good, good.long())


def test_a_diagram_without_bins_is_refused():
    with pytest.raises(ValueError, match="bins: expected at least 1, found 0"):
        metrics.reliability_diagram(*class_predictions(10), bins=0)
