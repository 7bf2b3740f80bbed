"""Reads a prior and a noise model out of a GPyTorch model definition.

The only file that touches GPyTorch and linear_operator internals. A model is a
*specification* here: its ``forward`` is called to learn mean and covariance, its
inference engine never is. Whatever ``forward`` does (a plain kernel, a sum of
kernels, a network in front of a kernel) becomes one GPyTorch kernel over one
matrix of kernel inputs, which is all that the rest of the package sees.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from gpytorch.models import ExactGP
from jaxtyping import Float
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    ConstantMulLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from sgdgp.checks import check_finite_parameters


class UnsupportedModelError(ValueError):
    """The model's prior cannot be read as one kernel between pairs of points."""


@dataclass(frozen=True)
class TargetScale:
    """Targets in the user's units = shift + scale * targets in the model's units."""

    shift: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Prior:
    """A Gaussian process prior in the form the rest of the package uses.

    Attributes:
        model: A frozen private copy of the user's model, in eval mode.
        kernel: One GPyTorch kernel over the kernel inputs.
        nugget: Variance that ``forward`` adds to the diagonal (``add_jitter``).
        target_scale: Units of the user's targets (BoTorch outcome transforms).
    """

    model: ExactGP
    kernel: Kernel
    nugget: float
    target_scale: TargetScale
    _is_plain: bool

    def evaluate(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Prior mean (n,) and kernel inputs (n, p) at x, differentiable in x."""
        x = self.transformed(x)
        prior = _call_forward(self.model, x)
        if self._is_plain:
            return prior.loc, x
        leaves = [leaf.operator.x1 for leaf in _leaves(prior.lazy_covariance_matrix)]
        return prior.loc, torch.cat(leaves, dim=-1)

    def transformed(self, x: Float[Tensor, "n d"]) -> Tensor:
        """The user's inputs after the model's input transform, if it has one."""
        transform = getattr(self.model, "input_transform", None)
        return x if transform is None else transform(x)

    def to_model_units(self, y: Float[Tensor, " n"]) -> Tensor:
        """The user's targets in the model's units."""
        return (y - self.target_scale.shift) / self.target_scale.scale


def prior_of(model: ExactGP, probe: Float[Tensor, "n d"]) -> Prior:
    """Read the prior out of a GPyTorch or BoTorch exact GP definition.

    The model is left as it is: everything refers to a detached copy, so that
    later changes of the model's parameters do not reach a finished posterior.

    Args:
        model: A ``gpytorch.models.ExactGP``, such as BoTorch's ``SingleTaskGP``.
        probe: A few inputs (n, d) on which ``forward`` is traced.

    Returns:
        The prior; ``prior.kernel`` acts on ``prior.evaluate(x)[1]``.

    Raises:
        UnsupportedModelError: ``forward`` returns a covariance that is not built
            from kernels between pairs of points, or has a batch shape.
        ValueError: A parameter is NaN or infinite, or ``forward`` fails.
    """
    frozen = _frozen_copy(model)
    check_finite_parameters("model", frozen)
    transform = getattr(frozen, "input_transform", None)
    inputs = probe[:2] if transform is None else transform(probe[:2])
    try:
        prior = _call_forward(frozen, inputs)
    except RuntimeError as error:
        raise ValueError(
            f"x: the model cannot be evaluated at inputs with {probe.shape[1]} "
            f"columns: {error}"
        ) from error
    covariance = prior.lazy_covariance_matrix
    if prior.loc.shape != (len(inputs),):
        raise UnsupportedModelError(
            f"model: expected a prior without batch shape, found mean of shape "
            f"{tuple(prior.loc.shape)} for {len(inputs)} inputs (batch and "
            "multi-output models are not supported)"
        )
    leaves = list(_leaves(covariance))
    plain = len(leaves) == 1 and _reads(leaves[0].operator, inputs)
    kernel = _scaled(leaves[0].operator.kernel, leaves[0].scale) if plain else None
    if kernel is None:
        kernel = _kernel_over_columns(leaves)
    found = Prior(frozen, kernel, _nugget(covariance), _target_scale(frozen), plain)
    _check_pointwise(found, probe[:2])
    return found


def noise_of(likelihood: Likelihood, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Noise variances of a Gaussian likelihood at the inputs x.

    Works for homoscedastic, fixed and per-point (input-dependent) Gaussian noise,
    because it asks the likelihood what it adds to a distribution of zero variance.

    Args:
        likelihood: The model's likelihood.
        x: Inputs (n, d) in the model's own units.

    Returns:
        The noise variances (n,), without a graph.

    Raises:
        TypeError: The likelihood is not Gaussian.
        ValueError: A variance is not positive and finite, or the number of fixed
            variances is not that of the inputs.
    """
    if not isinstance(likelihood, gpytorch.likelihoods.GaussianLikelihood) and not (
        hasattr(likelihood, "noise_covar")
    ):
        raise TypeError(
            f"likelihood: expected a Gaussian likelihood, found "
            f"{type(likelihood).__name__}"
        )
    n = x.shape[0]
    if isinstance(likelihood, FixedNoiseGaussianLikelihood):
        found = likelihood.noise.shape[-1]
        if found != n:
            raise ValueError(
                f"likelihood: expected {n} fixed noise variances, one per "
                f"observation, found {found}"
            )
    zero = MultivariateNormal(x.new_zeros(n), DiagLinearOperator(x.new_zeros(n)))
    with torch.no_grad():
        noisy = likelihood(zero, [x])
        noise = noisy.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2).to(x.dtype)
    if noise.shape != (n,):
        raise ValueError(
            f"likelihood: expected noise variances of shape ({n},), found "
            f"{tuple(noise.shape)}"
        )
    bad = ~(torch.isfinite(noise) & (noise > 0))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"likelihood: noise variances must be positive and finite, found "
            f"{int(bad.sum())} that are not, the first at row {first}: "
            f"{float(noise[first])}"
        )
    return noise


