"""What a definition is made of: models of one kernel each, with their data.

A BoTorch model of independent outputs is taken apart, output by output. An outcome
transform that is affine stays on its model, since the rest of the package reads it; any
other is taken off, because only values of functions can pass through it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from botorch.models.gpytorch import BatchedMultiOutputGPyTorchModel
from botorch.models.transforms.outcome import OutcomeTransform
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
)
from gpytorch.models import GP, ExactGP
from torch import Tensor, nn

from sgdgp.core.checks import check_finite, check_matrix, check_same
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter import raw_training_data


class Observations(nn.Module):
    """Data of one model, in the units of the user.

    A module, so that they move with the model; no state dict holds them.

    Attributes:
        x: Inputs (n, d).
        y: Targets (n, m).
        variances: Known noise variances (n, m), or None.
    """

    x: Tensor
    y: Tensor
    variances: Tensor | None

    def __init__(self, x: Tensor, y: Tensor, variances: Tensor | None = None) -> None:
        """Keep data."""
        super().__init__()
        self.register_buffer("x", x.detach(), persistent=False)
        self.register_buffer("y", y.detach(), persistent=False)
        self.register_buffer("variances", variances, persistent=False)

    @property
    def num_outputs(self) -> int:
        """Number of outputs m."""
        return self.y.shape[1]

    def is_same(self, other: Observations) -> bool:
        """Whether inputs and targets are equal, in the dtype of these."""
        return all(
            own.shape == new.shape
            and bool(((own == new.to(own)) | (own.isnan() & new.isnan())).all())
            for own, new in ((self.x, other.x), (self.y, other.y))
        )

    def replace(self, other: Observations) -> None:
        """Hold what the other does."""
        self.x, self.y, self.variances = other.x, other.y, other.variances


def single_models(definition: nn.Module) -> tuple[ExactGP, ...]:
    """The models of one kernel that a definition consists of.

    Raises:
        TypeError: Not a GPyTorch model definition.
        UnsupportedModelError: A batch of models, or a fully Bayesian one.
    """
    if not isinstance(definition, GP):
        raise TypeError(
            "definition: expected a gpytorch.models.ExactGP, a ModelListGP or a "
            f"SingleTaskGP, found {type(definition).__name__}"
        )
    members = getattr(definition, "models", None)
    if members is not None:
        return tuple(part for member in members for part in single_models(member))
    if not isinstance(definition, ExactGP):
        raise UnsupportedModelError(
            f"definition: expected an exact GP, found {type(definition).__name__}"
        )
    if getattr(definition, "_is_fully_bayesian", False):
        raise UnsupportedModelError(
            f"definition: {type(definition).__name__} is a mixture over "
            "hyperparameters; only models with one value of each are supported"
        )
    if len(getattr(definition, "_input_batch_shape", ())) > 0:
        raise UnsupportedModelError(
            "definition: expected training inputs (n, d), found batch shape "
            f"{tuple(definition._input_batch_shape)}; make a model of each element"
        )
    outputs = getattr(definition, "num_outputs", 1)
    if isinstance(definition, BatchedMultiOutputGPyTorchModel) and outputs > 1:
        return tuple(_single_output(definition, i) for i in range(outputs))
    return (definition,)


def _single_output(definition: BatchedMultiOutputGPyTorchModel, output: int) -> ExactGP:
    """A copy with one output, which in BoTorch still has the raw inputs of all."""
    single = definition.subset_output([output])
    raw = getattr(single, "_original_train_inputs", None)
    if raw is not None and raw.ndim == 3:
        single._original_train_inputs = raw[output]
    return cast(ExactGP, single)


def held_data(definition: nn.Module) -> list[Observations]:
    """Copies of what each model holds, as it holds it; nothing where one holds none."""
    members = getattr(definition, "models", None)
    if members is not None:
        return [held for member in members for held in held_data(member)]
    x, y = raw_training_data(cast(ExactGP, definition))
    if not isinstance(x, Tensor) or y is None:
        return []
    return [Observations(x.clone(), y.clone())]


def own_data(model: ExactGP) -> Observations:
    """The data that a model of one kernel holds, in the units of the user.

    Raises:
        ValueError: It holds none.
    """
    x, y = raw_training_data(model)
    if not isinstance(x, Tensor) or y is None:
        raise ValueError(
            "train_X, train_Y: expected both, since the definition holds no training "
            "data"
        )
    check_matrix("train_inputs", x)
    y = y.unsqueeze(-1) if y.ndim == 1 else y
    transform = getattr(model, "outcome_transform", None)
    if transform is not None:
        with torch.no_grad():
            y = frozen(transform).untransform(y, X=x)[0]
    return Observations(x, y)


def given_data(
    x: Tensor, y: Tensor | None, variances: Tensor | None, models: Sequence[ExactGP]
) -> tuple[Observations, ...]:
    """The data of each model, of train_X (n, d), train_Y (n, m), train_Yvar (n, m).

    Several columns of a single model are one, unless their noise differs.

    Raises:
        TypeError: Not tensors of floating point numbers.
        ValueError: Shapes or values do not fit.
    """
    check_matrix("train_X", x, _columns(models[0]))
    check_finite("train_X", x)
    if y is None:
        raise ValueError("train_X, train_Y: expected both, found train_X alone")
    check_matrix("train_Y", y)
    check_same("train_Y", y, "train_X", x)
    if len(y) != len(x):
        raise ValueError(
            f"train_Y: expected one row for each of the {len(x)} rows of train_X, "
            f"found shape {tuple(y.shape)}"
        )
    if variances is not None:
        check_matrix("train_Yvar", variances)
        check_same("train_Yvar", variances, "train_X", x)
        if variances.shape != y.shape or not bool((variances > 0).all()):
            raise ValueError(
                f"train_Yvar: expected positive variances of shape {tuple(y.shape)}, "
                f"found shape {tuple(variances.shape)}, least "
                f"{float(variances.min())}"
            )
    if len(models) == 1 and not _noise_differs(models[0], variances):
        return (Observations(x, y, variances),)
    if len(models) > 1 and y.shape[1] != len(models):
        raise ValueError(
            f"train_Y: expected {len(models)} columns, one for each output of the "
            f"definition, found shape {tuple(y.shape)}"
        )
    columns = y.split(1, dim=1)
    known = [None] * len(columns) if variances is None else variances.split(1, dim=1)
    return tuple(
        Observations(x, column, variance)
        for column, variance in zip(columns, known, strict=True)
    )


def _columns(model: ExactGP) -> int | None:
    """Columns of the inputs that a model holds, if it holds any."""
    x, _ = raw_training_data(model)
    return x.shape[-1] if isinstance(x, Tensor) else None


def _noise_differs(model: ExactGP, variances: Tensor | None) -> bool:
    """Whether the columns of a model with one output have noise of their own."""
    if variances is None or isinstance(model.likelihood, MultitaskGaussianLikelihood):
        return False
    return not bool((variances == variances[:, :1]).all())


def with_noise(model: ExactGP, variances: Tensor) -> ExactGP:
    """The model with known noise variances (n,) or (n, T), in its own units."""
    likelihood = model.likelihood
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        # It may learn additional noise.
        likelihood = copy.deepcopy(likelihood)
        likelihood.noise_covar.noise = variances
    else:
        likelihood = FixedNoiseGaussianLikelihood(noise=variances)
    return with_modules(model, likelihood=likelihood)


def with_modules(model: ExactGP, **modules: nn.Module | None) -> ExactGP:
    """A model that shares everything but these modules; None takes one off."""
    other = copy.copy(model)
    other._modules = {**model._modules, **modules}
    for name, module in modules.items():
        if module is None:
            del other._modules[name]
    return other


def frozen(transform: OutcomeTransform) -> OutcomeTransform:
    """A copy that learns nothing from what it transforms."""
    return copy.deepcopy(transform).eval()
