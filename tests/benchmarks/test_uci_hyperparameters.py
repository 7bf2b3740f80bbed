"""Published hyperparameters and the model they make."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.uci.hyperparameters import (
    Hyperparameters,
    hyperparameters_for,
    parse,
)
from benchmarks.uci.model import build_model, kernel_block

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData


def test_published_values_are_found_per_split(tiny: TinyData) -> None:
    found = hyperparameters_for("published", "tiny", 1, 3)
    assert found == Hyperparameters(
        tiny.noise_scale, tiny.signal_scale, tiny.lengthscale
    )


def test_only_the_noise_is_replaced(tiny: TinyData) -> None:
    found = hyperparameters_for("published", "tiny", 0, 3, noise_scale=0.001)
    assert found == Hyperparameters(0.001, tiny.signal_scale, tiny.lengthscale)


def test_a_set_without_published_values_says_what_to_do(tiny: TinyData) -> None:
    with pytest.raises(ValueError, match=r"none for 'yacht'.*try 'default'"):
        hyperparameters_for("published", "yacht", 0, 6)
    assert hyperparameters_for("default", "yacht", 0, 4).lengthscale == (2.0,) * 4


def test_a_split_without_values_is_named(tiny: TinyData) -> None:
    with pytest.raises(ValueError, match=r"split 2 of 'tiny', only for splits 0, 1"):
        hyperparameters_for("published", "tiny", 2, 3)


def test_the_wrong_number_of_lengthscales_is_refused(tiny: TinyData) -> None:
    with pytest.raises(ValueError, match=r"lengthscale: found 3 values.*expected 4"):
        hyperparameters_for("published", "tiny", 0, 4)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan])
def test_noise_that_is_not_positive_is_refused(tiny: TinyData, noise: float) -> None:
    with pytest.raises(ValueError, match="noise_scale"):
        hyperparameters_for("published", "tiny", 0, 3, noise_scale=noise)


def test_the_papers_text_file_is_read_and_nan_splits_are_left_out() -> None:
    text = (
        "Dataset: pol, split 0\n"
        "HparamsTuple(noise_scale=0.25, signal_scale=1.5e-1, length_scale="
        "Array([ 0.5,\n        1.25e+01], dtype=float32))\n\n"
        "Dataset: 3droad, split 3\n"
        "HparamsTuple(noise_scale=nan, signal_scale=nan, length_scale="
        "Array([nan, nan, nan], dtype=float32))\n"
    )
    expected = {"noise_scale": 0.25, "signal_scale": 0.15, "lengthscale": [0.5, 12.5]}
    assert parse(text) == {"pol": {"0": expected}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_enter_the_model_as_standard_deviations(dtype: torch.dtype) -> None:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = build_model(x, x[:, 0], Hyperparameters(0.001, 0.4, (0.5, 2.0)))
    assert model.likelihood.noise.item() == pytest.approx(1e-6, rel=1e-4)
    scaled = x.double() / torch.tensor([0.5, 2.0], dtype=torch.float64)
    r = math.sqrt(3) * torch.cdist(scaled, scaled)
    expected = 0.16 * (1 + r) * torch.exp(-r)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    block = kernel_block(model, x, x).double()
    assert (block - expected).abs().max() < tolerance
