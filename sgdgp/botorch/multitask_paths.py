"""Matheron paths of BoTorch's ``MultiTaskGP``, which BoTorch itself cannot draw.

BoTorch evaluates a path's kernel and mean on the inputs as they are. This model's
``forward`` first maps task values to the rows of its task kernel, and picks the mean
of the task. Importing this module registers paths that do the same, with BoTorch's
``draw_matheron_paths`` and everything built on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from botorch.models import MultiTaskGP
from botorch.sampling.pathwise.paths import GeneralizedLinearPath
from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths, MatheronPath
from botorch.sampling.pathwise.prior_samplers import DrawKernelFeaturePaths
from botorch.sampling.pathwise.utils import (
    OutcomeUntransformer,
    TensorTransform,
    get_input_transform,
    get_train_inputs,
    get_train_targets,
)
from botorch.utils.context_managers import delattr_ctx
from gpytorch.means import MultitaskMean
from gpytorch.models import ExactGP
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator
from torch import Tensor, nn

from sgdgp.botorch.iterative_update import likelihood_noise


class TaskInputs(TensorTransform):
    """The user's inputs as the model's kernel sees them.

    Inputs without the task column get it if the model has one output task.

    Args:
        model: The model.
    """

    def __init__(self, model: MultiTaskGP) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, values: Float[Tensor, "*batch q d"], **_: Any
    ) -> Float[Tensor, "*batch q p"]:
        """Task column, input transform, and numbers of tasks.

        Raises:
            ValueError: The task column is missing, and which task is not clear.
        """
        if values.shape[-1] == self.model.num_non_task_features:
            values = self._with_task(values)
        transform = get_input_transform(self.model)
        if transform is not None:
            values = transform.forward(values)
        return self.numbered(values)

    def numbered(self, x: Float[Tensor, "*batch q p"]) -> Float[Tensor, "*batch q p"]:
        """Inputs of the model's ``forward`` with task values as numbers 0, 1, ..."""
        before, tasks, after = self.model._split_inputs(x)
        return torch.cat([before, tasks.to(x), after], dim=-1)

    def _with_task(self, x: Tensor) -> Tensor:
        tasks, place = self.model._output_tasks, self.model._task_feature
        if len(tasks) != 1:
            raise ValueError(
                f"x: expected {x.shape[-1] + 1} columns, the task in column {place}, "
                f"found {x.shape[-1]}; only a model with one of output_tasks adds it"
            )
        column = x.new_full((*x.shape[:-1], 1), float(tasks[0]))
        return torch.cat([x[..., :place], column, x[..., place:]], dim=-1)


class TaskMean(nn.Module):
    """The mean of each row's task, at inputs with numbered tasks.

    Args:
        model: The model.
    """

    def __init__(self, model: MultiTaskGP) -> None:
        super().__init__()
        self.mean_module = model.mean_module
        self.task_feature = model._task_feature

    def forward(self, x: Float[Tensor, "*batch q p"]) -> Float[Tensor, "*batch q"]:
        """Prior means."""
        if not isinstance(self.mean_module, MultitaskMean):
            return self.mean_module(x)
        place = self.task_feature
        others = torch.cat([x[..., :place], x[..., place + 1 :]], dim=-1)
        tasks = x[..., place : place + 1].long()
        return self.mean_module(others).gather(-1, tasks).squeeze(-1)


@DrawKernelFeaturePaths.register(MultiTaskGP)
def multitask_prior_paths(model: MultiTaskGP, **settings: Any) -> GeneralizedLinearPath:
    """Prior functions of points and tasks."""
    paths = DrawKernelFeaturePaths.dispatch(ExactGP)(model, **settings)
    paths.bias_module = TaskMean(model)
    paths.input_transform = TaskInputs(model)
    paths.output_transform = _output_transform(model)
    return paths


@DrawMatheronPaths.register(MultiTaskGP)
def multitask_matheron_paths(
    model: MultiTaskGP,
    *,
    sample_shape: torch.Size,
    prior_sampler: Callable[..., GeneralizedLinearPath],
    update_strategy: Callable[..., GeneralizedLinearPath],
) -> MatheronPath:
    """Posterior functions of points and tasks.

    Args:
        model: The model.
        sample_shape: Shape of the samples.
        prior_sampler: BoTorch's; draws the prior functions.
        update_strategy: BoTorch's ``gaussian_update`` or ``iterative_update()``.

    Returns:
        Paths (*sample_shape, q) of inputs (q, d + 1), the task column among them; for
        a model with one output task also of inputs (q, d).
    """
    inputs = TaskInputs(model)
    points = inputs.numbered(get_train_inputs(model, transformed=True)[0])
    noise = likelihood_noise(model, points)
    with delattr_ctx(model, "outcome_transform"):
        prior_paths = prior_sampler(model=model, sample_shape=sample_shape)
        update_paths = update_strategy(
            model=model,
            sample_values=prior_paths.forward(points),
            target_values=get_train_targets(model, transformed=True),
            points=points,
            noise_covariance=DiagLinearOperator(noise.diagonal(dim1=-1, dim2=-2)),
        )
    update_paths.feature_map.input_transform = inputs
    return MatheronPath(
        prior_paths=prior_paths,
        update_paths=update_paths,
        output_transform=_output_transform(model),
    )


def _output_transform(model: MultiTaskGP) -> OutcomeUntransformer | None:
    """Undoes the model's outcome transform: its targets are one column."""
    transform = getattr(model, "outcome_transform", None)
    return None if transform is None else OutcomeUntransformer(transform, num_outputs=1)
