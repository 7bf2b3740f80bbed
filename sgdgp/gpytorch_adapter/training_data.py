"""The data that a model holds."""

from __future__ import annotations

from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.gpytorch_adapter.inputs import Inputs


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
