"""The table of stored runs: mean best values, and differences seed by seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.acquisitions.models import MODELS
from benchmarks.acquisitions.problems import PROBLEMS
from benchmarks.networks.table import markdown
from benchmarks.uci.columns import DASH, format_figure, mean_and_error

Run: TypeAlias = Mapping[str, Any]

THEIRS, OURS = MODELS


def read_runs(folder: Path) -> list[Run]:
    """All runs of a folder.

    Raises:
        ValueError: A JSON file is no run of this benchmark.
    """
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text())
            run["function"], run["model"], run["seed"], run["best"][-1]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is no run of this benchmark: {error}") from error
        runs.append(run)
    return runs


def summary(runs: Sequence[Run]) -> str:
    """The best values after all evaluations, one row for each function."""
    if not runs:
        return "no results"
    head = [
        "function (optimum)",
        "seeds",
        THEIRS,
        OURS,
        f"{OURS} - {THEIRS}",
        "better / worse",
        "within one standard error",
        "seconds",
    ]
    rows = [head, ["---", *("---:" for _ in head[1:])]]
    rows += [row for name in PROBLEMS if (row := _row(name, runs))]
    return markdown(rows)


def paired(name: str, runs: Sequence[Run]) -> tuple[list[int], dict[str, list[Run]]]:
    """Seeds that both models have of a function, and their runs in that order."""
    found = {
        model: {
            run["seed"]: run
            for run in runs
            if run["function"] == name and run["model"] == model
        }
        for model in (THEIRS, OURS)
    }
    seeds = sorted(found[THEIRS].keys() & found[OURS].keys())
    return seeds, {model: [of[seed] for seed in seeds] for model, of in found.items()}


def is_as_good(differences: Sequence[float]) -> bool | None:
    """Whether ours is not worse by more than a standard error; None of one seed."""
    mean, error = mean_and_error(differences)
    return None if error is None else mean >= -error


def _row(name: str, runs: Sequence[Run]) -> list[str] | None:
    seeds, found = paired(name, runs)
    if not seeds:
        return None
    best = {model: [run["best"][-1] for run in of] for model, of in found.items()}
    differences = [a - b for a, b in zip(best[OURS], best[THEIRS], strict=True)]
    better = sum(difference > 0 for difference in differences)
    worse = sum(difference < 0 for difference in differences)
    as_good = is_as_good(differences)
    seconds = [
        mean_and_error([sum(run["seconds"].values()) for run in found[model]])[0]
        for model in (THEIRS, OURS)
    ]
    return [
        f"{name} ({found[OURS][0]['optimum']:.3f})",
        str(len(seeds)),
        format_figure(*mean_and_error(best[THEIRS]), 3),
        format_figure(*mean_and_error(best[OURS]), 3),
        format_figure(*mean_and_error(differences), 3),
        f"{better} / {worse}",
        DASH if as_good is None else ("yes" if as_good else "no"),
        " / ".join(f"{value:.0f}" for value in seconds),
    ]
