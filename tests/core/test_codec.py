"""Values come back as they were; nothing but registered classes is ever made."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sgdgp.core import codec
from sgdgp.core.codec import (
    Contents,
    can_be_stored,
    decode,
    encode,
    is_stored_class,
    register_stored_class,
)
from sgdgp.core.errors import NotStorableError
from tests.stored import stored

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that are registered here are not elsewhere."""
    monkeypatch.setattr(codec, "_STORED", {})


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        float("inf"),
        "text",
        torch.float32,
        CPU,
        slice(2, 5),
        [1, [2.5, None]],
        (1, ("a", False)),
        {"a": {"b": (1, [])}, "tensor": "no tensor"},
    ],
    ids=repr,
)
def test_a_value_comes_back_in_its_own_type(value):
    again = stored(value)
    assert again == value
    assert type(again) is type(value)


def test_a_matrix_comes_back_as_it_lies_in_memory():
    contiguous = torch.arange(6.0).reshape(2, 3)
    for value in (contiguous, contiguous.mT, torch.tensor(3), contiguous[0, ::2]):
        again = stored({"inner": [value]})["inner"][0]
        assert torch.equal(again, value)
        assert again.dtype == value.dtype
    assert stored(contiguous.mT).mT.is_contiguous()


@dataclass
class Note:
    text: str
    value: Tensor


def test_an_object_comes_back_once_its_class_is_registered():
    with pytest.raises(
        NotStorableError, match="note is a Note, which cannot be stored"
    ):
        encode(Note("a", torch.ones(2)), "note", {})
    assert not can_be_stored([Note("a", torch.ones(2))])
    assert register_stored_class(Note) is register_stored_class(Note) is Note
    again = stored(Note("a", torch.ones(2)))
    assert (again.text, again.value.tolist()) == ("a", [1.0, 1.0])
    assert can_be_stored([again])


def test_a_name_is_of_one_class():
    register_stored_class(Note)
    impostor = type("Note", (Note,), {})
    assert is_stored_class(Note)
    assert not is_stored_class(impostor)
    with pytest.raises(ValueError, match="another class named Note"):
        register_stored_class(impostor)
    with pytest.raises(NotStorableError, match="value is a Note"):
        stored(impostor("a", torch.ones(1)))


def test_a_class_that_is_defined_again_replaces_the_former():
    def cell():
        @register_stored_class
        @dataclass
        class Cell:
            text: str

        return Cell

    former, present = cell(), cell()
    assert is_stored_class(present)
    assert not is_stored_class(former)
    assert type(stored(present("a"))) is present


def test_what_is_no_class_is_refused():
    with pytest.raises(TypeError, match="cls: expected a class, found 3"):
        register_stored_class(3)


@register_stored_class
class Squared:
    """Keeps another number than it is made of."""

    def __init__(self, root: float) -> None:
        self.square = root**2

    def stored_parts(self) -> dict[str, float]:
        return {"square": self.square}

    @classmethod
    def from_stored_parts(cls, square: float) -> Squared:
        return cls(square**0.5)


def test_a_class_says_itself_what_it_is_made_of():
    register_stored_class(Squared)
    assert stored(Squared(3.0)).square == 9.0


def test_what_is_given_on_loading_is_not_in_the_file():
    given = object()
    state = encode(
        {"a": [given, 1]}, "v", {}, lambda v, name: name if v is given else None
    )
    assert state == {"dict": {"a": {"list": [{"given": "v.a.0"}, 1]}}}
    found = decode(state, {}, CPU, {"v.a.0": given}.__getitem__)
    assert found["a"][0] is given
    with pytest.raises(ValueError, match=r"not known here: 'v\.a\.0'"):
        decode(state, {}, CPU)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({3: 1}, "expected strings as keys"),
        ([torch.sin], r"value\.0 is a builtin"),
        ({"a": {1}}, r"value\.a is a set"),
    ],
)
def test_what_cannot_be_stored_is_named(value, words):
    with pytest.raises(NotStorableError, match=words):
        stored(value)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ([1], ValueError, "unknown state"),
        ({"class": "os.system", "arguments": {}}, ValueError, "'os.system', which is"),
        ({"tensor": "x", "turned": False}, KeyError, "x"),
        ({"dtype": "object"}, KeyError, "object"),
        ({}, KeyError, "class"),
    ],
)
def test_states_that_nothing_was_encoded_to_are_refused(state, error, words):
    with pytest.raises(error, match=words):
        decode(state, {}, CPU)


def test_contents_are_made_when_they_are_asked_for():
    contents = Contents({"a.b": 1, "a.c": {"class": "Nothing"}, "d": 2}, {})
    assert contents["d"] == contents["a.b"] + 1
    inner = contents.below("a.")
    assert inner["b"] == 1
    with pytest.raises(KeyError):
        inner["d"]
    with pytest.raises(ValueError, match="'Nothing', which is not registered here"):
        inner["c"]
