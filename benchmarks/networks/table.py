"""The table of stored results as Markdown: means over seeds and standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.networks.settings import SETTINGS
from benchmarks.networks.store import Result
from benchmarks.uci.columns import DASH, format_figure, mean_and_error

COLUMNS = {
    "NLL": ("nll", 4),
    "ECE": ("ece", 4),
    "Brier": ("brier", 4),
    "accuracy": ("accuracy", 4),
    "joint": ("joint", 4),
    "OOD AUROC": ("auroc", 3),
    "seconds": ("seconds", 0),
    "peak MB": ("peak_rss_mb", 0),
}
CLEAN_COLUMNS = {name: COLUMNS[name] for name in ("NLL", "ECE", "Brier", "accuracy")}
_PLAIN = ("seconds", "peak_rss_mb")
_ANGLES = (30, 60, 90, 180)


def summary(results: Sequence[Result]) -> str:
    """All tables: one for each setting, then the rotated digits."""
    if not results:
        return "no results"
    parts = []
    for setting in _in_order(results):
        group = [result for result in results if result["setting"] == setting]
        seeds = ", ".join(str(result["seed"]) for result in group)
        parts.append(f"**{title(setting)}** (seeds {seeds})\n\n" + table(group))
        if clean := _clean(group):
            name = f"**{title(setting)}, against the clean labels** (seeds {seeds})"
            parts.append(f"{name}\n\n" + table(clean, CLEAN_COLUMNS))
    turned = rotated_table(results)
    if turned:
        parts.append("**NLL of rotated digits**\n\n" + turned)
    return "\n\n".join(parts) + "\n"


def title(setting: str) -> str:
    """What a setting is called."""
    return SETTINGS[setting].title if setting in SETTINGS else setting


def _clean(results: Sequence[Result]) -> list[Result]:
    """The scores against clean labels in the place of the others, where there are."""
    found = [
        {
            **result,
            "methods": {
                name: one["clean"]
                for name, one in result["methods"].items()
                if "clean" in one
            },
        }
        for result in results
    ]
    return [result for result in found if result["methods"]]


def table(
    results: Sequence[Result], columns: Mapping[str, tuple[str, int]] = COLUMNS
) -> str:
    """One setting: a row for each variant of each method."""
    rows = [["", *columns], ["---", *("---:" for _ in columns)]]
    for variant in variants(results):
        found = [
            result["methods"][variant]
            for result in results
            if variant in result["methods"]
        ]
        cells = [
            _cell(found, key, digits, error=key not in _PLAIN)
            for key, digits in columns.values()
        ]
        missing = len(results) - len(found)
        rows.append([variant + (f" ({missing} missing)" if missing else ""), *cells])
    return markdown(rows)


def rotated_table(results: Sequence[Result]) -> str:
    """NLL at some angles, for the settings with digits; empty without any."""
    rows = []
    for setting in _in_order(results):
        group = [result for result in results if result["setting"] == setting]
        for variant in variants(group):
            curves = [
                result["methods"][variant]["rotated"]
                for result in group
                if "rotated" in result["methods"].get(variant, {})
            ]
            if curves:
                cells = [_at(curves, angle) for angle in _ANGLES]
                rows.append([title(setting), variant, *cells])
    if not rows:
        return ""
    head = ["", "", *(f"{angle}°" for angle in _ANGLES)]
    return markdown([head, ["---", "---", *("---:" for _ in _ANGLES)], *rows])


def variants(results: Sequence[Result]) -> list[str]:
    """Variants of methods in the order in which they were measured."""
    return list(dict.fromkeys(name for result in results for name in result["methods"]))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _in_order(results: Sequence[Result]) -> list[str]:
    """Settings in the order of ``SETTINGS``, unknown ones last."""
    found = dict.fromkeys(result["setting"] for result in results)
    known = [name for name in SETTINGS if name in found]
    return known + [name for name in found if name not in SETTINGS]


def _cell(found: Sequence[Any], key: str, digits: int, *, error: bool) -> str:
    values = [one[key] for one in found if one.get(key) is not None]
    if not values:
        return DASH
    mean, spread = mean_and_error(values)
    return format_figure(mean, spread if error else None, digits)


def _at(curves: Sequence[Any], angle: int) -> str:
    values = [curve["nll"][curve["angle"].index(angle)] for curve in curves]
    return format_figure(*mean_and_error(values), 2)
