"""``python -m benchmarks.demo``: condition, compare, draw, and check the numbers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sgdgp
from benchmarks.demo.figure import save_figure
from benchmarks.demo.problem import NOISE_SCALE, Problem, make_problem
from benchmarks.demo.reference import Reference, exact_posterior
from benchmarks.demo.report import Column, check_lines, exact_column, table
from benchmarks.demo.scores import checks, compare, score
from benchmarks.uci.memory import available_bytes
from sgdgp.posterior import Posterior

_N, _N_SHORT = 20_000, 2_000
_BUDGET = 10**9
_SOLVERS: tuple[tuple[str, sgdgp.Solver | str], ...] = (
    ('solver="auto"', "auto"),
    ("sgdgp.SDD()", sgdgp.SDD()),
)


@dataclass(frozen=True)
class _Run:
    """One posterior and its marginals at the test points."""

    title: str
    posterior: Posterior
    mean: Tensor
    variance: Tensor
    seconds: float


def parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="A GP on 20,000 points with a gap, against the truth and Cholesky.",
    )
    add = result.add_argument
    add("--short", action="store_true", help=f"{_N_SHORT:,} points instead of {_N:,}")
    add("--n", type=int, help="number of observations")
    add("--num-samples", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--figure", type=Path, default=Path("demo.png"), help="where the figure goes")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if every number is where it should be, else 1."""
    options = parser().parse_args(arguments)
    n = options.n or (_N_SHORT if options.short else _N)
    start = time.perf_counter()
    problem = make_problem(n, seed=options.seed)
    print(
        f"{n:,} observations of a known function, noise standard deviation "
        f"{NOISE_SCALE}, nothing observed in the gap\n"
        f"{type(problem.model).__name__}: scaled Matern-5/2 kernel, hyperparameters "
        f"set by hand; {options.num_samples} samples\n"
        f"memory budget of the solves {_BUDGET / 1e9:g} GB; K in float64 would take "
        f"{8 * n * n / 1e9:.2g} GB\n",
        flush=True,
    )
    runs = [_run(title, solver, problem, options) for title, solver in _SOLVERS]
    exact = _reference(problem)

    columns, verdicts, failures = [], [], 0
    for run in runs:
        scores = score(run.mean, run.variance, problem)
        differences = None
        if exact is not None:
            differences = compare(run.mean, run.variance, exact, options.num_samples)
        solution = run.posterior.solution
        columns.append(Column(run.title, scores, solution, differences, run.seconds))
        found = checks(solution, scores, differences)
        failures += sum(not check.holds for check in found)
        verdicts.append(check_lines(run.title, found))
    if exact is not None:
        scores = score(exact.mean, exact.variance, problem)
        columns.append(exact_column(exact, scores))
    print("\n" + table(columns) + "\n")
    print("\n".join(verdicts) + "\n")

    shown = runs[-1]
    with torch.no_grad():
        save_figure(
            options.figure,
            problem,
            f"{n:,} points, {shown.title}",
            shown.mean,
            shown.variance,
            shown.posterior.functions(problem.x_test)[:5],
        )
    print(f"figure: {options.figure.resolve()}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    if failures:
        print(f"FAILED: {failures} numbers are not what they should be (above)")
    return 1 if failures else 0


def _reference(problem: Problem) -> Reference | None:
    """The exact posterior, unless its factor does not fit the memory."""
    n = len(problem.x)
    needed = 8.0 * n * n + 1e9
    if needed > available_bytes():
        print(
            f"no comparison with Cholesky: it needs {needed / 1e9:.1f} GB, "
            f"{available_bytes() / 1e9:.1f} GB are free"
        )
        return None
    print(
        f"the exact posterior by Cholesky, {n:,} x {n:,} in float64 "
        f"({n**3 / 3e12:.2g} trillion multiply-adds) ...",
        flush=True,
    )
    exact = exact_posterior(problem.model, problem.x_test)
    print(f"  {exact.seconds:.1f} s, largest residual {exact.residual:.1e}", flush=True)
    return exact


def _run(
    title: str,
    solver: sgdgp.Solver | str,
    problem: Problem,
    options: argparse.Namespace,
) -> _Run:
    """Condition with one solver and predict at the test points."""
    print(f"{title} ...", flush=True)
    start = time.perf_counter()
    posterior = sgdgp.condition(
        problem.model,
        solver=solver,
        num_samples=options.num_samples,
        seed=options.seed,
        memory_budget=_BUDGET,
    )
    mean, variance = posterior.predict(
        problem.x_test, batch_size=len(problem.x_test), progress=False
    )
    seconds = time.perf_counter() - start
    solution = posterior.solution
    print(
        f"  {seconds:.1f} s: {solution.solver} on {solution.operator}, "
        f"{solution.passes:.1f} passes, {solution.reason}",
        flush=True,
    )
    for warning in solution.warnings:
        print(f"  warning: {warning}")
    return _Run(title, posterior, mean, variance, seconds)


if __name__ == "__main__":
    sys.exit(main())
