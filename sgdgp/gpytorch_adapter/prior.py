"""The prior of a finished model: a frozen copy, read as one kernel."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite_parameters
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter.covariance import (
    Rows,
    Tree,
    columns_of,
    is_plain,
    kernel_of,
    nugget_of,
    tree_of,
)
from sgdgp.gpytorch_adapter.distribution import forward_at, transformed
from sgdgp.gpytorch_adapter.inputs import InputLayout, Inputs, layout_of
from sgdgp.gpytorch_adapter.noise import noise_of
from sgdgp.gpytorch_adapter.units import TargetScale, target_scales


@dataclass(frozen=True)
class Prior:
    """A Gaussian process prior in the form the rest of the package uses.

    Attributes:
        model: A frozen private copy of the user's model, in eval mode.
        kernel: One GPyTorch kernel over the kernel inputs.
        nugget: Variance that ``forward`` adds to the diagonal (``add_jitter``).
        target_scale: Units of the user's targets (BoTorch outcome transforms).
        layout: How several inputs lie in one matrix.
    """

    model: ExactGP
    kernel: Kernel
    nugget: float
    target_scale: TargetScale
    layout: InputLayout
    _is_plain: bool

    @property
    def num_outputs(self) -> int:
        """Outputs per input of the model."""
        return 1

    def joined(self, x: Inputs) -> Tensor:
        """One matrix (..., n, d) where the model has several inputs, else x itself.

        Raises:
            TypeError: An input is not a tensor.
            ValueError: Number, widths or lengths of the inputs do not fit.
        """
        return self.layout.join(x)

    def evaluate(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Prior mean (n,) and kernel inputs (n, p) at x, differentiable in x."""
        x = self.transformed(x)
        prior = forward_at(self.model, self.layout.split(x))
        if self._is_plain:
            return prior.loc, x
        return prior.loc, columns_of(_frozen_tree(prior), Rows())

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Noise variances of the likelihood at x, in the model's units, checked.

        Raises:
            ValueError: A variance is not positive and finite, or the likelihood only
                knows those of other points.
        """
        inputs = self.layout.split(self.transformed(x))
        return noise_of(self.model.likelihood, inputs)

    def transformed(self, x: Float[Tensor, "n d"]) -> Tensor:
        """The user's inputs after the model's input transform, if it has one."""
        return transformed(self.model, x)

    def to_model_units(self, y: Float[Tensor, " n"]) -> Tensor:
        """The user's targets in the model's units."""
        return self.target_scale.to_model_units(y)


@dataclass(frozen=True)
class PairPrior(Prior):
    """The prior of a model with T outputs per input, over pairs (x, t).

    Its inputs are rows [x, t] (N, d + 1), in any order. ``target_scale`` is the
    identity: units differ from task to task, see ``target_scales``.

    Attributes:
        target_scales: Units of each task's targets.
    """

    target_scales: tuple[TargetScale, ...]

    @property
    def num_outputs(self) -> int:
        """Number of tasks T."""
        return len(self.target_scales)

    def evaluate(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Prior mean (N,) and kernel inputs (N, p) at pairs, differentiable in x."""
        tasks = x[:, -1].long()
        prior = forward_at(self.model, (self.transformed(x[:, :-1]),))
        columns = columns_of(_frozen_tree(prior), Rows(tasks=x[:, -1]))
        return self._of_task(prior.loc, tasks), columns

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Noise variances of the likelihood at pairs, in the model's units."""
        noise = noise_of(self.model.likelihood, self.transformed(x[:, :-1]))
        return self._of_task(noise, x[:, -1].long())

    def joined(self, x: Inputs) -> Tensor:
        """Pairs are one matrix already."""
        if not torch.is_tensor(x):
            raise TypeError(f"x: expected a torch.Tensor, found {type(x).__name__}")
        return x

    def _of_task(self, values: Tensor, tasks: Tensor) -> Tensor:
        """From values of all tasks at every pair (N T,) that of the pair's own."""
        by_task = values.reshape(len(tasks), self.num_outputs)
        return by_task.gather(1, tasks.unsqueeze(1)).squeeze(1)


