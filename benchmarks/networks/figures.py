"""Figures of stored results: reliability diagrams and curves over rotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.networks.store import Result
from benchmarks.networks.table import title, variants

_STYLES = {
    "network": "#777777",
    "network, temperature": "#bbbbbb",
    "ensemble": "#9467bd",
    "last layer, evidence": "#ff7f0e",
    "last layer, calibrated": "#ffbb78",
    "KFAC, evidence": "#2ca02c",
    "KFAC, calibrated": "#98df8a",
    "sgdgp, evidence": "#1f77b4",
    "sgdgp, calibrated": "#17becf",
}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Both figures of every setting, as small PNG files.

    Returns:
        Their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    paths = []
    for setting in dict.fromkeys(result["setting"] for result in results):
        group = [result for result in results if result["setting"] == setting]
        paths.append(_reliability(group, folder / f"reliability-{setting}.png"))
        if any("rotated" in one for r in group for one in r["methods"].values()):
            paths.append(_rotated(group, folder / f"rotated-{setting}.png"))
    return paths


def pooled_reliability(
    found: Sequence[Any],
) -> tuple[list[float], list[float]]:
    """Confidence and accuracy of each bin that has points, over all seeds."""
    confidence: list[float] = []
    accuracy: list[float] = []
    diagrams = [one["reliability"] for one in found]
    for b in range(len(diagrams[0]["counts"])):
        counts = [diagram["counts"][b] for diagram in diagrams]
        if sum(counts):
            for key, values in (("confidence", confidence), ("accuracy", accuracy)):
                pairs = zip(counts, diagrams, strict=True)
                total = sum(n * diagram[key][b] for n, diagram in pairs if n)
                values.append(total / sum(counts))
    return confidence, accuracy


def _reliability(results: Sequence[Result], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.5, 4.0))
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for variant in variants(results):
        found = [r["methods"][variant] for r in results if variant in r["methods"]]
        confidence, accuracy = pooled_reliability(found)
        axes.plot(confidence, accuracy, marker=".", linewidth=1, **_style(variant))
    axes.set(xlabel="confidence", ylabel="accuracy", title=_title(results))
    axes.legend(fontsize=6)
    return _save(figure, path)


def _rotated(results: Sequence[Result], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.0, 3.5))
    for variant in variants(results):
        curves = [
            r["methods"][variant]["rotated"]
            for r in results
            if "rotated" in r["methods"].get(variant, {})
        ]
        if not curves:
            continue
        for axes, key in zip(panels, ("nll", "entropy"), strict=True):
            means = [
                sum(column) / len(curves)
                for column in zip(*(curve[key] for curve in curves), strict=True)
            ]
            axes.plot(curves[0]["angle"], means, linewidth=1, **_style(variant))
            axes.set(xlabel="rotation in degrees")
    panels[0].set(ylabel="NLL", title=_title(results))
    panels[1].set(ylabel="mean predictive entropy")
    panels[1].legend(fontsize=6)
    return _save(figure, path)


def _style(variant: str) -> dict[str, Any]:
    style = {"label": variant, "color": _STYLES.get(variant, "black")}
    return {**style, "linestyle": "--" if variant.endswith("calibrated") else "-"}


def _title(results: Sequence[Result]) -> str:
    return title(results[0]["setting"])


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
