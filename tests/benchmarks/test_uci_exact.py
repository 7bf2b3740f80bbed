"""The float64 reference against the textbook formula, densely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.uci import exact
from benchmarks.uci.data import load_split
from benchmarks.uci.exact import exact_prediction
from benchmarks.uci.hyperparameters import hyperparameters_for
from benchmarks.uci.model import build_model, kernel_block

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData


@pytest.mark.parametrize("block", [7, 27, 100])
def test_mean_and_variance_are_the_closed_form(tiny: TinyData, block: int) -> None:
    split = load_split("tiny", 0)
    values = hyperparameters_for("published", "tiny", 0, 3)
    found = exact_prediction(split, values, block=block)
    model = build_model(split.x, split.y, values)
    noise = values.noise_scale**2
    h = kernel_block(model, split.x, split.x) + noise * torch.eye(81).double()
    cross = kernel_block(model, split.x_test, split.x)
    mean = cross @ torch.linalg.solve(h, split.y)
    explained = (cross * torch.linalg.solve(h, cross.T).T).sum(1)
    variance = values.signal_scale**2 - explained + noise
    torch.testing.assert_close(found.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.variance, variance, rtol=1e-10, atol=1e-10)


def test_too_little_memory_is_said_before_the_work(
    tiny: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "available_bytes", lambda *_: 1000.0)
    values = hyperparameters_for("published", "tiny", 0, 3)
    with pytest.raises(ValueError, match=r"needs .* GB for n = 81"):
        exact_prediction(load_split("tiny", 0), values)


def test_single_precision_is_refused(tiny: TinyData) -> None:
    values = hyperparameters_for("published", "tiny", 0, 3)
    with pytest.raises(TypeError, match="float64"):
        exact_prediction(load_split("tiny", 0, dtype=torch.float32), values)
