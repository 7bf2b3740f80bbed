"""``python -m benchmarks.solvers``: the race of the solvers; see README.md."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.solvers.contenders import can_be_watched, contender
from benchmarks.solvers.plot import curve_of, plot_race
from benchmarks.solvers.problems import ProblemSpec, make_problem, parse_problem
from benchmarks.solvers.request import RaceRequest
from benchmarks.solvers.store import read_result, write_result
from benchmarks.solvers.table import Row, one_line, text_table
from benchmarks.uci.arguments import parse_bytes
from benchmarks.uci.request import DTYPES

_ROOT = Path(__file__).resolve().parents[2]
_INTERRUPTED = 130
_GRACE = 900.0
"""Seconds on top of three times the budget before a run is killed."""


def parser() -> argparse.ArgumentParser:
    """The options of the race."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers",
        description="Passes, seconds and memory of every solver to each tolerance.",
        epilog="A run whose result is in the results folder is not repeated.",
    )
    add = result.add_argument
    add(
        "--problem",
        nargs="+",
        required=True,
        metavar="NAME",
        help="NAME:SPLIT of a UCI set, race:1 to race:3, synthetic:KAPPA",
    )
    add("--columns", type=int, help="right-hand sides (default: 17; race: 1)")
    add("--n", type=int, help="equations (default: all; race: 10000; synthetic: 4000)")
    add("--solvers", nargs="+", default=["auto", "gpytorch-cg"], metavar="NAME")
    add("--tolerances", nargs="+", type=float, default=[1e-1, 1e-2, 1e-3])
    add("--max-passes", type=float, default=200.0)
    add("--max-seconds", type=float, default=600.0)
    add("--noise-scale", type=float, help="replace a data set's noise deviation")
    add("--dtype", choices=DTYPES, default="float32")
    add("--seed", type=int, default=0)
    add("--memory-budget", type=parse_bytes, metavar="SIZE", help="e.g. 1GB")
    add("--threads", type=int, help="threads of torch (default: torch's choice)")
    add("--results", type=Path, default=Path("results"), metavar="DIR")
    add("--again", action="store_true", help="repeat runs that are there already")
    add("--plot", action="store_true", help="also trace the residual and draw figures")
    add("--markdown", action="store_true", help="print Markdown tables")
    return result


