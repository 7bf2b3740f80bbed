"""What all files have in common: the same bits back, and nothing that is not sound.

A new kind is tested by its entry in ``stored_kinds.KINDS``.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gpytorch.kernels import RBFKernel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sgdgp
from sgdgp.core import files
from sgdgp.core.errors import StorageError
from tests.core.stored_kinds import KINDS
from tests.models import gp

ROOT = Path(__file__).parents[2]
SAVED = [mark for mark, kind in KINDS.items() if kind.saved]
CHECKPOINTS = [mark for mark, kind in KINDS.items() if not kind.saved]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every kind, and what it is to give."""
    place = tmp_path_factory.mktemp("files")
    for mark, kind in KINDS.items():
        torch.save(kind.write(place / mark), place / f"{mark}.before")
    return place


@pytest.fixture
def path(folder: Path, mark: str, tmp_path: Path) -> Path:
    """A copy of the file of a kind, with what lies beside it."""
    for place in folder.glob(f"{mark}*"):
        if place.suffix not in (".before", ".again"):
            shutil.copy(place, tmp_path)
    return tmp_path / mark


def refused(mark: str, path: Path, words: str) -> None:
    """The file is refused in these words, and left as it is."""
    content = path.read_bytes()
    with pytest.raises(KINDS[mark].error, match=words):
        KINDS[mark].again(path)
    assert path.read_bytes() == content


def test_every_kind_of_file_is_tested_here():
    assert KINDS.keys() == {m for m in files._KINDS if m.startswith("sgdgp.")}
    assert {mark: files._KINDS[mark].words for mark in KINDS} == {
        mark: kind.words for mark, kind in KINDS.items()
    }


def test_a_new_process_finds_the_same_bit_by_bit(folder: Path):
    copy = folder.parent / "again"
    shutil.copytree(folder, copy)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.core.loads_in_a_new_process", str(copy)],
        check=True,
        cwd=ROOT,
        env=environment,
    )
    for mark in KINDS:
        before, again = (
            torch.load(copy / f"{mark}.{when}") for when in ("before", "again")
        )
        assert before.keys() == again.keys() != set()
        for key, value in before.items():
            same = torch.equal if isinstance(value, torch.Tensor) else _same
            assert same(again[key], value), (mark, key)


def _same(one: Any, other: Any) -> bool:
    return bool(one == other)


@pytest.mark.parametrize("mark", KINDS)
def test_a_file_holds_no_code_and_no_names_of_modules(path: Path):
    content = path.read_bytes()
    for word in (b"tests.models", b"gpytorch.kernels", b"sgdgp.solvers", b"__main__"):
        assert word not in content
    assert pickle.PROTO + b"\x02" not in content[:64]


def damages(whole: bytes, count: int) -> Iterator[bytes]:
    """Cut off, flipped bits, overwritten and shifted stretches, anywhere."""
    draw = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(count):
        damaged = bytearray(whole)
        # Half of them in the header, which may be a small part of the file.
        place = draw.randrange(header if i % 2 else len(whole))
        kind = i % 5
        if kind == 0:
            damaged = damaged[: draw.choice([place, len(whole) - 1, 0, 7, 8, 9])]
        elif kind == 1:
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            damaged[place : place + 50] = draw.randbytes(50)
        elif kind == 3:
            damaged.insert(place, draw.randrange(256))
        else:
            del damaged[place]
        if damaged == whole:
            damaged[place] ^= 1
        yield bytes(damaged)


@pytest.mark.parametrize("mark", KINDS)
def test_damaged_files_are_all_refused(mark: str, path: Path):
    for damaged in damages(path.read_bytes(), 60):
        path.write_bytes(damaged)
        refused(mark, path, "damaged|nothing that sgdgp|is not a|format|cannot read")


@pytest.mark.parametrize("mark", KINDS)
def test_blanks_in_the_header_are_noticed_too(mark: str, path: Path):
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].rstrip(b" ")
    padded = header.replace(b'":', b'" :', 1) + b" " * 8
    padded += b" " * (-len(padded) % 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + whole[8 + size :])
    refused(mark, path, "damaged: its header")


@pytest.mark.parametrize("mark", KINDS)
def test_foreign_files_are_refused(mark: str, path: Path):
    for content in (b"", b"notes of a long day\n", b"PK\x03\x04" * 100):
        path.write_bytes(content)
        refused(mark, path, "is damaged, or (not a|nothing that sgdgp has saved)")
    save_file({"weight": torch.ones(3)}, path)
    refused(mark, path, "is not a|is nothing that sgdgp has saved")


