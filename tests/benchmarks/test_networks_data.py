"""Splits, wrong labels, rotations and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.networks import data
from benchmarks.networks.data import ANGLES, load_task, rotate
from benchmarks.networks.settings import SETTINGS
from benchmarks.networks.train import moved, outputs, trained
from benchmarks.uci.download import DamagedFileError, DataUnavailableError
from tests.benchmarks.networks_helpers import TINY, write_images


@pytest.fixture(autouse=True)
def tiny_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_images(tmp_path)
    monkeypatch.setenv("SGDGP_DATA", str(tmp_path))
    monkeypatch.setitem(SETTINGS, "mlp", TINY)
    return tmp_path


def test_train_calibration_and_test_images_are_disjoint_and_fill_the_pool() -> None:
    task = load_task("mlp", 0)
    parts = [task.train, task.calibration, task.test]
    assert [len(part) for part in parts] == [60, 20, 30]
    rows = torch.cat([part.x for part in parts]).flatten(1)
    assert len(rows.unique(dim=0)) == 110
    assert task.train.x.shape == (60, 1, 7, 7)
    assert task.ood.shape == (12, 1, 7, 7)


def test_a_seed_gives_the_same_task_and_another_one_another() -> None:
    one, same, other = load_task("mlp", 1), load_task("mlp", 1), load_task("mlp", 2)
    assert torch.equal(one.train.x, same.train.x)
    assert not torch.equal(one.train.y, other.train.y)


def test_images_are_scaled_by_the_training_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SETTINGS, "mlp", replace(TINY, pool=1))
    x = load_task("mlp", 0).train.x
    assert float(x.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1.0, abs=1e-5)


def test_a_fifth_of_all_labels_is_wrong_and_the_right_ones_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean = load_task("mlp", 0)
    monkeypatch.setitem(SETTINGS, "mlp", replace(TINY, wrong_labels=0.2))
    noisy = load_task("mlp", 0)
    assert int((clean.train.y != noisy.train.y).sum()) == 12
    assert int((clean.calibration.y != noisy.calibration.y).sum()) == 4
    assert int((clean.test.y != noisy.test.y).sum()) == 6
    assert torch.equal(clean.test.y, noisy.clean_y)


def test_a_quarter_turn_is_rot90_and_no_turn_nothing() -> None:
    x = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, 0), x)
    torch.testing.assert_close(rotate(x, 90), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_rotated_digits_come_angle_by_angle() -> None:
    task = load_task("mlp", 0, num_rotated=5)
    assert task.rotated is not None
    torch.testing.assert_close(task.rotated[:5], task.test.x[:5], atol=1e-4, rtol=0)
    assert len(task.rotated) == 5 * len(ANGLES)
    assert torch.equal(task.rotated_y, task.test.y[:5])


def test_colour_images_keep_their_test_set_and_get_clothes_of_their_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smaller = replace(SETTINGS["cifar"], train=30, calibration=10)
    monkeypatch.setitem(SETTINGS, "cifar", smaller)
    task = load_task("cifar", 0)
    assert [len(p) for p in (task.train, task.calibration, task.test)] == [30, 10, 10]
    assert task.ood.shape == (12, 3, 32, 32)
    assert task.rotated is None


def test_training_is_repeatable_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("mlp", 0)
    before = torch.random.get_rng_state()
    network, same = trained(task), trained(task)
    assert torch.equal(torch.random.get_rng_state(), before)
    f = outputs(network, task.train.x)
    assert torch.equal(f, outputs(same, task.train.x))
    assert float((f.argmax(1) == task.train.y).float().mean()) > 0.8
    assert not torch.equal(f, outputs(trained(task, member=1), task.train.x))


def test_moved_images_are_the_same_pixels_in_other_places() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 6, 6, generator=generator)
    found = moved(x, 2, generator)
    assert not torch.equal(found, x)
    sorted_pixels = x.flatten(2).sort().values
    torch.testing.assert_close(found.flatten(2).sort().values, sorted_pixels)


def test_missing_images_are_said_to_be_missing(
    tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_images / "images/mnist_10k.npz").unlink()
    with pytest.raises(DataUnavailableError, match=r"images/mnist_10k\.npz; there is"):
        load_task("mlp", 0)
    monkeypatch.delenv("SGDGP_DATA")
    with pytest.raises(DataUnavailableError, match=r"SGDGP_DATA has to name.*not set"):
        load_task("mlp", 0)


def test_a_damaged_file_is_named(tiny_images: Path) -> None:
    path = tiny_images / "images/mnist_10k.npz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedFileError, match=r"mnist_10k\.npz cannot be read"):
        load_task("mlp", 0)


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"found 'minst', expected one of mnist, noi"):
        data.load_task("minst", 0)
