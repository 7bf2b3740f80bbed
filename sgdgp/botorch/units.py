"""Outcome transforms, as the units of function values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Tensor

_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Units:
    """From a model's units to the user's: factor and shift (m,), or any transform.

    Attributes:
        shift: Of an affine transform (m,).
        factor: Of an affine transform (m,).
        transform: A frozen transform that is not affine, else None.
    """

    shift: Tensor
    factor: Tensor
    transform: OutcomeTransform | None = None

    @property
    def is_affine(self) -> bool:
        """Whether mean and variance pass through, and not only values."""
        return self.transform is None

    def values(self, latent: Tensor, x: Tensor) -> Tensor:
        """Values (..., m) in the user's units, of those in the model's."""
        if self.transform is None:
            return self.shift + self.factor * latent
        return self.transform.untransform(latent, X=x)[0]

    def latent(self, values: Tensor, x: Tensor) -> Tensor:
        """Values (..., m) in the model's units, of those in the user's."""
        if self.transform is None:
            return (values - self.shift) / self.factor
        return self.transform(values, X=x)[0]

    def subset(self, outputs: list[int]) -> Units:
        """Those of some of the outputs."""
        transform = self.transform
        if transform is not None:
            transform = transform.subset_output(outputs)
        return Units(self.shift[outputs], self.factor[outputs], transform)


def units_of(transform: OutcomeTransform, outputs: int, like: Tensor) -> Units:
    """The units behind a transform of m outputs that learns nothing more.

    Args:
        transform: A frozen transform.
        outputs: Number of outputs m.
        like: A tensor of the wanted dtype and device.
    """
    zeros = like.new_zeros(outputs)
    ones = torch.ones_like(zeros)
    # Double precision, so that a large shift does not hide the factor.
    steps = torch.arange(3, dtype=torch.float64, device=like.device)
    try:
        points = steps.unsqueeze(1).expand(3, outputs).contiguous()
        first, second, third = transform.untransform(points)[0].double()
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        # Whatever wants to see inputs is not one factor for all of them.
        return Units(zeros, ones, transform)
    factor = second - first
    curvature = (third - second - factor).abs()
    if bool((curvature > _TOLERANCE * (third - first).abs().clamp_min(1e-300)).any()):
        return Units(zeros, ones, transform)
    return Units(first.to(like), factor.to(like))
