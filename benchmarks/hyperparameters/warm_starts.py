"""What warm starts and pathwise probes save, in passes over the kernel matrix.

    python -m benchmarks.hyperparameters.warm_starts --datasets pol bike --rows 3000
    python -m benchmarks.hyperparameters.warm_starts --show STORED.json ...

Every scheme makes the same number of Adam steps from GPyTorch's default parameters on
the same rows; what it has learnt is judged by the exact log marginal likelihood, in
float64. "cold, standard" solves every step from zero for standard normal probes to the
tolerance; "warm, pathwise" goes on from the last step's solution for pathwise probes
and stops at the tolerance or at a budget of passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpytorch.models import ExactGP
from torch import Tensor

import sgdgp
from benchmarks.uci.data import load_split
from benchmarks.uci.run import versions
from benchmarks.uci.trainable import default_model
from sgdgp.gpytorch_adapter import prior_at, training_problems
from sgdgp.solvers import Auto, PivotedCholesky
from sgdgp.training import (
    PathwiseProbes,
    Probes,
    StandardProbes,
    StochasticMarginalLogLikelihood,
)
from sgdgp.training.gradient import exact_log_likelihood

SOLVERS: dict[str, sgdgp.Solver] = {
    "auto": Auto(tolerance=1e-2),
    "cg-pivoted-100": sgdgp.CG(
        tolerance=1e-2, preconditioner=PivotedCholesky(rank=100)
    ),
    "sdd": sgdgp.SDD(tolerance=1e-2, max_passes=2000.0),
}
"""Auto's preconditioner; the rank that the papers' code uses; none at all."""


@dataclass(frozen=True)
class Scheme:
    """How the solves of one fit are made.

    Attributes:
        name: In the table.
        probes: Kind and number of probe vectors.
        warm_start: Whether a solve starts at the last solution.
        passes: Budget of each solve.
    """

    name: str
    probes: Probes
    warm_start: bool
    passes: float


def schemes(count: int) -> tuple[Scheme, ...]:
    """The schemes that are compared, the reference first."""
    standard, pathwise = StandardProbes(count), PathwiseProbes(count)
    return (
        Scheme("cold, standard", standard, False, 1e6),
        Scheme("cold, pathwise", pathwise, False, 1e6),
        Scheme("warm, standard", standard, True, 1e6),
        Scheme("warm, pathwise", pathwise, True, 1e6),
        Scheme("warm, standard, 10 passes", standard, True, 10.0),
        Scheme("warm, standard, 5 passes", standard, True, 5.0),
        Scheme("warm, pathwise, 10 passes", pathwise, True, 10.0),
        Scheme("warm, pathwise, 5 passes", pathwise, True, 5.0),
    )


def run(
    x: Tensor, y: Tensor, solver: sgdgp.Solver, scheme: Scheme, steps: int
) -> dict[str, Any]:
    """One fit: passes, seconds, and the exact log p(y | X) / n at its end."""
    model = default_model(x, y)
    model.train()
    mll = StochasticMarginalLogLikelihood(
        model.likelihood,
        model,
        solver=solver,
        probes=scheme.probes,
        passes_per_evaluation=scheme.passes,
        warm_start=scheme.warm_start,
        initial_value=0.0,
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    start = time.perf_counter()
    last = 0.0
    for _ in range(steps):
        before = mll.passes
        optimiser.zero_grad()
        loss = -mll(model(x), y)
        loss.backward()
        optimiser.step()
        last = mll.passes - before
    seconds = time.perf_counter() - start
    residual = 0.0 if mll.solution is None else float(mll.solution.residuals.max())
    return {
        "scheme": scheme.name,
        "passes": mll.passes,
        "passes_last_step": last,
        "residual_last_step": residual,
        "seconds": seconds,
        "log_likelihood": exact_value(model, x, y),
        "noise": model.likelihood.noise.item(),
    }


def exact_value(model: ExactGP, x: Tensor, y: Tensor) -> float:
    """The value of log p(y | X) / n by a float64 Cholesky factor."""
    model = model.double()
    wide, targets = x.double(), y.double()
    with torch.no_grad():
        (problem,) = training_problems(
            prior_at(model, wide), model.likelihood, wide, targets
        )
        return exact_log_likelihood(problem)[1] / len(targets)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per fit, passes relative to the first scheme's."""
    lines = [
        "| data | solver | scheme | passes | last step | saved | log p / n | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        reference = next(
            other
            for other in results
            if (other["dataset"], other["solver"])
            == (result["dataset"], result["solver"])
        )
        lines.append(
            f"| {result['dataset']} | {result['solver']} | {result['scheme']} "
            f"| {result['passes']:.0f} | {result['passes_last_step']:.0f} "
            f"| {reference['passes'] / result['passes']:.1f} "
            f"| {result['log_likelihood']:.4f} | {result['seconds']:.0f} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m benchmarks.hyperparameters.warm_starts``."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.hyperparameters.warm_starts",
        description="Passes that warm starts and pathwise probes save.",
    )
    add = result.add_argument
    add("--datasets", nargs="+", default=["pol", "bike"])
    add("--rows", type=int, default=3000, help="random training rows of split 0")
    add("--steps", type=int, default=100)
    add("--probes", type=int, default=32)
    add("--solvers", nargs="+", choices=tuple(SOLVERS), default=list(SOLVERS))
    add("--results", type=Path, help="JSON file to write")
    add("--show", nargs="+", type=Path, help="only the table of stored results")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all fits and print the table."""
    options = parser().parse_args(arguments)
    results: list[dict[str, Any]] = []
    if options.show:
        for path in options.show:
            results += json.loads(path.read_text())["results"]
        print(table(results))
        return 0
    for dataset in options.datasets:
        split = load_split(dataset, 0, dtype=torch.float32)
        order = torch.randperm(len(split.x), generator=torch.Generator().manual_seed(0))
        rows = order[: options.rows]
        for solver in options.solvers:
            for scheme in schemes(options.probes):
                found = run(
                    split.x[rows],
                    split.y[rows],
                    SOLVERS[solver],
                    scheme,
                    options.steps,
                )
                about = {"dataset": dataset, "rows": len(rows), "solver": solver}
                results.append({**about, **found, "settings": asdict(scheme)})
                print(table(results).splitlines()[-1], flush=True)
                if options.results is not None:
                    write(options.results, results, arguments)
    print(table(results))
    return 0


def write(
    path: Path, results: list[dict[str, Any]], arguments: Sequence[str] | None
) -> None:
    """Write what there is so far, with the command."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = " ".join(["python -m benchmarks.hyperparameters.warm_starts", *given])
    content = {"command": command, "versions": versions(), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