def has_fixed_noise(likelihood: Likelihood) -> bool:
    """Whether the likelihood only knows the noise of its training points."""
    return isinstance(likelihood, FixedNoiseGaussianLikelihood)


def raw_training_data(model: ExactGP) -> tuple[Tensor | None, Tensor | None]:
    """The model's training inputs (n, d) before transforms, and targets in its units.

    BoTorch models hold transformed inputs in eval mode, and the user's own beside
    them.
    """
    inputs = getattr(model, "train_inputs", None)
    if inputs is None or model.train_targets is None:
        return None, None
    if getattr(model, "_has_transformed_inputs", False):
        inputs = (model._original_train_inputs,)
    if len(inputs) != 1:
        raise UnsupportedModelError(
            f"model: expected one training input tensor, found {len(inputs)}"
        )
    return inputs[0], model.train_targets


def differentiable_block(
    kernel: Kernel, x1: Float[Tensor, "m d"], x2: Float[Tensor, "n d"]
) -> Float[Tensor, "m n"]:
    """K(x1, x2) by GPyTorch itself, with a graph to the inputs."""
    with gpytorch.settings.lazily_evaluate_kernels(False):
        return kernel(x1, x2).to_dense()


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


def _call_forward(model: ExactGP, x: Tensor) -> MultivariateNormal:
    """The prior at x, past ExactGP's train / eval logic."""
    with gpytorch.settings.lazily_evaluate_kernels(True):
        prior = gpytorch.Module.__call__(model, x)
    if not isinstance(prior, MultivariateNormal):
        raise UnsupportedModelError(
            "model: forward must return a gpytorch MultivariateNormal, found "
            f"{type(prior).__name__}"
        )
    return prior


@dataclass(frozen=True)
class _Leaf:
    operator: LazyEvaluatedKernelTensor
    scale: Tensor | None


