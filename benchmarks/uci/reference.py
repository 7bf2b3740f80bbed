"""Published figures to print beside one's own.

Table 1 of Lin, Antoran, Padhy et al., "Sampling from Gaussian Process Posteriors
using Stochastic Gradient Descent" (NeurIPS 2023): mean over splits and its standard
error, in z-scored units. The CG row is the better of plain and preconditioned
conjugate gradients by test RMSE, so it is close to exact where it has converged
(the first five data sets at the regular noise).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LOW_NOISE_SCALE = 0.001
"""Noise standard deviation of the rows marked with a dagger."""

_NAMES = (
    "pol",
    "elevators",
    "bike",
    "protein",
    "keggdirected",
    "3droad",
    "song",
    "buzz",
    "houseelectric",
)


@dataclass(frozen=True)
class Published:
    """A published mean over splits; ``error`` is None where none was printed."""

    value: float
    error: float | None = None


def _row(
    values: tuple[float, ...], errors: Mapping[str, float] | None = None
) -> Mapping[str, Published]:
    errors = errors or {}
    return {
        name: Published(value, errors.get(name))
        for name, value in zip(_NAMES[: len(values)], values, strict=True)
    }


_EXACT_LIKE = "paper, exact-like"

RMSE: Mapping[str, Mapping[str, Published]] = {
    "paper, SGD": _row(
        (0.13, 0.38, 0.11, 0.51, 0.12, 0.11, 0.80, 0.42, 0.09), {"buzz": 0.01}
    ),
    "paper, CG": _row(
        (0.08, 0.35, 0.04, 0.50, 0.08, 0.15, 0.85, 1.41, 0.87),
        {"3droad": 0.01, "song": 0.03, "buzz": 0.08, "houseelectric": 0.14},
    ),
    "paper, SVGP": _row(
        (0.10, 0.37, 0.07, 0.57, 0.09, 0.49, 0.81, 0.33, 0.11),
        {"3droad": 0.01, "houseelectric": 0.01},
    ),
    _EXACT_LIKE: _row((0.0809, 0.3522, 0.0367, 0.5035, 0.0845)),
}

RMSE_LOW_NOISE: Mapping[str, Mapping[str, Published]] = {
    "paper, SGD": _row(
        (0.13, 0.38, 0.11, 0.51, 0.12, 0.11, 0.80, 0.42, 0.09), {"buzz": 0.01}
    ),
    "paper, CG": _row(
        (0.16, 0.68, 0.05, 3.03, 9.79, 0.34, 0.83, 5.66, 0.93),
        dict(
            zip(
                _NAMES,
                (0.01, 0.09, 0.01, 0.23, 1.06, 0.02, 0.02, 1.14, 0.19),
                strict=True,
            )
        ),
    ),
}

NLL: Mapping[str, Mapping[str, Published]] = {
    "paper, SGD": _row(
        (-0.70, 0.47, -0.48, 0.64, -0.62, -0.60, 1.21, 0.83, -1.09),
        {
            "pol": 0.02,
            "bike": 0.08,
            "protein": 0.01,
            "keggdirected": 0.07,
            "buzz": 0.07,
            "houseelectric": 0.04,
        },
    ),
    "paper, CG": _row(
        (-1.17, 0.38, -2.62, 0.62, -0.92, 16.27, 1.36, 2.38, 2.07),
        {
            "bike": 0.06,
            "keggdirected": 0.10,
            "3droad": 0.45,
            "song": 0.07,
            "buzz": 0.08,
            "houseelectric": 0.58,
        },
    ),
    "paper, SVGP": _row(
        (-0.71, 0.43, -1.27, 0.86, -0.70, 0.67, 1.22, 0.25, -0.89),
        {
            "bike": 0.02,
            "keggdirected": 0.02,
            "3droad": 0.02,
            "buzz": 0.04,
            "houseelectric": 0.10,
        },
    ),
    _EXACT_LIKE: _row((-1.17, 0.38, -2.62, 0.62, -0.92)),
}


def published_rows(
    metric: str, *, low_noise: bool
) -> Mapping[str, Mapping[str, Published]]:
    """Published rows of a metric: row label -> data set -> figure.

    Args:
        metric: ``"rmse"`` or ``"nll"``; every other metric has no published rows.
        low_noise: The rows with noise standard deviation 0.001 (RMSE only).
    """
    if metric == "rmse":
        return RMSE_LOW_NOISE if low_noise else RMSE
    return NLL if metric == "nll" and not low_noise else {}
