"""Studies: rows that are measured seed by seed, and held against thresholds."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.checks import SHORT, Check, thresholds
from benchmarks.json_file import write_json
from benchmarks.processes import exit_status, failures, run_module

Record: TypeAlias = dict[str, Any]
"""Figures of one seed, as they lie in a file."""


@dataclass(frozen=True)
class Row:
    """One experiment.

    Attributes:
        measure: From a seed to its figures.
        checks: From the figures of all seeds to what is asked of them.
        seeds: Which are run unless others are asked for.
    """

    measure: Callable[[int], Record]
    checks: Callable[[Sequence[Record]], Iterable[Check]]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Study:
    """Experiments of one command.

    Attributes:
        name: Of its package in ``benchmarks``, whose ``run`` module calls ``run``.
        description: What the command says of itself.
        rows: By name.
    """

    name: str
    description: str
    rows: Mapping[str, Row]

    def records(self, folder: Path, row: str) -> list[Record]:
        """What is there of a row, in the order of its seeds."""
        path = folder / f"{row}.json"
        found = json.loads(path.read_text())["records"] if path.exists() else []
        assert isinstance(found, list)
        return found

    def execute(self, row: str, folder: Path, seeds: Sequence[int]) -> None:
        """Run seeds of a row, and keep what is found in the place of what was there."""
        command = f"python -m benchmarks.{self.name} --rows {row}"
        for seed in seeds:
            found = {"seed": seed, **self.rows[row].measure(seed)}
            kept = [r for r in self.records(folder, row) if r["seed"] != seed]
            everything = sorted([*kept, found], key=lambda record: record["seed"])
            content = {"command": command, "records": everything}
            write_json(folder / f"{row}.json", content)
            print(f"{row}, seed {seed}", flush=True)

    def run(self, arguments: Sequence[str]) -> int:
        """Run what the arguments say, in a process of one thread."""
        row, folder, *seeds = arguments
        torch.set_num_threads(1)
        # What must be reported as unfit is, and is counted.
        warnings.simplefilter("ignore")
        self.execute(row, Path(folder), [int(seed) for seed in seeds])
        return 0

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run, print the table, and say by the exit status whether all figures hold."""
        options = self._parser().parse_args(arguments)
        folder = options.results
        asked = {
            row: options.seeds or self.rows[row].seeds
            for row in dict.fromkeys(options.rows)
        }

        def missing(row: str) -> list[int]:
            there = {record["seed"] for record in self.records(folder, row)}
            return [s for s in asked[row] if not (options.table and s in there)]

        def execute(row: str) -> int:
            module = f"benchmarks.{self.name}.run"
            return run_module(module, row, str(folder), *map(str, missing(row)))

        def work() -> Sequence[str]:
            return failures([n for n in asked if missing(n)], execute, options.workers)

        status = exit_status(work, "finished seeds")
        checks = []
        for row, seeds in asked.items():
            found = [r for r in self.records(folder, row) if r["seed"] in seeds]
            checks += list(self.rows[row].checks(found)) if found else []
        print("\n" + thresholds(checks))
        return status or (0 if all(check.holds for check in checks) else SHORT)

    def _parser(self) -> argparse.ArgumentParser:
        result = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.name}",
            description=self.description,
            epilog=f"Exit status {SHORT}: a figure falls short of its threshold.",
        )
        add = result.add_argument
        names = list(self.rows)
        add("--rows", nargs="+", default=names, choices=self.rows, metavar="ROW")
        add("--seeds", nargs="+", type=int, help="default: those of each row")
        add("--table", action="store_true", help="run only what is not there yet")
        add(
            "--workers",
            type=int,
            default=2,
            help="processes of one thread (default: 2)",
        )
        measured = Path(__file__).parent / self.name / "measured"
        add("--results", type=Path, default=measured, metavar="DIR")
        return result
