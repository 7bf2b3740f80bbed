"""The reliability diagram is that of the metrics."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

import sgdgp
from sgdgp.metrics import expected_calibration_error, reliability_diagram


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(300, 4, generator=generator)).softmax(1)
    labels = torch.randint(4, (300,), generator=generator)
    return probabilities, labels


def test_bins_that_have_points_and_the_error_in_the_title(predictions):
    ax = sgdgp.plot.networks.reliability(*predictions, bins=10)
    diagram = reliability_diagram(*predictions, 10)
    some = diagram.counts > 0
    assert not bool(some.all())
    line = next(line for line in ax.get_lines() if line.get_linestyle() == "-")
    assert line.get_xdata().tolist() == diagram.confidence[some].tolist()
    assert line.get_ydata().tolist() == diagram.accuracy[some].tolist()
    (markers,) = ax.collections
    assert markers.get_offsets()[:, 1].tolist() == diagram.accuracy[some].tolist()
    error = expected_calibration_error(*predictions, 10)
    assert ax.get_title() == f"expected calibration error {error:.3f}, n = 300"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")


def test_labelled_curves_share_one_diagonal(predictions):
    probabilities, labels = predictions
    _, ax = plt.subplots()
    flat = probabilities.sqrt()
    flat /= flat.sum(1, keepdim=True)
    for name, p in (("raw", probabilities), ("flat", flat)):
        assert sgdgp.plot.networks.reliability(p, labels, label=name, ax=ax) is ax
    error = expected_calibration_error(probabilities, labels)
    assert ax.get_legend_handles_labels()[1][0] == f"raw, ECE {error:.3f}"
    assert sum(line.get_linestyle() == "--" for line in ax.get_lines()) == 1
    assert ax.get_title() == ""


def test_bad_input_is_named(predictions):
    probabilities, labels = predictions
    with pytest.raises(ValueError, match=r"probabilities: .*softmax"):
        sgdgp.plot.networks.reliability(2 * probabilities, labels)
    with pytest.raises(TypeError, match="bins: "):
        sgdgp.plot.networks.reliability(probabilities, labels, bins=1.5)
    with pytest.raises(TypeError, match=r"ax: .*int"):
        sgdgp.plot.networks.reliability(probabilities, labels, ax=3)
