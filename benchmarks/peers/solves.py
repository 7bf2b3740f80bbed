r"""One system (K + noise I) V = B: this package's solvers and published codes.

    python -m benchmarks.peers.solves --n 2000 --sgd-gp PATH JAXPYTHON \
        --iterative-gp PATH JAXPYTHON --rlaopt PATH --json FILE

Matern-3/2 of unit variance, Gaussian inputs, B drawn from N(0, K + noise I), float32.
PATH is a checkout of the published code, PYTHON an interpreter that has what it imports
(default: this one). What is not given is left out. All solve to the same true relative
residual (mean of the columns, in float64), which is measured here, off the clock, from
the weights that come back; compiling is off the clock too. ``published/`` says how.

Ratios are of CPU seconds of all threads, which other work on the machine hardly
touches: how many times those of the best solver here. With ``--assert-ratio`` the exit
status is 3 where a published code that arrives takes less than so many times them.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import SHORT
from benchmarks.json_file import write_json
from benchmarks.peers.published import iterative_gp, rlaopt, sgd_gp
from benchmarks.peers.published.protocol import Solver, System
from benchmarks.solvers.contenders import contender
from benchmarks.solvers.problem import KernelValues, Problem, dense_kernel
from benchmarks.solvers.stopwatch import Stopwatch
from benchmarks.solvers.task import Task
from sgdgp.core.memory import resolve_budget

_WARM_UP = 256
_CANNOT_IMPORT = 2


@dataclass(frozen=True)
class Code:
    """A published code: its adapter, and a file by which its checkout is known."""

    module: str
    file: str
    solvers: dict[str, Solver]


CODES = {
    "sgd-gp": Code("sgd_gp", "scalable_gps/optim_utils.py", sgd_gp.SOLVERS),
    "iterative-gp": Code("iterative_gp", "linear_solvers.py", iterative_gp.SOLVERS),
    "rlaopt": Code("rlaopt", "rlaopt/models/linsys.py", rlaopt.SOLVERS),
}


def system(chosen: argparse.Namespace) -> Problem:
    """What all solve."""
    generator = torch.Generator().manual_seed(chosen.seed)
    x = torch.randn(chosen.n, chosen.dim, generator=generator)
    kernel = KernelValues("matern32", 1.0, (chosen.lengthscale,) * chosen.dim)
    k = dense_kernel(kernel.build(x.double()), x.double())
    k.diagonal().add_(chosen.noise)
    normal = torch.randn(
        chosen.n, chosen.columns, generator=generator, dtype=torch.float64
    )
    rhs = (torch.linalg.cholesky(k) @ normal).float()
    zero = torch.zeros_like(rhs)
    return Problem("solves", kernel, x, chosen.noise, rhs, zero)


def ours(name: str, problem: Problem, chosen: argparse.Namespace) -> dict[str, Any]:
    """A solver of this package, in this process."""

    def solve(problem: Problem, budget: float) -> dict[str, Any]:
        memory, clock = resolve_budget(None), Stopwatch()
        limits = budget, chosen.max_seconds, memory, chosen.seed
        found = contender(name)(Task(problem, chosen.tolerance, *limits, clock))
        times = {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}
        return {"epochs": found.passes, **times, "weights": found.weights}

    solve(problem.head(_WARM_UP), 5.0)
    return solve(problem, chosen.max_epochs)


def theirs(
    code: Code, solver: str, place: Sequence[str], given: System, threads: int
) -> dict[str, Any]:
    """A published solver, in a process of its own; or what went wrong.

    Raises:
        ImportError: Something that it imports is missing.
    """
    python = place[1] if len(place) > 1 else sys.executable
    module, checkout = "benchmarks.peers.published", str(Path(place[0]).resolve())
    arguments = module, code.module, solver, checkout
    finished, found = given.put_to(python, *arguments, threads=threads)
    said = finished.stderr.strip().splitlines() or [f"exit {finished.returncode}"]
    if finished.returncode == _CANNOT_IMPORT:
        raise ImportError(f"{python} cannot import it: {said[-1]}")
    if finished.returncode:
        return {"failed": said[-1]}
    numbers = {k: float(v) for k, v in found.items() if k != "weights"}
    return {**numbers, "weights": torch.from_numpy(found["weights"])}


def checked(row: dict[str, Any], problem: Problem, tolerance: float) -> dict[str, Any]:
    """The row with true residuals in place of the weights."""
    weights = row.pop("weights", None)
    if weights is None:
        return {**row, "reached": False}
    residuals = problem.true_residuals(weights)
    mean, worst = float(residuals.mean()), float(residuals.max())
    return {**row, "residual": mean, "worst": worst, "reached": mean <= tolerance}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status says whether the ratio that was asked holds."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    for name in ("n", "dim", "columns", "threads", "lengthscale", "noise", "tolerance"):
        if not getattr(chosen, name) > 0:
            parser.error(f"--{name}: expected above 0, found {getattr(chosen, name)}")
    places = {name: getattr(chosen, name.replace("-", "_")) for name in CODES}
    places = {name: place for name, place in places.items() if place}
    for name, (path, *python) in places.items():
        if not (Path(path) / CODES[name].file).is_file():
            parser.error(f"--{name}: {path} has no {CODES[name].file}: no checkout?")
        if len(python) > 1 or not all(Path(found).is_file() for found in python):
            parser.error(f"--{name}: expected PATH [PYTHON], found {python} after it")
    if chosen.assert_ratio is not None and not places:
        parser.error("--assert-ratio: expected the path of a published code too")
    torch.set_num_threads(chosen.threads)
    problem = system(chosen)
    limits = chosen.tolerance, chosen.max_epochs, chosen.max_seconds
    arrays = problem.x.numpy(), problem.rhs.numpy()
    given = System(*arrays, chosen.lengthscale, chosen.noise, *limits)
    rows: list[dict[str, Any]] = []
    for name, place in places.items():  # first, as something may be missing
        for solver in CODES[name].solvers:
            if chosen.published and f"{name}:{solver}" not in chosen.published:
                continue
            try:
                row = theirs(CODES[name], solver, place, given, chosen.threads)
            except ImportError as error:
                parser.error(f"--{name}: {error}")
            row = checked(row, problem, chosen.tolerance)
            rows.append({"code": name, "solver": solver, **row})
            print(f"{name}:{solver} is done", file=sys.stderr)
    for solver in chosen.solvers:
        row = checked(ours(solver, problem, chosen), problem, chosen.tolerance)
        rows.append({"code": "sgdgp", "solver": solver, **row})
    best = {
        own: min(
            (
                row["cpu_seconds"]
                for row in rows
                if row["reached"] and (row["code"] == "sgdgp") == own
            ),
            default=float("inf"),
        )
        for own in (True, False)
    }
    for row in rows:
        row["ratio"] = row["cpu_seconds"] / best[True] if row["reached"] else None
    _print(rows)
    if chosen.json is not None:
        given_arguments = sys.argv[1:] if arguments is None else arguments
        command = "python -m benchmarks.peers.solves " + shlex.join(given_arguments)
        machine = {"processor": platform.processor(), "cores": os.cpu_count()}
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        about: dict[str, Any] = {"command": command, **machine, "load_average": load}
        about["system"] = {
            name: getattr(chosen, name)
            for name in (*_parameters(), "threads", "tolerance", "max_epochs")
        }
        about["commits"] = {name: _commit(place[0]) for name, place in places.items()}
        write_json(chosen.json, {**about, "rows": rows})
    asked = chosen.assert_ratio
    if asked is None or best[False] >= asked * best[True] < float("inf"):
        return 0
    ratio = best[False] / best[True]
    print(f"falls short: the best published takes {ratio:.2f} times, asked {asked:g}")
    return SHORT


def _print(rows: Sequence[dict[str, Any]]) -> None:
    numbers = "residual", "worst", "epochs", "seconds", "cpu_seconds", "ratio"
    print(f"{'':24}" + "".join(f"{name:>13}" for name in numbers))
    for row in rows:
        cells = "".join(
            f"{row[name]:13.4g}" if row.get(name) is not None else f"{'-':>13}"
            for name in numbers
        )
        name = f"{row['code']}:{row['solver']}"
        print(f"{name:24}{cells}  {row.get('failed', '')}".rstrip())


def _parameters() -> tuple[str, ...]:
    return "n", "dim", "columns", "lengthscale", "noise", "seed"


def _commit(path: str) -> str | None:
    if not (Path(path) / ".git").exists():
        return None
    command = ["git", "-C", path, "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.solves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--n", type=int, default=2000)
    add("--dim", type=int, default=9)
    add("--columns", type=int, default=17)
    add("--lengthscale", type=float, default=2.0)
    add("--noise", type=float, default=0.1, help="its variance")
    add("--seed", type=int, default=0)
    add("--tolerance", type=float, default=1e-2)
    add("--max-epochs", type=float, default=500.0, help="of each, in passes over K")
    add("--max-seconds", type=float, default=300.0, help="of each, in wall clock")
    add("--threads", type=int, default=1)
    add("--solvers", nargs="+", default=["auto", "cg", "sdd", "adasap"])
    for name in CODES:
        add(f"--{name}", nargs="+", metavar=("PATH", "PYTHON"), help="a checkout")
    names = [
        f"{name}:{solver}" for name, code in CODES.items() for solver in code.solvers
    ]
    add(
        "--published",
        nargs="+",
        choices=names,
        metavar="CODE:SOLVER",
        help=(f"of those given, these alone: {', '.join(names)}"),
    )
    add("--assert-ratio", type=float, help="how many times the best solver here")
    add("--json", type=Path, help="file that takes the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
