"""Objects as tensors and JSON, and back; nothing in a file is ever executed.

A file knows an object by the name of its class and by the arguments of its constructor,
which the class keeps as attributes of the same names. A class that keeps something else
says what in two methods, ``stored_parts()`` and ``from_stored_parts(**parts)``. Classes
are looked up by name in the table of those that were registered in this process, never
by what a file says of modules.

What is not in a file but *given* on loading, such as a kernel, has a mark there: one
function makes the mark on writing, another finds the object on reading.
"""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from sgdgp.core.errors import NotStorableError, StorageError
from sgdgp.core.files import FileKind, package_versions, read_file, write_file

C = TypeVar("C", bound=type[Any])

Marker: TypeAlias = Callable[[Any, str], Any]
"""(value, name) to the mark of a value that will be given on reading, or None."""

Finder: TypeAlias = Callable[[Any], Any]
"""The object behind a mark."""

MISFITS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What may go wrong with the values of a sound file that is not what it says."""

_STORED: dict[str, type] = {}
_PLACE = ("__module__", "__qualname__")  # where a class is defined


def register_stored_class(cls: C) -> C:
    """Let objects of a class be stored, such as a likelihood; usable as a decorator.

    The class must keep each argument of its constructor as an attribute of the same
    name: a tensor, a number, a string, None, an object of a registered class, or a
    sequence or dictionary of those. To load a file, it must have been registered in
    that process too.

    Args:
        cls: The class; files know it by its name.

    Raises:
        TypeError: No class.
        ValueError: Another class of that name is registered.
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls: expected a class, found {cls!r}")
    known = _STORED.get(cls.__name__, cls)
    # A cell of a notebook that is run again makes the same class anew.
    same = all(getattr(known, a) == getattr(cls, a) for a in _PLACE)
    if known is not cls and (not same or issubclass(cls, known)):
        raise ValueError(f"another class named {cls.__name__} is registered")
    _STORED[cls.__name__] = cls
    return cls


def is_stored_class(cls: type) -> bool:
    """Whether objects of exactly this class can be stored."""
    return _STORED.get(cls.__name__) is cls


def can_be_stored(value: Any) -> bool:
    """Whether ``encode`` takes a value."""
    try:
        encode(value, "value", {})
    except NotStorableError:
        return False
    return True


