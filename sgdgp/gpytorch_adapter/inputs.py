"""Models of several inputs, such as points and tasks, as models of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from gpytorch.models import ExactGP
from torch import Tensor

Inputs: TypeAlias = Tensor | Sequence[Tensor]
"""Inputs of a model: (n, d), or several of them with the same n."""


@dataclass(frozen=True)
class InputLayout:
    """How the inputs of a model lie side by side in one matrix.

    Attributes:
        widths: Columns of each input.
        dtypes: Data type of each input, that the model is to be given.
    """

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, inputs: Inputs) -> InputLayout:
        """The layout of these inputs.

        Raises:
            TypeError: An input is not a tensor.
            ValueError: There is none, or an input is not a matrix.
        """
        parts = _parts(inputs)
        return cls(
            tuple(part.shape[-1] for part in parts), tuple(part.dtype for part in parts)
        )

    def join(self, inputs: Inputs) -> Tensor:
        """One matrix (..., n, d) of several inputs; one input passes through.

        Raises:
            TypeError: An input is not a tensor.
            ValueError: Number or widths of the inputs are not the model's.
        """
        if isinstance(inputs, Tensor) and (
            len(self.widths) == 1 or inputs.shape[-1] == sum(self.widths)
        ):
            return inputs
        parts = _parts(inputs)
        widths = tuple(part.shape[-1] for part in parts)
        if widths != self.widths:
            raise ValueError(
                f"x: expected {len(self.widths)} input tensors with "
                f"{', '.join(map(str, self.widths))} columns, found {len(widths)} with "
                f"{', '.join(map(str, widths))}"
            )
        if len(parts) == 1:
            return parts[0]
        lengths = {part.shape[:-1] for part in parts}
        if len(lengths) > 1:
            raise ValueError(
                "x: expected input tensors of the same length, found shapes "
                f"{', '.join(str(tuple(part.shape)) for part in parts)}"
            )
        kept = next((part for part in parts if part.is_floating_point()), None)
        if kept is None:
            kept = torch.empty(0, device=parts[0].device)
        return torch.cat([part.to(kept.dtype) for part in parts], dim=-1)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The inputs as the model takes them; indices as whole numbers."""
        if len(self.widths) == 1:
            return (x,)
        return tuple(
            part if dtype.is_floating_point else part.round().to(dtype)
            for part, dtype in zip(
                x.split(self.widths, dim=-1), self.dtypes, strict=True
            )
        )


def layout_of(model: ExactGP, x: Inputs | None = None) -> InputLayout:
    """The layout of the given inputs, or of those that the model was trained on."""
    if x is not None and not torch.is_tensor(x):
        return InputLayout.of(x)
    held = getattr(model, "train_inputs", None)
    if held is not None and len(held) > 1:
        return InputLayout.of(held)
    if x is None:
        x = held[0] if held else torch.empty(0, 0)
    return InputLayout.of(x)


def _parts(inputs: Inputs) -> list[Tensor]:
    given = [inputs] if not isinstance(inputs, tuple | list) else list(inputs)
    if not given:
        raise ValueError("x: expected at least one input tensor, found none")
    parts = [part for part in given if isinstance(part, Tensor)]
    if len(parts) < len(given):
        raise TypeError(
            f"x: expected a torch.Tensor, found {type(inputs)}; of a model with "
            "several inputs a tuple of tensors"
        )
    return [part.unsqueeze(-1) if part.ndim == 1 else part for part in parts]
