"""What an object is in a few facts: a line of text, and a table in notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_SHOWN = 4
"""Numbers of a tuple that are written out; of more the first and the last."""


class Summarised:
    """Shows its facts and not its tensors; dataclasses need ``repr=False`` beside it.

    Facts have the names of attributes where there are such. Sentences (a tuple of
    strings) are counted in the line, written out in the table, and left out where
    there are none; the table leaves out None too.
    """

    def _facts(self) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} has no method _facts")

    def _known(self) -> Iterable[tuple[str, Any]]:
        for name, value in self._facts().items():
            if value != ():
                yield name, value

    def __repr__(self) -> str:
        facts = [f"{name}={_in_a_line(value)}" for name, value in self._known()]
        return f"{type(self).__name__}({', '.join(facts)})"

    def _repr_html_(self) -> str:
        rows = [
            (name.replace("_", " "), _in_a_cell(value))
            for name, value in self._known()
            if value is not None
        ]
        return html_table(type(self).__name__, rows)


def html_table(title: str, rows: Iterable[Sequence[str]], *below: str) -> str:
    """A table whose rows begin with what they are about, and sentences below it."""
    left = "text-align: left"
    lines = [
        f"<tr><th style='{left}; white-space: nowrap'>{_escaped(name)}</th>"
        + "".join(f"<td style='{left}'>{_escaped(value)}</td>" for value in values)
        + "</tr>"
        for name, *values in rows
    ]
    caption = f"<caption style='{left}'>{_escaped(title)}</caption>"
    table = f"<table>{caption}{''.join(lines)}</table>"
    return table + "".join(f"<p>{_escaped(sentence)}</p>" for sentence in below)


def _escaped(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _in_a_line(value: Any) -> str:
    if _are_sentences(value):
        return str(len(value))
    return repr(value) if isinstance(value, str) else _number(value)


def _in_a_cell(value: Any) -> str:
    if _are_sentences(value):
        return "\n".join(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _number(value)


def _are_sentences(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, str) for part in value)


def _number(value: Any) -> str:
    """Floats with three digits, tuples of them shortened; all else as it prints."""
    if isinstance(value, float):
        return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"
    if isinstance(value, tuple):
        shown = [_number(part) for part in value]
        if len(shown) > _SHOWN:
            shown = [shown[0], "...", shown[-1]]
        return f"({', '.join(shown)}{',' if len(value) == 1 else ''})"
    return str(value)
