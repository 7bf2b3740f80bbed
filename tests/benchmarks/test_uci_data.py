"""The loader, on a tiny folder; real data only where SGDGP_DATA is set."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.uci import data, download
from benchmarks.uci.data import load_split, locate, standardise
from benchmarks.uci.download import (
    DamagedFileError,
    DataUnavailableError,
    cached_download,
    checksum,
    verify,
)
from benchmarks.uci.registry import DATASETS, MASK

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData


def test_a_split_holds_the_masked_rows_in_training_units(tiny: TinyData) -> None:
    split = load_split("tiny", 3)
    table, test = tiny.table(), tiny.mask()[:, 3].astype(bool)
    train = table[~test]
    expected = (table - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(split.x[:, :2], expected[~test][:, :2], atol=1e-8)
    np.testing.assert_allclose(split.x_test[:, :2], expected[test][:, :2], atol=1e-8)
    np.testing.assert_allclose(split.y_test, expected[test][:, 3], atol=1e-8)
    assert split.x.shape == (81, 3)
    assert split.y.shape == (81,)
    assert split.y.mean().abs() < 1e-12
    assert abs(split.y.std(correction=0) - 1) < 1e-12


def test_a_constant_column_is_exactly_zero(tiny: TinyData) -> None:
    split = load_split("tiny", 0)
    assert torch.equal(split.x[:, 2], torch.zeros(81, dtype=torch.float64))
    assert torch.equal(split.x_test[:, 2], torch.zeros(9, dtype=torch.float64))


def test_a_column_that_varies_only_in_the_test_rows_is_only_centred() -> None:
    train, test = standardise(np.full((5, 1), 0.3), np.array([[0.3], [1.3]]))
    np.testing.assert_array_equal(train, np.zeros((5, 1)))
    np.testing.assert_allclose(test, [[0.0], [1.0]])


def test_the_dtype_is_the_one_asked_for(tiny: TinyData) -> None:
    assert load_split("tiny", 0, dtype=torch.float32).x.dtype == torch.float32


@pytest.mark.parametrize("split", [-1, 10])
def test_a_split_that_does_not_exist_is_refused(tiny: TinyData, split: int) -> None:
    with pytest.raises(ValueError, match=rf"split: found {split}, expected 0 to 9"):
        load_split("tiny", split)


def test_an_unknown_name_is_refused_with_the_known_ones(tiny: TinyData) -> None:
    with pytest.raises(ValueError, match=r"found 'poll'.*pol, elevators.*energy"):
        load_split("poll", 0)


def test_a_folder_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGDGP_DATA", "/nowhere")
    with pytest.raises(DataUnavailableError, match=r"SGDGP_DATA.*'/nowhere'"):
        locate("pol")


def test_a_pinned_file_with_other_content_is_damaged(tiny: TinyData) -> None:
    tiny.write("yacht")
    with pytest.raises(DamagedFileError, match=r"yacht/data.csv.gz is damaged"):
        load_split("yacht", 0)


def test_a_cut_file_is_damaged(tiny: TinyData) -> None:
    path = tiny.write("tiny")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedFileError, match="cannot be read"):
        load_split("tiny", 0)


def test_nan_in_the_data_is_located(tiny: TinyData) -> None:
    table = tiny.table()
    table[[7, 9], 1] = np.nan
    tiny.write("tiny", table)
    with pytest.raises(DamagedFileError, match=r"2 entries.*row 7, column 1"):
        load_split("tiny", 0)


def test_a_mask_of_another_length_is_refused(tiny: TinyData) -> None:
    tiny.write("tiny", mask=tiny.mask(80))
    with pytest.raises(DamagedFileError, match=r"mask has shape \(80, 10\)"):
        load_split("tiny", 0)


def test_checksums_are_those_of_sha256sum_and_git(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"what is up, doc?")
    # The git value is the well-known example of Pro Git, section 10.2.
    blob = "git-blob:bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert checksum(path, "git-blob") == blob
    sha256 = hashlib.sha256(b"what is up, doc?").hexdigest()
    assert checksum(path, "sha256") == f"sha256:{sha256}"
    verify(path, blob)
    with pytest.raises(DamagedFileError, match="expected git-blob:0000"):
        verify(path, "git-blob:0000")


def test_a_download_is_kept_and_not_repeated(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    expected = checksum(source, "sha256")
    target = tmp_path / "cache/uci/file"
    urls = ["file:///nowhere/file", source.as_uri()]
    assert cached_download(target, urls, expected).read_bytes() == b"content"
    source.unlink()
    assert cached_download(target, urls, expected).read_bytes() == b"content"


def test_a_wrong_download_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"an error page")
    target = tmp_path / "cache/file"
    with pytest.raises(DataUnavailableError, match=r"damaged.*\n.*SGDGP_DATA"):
        cached_download(target, [source.as_uri()], "sha256:00")
    assert list(target.parent.iterdir()) == []


def test_a_set_that_is_not_in_the_folder_comes_from_the_cache(
    tiny: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def note(path: Path, urls: list[str], expected: str) -> Path:
        asked.append(path)
        assert expected == DATASETS["song"].files[path.name]
        assert all(f"uci_datasets/song/{path.name}" in url for url in urls)
        return path

    monkeypatch.setattr(data, "cached_download", note)
    assert locate("song") == asked
    assert [path.name for path in asked] == ["data.csv.gz", "data1.csv.gz", MASK]
    assert asked[0].is_relative_to(download.cache_folder())


@pytest.mark.skipif(not os.environ.get("SGDGP_DATA"), reason="SGDGP_DATA is not set")
def test_yacht_has_its_published_shape_and_ten_disjoint_test_sets() -> None:
    splits = [load_split("yacht", index) for index in range(10)]
    assert all(split.x.shape[1] == 6 for split in splits)
    assert sum(len(split.y_test) for split in splits) == 308
    assert all(len(split.y) + len(split.y_test) == 308 for split in splits)
    for split in splits:
        assert abs(split.y.double().std(correction=0) - 1) < 1e-9
