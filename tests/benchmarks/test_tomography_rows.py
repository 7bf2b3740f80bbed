"""The study of tomography: its images, its scores, and what is asked of figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.checks import SHORT, Check
from benchmarks.study import Row, Study
from benchmarks.tomography import digits, shepp_logan, volumes
from benchmarks.tomography.phantoms import rectangles
from benchmarks.tomography.phantoms import shepp_logan as phantom
from benchmarks.tomography.scores import oracle, pixel_scores, psnr, sample_scores
from sgdgp.tomography.posterior import RESOLUTION


def test_the_head_phantom_is_the_same_at_every_size():
    large, small = phantom(64), phantom(32)
    assert large.reshape(32, 2, 32, 2).mean((1, 3)).allclose(small, atol=0.05)
    assert small.min() == 0.0
    assert 0.9 < float(small.max()) <= 1.0
    # The skull is whole, the brain .2, the ventricles 0, and the tumour is below.
    assert large[32, 32] == pytest.approx(0.2)
    assert large[32, 25] == large[32, 38] == 0.0
    assert large[52, 32] > large[58, 32]


def test_the_middle_of_the_volume_is_the_head():
    volume = phantom(16, slices=15)
    assert volume.shape == (15, 16, 16)
    assert float((volume[7] - phantom(16)).abs().mean()) < 0.05
    assert not volume[0].any()


def test_rectangles_lie_one_way():
    image = rectangles(48, seed=3)
    assert torch.equal(image, rectangles(48, seed=3))
    assert not torch.equal(image, rectangles(48, seed=4))
    assert (image >= 0).all()
    assert (image <= 1).all()
    # Gradients along their sides are of two directions at a right angle: the angle
    # times four is one direction.
    dy, dx = torch.gradient(image)
    around = torch.polar((dx.square() + dy.square()), 4 * torch.atan2(dy, dx))
    assert float(around.sum().abs() / around.abs().sum()) > 0.5


def test_scores_are_those_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(6, 6, generator=generator)
    mean = truth + 0.1 * torch.randn(6, 6, generator=generator)
    deviation = 0.05 + 0.1 * torch.rand(6, 6, generator=generator)
    found = pixel_scores(mean, deviation, truth)
    expected = torch.distributions.Normal(mean, deviation).log_prob(truth).mean()
    assert found["log density"] == pytest.approx(float(expected), abs=1e-5)
    constant = float((truth - mean).square().mean().sqrt())
    same = pixel_scores(mean, torch.full((6, 6), constant), truth)["log density"]
    assert oracle(mean, truth) == pytest.approx(same, abs=1e-5)
    size = float(truth.max() - truth.min())
    assert psnr(truth + 0.01 * size, truth) == pytest.approx(40, abs=1e-3)


def test_scores_of_samples_take_pixels_one_by_one_or_in_patches():
    generator = torch.Generator().manual_seed(0)
    truth = torch.linspace(0, 1, 36).reshape(6, 6)
    samples = truth + 0.1 * torch.randn(4000, 6, 6, generator=generator)
    found = sample_scores(samples, truth)
    assert found["patches"]["1"] == pytest.approx(found["log density"], abs=1e-6)
    # Pixels are independent, so that patches add nothing.
    assert found["patches"]["2"] == pytest.approx(found["log density"], abs=1e-2)
    certain = sample_scores(truth.expand(3, 6, 6), truth)["log density"]
    floor = -math.log(RESOLUTION * math.sqrt(2 * math.pi))
    assert certain == pytest.approx(floor, abs=1e-3)


def short(checks: object) -> list[int]:
    return [i for i, check in enumerate(checks) if not check.holds]  # type: ignore[call-overload]


def test_phantoms_that_fall_short_are_seen():
    good = {
        "ours": {
            "psnr": 34.0,
            "log density": 2.6,
            "coverage": 0.97,
            "correlation": 0.6,
            "patches": {"2": 2.7, "5": 2.8, "image": 2.9},
        },
        "oracle": 2.1,
        "seconds of a core": 50.0,
    }
    checks = shepp_logan.ROWS["shepp-logan-32"].checks
    assert short(checks([good, good])) == []
    bad = {
        "ours": {**good["ours"], "psnr": 31.0, "coverage": 0.995, "log density": 2.4},
        "oracle": 2.1,
        "seconds of a core": 200.0,
    }
    assert short(checks([bad])) == [0, 2, 6, 8]
    assert short(shepp_logan.ROWS["shepp-logan-48"].checks([bad])) == [0, 2, 6, 8]


def test_digits_on_which_another_method_is_better_are_seen():
    def record(ours: float) -> dict:
        figures = {"log density": ours, "psnr": 30.0, "coverage": 0.96}
        return {
            "ours": figures,
            "MC dropout": {**figures, "log density": 2.0},
            "fixed variance": {"log density": 2.1},
        }

    checks = digits.ROWS["digits-05-10"].checks
    assert short(checks([record(2.5), record(1.9)])) == []
    assert short(checks([record(2.1), record(2.05)])) == [0, 1]


def test_samples_that_err_more_than_their_number_predicts_are_seen():
    def record(factor: float, lost: float) -> dict:
        figures = {"predicted": 0.1, "error": 0.1 * factor, "log density": lost}
        return {"Cholesky": {"16": figures, "256": figures}, "conjugate gradients": {}}

    checks = shepp_logan.ROWS["samples"].checks
    assert short(checks([record(1.1, -0.005)])) == []
    assert short(checks([record(1.4, -0.02)])) == [0, 2, 3]


def test_a_table_is_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    def checks(records: list) -> list[Check]:
        worst = max(r["error"] for r in records)
        return [Check("error", f"{worst}", "< 1", worst < 1)]

    row = Row(lambda seed: {"error": seed / 2}, checks, (0, 1))
    study = Study("tomography", "A study.", {"errors": row})
    study.execute("errors", tmp_path, [1, 0])
    file = json.loads((tmp_path / "errors.json").read_text())
    assert file["command"] == "python -m benchmarks.tomography --rows errors"
    assert [r["seed"] for r in file["records"]] == [0, 1]
    assert study.main(["--table", "--results", str(tmp_path)]) == 0
    study.execute("errors", tmp_path, [1, 2])
    asked = ["--table", "--results", str(tmp_path), "--seeds", "1", "2"]
    assert study.main(asked) == SHORT
    assert "falls short" in capsys.readouterr().out


def test_a_larger_volume_takes_time_by_its_voxels():
    record = {
        "size": 64,
        "seconds of a core": {"reconstruction": 100.0, "posterior": 350.0},
        "seconds of a column": {"jvp": 0.4, "vjp": 0.5},
        "peak GB": 9.0,
        **dict.fromkeys(
            ("psnr", "filtered back-projection", "log density", "oracle", "noise"), 1.0
        ),
        "coverage": 0.95,
        "correlation": 0.5,
    }
    record["modelled"] = {"128": volumes.modelled(record, 128)}
    assert record["modelled"]["128"]["hours of a core"] == pytest.approx(1.0)
    assert record["modelled"]["128"]["seconds of a vjp"] == pytest.approx(4.0)
    found = list(volumes.check([record]))
    assert [c.holds for c in found] == [False] + [True] * (len(found) - 1)
