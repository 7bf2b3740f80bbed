"""The data of a model: what it holds, or what is given, checked before any work."""

from __future__ import annotations

import torch
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.checks import check_finite, check_matrix, check_same
from sgdgp.gpytorch_adapter.inputs import Inputs, layout_of
from sgdgp.gpytorch_adapter.units import to_model_units

_BATCH = (
    "batch models, such as BoTorch's multi-output SingleTaskGP, are not supported. For "
    "independent outputs give a single-output model and y of shape (n, outputs), for "
    "correlated ones a MultitaskKernel; else condition on each element of the batch by "
    "itself"
)


def training_data(
    model: ExactGP, x: Inputs | None, y: Tensor | None
) -> tuple[Inputs, Tensor]:
    """Training inputs before the model's transforms, and targets in its own units.

    Args:
        model: The model.
        x: Inputs (n, d) or (n,), or several tensors for a model of several inputs.
            Default: the model's.
        y: Targets (n,), (n, 1) or (n, T) in the user's units, NaN in (n, T) where
            there is none. Default: the model's.

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
            f"x: expected shape (n, d), found {tuple(joined.shape)}; {_BATCH}"
        )
    check_matrix("x", joined)
    y = _targets(y, len(joined))
    check_same("y", y, "x", joined)
    parameter = next(model.parameters(), None)
    if parameter is not None:
        check_same("x", joined, "the model's parameters", parameter)
    check_finite("x", joined)
    if y.ndim == 1:
        check_finite("y", y)
    else:
        check_finite("y", torch.where(torch.isnan(y), torch.zeros_like(y), y))
    if given:
        y = to_model_units(model, y)
    joined = joined.detach()
    several = len(layout.widths) > 1
    return layout.split(joined) if several else joined, y.detach()


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