@pytest.mark.parametrize("mark", KINDS)
def test_files_of_other_kinds_are_refused(mark: str, path: Path, folder: Path):
    for other in KINDS:
        if other == mark:
            continue
        shutil.copy(folder / other, path)
        with pytest.raises(KINDS[mark].error, match=f"is not a {KINDS[mark].words} of"):
            KINDS[mark].door(path)


@pytest.mark.parametrize("mark", KINDS)
def test_a_missing_file_is_refused_or_begun(mark: str, path: Path):
    path.unlink()
    if KINDS[mark].saved:
        with pytest.raises(StorageError, match="cannot read"):
            KINDS[mark].again(path)
        with pytest.raises(StorageError, match="cannot read"):
            KINDS[mark].again(path.parent)
    else:
        KINDS[mark].again(path)
        assert path.exists()


@pytest.mark.parametrize("mark", KINDS)
def test_a_place_that_cannot_be_written_is_refused(mark: str, tmp_path: Path):
    error, argument = KINDS[mark].error, "path" if mark in SAVED else "checkpoint"
    for place, words in (
        (tmp_path, "expected a file, found directory"),
        (tmp_path / "nowhere" / "file", "expected an existing directory"),
        ("/proc/file", "cannot write into /proc"),
    ):
        with pytest.raises(error, match=f"{argument}: {words}"):
            KINDS[mark].write(place)
    with pytest.raises(TypeError, match=f"{argument}: expected a path, found 3"):
        KINDS[mark].write(3)


def rewritten(path: Path, change: Any) -> None:
    """Change tensors, state and metadata; the checksum is made to fit again."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors, state = load_file(path), json.loads(metadata["state"])
    change(tensors, state, metadata)
    metadata["state"] = json.dumps(state)
    metadata["checksum"] = files._checksum(metadata["state"], tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("mark", KINDS)
def test_newer_and_unknown_formats_are_refused(mark: str, path: Path):
    newer = str(files._KINDS[mark].version + 1)
    rewritten(path, lambda t, s, metadata: metadata.update({mark: newer}))
    refused(mark, path, f"format {newer}, .* reads up to .*; use a newer sgdgp")
    rewritten(path, lambda t, s, metadata: metadata.update({mark: "x"}))
    refused(mark, path, "unknown format 'x'")


def inner(state: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a state."""
    if isinstance(state, dict):
        yield state
    items = state.values() if isinstance(state, dict) else state
    for item in items if isinstance(state, dict | list) else ():
        yield from inner(item)


def as_another_class(tensors: Any, state: Any, metadata: Any) -> None:
    """Every object is said to be of a class that nobody registered."""
    for found in inner(state):
        if "class" in found:
            found["class"] = "os.system"


def as_another_object(tensors: Any, state: Any, metadata: Any) -> None:
    """Every object is said to be of a registered class that it is not of."""
    for found in inner(state):
        if "class" in found:
            found["class"] = "Categorical"


def one_argument_more(tensors: Any, state: Any, metadata: Any) -> None:
    """Every object has an argument that no class knows."""
    for found in inner(state):
        if "class" in found:
            found["arguments"]["magic"] = 1


def without_weights(tensors: Any, state: Any, metadata: Any) -> None:
    """All large tensors have lost their last element."""
    for name, value in tensors.items():
        if value.ndim and len(value):
            tensors[name] = value[:-1].clone()


def without_tensors(tensors: Any, state: Any, metadata: Any) -> None:
    """The file has the names of its tensors only."""
    tensors.clear()


def a_list(tensors: Any, state: Any, metadata: Any) -> None:
    """What was a dictionary is a number."""
    for name in state:
        state[name] = 3


CHANGES = (
    as_another_class,
    as_another_object,
    one_argument_more,
    without_weights,
    without_tensors,
    a_list,
)


