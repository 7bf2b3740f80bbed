"""How far estimates of tr(H^-1 dH) are from it: measured, and in closed form.

``python -m benchmarks.hyperparameters.variance`` takes n rows of a data set, where the
trace is known, and draws probes as ``sgdgp.fit`` does; their solves are exact. What is
left is the error of the probes alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.data import Split, load_split
from benchmarks.uci.download import DataUnavailableError
from benchmarks.uci.hyperparameters import Hyperparameters, hyperparameters_for
from benchmarks.uci.model import build_model, kernel_block
from sgdgp.features import draw_prior
from sgdgp.training import PathwiseProbes, Probes, StandardProbes

COUNTS = (8, 32, 128)
_MEASURED = Path(__file__).parent / "measured" / "variance.json"
_STEP = 1e-4
_Drawn: TypeAlias = tuple[Tensor, bool]
"""Right-hand sides (n, s), and whether their covariance is H."""


@dataclass(frozen=True)
class Spread:
    """Relative errors of one parameter's trace term by one kind of probes.

    Attributes:
        n: Rows.
        values: Which hyperparameters: "published", "default" or "initial".
        parameter: What H is differentiated by (its logarithm).
        probes: "pathwise", "standard", or "one map" (pathwise, the random
            features shared by all probes).
        trace: tr(H^-1 dH) / n.
        closed: Probe vectors to relative error, in closed form; empty if none is known.
        measured: Probe vectors to relative root mean square error.
    """

    n: int
    values: str
    parameter: str
    probes: str
    trace: float
    closed: dict[int, float]
    measured: dict[int, float]


def variances(
    factor: Float[Tensor, "n n"], derivative: Float[Tensor, "n n"]
) -> tuple[float, float]:
    """Variance of one Gaussian probe's estimate of tr(H^-1 A): pathwise, standard.

    With M = H^-1 A these are 2 tr(M^2) and tr(M^2) + ||M||_F^2, never less.

    Args:
        factor: Lower Cholesky factor of H.
        derivative: A, symmetric.
    """
    product = torch.cholesky_solve(derivative, factor)
    squares = float((product * product.mT).sum())
    return 2.0 * squares, squares + float(product.square().sum())


def initial_values(d: int) -> Hyperparameters:
    """Where a fit of a new GPyTorch model starts: softplus(0) for everything."""
    start = math.log(2.0)
    return Hyperparameters(math.sqrt(start), math.sqrt(start), (start,) * d)


def derivatives(
    split: Split, values: Hyperparameters
) -> dict[str, Float[Tensor, "n n"]]:
    """DH by the logarithms of three parameters, from central differences.

    Args:
        split: The data, in float64.
        values: Where to differentiate.
    """
    noise = values.noise_scale**2 * torch.eye(len(split.x), dtype=split.x.dtype)

    def kernel(factor: float) -> Tensor:
        lengthscale = tuple(factor * value for value in values.lengthscale)
        moved = replace(values, lengthscale=lengthscale)
        model = build_model(split.x, split.y, moved)
        return kernel_block(model, split.x, split.x)

    change = kernel(math.exp(_STEP)) - kernel(math.exp(-_STEP))
    return {
        "noise": noise,
        "outputscale": kernel(1.0),
        "lengthscales": change / (2.0 * _STEP),
    }


def estimates(
    draw: Callable[[int], _Drawn],
    factor: Float[Tensor, "n n"],
    matrices: Sequence[Float[Tensor, "n n"]],
    replicates: int,
) -> Float[Tensor, "p r s"]:
    """Estimates of tr(H^-1 A) by matrix, replicate and single probe.

    Args:
        draw: Seed to right-hand sides.
        factor: Cholesky factor of H.
        matrices: The matrices A.
        replicates: Number of seeds r.
    """
    found = []
    for seed in range(replicates):
        rhs, is_pathwise = draw(seed)
        left = torch.cholesky_solve(rhs, factor)
        right = left if is_pathwise else rhs
        found.append(torch.stack([(left * (a @ right)).sum(0) for a in matrices]))
    return torch.stack(found, dim=1)


def spreads(
    split: Split,
    source: str,
    values: Hyperparameters,
    num_features: int,
    replicates: int,
) -> list[Spread]:
    """Relative errors for every parameter and kind of probes on all rows of a split.

    Args:
        split: The data, in float64.
        source: What the values are called.
        values: Hyperparameters.
        num_features: Random features of a prior function.
        replicates: Independent sets of the largest number of probes.
    """
    x, n, most = split.x, len(split.x), max(COUNTS)
    kernel = build_model(x, split.y, values).covar_module
    parts = derivatives(split, values)
    factor = torch.linalg.cholesky(parts["noise"] + parts["outputscale"])
    noise = parts["noise"].diagonal()

    def drawn(probes: Probes, seed: int) -> _Drawn:
        found = probes.draw(kernel, x, noise, torch.Generator().manual_seed(seed))
        return found.rhs, found.is_pathwise

    def shared(seed: int) -> _Drawn:
        return _one_map(kernel, x, noise, most, num_features, seed), True

    kinds: dict[str, Callable[[int], _Drawn]] = {
        "pathwise": lambda seed: drawn(PathwiseProbes(most, num_features), seed),
        "standard": lambda seed: drawn(StandardProbes(most), seed),
        "one map": shared,
    }
    result = []
    for kind, draw in kinds.items():
        found = estimates(draw, factor, list(parts.values()), replicates)
        for (name, matrix), singles in zip(parts.items(), found, strict=True):
            trace = float(torch.cholesky_solve(matrix, factor).trace())
            exact = dict(zip(kinds, variances(factor, matrix), strict=False)).get(kind)
            closed = {} if exact is None else {s: math.sqrt(exact / s) for s in COUNTS}
            result.append(
                Spread(
                    n,
                    source,
                    name,
                    kind,
                    trace / n,
                    {s: error / abs(trace) for s, error in closed.items()},
                    {s: _error(singles, s, trace) / abs(trace) for s in COUNTS},
                )
            )
    return result


def _one_map(
    kernel: Kernel, x: Tensor, noise: Tensor, count: int, num_features: int, seed: int
) -> Tensor:
    """Pathwise right-hand sides whose prior functions share their random features."""
    generator = torch.Generator().manual_seed(seed)
    functions = draw_prior(
        kernel,
        count,
        dim=x.shape[1],
        num_features=num_features,
        generator=generator,
        dtype=x.dtype,
        group_size=count,
    )
    normal = torch.randn(len(x), count, generator=generator, dtype=x.dtype)
    return functions(x) + noise.sqrt().unsqueeze(1) * normal


def _error(singles: Float[Tensor, "r s"], count: int, truth: float) -> float:
    """Root mean square error of means over ``count`` probes of one replicate."""
    means = singles.unflatten(1, (-1, count)).mean(2)
    return float((means - truth).square().mean().sqrt())


def table(results: Sequence[Spread]) -> str:
    """Markdown: relative errors in per cent, measured (closed form)."""
    shown = {"pathwise": COUNTS, "standard": COUNTS, "one map": COUNTS[-1:]}
    names = [f"{kind}, {s}" for kind, counts in shown.items() for s in counts]
    rows = [
        ["n", "at", "parameter", *names],
        ["---:", "---", "---", *("---:" for _ in names)],
    ]
    cells: dict[tuple[int, str, str], list[str]] = {}
    for result in results:
        row = cells.setdefault((result.n, result.values, result.parameter), [])
        for s in shown[result.probes]:
            closed = f" ({100 * result.closed[s]:.2g})" if result.closed else ""
            row.append(f"{100 * result.measured[s]:.2g}{closed}")
    rows += [[f"{n:,}", at, name, *row] for (n, at, name), row in cells.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parser() -> argparse.ArgumentParser:
    """The options of this command."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.hyperparameters.variance",
        description="Error of the trace term's estimates, measured and in closed form.",
    )
    add = result.add_argument
    add("--dataset", default="pol")
    add("--split", type=int, default=0)
    add("--n", type=int, nargs="+", default=[300, 1000], help="random training rows")
    add("--at", nargs="+", default=["published", "initial"], metavar="VALUES")
    add("--num-features", type=int, default=PathwiseProbes().num_features)
    add("--replicates", type=int, default=30)
    add("--out", type=Path, default=_MEASURED, help="JSON file of the results")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write it down."""
    given = parser().parse_args(arguments)
    try:
        split = load_split(given.dataset, given.split)
        results = []
        for n in given.n:
            some = rows(split, n)
            for source in given.at:
                d = split.x.shape[1]
                values = (
                    initial_values(d)
                    if source == "initial"
                    else hyperparameters_for(source, given.dataset, given.split, d)
                )
                results += spreads(
                    some, source, values, given.num_features, given.replicates
                )
    except (ValueError, DataUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    request = {key: value for key, value in vars(given).items() if key != "out"}
    stored = {"request": request, "results": [asdict(result) for result in results]}
    given.out.write_text(json.dumps(stored, indent=1, allow_nan=False) + "\n")
    return 0


def rows(split: Split, n: int) -> Split:
    """The first n training rows in a random order that is always the same.

    Raises:
        ValueError: The split has fewer.
    """
    if not 2 <= n <= len(split.x):
        raise ValueError(f"n: found {n}, expected 2 to {len(split.x)} rows")
    order = torch.randperm(len(split.x), generator=torch.Generator().manual_seed(0))
    return replace(split, x=split.x[order[:n]], y=split.y[order[:n]])


if __name__ == "__main__":
    sys.exit(main())
