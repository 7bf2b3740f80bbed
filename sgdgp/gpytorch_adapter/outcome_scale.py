"""The units of a model's targets, where it transforms them (BoTorch)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.errors import UnsupportedModelError


@dataclass(frozen=True)
class TargetScale:
    """Targets in the user's units = shift + scale * targets in the model's units."""

    shift: float = 0.0
    scale: float = 1.0

    def to_model_units(self, y: Tensor) -> Tensor:
        """The user's targets in the model's units."""
        return (y - self.shift) / self.scale


def target_scales(model: ExactGP, outputs: int) -> tuple[TargetScale, ...]:
    """Read an affine outcome transform, output by output.

    Args:
        model: The model.
        outputs: Outputs per input.

    Raises:
        UnsupportedModelError: The transform is not affine in each output by itself.
    """
    transform = getattr(model, "outcome_transform", None)
    if transform is None:
        return (TargetScale(),) * outputs
    # In float64, so that a large shift does not hide the scale.
    steps = torch.arange(3, dtype=torch.float64, device=_device(model))
    points = steps.unsqueeze(1).expand(3, outputs).contiguous()
    values = transform.untransform(points)[0].reshape(3, outputs).tolist()
    scales = []
    for zero, one, two in zip(*values, strict=True):
        if abs((two - one) - (one - zero)) > 1e-6 * max(abs(two - zero), 1e-300):
            raise UnsupportedModelError(
                f"model: outcome transform {type(transform).__name__} is not affine; "
                "only affine transforms such as Standardize keep the posterior Gaussian"
            )
        scales.append(TargetScale(zero, one - zero))
    return tuple(scales)


def _device(model: ExactGP) -> torch.device | None:
    targets = model.train_targets
    return targets.device if torch.is_tensor(targets) else None


def to_model_units(model: ExactGP, y: Tensor) -> Tensor:
    """The user's targets (n,) or (n, T) in the units of the model's own.

    Args:
        model: The model; BoTorch's have an outcome transform.
        y: Targets before it.
    """
    outputs = y.shape[1] if y.ndim == 2 else 1
    transform = getattr(model, "outcome_transform", None)
    if transform is None:
        return y
    # Columns of a model with one output get its units, by broadcasting.
    scales = target_scales(model, outputs)
    shift = y.new_tensor([scale.shift for scale in scales])
    factor = y.new_tensor([scale.scale for scale in scales])
    return (y - shift) / factor
