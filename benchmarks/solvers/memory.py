"""Peak memory of one ``sgdgp.condition`` under a budget, in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpytorch.likelihoods import GaussianLikelihood

import sgdgp
from benchmarks.demo.problem import DemoGP
from benchmarks.solvers.setting import NOISE
from benchmarks.uci.memory import peak_rss_mb

_ROOT = Path(__file__).resolve().parents[2]


def measure_memory(
    n: int, d: int, budget: int, num_samples: int, passes: int
) -> dict[str, float | str]:
    """Start a fresh process that conditions on n points; what it measured.

    Raises:
        RuntimeError: The process failed; with what it said.
    """
    arguments = [str(value) for value in (n, d, budget, num_samples, passes)]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.solvers.memory", *arguments],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the memory run failed:\n{finished.stderr}")
    result: dict[str, float | str] = json.loads(finished.stdout.splitlines()[-1])
    return result


def _condition(
    n: int, d: int, budget: int, num_samples: int, passes: int
) -> dict[str, float | str]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = torch.sin(x[:, 0]) + math.sqrt(NOISE) * torch.randn(n, generator=generator)
    model = DemoGP(x, y, GaussianLikelihood())
    model.covar_module.base_kernel.lengthscale = math.sqrt(d)
    model.likelihood.noise = NOISE
    before = peak_rss_mb()
    start = time.perf_counter()
    posterior = sgdgp.condition(
        model,
        solver=sgdgp.SDD(max_passes=float(passes)),
        num_samples=num_samples,
        memory_budget=budget,
        progress=False,
    )
    return {
        "n": n,
        "d": d,
        "memory_budget": budget,
        "num_samples": num_samples,
        "operator": posterior.solution.operator,
        "passes": posterior.solution.passes,
        "seconds": time.perf_counter() - start,
        "rss_before_mb": before,
        "peak_rss_mb": peak_rss_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(_condition(*(int(value) for value in sys.argv[1:]))))
