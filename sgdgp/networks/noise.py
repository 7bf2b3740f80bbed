"""Noise variances of regression networks: how they are given, how they are learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite

_LARGEST_FALL = 100.0
_SMALLEST = torch.finfo(torch.float32).tiny


def updated_noise(
    squared_error: Float[Tensor, " C"],
    num_examples: int,
    effective_dimension: float | Float[Tensor, " C"] = 0.0,
    before: float | Sequence[float] | Tensor = 0.0,
) -> Float[Tensor, " C"]:
    """Noise variance of each output, sigma_c^2 = |y_c - f_c|^2 / (N - gamma_c).

    The fixed point of the evidence in the noise (MacKay, Neural Computation 4, 1992).
    Where the model takes up more than half of the targets, gamma from samples is not
    good enough to divide by what it leaves: there it is the step of expectation
    maximisation, (|y_c - f_c|^2 + gamma_c sigma_c^2) / N, with the same fixed point.

    Args:
        squared_error: Sums over the examples of (y - f)^2 (C,), f the outputs of the
            linear model's optimum.
        num_examples: N.
        effective_dimension: gamma, shared evenly by the outputs, or that of each
            (C,), sum_n var(f_nc) / sigma_c^2. Default: 0, the mean squared error.
        before: The noise at which gamma was found, one or one each.

    Returns:
        Variances (C,) in float64, positive even where the fit is exact, and no less
        than a hundredth of those before. If gamma was shared evenly, their mean is the
        one variance for all outputs.

    Raises:
        ValueError: Negative or non-finite errors or dimensions.
    """
    error = _in_float64(squared_error)
    gamma = _in_float64(effective_dimension)
    check_finite("squared_error", error)
    check_finite("effective_dimension", gamma)
    for name, value in (("squared_error", error), ("effective_dimension", gamma)):
        if bool((value < 0).any()):
            raise ValueError(
                f"{name}: expected no negative value, found {value.min().item():.6g}"
            )
    gamma = (gamma if gamma.ndim else gamma / len(error)).clamp_max(num_examples)
    earlier = _in_float64(before)
    step = (error + gamma * earlier) / num_examples
    left = num_examples - gamma
    noise = torch.where(2 * gamma <= num_examples, error / left, step)
    # An exact fit has no noise; systems that get there in one go are not solvable.
    return noise.maximum(earlier / _LARGEST_FALL).clamp_min(_SMALLEST)


def as_variances(
    name: str, value: float | Sequence[float] | Tensor | None
) -> float | tuple[float, ...] | None:
    """One variance, or one per output, as plain numbers: they compare, hash and store.

    Args:
        name: What the caller calls it.
        value: A number, a sequence, a tensor of shape () or (C,), or None.

    Raises:
        ValueError: Of another shape, or a variance that is not positive and finite.
    """
    if value is None:
        return None
    tensor = _in_float64(value)
    if tensor.ndim > 1 or tensor.numel() == 0:
        raise ValueError(
            f"{name}: expected one variance, or one per output as shape (C,), found "
            f"shape {tuple(tensor.shape)}"
        )
    check_finite(name, tensor)
    if not bool((tensor > 0).all()):
        raise ValueError(
            f"{name}: expected positive variances, found {tensor.min().item():.6g}"
        )
    return tuple(tensor.tolist()) if tensor.ndim else float(tensor)


def _in_float64(value: float | Sequence[float] | Tensor) -> Tensor:
    """A tensor on the CPU, without gradient; numbers lose no digits."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
