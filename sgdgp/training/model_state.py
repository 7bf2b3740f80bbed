"""Parameters and buffers of a model: taken out, and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def put_state(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load parameters and buffers, and touch nothing else.

    BoTorch's own method also transforms the training data anew, which rounds them.

    Args:
        model: The model, changed in place.
        state: What ``state_of`` returned.
    """
    torch.nn.Module.load_state_dict(model, state)
