"""The units of a model's outcomes, where it transforms them (BoTorch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.errors import UnsupportedModelError

_CURVATURE = 1e-6
"""Largest relative departure from a straight line that is rounding: far above that of
float32 statistics in float64, far below that of any transform one would choose."""


@dataclass(frozen=True)
class OutcomeScale:
    """Targets in the user's units = shift + scale * targets in the model's units."""

    shift: float = 0.0
    scale: float = 1.0

    def to_model_units(self, y: Tensor) -> Tensor:
        """The user's targets in the model's units."""
        return (y - self.shift) / self.scale


def affine_of(
    transform: Any, outputs: int, device: torch.device | None
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]] | None:
    """Shift and scale of an affine outcome transform, output by output, in float64.

    Args:
        transform: One of BoTorch's outcome transforms, which are read at three points.
        outputs: Number of outputs m; those of a transform of one output are alike.
        device: Where the transform is.

    Returns:
        Both, or None where the transform is not affine in each output by itself.
    """
    # In float64, so that a large shift does not hide the scale.
    steps = torch.arange(3, dtype=torch.float64, device=device)
    points = steps.unsqueeze(1).expand(3, outputs).contiguous()
    values = transform.untransform(points)[0].double().reshape(3, outputs)
    shift, one, two = values
    scale = one - shift
    bend = ((two - one) - scale).abs()
    if bool((bend > _CURVATURE * (two - shift).abs().clamp_min(1e-300)).any()):
        return None
    return shift, scale


def outcome_scales(model: ExactGP, outputs: int) -> tuple[OutcomeScale, ...]:
    """Read a model's affine outcome transform, for each of its outputs per input.

    Raises:
        UnsupportedModelError: The transform is not affine in each output by itself.
    """
    transform = getattr(model, "outcome_transform", None)
    if transform is None:
        return (OutcomeScale(),) * outputs
    targets = model.train_targets
    device = targets.device if torch.is_tensor(targets) else None
    affine = affine_of(transform, outputs, device)
    if affine is None:
        raise UnsupportedModelError(
            f"model: outcome transform {type(transform).__name__} is not affine; only "
            "affine transforms such as Standardize keep the posterior Gaussian"
        )
    return tuple(map(OutcomeScale, *(part.tolist() for part in affine)))


def to_model_units(model: ExactGP, y: Tensor) -> Tensor:
    """The user's targets (n,) or (n, T) in the units of the model's own."""
    if getattr(model, "outcome_transform", None) is None:
        return y
    # Columns of a model with one output get its units, by broadcasting.
    scales = outcome_scales(model, y.shape[1] if y.ndim == 2 else 1)
    shift = y.new_tensor([scale.shift for scale in scales])
    factor = y.new_tensor([scale.scale for scale in scales])
    return (y - shift) / factor
