"""What ``forward`` returns: a prior over some points, its covariance unevaluated."""

from __future__ import annotations

from collections.abc import Sequence

import gpytorch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter.inputs import Inputs, layout_of
from sgdgp.gpytorch_adapter.products import products_kept


def forward_at(model: ExactGP, inputs: Sequence[Tensor]) -> MultivariateNormal:
    """The prior at inputs that are transformed already, past the train / eval logic.

    Raises:
        UnsupportedModelError: ``forward`` returns something else.
    """
    with gpytorch.settings.lazily_evaluate_kernels(True), products_kept():
        prior = gpytorch.Module.__call__(model, *inputs)
    if not isinstance(prior, MultivariateNormal):
        raise UnsupportedModelError(
            "model: forward must return a gpytorch MultivariateNormal, found "
            f"{type(prior).__name__}"
        )
    return prior


def prior_at(model: ExactGP, x: Inputs) -> MultivariateNormal:
    """The prior at the user's inputs in the model's present mode, with its graph.

    The same as ``model(x)`` in train mode, but at any inputs, and with products of
    covariances left unevaluated (Hadamard multitask models).

    Args:
        model: The model, in train or eval mode.
        x: Inputs (n, d) before the model's transforms, or several.
    """
    layout = layout_of(model, x)
    joined = layout.join(x)
    # In train mode BoTorch's forward transforms inputs by itself.
    inputs = joined if model.training else transformed(model, joined)
    return forward_at(model, layout.split(inputs))


def transformed(model: ExactGP, x: Tensor) -> Tensor:
    """The user's inputs after the model's input transform, if it has one."""
    transform = getattr(model, "input_transform", None)
    return x if transform is None else transform(x)
