"""Text tables and the figures in their cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from benchmarks.uci.store import request_of

Result: TypeAlias = Mapping[str, Any]

DASH = "-"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; no error for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


def format_figure(mean: float, error: float | None, digits: int = 4) -> str:
    """``0.0812 ± 0.0011``, or the mean alone."""
    text = f"{mean:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, a rule under the first row (the header)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def row_label(result: Result) -> str:
    """The solver of a run, with every setting that is not the default."""
    request = request_of(result)
    # The reference is float64 by its nature: no deviation worth a word.
    plain = replace(request, dtype="float32") if request.solver == "exact" else request
    return f"{request.solver} ({plain.variant})" if plain.variant else request.solver


def grouped(
    results: Iterable[Result], key: Callable[[Result], str]
) -> list[tuple[str, list[Result]]]:
    """Results with the same key, in the order of their first one."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.items())


def average(values: Iterable[float | None], form: str) -> str:
    """The mean of what is there, or a dash."""
    found = [value for value in values if value is not None]
    return format(math.fsum(found) / len(found), form) if found else DASH


def largest(values: Iterable[float | None], form: str) -> str:
    """The largest of what is there, or a dash."""
    found = [value for value in values if value is not None]
    return format(max(found), form) if found else DASH
