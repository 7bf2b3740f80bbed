"""Checks of the regressor's parameters, and what they stand for.

What is refused is named, by a TypeError if it is of the wrong kind, else a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight

from sgdgp.core.checks import check_count, check_positive, check_variances
from sgdgp.solvers import Solver
from sgdgp.solvers.auto import check_solver_name

Optimiser = Callable[[Any], torch.optim.Optimizer]

_Function = TypeVar("_Function", bound=Callable[..., None])

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def checked_later(function: _Function) -> _Function:
    """Exempt a constructor from checks of types while the program runs.

    scikit-learn wants whatever it is given to be stored, and checked by ``fit``.
    """
    function.__no_type_check__ = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Settings:
    """Checked parameters of a regressor.

    Attributes:
        noise: Noise variance to start from, or those of all rows.
        optimiser: Parameters to an optimiser; None to learn nothing.
        steps: Most steps of it.
        num_samples: Posterior samples.
        solver: Solver or its name.
        device: Where to compute.
        dtype: In what precision.
        progress: Whether to show progress bars.
    """

    noise: float | np.ndarray
    optimiser: Optimiser | None
    steps: int
    num_samples: int
    solver: Solver | str
    device: torch.device
    dtype: torch.dtype
    progress: bool

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Settings:
        """Check the parameters of a regressor, ``get_params()``."""
        check_solver_name(parameters["solver"])
        return cls(
            noise=check_noise(parameters["noise"]),
            optimiser=check_optimizer(parameters["optimizer"]),
            steps=check_whole("steps", parameters["steps"], 0),
            num_samples=check_whole("num_samples", parameters["num_samples"], 0),
            solver=parameters["solver"],
            device=check_device(parameters["device"]),
            dtype=check_dtype(parameters["dtype"]),
            progress=bool(parameters["verbose"]),
        )


def check_whole(name: str, value: Any, minimum: int) -> int:
    """The value as an int; NumPy's integers will do."""
    check_count(name, value, minimum)
    return int(value)


def check_noise(noise: Any) -> float | np.ndarray:
    """The noise variance as a float, or those of all rows (n,)."""
    if isinstance(noise, list | tuple | np.ndarray) and np.ndim(noise) == 1:
        variances = np.asarray(noise, dtype=np.float64)
        check_variances("noise", torch.from_numpy(variances))
        if len(variances) != 1:
            return variances
        noise = float(variances[0])
    check_positive("noise", noise)
    return float(noise)


def noise_of_rows(noise: float | np.ndarray, n: int) -> np.ndarray:
    """Noise variances of n rows."""
    if isinstance(noise, np.ndarray) and len(noise) != n:
        raise ValueError(
            "noise must be a scalar or an array with same number of entries as y. "
            f"({len(noise)} != {n})"
        )
    return np.broadcast_to(noise, n)


def check_device(device: str | torch.device) -> torch.device:
    """The device named; "auto" is a GPU if there is one that CUDA can use."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"device: expected 'auto' or a device of this machine, found {device!r}"
        ) from error
    return found


def check_dtype(dtype: Any) -> torch.dtype:
    """float32 or float64 as PyTorch's, from a name, NumPy's or PyTorch's own."""
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    try:
        return _DTYPES[np.dtype(dtype).name]
    except (TypeError, KeyError):
        raise ValueError(
            f"dtype: expected 'float64' or 'float32', found {dtype!r}"
        ) from None


def check_optimizer(optimizer: str | Optimiser | None) -> Optimiser | None:
    """What makes an optimiser from parameters, or None for fixed parameters."""
    if optimizer is None or (callable(optimizer) and not isinstance(optimizer, str)):
        return optimizer
    if optimizer != "adam":
        raise ValueError(
            "optimizer: expected 'adam', None or a callable that takes parameters, "
            f"found {optimizer!r}"
        )
    # Adam's steps do not depend on the scale of the loss, up to eps; with a smaller
    # one a row of weight two and two rows, whose losses are averaged over different
    # counts, teach the same.
    return partial(torch.optim.Adam, lr=0.1, eps=1e-14)


def check_weights(
    sample_weight: Any, x: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | slice]:
    """Weights of the rows that count (n,), and which those are.

    Args:
        sample_weight: Weights of all rows, one for all, or None.
        x: Inputs.

    Returns:
        The positive weights, or None where all are one; and their rows.
    """
    if sample_weight is None:
        return None, slice(None)
    weights = _check_sample_weight(
        sample_weight, x, dtype=np.float64, ensure_non_negative=True
    )
    counted = weights > 0
    if not counted.any():
        raise ValueError("sample_weight: all weights are zero; one has to be positive")
    positive = weights[counted]
    return (None if (positive == 1).all() else positive), counted


def check_quantiles(quantiles: Any) -> np.ndarray:
    """Probabilities (q,) strictly between zero and one."""
    levels = np.atleast_1d(np.asarray(quantiles, dtype=np.float64))
    if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(
            "quantiles: expected numbers strictly between 0 and 1, found "
            f"{np.asarray(quantiles).tolist()}"
        )
    return levels


def draw_seed(random_state: Any) -> int:
    """A seed from an int, a ``numpy.random.RandomState`` or None."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
