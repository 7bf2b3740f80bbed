"""Pages of the reference, one a room, from what its ``__init__`` exports.

What is public is said once, in ``__all__``: a new name is on the site with the next
build. An object that several rooms export stands where it comes first in ``ROOMS``, and
the others point there.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import sgdgp

ROOMS = (
    "sgdgp",
    "sgdgp.plot",
    "sgdgp.plot.networks",
    "sgdgp.metrics",
    "sgdgp.sklearn",
    "sgdgp.botorch",
    "sgdgp.bayesopt",
    "sgdgp.networks",
    "sgdgp.networks.priors",
    "sgdgp.tomography",
    "sgdgp.posterior",
    "sgdgp.training",
    "sgdgp.solvers",
    "sgdgp.operators",
    "sgdgp.kernels",
    "sgdgp.features",
    "sgdgp.tangent",
)


METHODS = (FunctionType, property, cached_property, classmethod, staticmethod)
SECTION = re.compile(r"(Args|Attributes|Example|Examples|Raises|Returns|Yields|Note):$")


def is_there(room: str) -> bool:
    """Whether there is a module of that name."""
    parent = room.rpartition(".")[0]
    return not parent or (is_there(parent) and find_spec(room) is not None)


def exported(module: Any) -> list[str]:
    """Public names of a module: ``__all__``, or what it defines itself."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("_")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
    ]


def members(cls: type) -> list[str]:
    """Public methods and properties that the package itself defines, bases included."""
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if base.__module__.startswith("sgdgp"):
            for name, value in vars(base).items():
                if not name.startswith("_") and isinstance(value, METHODS):
                    found[name] = None
    return list(found)


def described(room: str, name: str) -> str | None:
    """Where a constant or a type has its docstring: "module.name"."""
    package = importlib.import_module(room)
    folder = Path(str(package.__file__)).parent
    files = [path.stem for path in sorted(folder.glob("*.py"))]
    for stem in files:
        home = room if stem == "__init__" else f"{room}.{stem}"
        documented = ModuleAnalyzer.for_module(home).find_attr_docs()
        if ("", name) in documented:
            return f"{home}.{name}"
    return None


def entry(room: str, name: str, value: Any) -> list[str]:
    """Lines that document one object."""
    target = f"{room}.{name}"
    if inspect.isclass(value):
        lines = [f".. autoclass:: {target}"]
        if listed := members(value):
            lines.append(f"   :members: {', '.join(listed)}")
        if "__call__" in vars(value) and value.__call__.__doc__:
            lines.append("   :special-members: __call__")
        return [*lines, ""]
    if inspect.isfunction(value):
        return [f".. autofunction:: {target}", ""]
    home = described(room, name)
    return [f".. autodata:: {home}", "   :no-value:", ""] if home else []


def summary(value: Any) -> str:
    """First sentence of a docstring."""
    first = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return escaped(first.split(". ")[0].rstrip("."))


def escaped(line: str) -> str:
    """A line of plain text as markup: stars, bars and underscores are meant."""
    parts = line.split("``")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?=[*|])|(?<=\w)(?=_(?!\w))", r"\\", parts[i])
    return "``".join(parts)


def mark_up(*arguments: Any) -> None:
    """Docstrings are text: formulas on lines of their own stay as they are typed."""
    kind, lines, marked = arguments[1], arguments[-1], list[str]()
    described, literal, example = True, False, False
    for line in lines:
        described = described and not SECTION.match(line)
        begins = not marked or not marked[-1].strip()
        if described and line.startswith("  ") and begins and not literal:
            if not any(text.rstrip().endswith("::") for text in marked[-2:]):
                marked += ["::", ""]
            literal = True
        elif line.strip() and not line.startswith("  "):
            literal = False
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        marked.append(line if literal or example else escaped(line))
    # What stands before a colon in the first line of a property would be its type: so
    # it begins with an empty comment.
    is_value = kind in ("property", "attribute", "data")
    lines[:] = ["..", "", *marked] if is_value else marked


class Pages:
    """What stands where: every object has one place."""

    def __init__(self) -> None:
        self.places: dict[int, str] = {}

    def of_room(self, room: str) -> Iterator[str]:
        """The lines of one page."""
        module = importlib.import_module(room)
        yield from (room, "=" * len(room), "")
        yield from (
            f".. automodule:: {room}",
            "   :no-members:",
            "",
            "   .. rubric:: Names",
        )
        yield from ("", "   .. list-table::", "      :widths: 30 70", "")
        entries: list[str] = []
        for name in exported(module):
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            callable_object = inspect.isclass(value) or inspect.isfunction(value)
            known = self.places.get(id(value)) if callable_object else None
            lines = [] if known else entry(room, name, value)
            place = known or f"{room}.{name}"
            label = f":py:obj:`{name} <{place}>`" if known or lines else f"``{name}``"
            says = summary(value) if callable_object else ""
            yield from (f"      * - {label}", f"        - {says}")
            if callable_object:
                self.places.setdefault(id(value), place)
            entries += lines
        yield from ("", *entries)


def write_pages(app: Sphinx) -> None:
    """Write the pages that have changed into ``reference`` of the sources."""
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    pages = Pages()
    rooms = [room for room in ROOMS if is_there(room)]
    texts = {f"{room}.rst": "\n".join(pages.of_room(room)) for room in rooms}
    listed = "\n   ".join(rooms)
    title = f"Reference\n=========\n\nPublic names of sgdgp {sgdgp.__version__}."
    texts["index.rst"] = f"{title}\n\n.. toctree::\n   :maxdepth: 1\n\n   {listed}\n"
    for path in folder.glob("*.rst"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for its sources."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", mark_up, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
