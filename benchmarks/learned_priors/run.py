"""Runs of one set, kept seed by seed."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.json_file import write_json
from benchmarks.learned_priors import continual, fewshot, regression
from benchmarks.learned_priors.priors import Record

RUNS: dict[str, Callable[[str, int], Iterator[Record]]] = {
    "regression": regression.run,
    "certificates": regression.certificates,
    "fewshot": fewshot.run,
    "continual": continual.run,
}

REGRESSIONS = ("regression", "certificates")
"""Rows on sets of ``SGDGP_DATA/uci``."""


@dataclass(frozen=True)
class Job:
    """Some seeds of one set of one row."""

    row: str
    name: str
    seeds: tuple[int, ...]

    def read(self, folder: Path) -> list[Record]:
        """What is there of them."""
        return [r for r in _records(self._path(folder)) if r["seed"] in self.seeds]

    def missing(self, folder: Path) -> Job:
        """Those that are not there."""
        there = {record["seed"] for record in self.read(folder)}
        return replace(self, seeds=tuple(s for s in self.seeds if s not in there))

    def execute(self, folder: Path) -> None:
        """Run them, and keep what is found in the place of what was there."""
        path = self._path(folder)
        sets = f" --sets {self.name}" if self.row in REGRESSIONS else ""
        command = f"python -m benchmarks.learned_priors --rows {self.row}{sets}"
        for seed in self.seeds:
            found = [{"seed": seed, **r} for r in RUNS[self.row](self.name, seed)]
            kept = [r for r in _records(path) if r["seed"] != seed]
            records = sorted(kept + found, key=lambda record: record["seed"])
            write_json(path, {"command": command, "records": records})
            print(f"{self.row} {self.name}, seed {seed}", flush=True)

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.row}-{self.name}.json"


def _records(path: Path) -> list[Record]:
    found = json.loads(path.read_text())["records"] if path.exists() else []
    assert isinstance(found, list)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say."""
    row, name, folder, *seeds = arguments
    torch.set_num_threads(1)
    # Precisions of few examples settle slowly, and say so.
    warnings.simplefilter("ignore")
    Job(row, name, tuple(map(int, seeds))).execute(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