@pytest.mark.parametrize("mark", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_files_that_were_tampered_with_consistently_are_refused(
    mark: str, path: Path, change: Any
):
    before = path.read_bytes()
    rewritten(path, change)
    if b"class" in before or change not in CHANGES[:3]:
        refused(mark, path, str(path))


NOT_TOLD = ("sgdgp.checkpoint", "sgdgp.fit", "sgdgp.thompson_sampling")
"""Kinds that find wrong shapes where the file does not tell the right ones either."""


@pytest.mark.parametrize(
    ("mark", "told"),
    [*((mark, True) for mark in KINDS), *((mark, False) for mark in NOT_TOLD)],
)
@pytest.mark.parametrize("shape", ["shorter", "wider"])
def test_each_tensor_of_another_shape_is_refused(
    mark: str, told: bool, shape: str, path: Path
):
    whole, tensors = path.read_bytes(), load_file(path)
    unnoticed = []
    for name, value in tensors.items():
        if not value.numel() or not value.ndim:
            continue
        other = value[:-1] if shape == "shorter" else value.unsqueeze(0)
        path.write_bytes(whole)

        def change(
            tensors: Any,
            state: Any,
            metadata: Any,
            name: str = name,
            other: Any = other,
        ) -> None:
            tensors[name] = other.clone()
            for found in inner(state):
                if not told and "tensor" in found:
                    found.pop("shape")

        rewritten(path, change)
        try:
            KINDS[mark].again(path)
        except KINDS[mark].error:
            continue
        unnoticed.append(name)
    assert unnoticed == []


@pytest.mark.parametrize("mark", KINDS)
def test_a_file_that_lacks_something_is_refused(mark: str, path: Path):
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        names = json.loads(file.metadata()["state"]).keys() - {"versions"}
    for name in sorted(names):
        path.write_bytes(whole)
        rewritten(path, lambda t, state, m, name=name: state.pop(name))
        refused(mark, path, str(path))


@pytest.mark.parametrize("mark", SAVED)
def test_a_write_that_fails_leaves_the_old_file(
    mark: str, path: Path, monkeypatch: pytest.MonkeyPatch
):
    before, names = path.read_bytes(), sorted(path.parent.iterdir())
    _full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left on device"):
        KINDS[mark].write(path)
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names


@pytest.mark.parametrize("mark", CHECKPOINTS)
def test_a_full_disk_does_not_end_the_work(
    mark: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn
):
    _full_disk(monkeypatch)
    found = KINDS[mark].again(tmp_path / "file")
    told = [*found.get("warnings", ()), *(str(w.message) for w in recwarn)]
    assert any("No space left on device" in words for words in told)
    assert list(tmp_path.iterdir()) == []


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sgdgp.core.files.save_file", full)


@pytest.mark.parametrize("mark", SAVED)
def test_loading_with_something_else_says_what_the_file_is(mark: str, path: Path):
    for given in (3, None):
        with pytest.raises(TypeError, match=f"expected .*{KINDS[mark].words}, found"):
            sgdgp.load(path, given)


@pytest.mark.parametrize("mark", CHECKPOINTS)
def test_a_checkpoint_is_nothing_to_be_loaded(mark: str, path: Path):
    with pytest.raises(StorageError, match=f"is a {KINDS[mark].words}, nothing that"):
        sgdgp.load(path, gp(RBFKernel()))


def test_what_a_killed_write_left_is_removed(tmp_path: Path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    name = f".run.safetensors.{files._MACHINE}"
    stale = tmp_path / f"{name}.{killed.pid}.x.tmp"
    other = tmp_path / f".another.safetensors.{files._MACHINE}.{killed.pid}.x.tmp"
    alive = tmp_path / f"{name}.{os.getppid()}.x.tmp"
    elsewhere = tmp_path / f".run.safetensors.{'0' * 8}.{killed.pid}.x.tmp"
    for place in (stale, other, alive, elsewhere):
        place.mkdir()
        (place / "file").write_text("half")
    files.place_of(tmp_path / "run.safetensors")
    assert set(tmp_path.iterdir()) == {other, alive, elsewhere}


def test_many_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path):
    model = gp(RBFKernel())
    posterior = sgdgp.condition(model, num_samples=2, num_features=8)
    place = tmp_path / "shared.safetensors"

    def save_often(_: int) -> None:
        for _ in range(10):
            posterior.save(place)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save_often, range(4)))
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    sgdgp.load(place, model)


@pytest.mark.parametrize("mark", KINDS)
def test_a_pipe_or_a_link_to_itself_is_refused_at_once(mark: str, tmp_path: Path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(link)
    for place in (pipe, link):
        with pytest.raises(KINDS[mark].error, match=place.name):
            KINDS[mark].again(place)


@pytest.mark.parametrize("name", ["pipe", "link", "x" * 300, "zero\0byte"])
def test_what_cannot_be_written_is_refused_in_words(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(StorageError, match="path: "):
        files.place_of(tmp_path / name)


@pytest.mark.parametrize("mark", ["sgdgp.checkpoint"])
def test_a_relative_path_survives_a_change_of_directory(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    KINDS[mark].again("run", lambda p: monkeypatch.chdir(tmp_path / "elsewhere"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "run"]
