"""Runs of one row, kept seed by seed."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.json_file import write_json
from benchmarks.reference_posteriors import (
    alignment,
    chains,
    pruning,
    variances,
    weights,
)
from benchmarks.reference_posteriors.rows import Record, Row

ROWS: dict[str, Row] = {
    **variances.ROWS,
    **alignment.ROWS,
    **chains.ROWS,
    **pruning.ROWS,
    **weights.ROWS,
}
"""All rows by name; a module for each kind of question."""


def records(folder: Path, name: str) -> list[Record]:
    """What is there of a row, in the order of its seeds."""
    path = folder / f"{name}.json"
    found = json.loads(path.read_text())["records"] if path.exists() else []
    assert isinstance(found, list)
    return found


def execute(name: str, folder: Path, seeds: Sequence[int]) -> None:
    """Run seeds of a row, and keep what is found in the place of what was there."""
    command = f"python -m benchmarks.reference_posteriors --rows {name}"
    for seed in seeds:
        found = {"seed": seed, **ROWS[name].measure(seed)}
        kept = [r for r in records(folder, name) if r["seed"] != seed]
        everything = sorted([*kept, found], key=lambda record: record["seed"])
        write_json(folder / f"{name}.json", {"command": command, "records": everything})
        print(f"{name}, seed {seed}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say, in a process of one thread."""
    name, folder, *seeds = arguments
    torch.set_num_threads(1)
    # What must be reported as unfit is, and is counted.
    warnings.simplefilter("ignore")
    execute(name, Path(folder), [int(seed) for seed in seeds])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
