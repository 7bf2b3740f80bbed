"""Maximising 1,000 posterior functions at once: seconds, memory, and are they maxima.

``python -m benchmarks.thompson_sampling.maximise`` conditions on 20,000 points in 8
dimensions (off the clock; ``--posterior FILE`` keeps that for the next time), maximises
every function under a memory budget, and compares with a random search of ten times as
many candidates.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sgdgp
from benchmarks.json_file import write_json
from benchmarks.thompson_sampling.problem import KnownGP
from benchmarks.uci.memory import peak_rss_mb
from sgdgp.bayesopt import Functions, maximise
from sgdgp.features import draw_prior
from sgdgp.posterior import PathwisePosterior

_MEASURED = Path(__file__).parent / "measured"
_MORE = 10
_CLEAR_REFS = Path("/proc/self/clear_refs")


def posterior_of(
    n: int, d: int, lengthscale: float, functions: int, passes: float, path: Path | None
) -> PathwisePosterior:
    """Functions given noisy values of a prior draw at uniform points.

    Args:
        n: Points.
        d: Dimensions.
        lengthscale: That of the Matern-3/2 kernel.
        functions: Number of posterior functions.
        passes: Budget of the solve.
        path: File to read it from, or to keep it in.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, d, generator=generator)
    model = KnownGP(lengthscale, 1e-6, x, x[:, 0])
    if path is not None and path.exists():
        found = sgdgp.load(path, model)
        if not isinstance(found, PathwisePosterior):
            raise TypeError(f"{path}: expected a posterior of one output")
        return found
    objective = draw_prior(
        model.covar_module, 1, dim=d, num_features=5000, generator=generator
    )
    with torch.no_grad():
        y = objective(x)[:, 0] + 1e-3 * torch.randn(n, generator=generator)
    posterior = sgdgp.condition(
        model,
        x,
        y,
        solver=sgdgp.SDD(max_passes=passes),
        num_samples=functions,
        seed=1,
    )
    if not isinstance(posterior, PathwisePosterior):
        raise TypeError("expected a posterior of one output")
    if path is not None:
        posterior.save(path)
    return posterior


def measured(
    posterior: PathwisePosterior,
    budget: int,
    check: int,
    num_candidates: int = 1024,
    rounds: int = 30,
    steps: int = 60,
) -> dict[str, Any]:
    """Maximise all functions; compare the first ``check`` with a random search.

    Args:
        posterior: Functions on the unit cube.
        budget: Bytes that maximising may use.
        check: Functions that the random search looks at.
        num_candidates: Candidates of each round.
        rounds: Rounds.
        steps: Gradient steps.
    """
    d = posterior.problem.x.shape[1]
    bounds = torch.stack([torch.zeros(d), torch.ones(d)])
    gc.collect()
    before = _reset_peak()
    start = time.perf_counter()
    found = maximise(
        posterior,
        bounds,
        num_candidates,
        rounds=rounds,
        steps=steps,
        memory_budget=budget,
        progress=True,
    )
    seconds = time.perf_counter() - start
    peak = peak_rss_mb()
    searched: Functions = posterior.functions.subset(range(check))
    start = time.perf_counter()
    dense = maximise(
        searched,
        bounds,
        num_candidates * _MORE,
        rounds=rounds,
        steps=0,
        nearby=_nearby(posterior, bounds),
        x=posterior.problem.x,
        y=posterior.problem.targets,
        seed=1,
        progress=True,
    )
    gains = found.values[:check] - dense.values
    return {
        "n": len(posterior.problem.x),
        "d": d,
        "functions": posterior.num_samples,
        "features": posterior.problem.settings.num_features,
        "relative_residual": float(posterior.solution.residuals.max()),
        "threads": torch.get_num_threads(),
        "candidates": num_candidates * rounds,
        "steps": steps,
        "seconds": seconds,
        "memory_budget_mb": budget / 1e6,
        "memory_used_mb": peak - before,
        "posterior_mb": before,
        "largest_observation": float(posterior.problem.targets.max()),
        "mean_maximum": float(found.values.mean()),
        "mean_of_best_candidates": float(found.candidate_values.mean()),
        "checked_functions": check,
        "random_search_candidates": num_candidates * rounds * _MORE,
        "random_search_seconds": time.perf_counter() - start,
        "mean_of_random_search": float(dense.values.mean()),
        "at_least_random_search": float((gains >= 0).double().mean()),
        "smallest_gain": float(gains.min()),
        "mean_gain": float(gains.mean()),
    }


def _nearby(posterior: PathwisePosterior, bounds: torch.Tensor) -> float:
    """What ``maximise`` takes for this kernel."""
    length = posterior.problem.prior.model.covar_module.base_kernel.lengthscale
    return min(0.5 * float(length), 0.25)


def _reset_peak() -> float:
    """Start measuring anew; the resident set of this process in megabytes."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")
    return peak_rss_mb()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--d", type=int, default=8)
    parser.add_argument("--lengthscale", type=float, default=0.3)
    parser.add_argument("--functions", type=int, default=1000)
    parser.add_argument("--passes", type=float, default=15.0, help="of the solve")
    parser.add_argument("--budget-mb", type=float, default=512.0)
    parser.add_argument("--check", type=int, help="functions; default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--posterior", type=Path, help="file to keep it in")
    parser.add_argument("--output", type=Path, default=_MEASURED / "maximise.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    posterior = posterior_of(
        given.n,
        given.d,
        given.lengthscale,
        given.functions,
        given.passes,
        given.posterior,
    )
    check = given.functions if given.check is None else given.check
    report = measured(posterior, int(given.budget_mb * 1e6), check)
    report["lengthscale"] = given.lengthscale
    for name, value in report.items():
        print(f"{name:26s} {value:.6g}")
    print(write_json(given.output, report))


if __name__ == "__main__":
    main()
