"""One measurement in processes of its own: ``python -m`` writes it as a JSON file."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch import Tensor

import sgdgp
from benchmarks.json_file import write_json
from sgdgp.operators import operator_by_name
from sgdgp.solvers.sdd import default_block_size

NOISE = 0.1
_PREDICTED = 1000
_SAMPLE = 0.01
"""Part of an epoch whose steps are made; the others take as long."""


class Model(gpytorch.models.ExactGP):
    """Matern-3/2 with the lengthscale of inputs that are standard normal."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.MaternKernel(nu=1.5)
        self.covar_module.lengthscale = 0.8 * x.shape[1] ** 0.5
        self.likelihood.noise = NOISE

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """The prior at x."""
        mean, covariance = self.mean_module(x), self.covar_module(x)
        return gpytorch.distributions.MultivariateNormal(mean, covariance)


def problem(n: int, dims: int, dtype: str) -> tuple[Model, Tensor]:
    """A model of n noisy values of a smooth function, and points to predict at."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n + _PREDICTED, dims, generator=g)
    y = (x @ torch.randn(dims, 5, generator=g) / dims**0.5).sin().sum(1)
    y += NOISE**0.5 * torch.randn(len(y), generator=g)
    x, y = (given.to(getattr(torch, dtype)) for given in (x, y))
    return Model(x[:n], y[:n]).to(x), x[n:]


def solve(
    n: int, dims: int, columns: int, solver: str, tolerance: float, dtype: str
) -> dict[str, Any]:
    """A whole ``condition`` and the predictions of a thousand points."""
    model, x_new = problem(n, dims, dtype)
    chosen = sgdgp.Auto() if solver == "auto" else sgdgp.solvers.auto.SOLVERS[solver]()
    started, used = time.perf_counter(), time.process_time()
    posterior = sgdgp.condition(
        model,
        solver=chosen.with_limits(sgdgp.solvers.Limits(tolerance)),
        num_samples=columns - 1,
        progress=False,
    )
    solved, solved_used = time.perf_counter(), time.process_time()
    prediction = posterior.predict(x_new, batch_size=_PREDICTED)
    found = posterior.solution
    return {
        "seconds": solved - started,
        "cpu_seconds": solved_used - used,
        "prediction_seconds": time.perf_counter() - solved,
        "timings": posterior.timings,
        "passes": found.passes,
        "residual": float(found.residuals.max()),
        "reason": found.reason,
        "solver": found.solver,
        "operator": found.operator,
        "mean": prediction.mean.tolist()[:100],
        "variance": prediction.variance.tolist()[:100],
    }


def epoch(
    n: int, dims: int, columns: int, solver: str, tolerance: float, dtype: str
) -> dict[str, Any]:
    """What a pass of SDD's steps takes, from some of them; nothing is solved."""
    model, _ = problem(n, dims, dtype)
    operator = operator_by_name("sharded", model.covar_module, model.train_inputs[0])
    size = default_block_size(n)
    steps = -(-n // size)
    made = max(4, round(_SAMPLE * steps))
    point = operator.tracked(operator.x.new_zeros(n, columns))
    change, average = point.zeros_like(), operator.x.new_zeros(n, columns)
    operator.rows_of_product(slice(0, size), point)  # threads, compilers, messages
    started, used = time.perf_counter(), time.process_time()
    for step in range(made):
        rows = slice(step * size, (step + 1) * size)
        gradient = operator.rows_of_product(rows, point) - 1.0
        change.move(operator.move(rows, gradient), -1e-6)
        point.set_to_difference(point, change, 0.5)
        if step % 4 == 0:
            average.lerp_(point.values, 0.1)
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - used
    return {
        "modelled": True,
        "steps": steps,
        "steps_made": made,
        "seconds": seconds * steps / made,
        "cpu_seconds": cpu_seconds * steps / made,
        "seconds_measured": seconds,
        "operator": operator.name,
    }


def product(
    n: int, dims: int, columns: int, solver: str, tolerance: float, dtype: str
) -> dict[str, Any]:
    """The fastest of three products K V."""
    model, _ = problem(n, dims, dtype)
    operator = operator_by_name("sharded", model.covar_module, model.train_inputs[0])
    g = torch.Generator().manual_seed(1)
    v = torch.randn(n, columns, generator=g).to(operator.x)
    operator.matmul(v[:, :1])
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        found = operator.matmul(v)
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "values": found[:100, 0].tolist()}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "solve": solve,
    "epoch": epoch,
    "product": product,
}


def main(out: Path, kind: str, settings: dict[str, Any]) -> None:
    """Measure, in the process that leads."""
    found = KINDS[kind](**settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(out, {**settings, **found, "peak_bytes": peak})


if __name__ == "__main__":
    place, which, given = sys.argv[1:]
    torch.set_num_threads(1)
    sgdgp.distribute(
        lambda: main(Path(place), which, json.loads(given)),
        device=torch.device("cpu"),
    )