@dataclass
class Race:
    """All runs on one problem.

    The problem is drawn when the first run needs it, and written to a file from
    which the processes of the runs read it.
    """

    spec: ProblemSpec
    options: argparse.Namespace
    folder: Path
    failed: list[RaceRequest] = field(default_factory=list)
    reused: int = 0
    _file: Path | None = None

    def request(
        self, solver: str, tolerance: float, *, trace: bool = False
    ) -> RaceRequest:
        options = self.options
        return RaceRequest(
            self.spec,
            solver,
            tolerance,
            options.max_passes,
            options.max_seconds,
            options.memory_budget,
            options.threads,
            trace,
        )

    def row(self, solver: str, tolerances: Sequence[float], bar: Any) -> Row:
        """Run one contender, loosest tolerance first, until one is not reached."""
        results: dict[float, dict[str, Any] | None] = {}
        for tolerance in tolerances:
            bar.set_description(f"{self.spec.name} {solver} {tolerance:g}")
            results[tolerance] = self.run(self.request(solver, tolerance), bar)
            found = results[tolerance]
            if found is None or not found["reached"]:
                break
        bar.update()
        return Row(solver, results)

    def run(self, request: RaceRequest, bar: Any) -> dict[str, Any] | None:
        """The stored result of a run, or that of doing it now; None if it failed."""
        stored = None if self.options.again else read_result(self.folder, request)
        if stored is not None:
            self.reused += 1
            return stored
        status = execute(request, self._problem_file(), self.folder)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        result = None if status else read_result(self.folder, request)
        if result is None:
            self.failed.append(request)
        elif not request.trace:
            bar.write(one_line(result), file=sys.stdout)
        return result

    def _problem_file(self) -> Path:
        if self._file is None:
            handle, name = tempfile.mkstemp(prefix="sgdgp-problem-", suffix=".pt")
            os.close(handle)
            self._file = Path(name)
            make_problem(self.spec).save(self._file)
        return self._file

    def close(self) -> None:
        """Remove the problem's file."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None


def execute(request: RaceRequest, problem: Path, folder: Path) -> int:
    """One run in a fresh process; its exit status."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYKEOPS_VERBOSE": "0",  # GPyTorch imports KeOps, which reports on CUDA
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if request.threads is not None:
        environment["OMP_NUM_THREADS"] = str(request.threads)
    command = [sys.executable, "-m", "benchmarks.solvers.race"]
    limit = 3.0 * request.max_seconds + _GRACE
    try:
        return subprocess.run(
            [*command, json.dumps(request.to_dict()), str(problem), str(folder)],
            env=environment,
            timeout=limit,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        # That is a result: it is not to be waited for again.
        write_result(folder, request, _timed_out(request, limit))
        return 0


def _timed_out(request: RaceRequest, seconds: float) -> dict[str, Any]:
    return {
        "problem": request.problem.name,
        "solver": request.solver,
        "tolerance": request.tolerance,
        "passes": None,
        "seconds": seconds,
        "cpu_seconds": None,
        "reason": "timeout",
        "reached": False,
        "command": request.command,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the tables.

    Returns:
        0; 1 if a run failed; 2 for arguments or data that cannot be used; 130 after
        Ctrl-C.
    """
    options = parser().parse_args(arguments)
    failed: list[RaceRequest] = []
    try:
        specs = _specs(options)
        solvers = list(dict.fromkeys(options.solvers))
        tolerances = sorted(set(options.tolerances), reverse=True)
        for solver in solvers:
            contender(solver)  # an unknown name is found out before the first run
            for tolerance in tolerances:
                Race(specs[0], options, options.results).request(solver, tolerance)
        tables = []
        with tqdm(total=len(specs) * len(solvers), unit="solver", disable=None) as bar:
            for spec in specs:
                race = Race(spec, options, options.results)
                try:
                    tables.append(_one_problem(race, solvers, tolerances, bar))
                finally:
                    race.close()
                    failed += race.failed
        print("\n\n".join(["", *tables]) if tables else "")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept", file=sys.stderr)
        return _INTERRUPTED
    for request in failed:
        print(f"failed: {request.command}", file=sys.stderr)
    return 1 if failed else 0


def _specs(options: argparse.Namespace) -> list[ProblemSpec]:
    return [
        parse_problem(
            text,
            columns=options.columns,
            n=options.n,
            dtype=options.dtype,
            seed=options.seed,
            noise_scale=options.noise_scale,
        )
        for text in dict.fromkeys(options.problem)
    ]


def _one_problem(
    race: Race, solvers: Sequence[str], tolerances: Sequence[float], bar: Any
) -> str:
    """Run everything on one problem; its table."""
    rows = [race.row(solver, tolerances, bar) for solver in solvers]
    found = [result for row in rows for result in row.results.values() if result]
    title = _title(race.spec, found)
    text = text_table(title, rows, tolerances, markdown=race.options.markdown)
    if race.options.plot:
        curves = {}
        for row in rows:
            trace = None
            if can_be_watched(row.solver):
                request = race.request(row.solver, min(tolerances), trace=True)
                bar.set_description(f"{race.spec.name} {row.solver} traced")
                trace = race.run(request, bar)
            runs = [result for result in row.results.values() if result]
            curves[row.solver] = curve_of(trace, runs)
        name = re.sub(r"[^\w.+-]", "-", race.spec.name)
        path = plot_race(race.folder / f"{name}.png", title, curves, tolerances)
        text += f"\nfigure: {path}"
    if race.reused:
        text += f"\n{race.reused} runs reused from {race.folder} (--again repeats)"
    return text


def _title(spec: ProblemSpec, results: Sequence[Mapping[str, Any]]) -> str:
    known = next((result for result in results if "n" in result), None)
    if known is None:
        return spec.name
    words = [
        f"{spec.name}: n = {known['n']:,}",
        f"d = {known['d']}",
        f"{known['columns']} columns",
        f"noise variance {known['noise']:.3g}",
        spec.dtype,
        f"{known['machine']['threads']} threads",
    ]
    kappa = known["facts"].get("condition_number")
    if kappa:
        words.append(f"condition number {kappa:.3g}")
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main())