def prior_of(model: ExactGP, probe: Inputs) -> Prior:
    """Read the prior out of a GPyTorch or BoTorch exact GP definition.

    The model is left as it is: everything refers to a detached copy, so that
    later changes of the model's parameters do not reach a finished posterior.

    Args:
        model: A ``gpytorch.models.ExactGP``, such as BoTorch's ``SingleTaskGP``.
        probe: A few inputs (n, d) on which ``forward`` is traced; several tensors
            for a model of several inputs.

    Returns:
        The prior, a ``PairPrior`` where the model has several outputs per input;
        ``prior.kernel`` acts on ``prior.evaluate(x)[1]``.

    Raises:
        UnsupportedModelError: ``forward`` returns a covariance that is not built
            from kernels between pairs of points, or has a batch shape.
        ValueError: A parameter is NaN or infinite, or ``forward`` fails.
    """
    frozen = _frozen_copy(model)
    check_finite_parameters("model", frozen)
    layout = layout_of(frozen, probe)
    points = layout.join(probe)[:2]
    inputs = layout.split(transformed(frozen, points))
    try:
        distribution = forward_at(frozen, inputs)
    except RuntimeError as error:
        raise ValueError(
            f"x: the model cannot be evaluated at inputs with {points.shape[1]} "
            f"columns: {error}"
        ) from error
    tasks = _num_tasks(distribution, len(points))
    tree = _frozen_tree(distribution)
    kernel, nugget = kernel_of(tree), nugget_of(distribution.lazy_covariance_matrix)
    if tasks is None:
        prior = Prior(
            frozen,
            kernel,
            nugget,
            target_scales(frozen, 1)[0],
            layout,
            len(inputs) == 1 and is_plain(tree, inputs[0]),
        )
        _check_pointwise(prior, points)
        return prior
    scales = target_scales(frozen, tasks)
    pairs = PairPrior(frozen, kernel, nugget, TargetScale(), layout, False, scales)
    _check_pointwise(pairs, pairs_of(points, tasks))
    return pairs


def pairs_of(x: Float[Tensor, "n d"], tasks: int) -> Float[Tensor, "N k"]:
    """All rows [x_i, t], those of one input one after another: (n T, d + 1)."""
    index = torch.arange(tasks, device=x.device).to(x).repeat(len(x))
    return torch.cat([x.repeat_interleave(tasks, 0), index.unsqueeze(1)], dim=1)


def _num_tasks(distribution: MultivariateNormal, n: int) -> int | None:
    """Outputs per input of a multitask prior, None for a prior of one output."""
    found = tuple(distribution.loc.shape)
    if isinstance(distribution, MultitaskMultivariateNormal):
        if len(found) == 1 and distribution._interleaved:
            return int(distribution.num_tasks)
    elif found == (n,):
        return None
    raise UnsupportedModelError(
        f"model: expected a prior without batch shape, found mean of shape {found} for "
        f"{n} inputs; batch models are not supported. For independent outputs that "
        "share a kernel give a single-output model and y of shape (n, outputs); for "
        "correlated ones use a MultitaskKernel"
    )


def _frozen_tree(distribution: MultivariateNormal) -> Tree:
    return tree_of(distribution.lazy_covariance_matrix).frozen()


def _frozen_copy(model: ExactGP) -> ExactGP:
    data = [t for t in (model.train_inputs or ()) if torch.is_tensor(t)]
    data += [model.train_targets] if torch.is_tensor(model.train_targets) else []
    # Training data are shared with the copy, never duplicated.
    frozen = copy.deepcopy(model, memo={id(t): t for t in data})
    frozen.prediction_strategy = None
    frozen.eval()
    return frozen.requires_grad_(False)


def _check_pointwise(prior: Prior, probe: Tensor) -> None:
    """Refuse a forward that scales or centres its inputs by the batch it is given."""
    with torch.no_grad():
        together = prior.evaluate(probe)
        alone = [prior.evaluate(row) for row in probe.split(1)]
    for whole, *parts in zip(together, *alone, strict=True):
        tolerance = 1e-3 * whole.abs().max().clamp_min(1e-6)
        if not bool((whole - torch.cat(parts)).abs().le(tolerance).all()):
            raise UnsupportedModelError(
                "model: forward gives a point another mean or other kernel inputs when "
                "other points are beside it, so the prior is not a function of two "
                "points; scale or centre inputs by constants, not by the batch"
            )
