"""The problems of the race: UCI sets, the reference's race, chosen conditioning.

- ``NAME:SPLIT``: a UCI set with the papers' hyperparameters, z-scored as in
  ``benchmarks.uci``; right-hand sides [y | f_s(X) + eps_s].
- ``race:1``, ``race:2``, ``race:3``: n = 10,000 Gaussian inputs in nine dimensions,
  Matern-3/2 of unit variance, y drawn from the process itself.
- ``synthetic:KAPPA``: n = 4,000 Gaussian inputs in three dimensions with the noise
  variance that makes lambda_max(H) / lambda_min(H) the number asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.solvers.problem import (
    KernelKind,
    KernelValues,
    Problem,
    dense_kernel,
)
from benchmarks.uci.data import load_split, locate
from benchmarks.uci.hyperparameters import Hyperparameters, hyperparameters_for
from benchmarks.uci.registry import DATASETS, NUM_SPLITS
from sgdgp.features.prior_draws import draw_prior

NUM_FEATURES = 2048
"""Random features of the pathwise samples."""

RACES: dict[str, tuple[float, float]] = {
    "1": (2.0, 0.1),
    "2": (2.0, 0.01),
    "3": (3.0, 1e-4),
}
"""Lengthscale and noise variance of the reference's three problems."""

_RACE_N, _RACE_D = 10_000, 9
_SYNTHETIC_N, _SYNTHETIC_D, _SYNTHETIC_LENGTHSCALE = 4000, 3, 2.0
_EIGENVALUES_UP_TO = 8000
_EXACT_DRAWS_UP_TO = 12_000  # a float64 factor of that size takes some 15 s
_FEATURES_BEYOND = 16_384


@dataclass(frozen=True)
class ProblemSpec:
    """A problem as it is named on the command line.

    Attributes:
        family: ``"race"``, ``"synthetic"`` or the name of a data set.
        variant: Number of the race, condition number, or split.
        columns: Right-hand sides k. Default: 1 in a race, else 17.
        n: Equations. Default: all training rows; 10,000; 4,000.
        dtype: ``"float32"`` or ``"float64"``.
        seed: Of everything that is drawn.
        noise_scale: Replaces the noise standard deviation of a data set.
    """

    family: str
    variant: str
    columns: int
    n: int | None = None
    dtype: str = "float32"
    seed: int = 0
    noise_scale: float | None = None

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.family}:{self.variant}"