def encode(
    value: Any, name: str, tensors: dict[str, Tensor], given: Marker | None = None
) -> Any:
    """What JSON needs to know of a value; its tensors are put into ``tensors``.

    Args:
        value: None, a number, a string, a tensor, a dtype, a device (which is the
            reader's afterwards), a slice, an object of a registered class, or a list,
            tuple or dictionary (by strings) of those.
        name: Prefix of the names of its tensors: where the value is, with dots.
        tensors: Where they go.
        given: Marks what is not to be stored. Default: nothing.

    Raises:
        NotStorableError: There is something else in it.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = operator.index(value)  # NumPy's too
    mark = None if given is None else given(value, name)
    if mark is not None:
        return {"given": mark}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        # Blocks of weights lie as transposes, and come back so.
        turned = value.ndim == 2 and not value.is_contiguous()
        tensors[name] = value.mT if turned else value
        return {"tensor": name, "turned": turned, "shape": list(value.shape)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "of the reader"}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop]}
    if isinstance(value, list | tuple):
        items = [encode(v, f"{name}.{i}", tensors, given) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise NotStorableError(f"{name}: expected strings as keys, found {value!r}")
        return {"dict": _encode_parts(value, name, tensors, given)}
    cls = type(value)
    if not is_stored_class(cls):
        raise NotStorableError(
            f"{name} is a {cls.__name__}, which cannot be stored: register the class "
            "with sgdgp.register_stored_class"
        )
    parts = _encode_parts(_parts_of(value), name, tensors, given)
    return {"class": cls.__name__, "arguments": parts}


def decode(
    state: Any,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    given: Finder | None = None,
) -> Any:
    """The value behind ``encode``.

    Args:
        state: What was returned.
        tensors: What was put there.
        device: Where its tensors go.
        given: Finds what was marked.

    Raises:
        ValueError: An object is of a class that is not registered in this process, or
            the state is none of ``encode``.
        KeyError: A tensor is missing.
    """
    if state is None or isinstance(state, bool | int | float | str):
        return state
    if not isinstance(state, dict):
        raise ValueError(f"unknown state {state!r}")

    def again(inner: Any) -> Any:
        return decode(inner, tensors, device, given)

    if "tensor" in state:
        value = tensors[state["tensor"]].to(device)
        value = value.mT if state["turned"] else value
        found = list(value.shape)
        # Files of version 0.1.0 do not say.
        if found != (shape := state.get("shape", found)):
            raise ValueError(f"{state['tensor']} has shape {found}, expected {shape}")
        return value
    if "given" in state:
        if given is None:
            raise ValueError(f"it needs what is not known here: {state['given']!r}")
        return given(state["given"])
    if "dtype" in state:
        return _DTYPES[state["dtype"]]
    if "device" in state:
        return device
    if "slice" in state:
        return slice(*state["slice"])
    if "list" in state:
        return [again(item) for item in state["list"]]
    if "tuple" in state:
        return tuple(again(item) for item in state["tuple"])
    if "dict" in state:
        return {key: again(item) for key, item in state["dict"].items()}
    cls = _STORED.get(state["class"])
    if cls is None:
        raise ValueError(
            f"it holds a {state['class']!r}, which is not registered here; import what "
            "calls register_stored_class for it first"
        )
    build = getattr(cls, "from_stored_parts", cls)
    return build(**{key: again(item) for key, item in state["arguments"].items()})


class Contents:
    """What a file holds: values by name, made when they are asked for.

    Args:
        state: ``encode`` of each value.
        tensors: Their tensors.
        device: Where tensors go.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self._state = state
        self._tensors = tensors
        self.device = torch.device(device)

    def __getitem__(self, name: str) -> Any:
        """The value of that name."""
        return self.value(name)

    def value(self, name: str, given: Finder | None = None) -> Any:
        """The value of that name, with what is given; errors are those of ``decode``.

        Raises:
            KeyError: There is none.
        """
        return decode(self._state[name], self._tensors, self.device, given)

    def below(self, prefix: str) -> Contents:
        """The values whose names begin so, by the rest of their names."""
        inner = {
            name.removeprefix(prefix): state
            for name, state in self._state.items()
            if name.startswith(prefix)
        }
        return Contents(inner, self._tensors, self.device)


def write_values(
    path: Path, kind: FileKind, values: Mapping[str, Any], given: Marker | None = None
) -> None:
    """Put a file of values in the place of an old one, in one step.

    Raises:
        NotStorableError: A value cannot be stored; nothing was written.
        OSError: The file could not be written; the old one is untouched.
    """
    tensors: dict[str, Tensor] = {}
    state = _encode_parts(values, "", tensors, given)
    write_file(path, kind, tensors, {"versions": package_versions(), **state})


def read_values(
    path: str | os.PathLike[str], kind: FileKind, device: torch.device | str = "cpu"
) -> Contents:
    """The values of a file.

    Raises:
        StorageError: Not of that kind, damaged, or of a newer format.
    """
    tensors, state = read_file(Path(path), kind)
    return Contents(state, tensors, device)


@contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """What goes wrong in here is that a file does not fit what it is used with.

    Args:
        path: The file.
        what: What it is used with: "model", "network".

    Raises:
        StorageError: Anything went wrong.
    """
    try:
        yield
    except StorageError as error:
        if str(path) in str(error):
            raise
        raise StorageError(f"{error}; the file is {path}") from error
    except MISFITS as error:
        raise StorageError(f"{path} does not fit this {what}: {error}") from error


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def _encode_parts(
    parts: Mapping[str, Any],
    name: str,
    tensors: dict[str, Tensor],
    given: Marker | None,
) -> dict[str, Any]:
    prefix = f"{name}." if name else ""
    return {k: encode(v, f"{prefix}{k}", tensors, given) for k, v in parts.items()}


def _parts_of(value: Any) -> Mapping[str, Any]:
    """What an object is made of, by name."""
    if hasattr(value, "stored_parts"):
        parts: Mapping[str, Any] = value.stored_parts()
        return parts
    names = inspect.signature(type(value)).parameters
    return {name: getattr(value, name) for name in names}
