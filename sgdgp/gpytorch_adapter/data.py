"""The data of a model: what it holds, or what is given, checked before any work.

Several inputs, such as points and tasks, lie side by side in one matrix
(``InputLayout``); targets with gaps say which rows were observed in which columns
(``observed_rows``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.checks import check_finite, check_matrix, check_same, check_targets
from sgdgp.core.inference import ordinary
from sgdgp.gpytorch_adapter.outcome_scale import to_model_units

Inputs: TypeAlias = Tensor | Sequence[Tensor]
"""Inputs of a model: (n, d), or several of them with the same n."""

NO_BATCHES = (
    "batch models, such as BoTorch's multi-output SingleTaskGP, are not supported. For "
    "independent outputs that share a kernel give a single-output model and y of shape "
    "(n, outputs), for correlated ones use a MultitaskKernel; else condition on each "
    "element of the batch by itself"
)
"""What is wrong with a model of several outputs, and what to do instead."""


def training_data(
    model: ExactGP, x: Inputs | None, y: Tensor | None
) -> tuple[Inputs, Tensor]:
    """Training inputs before the model's transforms, and targets in its own units.

    Args:
        model: The model.
        x: Inputs (n, d) or (n,), or several tensors for a model of several inputs.
            Default: the model's.
        y: Targets (n,), (n, 1) or (n, T) in the user's units, NaN where there is
            none. Default: the model's.

    Returns:
        x, (n, d) or a tuple, and y, (n,) or (n, T), without graphs. A row of y
        without any target stays.

    Raises:
        TypeError: ``model`` is not an ``ExactGP``, x or y is not of the right kind.
        ValueError: Shapes, dtypes, devices or values do not fit; says which.
    """
    if not isinstance(model, ExactGP):
        raise TypeError(
            f"model: expected a gpytorch.models.ExactGP, found {type(model).__name__}"
        )
    if (x is None) != (y is None):
        raise ValueError("x, y: expected both or neither, found one of them")
    given = y is not None
    if x is None or y is None:
        x, y = raw_training_data(model)
        if x is None or y is None:
            raise ValueError(
                "x, y: the model holds no training data; pass them as arguments x and y"
            )
    layout = layout_of(model, x)
    joined = layout.join(x)
    if joined.ndim == 1:
        joined = joined.unsqueeze(-1)
    if joined.ndim == 3:
        raise ValueError(
            f"x: expected shape (n, d), found {tuple(joined.shape)}; {NO_BATCHES}"
        )
    check_matrix("x", joined)
    y = _targets(y, len(joined))
    check_same("y", y, "x", joined)
    parameter = next(model.parameters(), None)
    if parameter is not None:
        check_same("x", joined, "the model's parameters", parameter)
    check_finite("x", joined)
    check_targets("y", y)
    if given:
        y = to_model_units(model, y)
    joined = ordinary(joined.detach())
    several = len(layout.widths) > 1
    return layout.split(joined) if several else joined, ordinary(y.detach())


def _targets(y: Tensor, n: int) -> Tensor:
    if not torch.is_tensor(y):
        raise TypeError(f"y: expected a torch.Tensor, found {type(y)}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2) or y.shape[0] != n or y.numel() == 0:
        expected = f"({n},)" if y.ndim < 2 else f"({n},) or ({n}, outputs)"
        raise ValueError(f"y: expected shape {expected}, found {tuple(y.shape)}")
    return y


def raw_training_data(model: ExactGP) -> tuple[Inputs | None, Tensor | None]:
    """The model's training inputs before transforms, and targets in its units.

    BoTorch models hold transformed inputs in eval mode, and the user's own beside
    them. A model of several inputs has a tuple of them.
    """
    inputs = getattr(model, "train_inputs", None)
    if inputs is None or model.train_targets is None:
        return None, None
    if getattr(model, "_has_transformed_inputs", False):
        inputs = (model._original_train_inputs,)
    return inputs[0] if len(inputs) == 1 else tuple(inputs), model.train_targets


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
        x = held[0] if held else torch.empty(0, 0, device="cpu")
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


@dataclass(frozen=True, eq=False)
class Observed:
    """Targets that were observed in the same rows: one linear system.

    Attributes:
        rows: Rows of the prior (N,): the input i, or i T + t where the model has T
            outputs per input.
        targets: (N, c), without gaps.
        columns: Columns of y behind those of ``targets``; of a model with several
            outputs per input, whose targets are one column, all of them.
    """

    rows: Int[Tensor, " N"]
    targets: Float[Tensor, "N c"]
    columns: tuple[int, ...]


def observed_rows(
    y: Float[Tensor, " n"] | Float[Tensor, "n T"], tasks: int
) -> tuple[Observed, ...]:
    """The linear systems behind targets, NaN where there is none.

    Args:
        y: Targets (n, T), or (n,) of one output.
        tasks: Outputs per input of the model. With several, all targets are one
            column, and what is missing is left out. With one, the columns of y are
            independent: those observed in the same rows share a system.

    Returns:
        One or more systems, in the order of their first column.

    Raises:
        ValueError: A column of independent outputs, or everything, is missing.
    """
    check_targets("y", y)
    y = y.reshape(len(y), -1)
    is_there = ~torch.isnan(y)
    if tasks > 1:
        rows = is_there.flatten().nonzero().squeeze(1)
        targets = y.flatten()[rows].unsqueeze(1)
        return (Observed(rows, targets, tuple(range(y.shape[1]))),)
    empty = (~is_there.any(dim=0)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"y: expected at least one observation in each column, found only NaN in "
            f"column {empty[0]}"
        )
    patterns, pattern_of = torch.unique(is_there, dim=1, return_inverse=True)
    columns: dict[int, list[int]] = {}
    for column, pattern in enumerate(pattern_of.tolist()):
        columns.setdefault(pattern, []).append(column)
    systems = []
    for pattern, chosen in columns.items():
        rows = patterns[:, pattern].nonzero().squeeze(1)
        systems.append(Observed(rows, y[rows][:, chosen], tuple(chosen)))
    return tuple(systems)