def parse_problem(
    text: str,
    *,
    columns: int | None = None,
    n: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    noise_scale: float | None = None,
) -> ProblemSpec:
    """Read ``pol:0``, ``race:2`` or ``synthetic:1e6`` and check that it exists.

    Raises:
        ValueError: It does not, or an option does not fit it.
        OSError: The files of the data set cannot be had.
    """
    family, _, variant = text.partition(":")
    for name, value in (("columns", columns), ("n", n)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    if noise_scale is not None:
        if family in ("race", "synthetic"):
            raise ValueError(f"noise_scale: {text} has a noise of its own")
        if not noise_scale > 0:
            raise ValueError(f"noise_scale: found {noise_scale}, expected > 0")
    if family == "race":
        if variant not in RACES:
            raise ValueError(
                f"problem: found {text!r}, expected race:1, race:2 or race:3"
            )
    elif family == "synthetic":
        _condition_number(text, variant)
    else:
        _check_data_set(text, family, variant, noise_scale)
    if columns is None:
        columns = 1 if family == "race" else 17
    return ProblemSpec(family, variant, columns, n, dtype, seed, noise_scale)


def _condition_number(text: str, variant: str) -> float:
    try:
        kappa = float(variant)
    except ValueError:
        kappa = math.nan
    if not (math.isfinite(kappa) and kappa > 1):
        raise ValueError(
            f"problem: found {text!r}, expected synthetic:KAPPA with a condition "
            "number above 1, e.g. synthetic:1e6"
        )
    return kappa


def _check_data_set(
    text: str, name: str, split: str, noise_scale: float | None
) -> None:
    if not split.isdigit() or int(split) not in range(NUM_SPLITS):
        raise ValueError(
            f"problem: found {text!r}, expected NAME:SPLIT with a split of 0 to "
            f"{NUM_SPLITS - 1}, race:1 to race:3, or synthetic:KAPPA"
        )
    locate(name)
    if name in DATASETS:
        d = DATASETS[name].d
        hyperparameters_for("published", name, int(split), d, noise_scale=noise_scale)


def make_problem(spec: ProblemSpec) -> Problem:
    """Load or draw the problem.

    Raises:
        ValueError: The noise that the condition number needs is not positive, or
            the problem is too large to know its eigenvalues.
    """
    if spec.family == "race":
        return _race(spec)
    if spec.family == "synthetic":
        return _synthetic(spec)
    return _data_set(spec)


def _data_set(spec: ProblemSpec) -> Problem:
    split = load_split(spec.family, int(spec.variant))
    x, y = split.x, split.y
    if spec.n is not None and spec.n < len(y):
        kept = torch.randperm(len(y), generator=_generator(spec, 2))[: spec.n]
        x, y = x[kept], y[kept]
    values: Hyperparameters = hyperparameters_for(
        "published",
        spec.family,
        int(spec.variant),
        x.shape[1],
        noise_scale=spec.noise_scale,
    )
    kernel = KernelValues("matern32", values.signal_scale**2, values.lengthscale)
    noise = values.noise_scale**2
    return _with_samples(spec, kernel, x, noise, y, {"targets": "data"})


def _race(spec: ProblemSpec) -> Problem:
    lengthscale, noise = RACES[spec.variant]
    x = _gaussian(spec, spec.n or _RACE_N, _RACE_D)
    kernel = KernelValues("matern32", 1.0, (lengthscale,) * _RACE_D)
    y, facts = _draw_targets(spec, kernel, x, noise)
    return _with_samples(spec, kernel, x, noise, y, facts)


def _synthetic(spec: ProblemSpec) -> Problem:
    kappa = _condition_number(spec.name, spec.variant)
    n = spec.n or _SYNTHETIC_N
    if n > _EIGENVALUES_UP_TO:
        raise ValueError(
            f"n: found {n}, expected at most {_EIGENVALUES_UP_TO} for a chosen "
            "condition number: it takes all eigenvalues of K"
        )
    x = _gaussian(spec, n, _SYNTHETIC_D)
    kinds: tuple[KernelKind, ...] = ("matern32", "rbf")
    for kind in kinds:
        kernel = KernelValues(kind, 1.0, (_SYNTHETIC_LENGTHSCALE,) * _SYNTHETIC_D)
        # Of the matrix that the solvers meet: inputs rounded to their dtype.
        rounded = x.to(getattr(torch, spec.dtype)).double()
        eigenvalues = torch.linalg.eigvalsh(
            dense_kernel(kernel.build(rounded), rounded)
        )
        smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
        noise = (largest - kappa * smallest) / (kappa - 1.0)
        if noise > 0:
            break
    else:
        raise ValueError(
            f"problem: {spec.name} with n = {n} is better conditioned than that "
            "without any noise; ask for a smaller condition number or a larger n"
        )
    y, facts = _draw_targets(spec, kernel, x, noise)
    facts |= {
        "kernel": kind,
        "largest_eigenvalue": largest + noise,
        "smallest_eigenvalue": smallest + noise,
        "condition_number": (largest + noise) / (smallest + noise),
    }
    return _with_samples(spec, kernel, x, noise, y, facts)


def _with_samples(
    spec: ProblemSpec,
    kernel: KernelValues,
    x: Tensor,
    noise: float,
    y: Tensor,
    facts: dict[str, Any],
) -> Problem:
    """Add pathwise samples as right-hand sides and round everything to the dtype."""
    dtype = getattr(torch, spec.dtype)
    generator = _generator(spec, 1)
    samples = spec.columns - 1
    x = x.to(dtype).contiguous()
    prior = draw_prior(
        kernel.build(x),
        samples,
        dim=x.shape[1],
        num_features=NUM_FEATURES,
        generator=generator,
        dtype=dtype,
    )
    with torch.no_grad():
        draws = prior(x)
    eps = math.sqrt(noise) * torch.randn(
        len(x), samples, generator=generator, dtype=torch.float64
    ).to(dtype)
    rhs = torch.cat([y.to(dtype).unsqueeze(1), draws + eps], 1)
    noise_draws = torch.cat([torch.zeros_like(rhs[:, :1]), eps], 1)
    return Problem(spec.name, kernel, x, noise, rhs, noise_draws, facts)


def _draw_targets(
    spec: ProblemSpec, kernel: KernelValues, x: Tensor, noise: float
) -> tuple[Tensor, dict[str, Any]]:
    """Draw y ~ N(0, K + s I): exact by L z, or features where that takes too long."""
    generator = _generator(spec, 3)
    n = len(x)
    if n <= _EXACT_DRAWS_UP_TO:
        matrix = dense_kernel(kernel.build(x), x)
        matrix.diagonal().add_(noise)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not int(info):
            z = torch.randn(n, generator=generator, dtype=torch.float64)
            return factor @ z, {"targets": "exact draw"}
    prior = draw_prior(
        kernel.build(x),
        1,
        dim=x.shape[1],
        num_features=_FEATURES_BEYOND,
        generator=generator,
        dtype=torch.float64,
    )
    eps = torch.randn(n, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = prior(x)[:, 0] + math.sqrt(noise) * eps
    return y, {"targets": f"draw with {_FEATURES_BEYOND} features"}


def _gaussian(spec: ProblemSpec, n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=_generator(spec, 2), dtype=torch.float64)


def _generator(spec: ProblemSpec, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * spec.seed + stream)
