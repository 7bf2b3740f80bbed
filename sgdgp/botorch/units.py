"""Outcome transforms, as the units of function values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Tensor

from sgdgp.gpytorch_adapter.outcome_scale import affine_of


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
    try:
        affine = affine_of(transform, outputs, like.device)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        # Whatever wants to see inputs is not one factor for all of them.
        affine = None
    if affine is None:
        return Units(zeros, ones, transform)
    shift, factor = affine
    return Units(shift.to(like), factor.to(like))