def _leaves(covariance: LinearOperator, scale: Any = None) -> Iterator[_Leaf]:
    """Flatten a tree of sums and constant multiples into kernel evaluations."""
    if isinstance(covariance, LazyEvaluatedKernelTensor):
        if covariance.x1 is not covariance.x2:
            raise UnsupportedModelError(
                f"model: forward calls a {type(covariance.kernel).__name__} on two "
                "different sets of points; expected kernel(x)"
            )
        yield _Leaf(covariance, scale)
    elif isinstance(covariance, SumLinearOperator):
        for term in covariance.linear_ops:
            if not isinstance(term, ConstantDiagLinearOperator):
                yield from _leaves(term, scale)
    elif isinstance(covariance, ConstantMulLinearOperator):
        constant = covariance._constant
        yield from _leaves(
            covariance.base_linear_op, constant if scale is None else scale * constant
        )
    else:
        raise UnsupportedModelError(
            f"model: forward returned a covariance with a {type(covariance).__name__},"
            " which is not a function of two points. Build it from kernels called on"
            " inputs, their sums and constant multiples; write a product of kernels as"
            " (kernel_1 * kernel_2)(x), and put noise into the likelihood."
        )


def _nugget(covariance: LinearOperator) -> float:
    if isinstance(covariance, ConstantDiagLinearOperator):
        return float(covariance.diag_values.flatten()[0])
    if isinstance(covariance, SumLinearOperator):
        return sum(_nugget(term) for term in covariance.linear_ops)
    if isinstance(covariance, ConstantMulLinearOperator):
        return float(covariance._constant) * _nugget(covariance.base_linear_op)
    return 0.0


def _reads(leaf: LazyEvaluatedKernelTensor, inputs: Tensor) -> bool:
    """Whether the kernel is called on the model's inputs themselves.

    Equal values would not be enough: relu(x) equals x on some inputs and not on
    others. Kernels with active dims see a selection, never the inputs themselves.
    """
    return leaf.kernel.active_dims is None and leaf.x1 is inputs


def _kernel_over_columns(leaves: list[_Leaf]) -> Kernel:
    """One kernel over the concatenated inputs of all leaves."""
    terms, start = [], 0
    for leaf in leaves:
        width = leaf.operator.x1.shape[-1]
        kernel = _sharing_parameters(leaf.operator.kernel)
        kernel.active_dims = torch.arange(
            start, start + width, device=leaf.operator.x1.device
        )
        terms.append(_scaled(kernel, leaf.scale))
        start += width
    return terms[0] if len(terms) == 1 else AdditiveKernel(*terms)


def _sharing_parameters(kernel: Kernel) -> Kernel:
    """A kernel with the same parameters and sub-kernels, but columns of its own."""
    # copy.copy will not do: GPyTorch's kernels hand on their __dict__ itself, so a
    # change of the copy is a change of the original.
    shared: Kernel = object.__new__(type(kernel))
    shared.__dict__ = dict(kernel.__dict__)
    shared.__dict__["_buffers"] = dict(kernel._buffers)
    return shared


def _scaled(kernel: Kernel, scale: Tensor | None) -> Kernel:
    if scale is None:
        return kernel
    if scale.numel() != 1 or float(scale) <= 0:
        raise UnsupportedModelError(
            f"model: a kernel is multiplied by {scale.tolist()} in forward; expected "
            "one positive number"
        )
    # It takes over the kernel's active dims and calls its forward past them.
    outer = ScaleKernel(kernel).to(dtype=scale.dtype, device=scale.device)
    outer.outputscale = scale.detach()
    return outer.requires_grad_(False)


def _target_scale(model: ExactGP) -> TargetScale:
    transform = getattr(model, "outcome_transform", None)
    if transform is None:
        return TargetScale()
    # In float64, so that a large shift does not hide the scale.
    points = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    untransformed = transform.untransform(points.to(model.train_targets.device))[0]
    zero, one, two = untransformed.flatten().tolist()
    if abs((two - one) - (one - zero)) > 1e-6 * max(abs(two - zero), 1e-300):
        raise UnsupportedModelError(
            f"model: outcome transform {type(transform).__name__} is not affine; only "
            "affine transforms such as Standardize keep the posterior Gaussian"
        )
    return TargetScale(zero, one - zero)
