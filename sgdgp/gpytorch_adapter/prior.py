"""The prior of a model: what ``forward`` returns, read as one kernel over one matrix.

A finished model is read from a frozen copy (``prior_of``), one that is being trained
with its graph (``prior_at``). Either way ``forward`` may add and multiply kernels,
scale them by constants and put a network in front of them: what it returns is a tree
of linear operators whose leaves are kernels that have not been evaluated yet. Each leaf
gets columns of its own in the matrix of kernel inputs. Nothing of the tree is copied or
detached: kernels are the model's own, and inputs and constants keep their graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    ProductKernel,
    ScaleKernel,
)
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models import ExactGP
from jaxtyping import Float
from linear_operator.operators import (
    BlockLinearOperator,
    ConstantDiagLinearOperator,
    ConstantMulLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from sgdgp.core.checks import check_finite_parameters
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter.data import NO_BATCHES, InputLayout, Inputs, layout_of
from sgdgp.gpytorch_adapter.multitask import (
    ProductOperator,
    multitask_kernel,
    on_columns,
    products_kept,
)
from sgdgp.gpytorch_adapter.noise import has_fixed_noise, noise_of, noise_of_rows
from sgdgp.gpytorch_adapter.outcome_scale import OutcomeScale, outcome_scales


@dataclass(frozen=True)
class Prior:
    """A Gaussian process prior in the form the rest of the package uses.

    Attributes:
        model: A frozen private copy of the user's model, in eval mode.
        kernel: One GPyTorch kernel over the kernel inputs.
        nugget: Variance that ``forward`` adds to the diagonal (``add_jitter``).
        outcome_scale: Units of the user's targets (BoTorch outcome transforms).
        layout: How several inputs lie in one matrix.
    """

    model: ExactGP
    kernel: Kernel
    nugget: float
    outcome_scale: OutcomeScale
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
        return prior.loc, columns_of(_frozen_tree(prior))

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Noise variances of the likelihood at x, in the model's units, checked.

        Raises:
            ValueError: A variance is not positive and finite, or the likelihood only
                knows those of other points.
        """
        inputs = self.layout.split(self.transformed(x))
        return noise_of(self.model.likelihood, inputs)

    def rows(self, points: Float[Tensor, "n d"]) -> Float[Tensor, "N k"]:
        """The prior's inputs behind joined points: one for each output (n T, k)."""
        return points

    def training_noise(self, points: Float[Tensor, "n d"]) -> Float[Tensor, " N"]:
        """Noise variances of all rows of the training points, fixed ones included."""
        return self.noise(points)

    def transformed(self, x: Float[Tensor, "n d"]) -> Tensor:
        """The user's inputs after the model's input transform, if it has one."""
        return transformed(self.model, x)

    def to_model_units(self, y: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """The user's targets in the model's units."""
        return self.outcome_scale.to_model_units(y)

    def to_model_variances(
        self, noise: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        """Variances in the user's units squared in those of the model."""
        return noise / self.outcome_scale.scale**2


@dataclass(frozen=True)
class MultitaskPrior(Prior):
    """The prior of a model with T outputs per input, over pairs (x, t).

    Its inputs are rows [x, t] (N, d + 1), in any order. ``outcome_scale`` is the
    identity: units differ from task to task, see ``outcome_scales``.

    Attributes:
        outcome_scales: Units of each task's targets.
    """

    outcome_scales: tuple[OutcomeScale, ...]

    @property
    def num_outputs(self) -> int:
        return len(self.outcome_scales)

    def evaluate(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        tasks = x[:, -1].long()
        prior = forward_at(self.model, (self.transformed(x[:, :-1]),))
        columns = columns_of(_frozen_tree(prior), tasks=x[:, -1])
        return self._of_task(prior.loc, tasks), columns

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        noise = noise_of(self.model.likelihood, self.transformed(x[:, :-1]))
        return self._of_task(noise, x[:, -1].long())

    def rows(self, points: Float[Tensor, "n d"]) -> Float[Tensor, "N k"]:
        return multitask_inputs(points, self.num_outputs)

    def training_noise(self, points: Float[Tensor, "n d"]) -> Float[Tensor, " N"]:
        likelihood = self.model.likelihood
        if has_fixed_noise(likelihood):
            # Perhaps those of points alone.
            known = noise_of(likelihood, points)
            return noise_of_rows(known, len(points), self.num_outputs)
        return self.noise(self.rows(points))

    def to_model_units(self, y: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
        scales = enumerate(self.outcome_scales)
        return torch.stack([s.to_model_units(y[:, t]) for t, s in scales], dim=1)

    def to_model_variances(self, noise: Float[Tensor, "n t"]) -> Float[Tensor, "n t"]:
        factor = noise.new_tensor([scale.scale for scale in self.outcome_scales])
        return noise / factor.square()

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
        The prior, a ``MultitaskPrior`` where the model has several outputs per input;
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
    tasks = tasks_of(distribution, len(points))
    tree = _frozen_tree(distribution)
    kernel, nugget = kernel_of(tree), nugget_of(distribution.lazy_covariance_matrix)
    prior: Prior
    if tasks is None:
        plain = len(inputs) == 1 and is_plain(tree, inputs[0])
        (scale,) = outcome_scales(frozen, 1)
        prior = Prior(frozen, kernel, nugget, scale, layout, plain)
    else:
        scales = outcome_scales(frozen, tasks)
        prior = MultitaskPrior(
            frozen, kernel, nugget, OutcomeScale(), layout, False, scales
        )
    _check_pointwise(prior, prior.rows(points))
    if any(getattr(m, "grid_is_dynamic", False) for m in kernel.modules()):
        raise UnsupportedModelError(
            "model: its GridInterpolationKernel has no grid_bounds, so GPyTorch moves "
            "its grid with the points of every call and the prior is not a function of "
            "two points; build it with grid_bounds that hold the training inputs and "
            "wherever you will predict"
        )
    return prior


def multitask_inputs(x: Float[Tensor, "n d"], tasks: int) -> Float[Tensor, "N k"]:
    """All rows [x_i, t], those of one input one after another: (n T, d + 1)."""
    index = torch.arange(tasks, device=x.device).to(x).repeat(len(x))
    return torch.cat([x.repeat_interleave(tasks, 0), index.unsqueeze(1)], dim=1)


def tasks_of(distribution: MultivariateNormal, n: int | None = None) -> int | None:
    """Outputs per input of a multitask prior, None for a prior of one output.

    Args:
        distribution: The prior at some inputs.
        n: Their number, if it is known.

    Raises:
        UnsupportedModelError: The prior has a batch shape.
    """
    found = tuple(distribution.loc.shape)
    if isinstance(distribution, MultitaskMultivariateNormal):
        if len(found) == 1 and distribution._interleaved:
            return int(distribution.num_tasks)
    elif len(found) == 1 and n in (None, found[0]):
        return None
    inputs = "" if n is None else f" for {n} inputs"
    raise UnsupportedModelError(
        f"model: expected a prior without batch shape, found mean of shape {found}"
        f"{inputs}; {NO_BATCHES}"
    )


def _frozen_tree(distribution: MultivariateNormal) -> Tree:
    return tree_of(distribution.lazy_covariance_matrix, frozen=True)


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
        # Far above rounding of a network in float32, far below a shift by the batch.
        tolerance = 1e-3 * whole.abs().max().clamp_min(1e-6)
        if not bool((whole - torch.cat(parts)).abs().le(tolerance).all()):
            raise UnsupportedModelError(
                "model: forward gives a point another mean or other kernel inputs when "
                "other points are beside it, so the prior is not a function of two "
                "points; scale or centre inputs by constants, not by the batch"
            )


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


@dataclass(frozen=True)
class Leaf:
    """A kernel that ``forward`` has called, and the constant in front of it.

    Attributes:
        kernel: The kernel; its active dims are applied already.
        inputs: What it was called on (n, p).
        scale: Product of the constants around it, or None.
    """

    kernel: Kernel
    inputs: Tensor
    scale: Tensor | None

    @property
    def outputs(self) -> int:
        """Outputs per input."""
        return int(self.kernel.num_outputs_per_input(self.inputs, self.inputs))


@dataclass(frozen=True)
class Branch:
    """A sum or product of covariances."""

    kind: type[AdditiveKernel] | type[ProductKernel]
    parts: tuple[Tree, ...]


Tree: TypeAlias = Leaf | Branch


def tree_of(
    covariance: LinearOperator, scale: Tensor | None = None, *, frozen: bool = False
) -> Tree:
    """The covariance's kernels, with constants that have no graph where frozen.

    Raises:
        UnsupportedModelError: Something in it is not a function of two points.
    """
    if isinstance(covariance, LazyEvaluatedKernelTensor):
        return _leaf(covariance, scale)
    if isinstance(covariance, SumLinearOperator):
        terms = [
            tree_of(term, scale, frozen=frozen)
            for term in covariance.linear_ops
            if not isinstance(term, ConstantDiagLinearOperator)
        ]
        return terms[0] if len(terms) == 1 else Branch(AdditiveKernel, tuple(terms))
    if isinstance(covariance, ProductOperator):
        first, second = covariance.factors
        if nugget_of(first) or nugget_of(second):
            raise UnsupportedModelError(
                "model: forward multiplies a covariance to whose diagonal it has added "
                "something; add jitter to the product"
            )
        one, other = (
            tree_of(first, scale, frozen=frozen),
            tree_of(second, frozen=frozen),
        )
        return Branch(ProductKernel, (one, other))
    if isinstance(covariance, ConstantMulLinearOperator):
        constant = covariance._constant.detach() if frozen else covariance._constant
        scale = constant if scale is None else scale * constant
        return tree_of(covariance.base_linear_op, scale, frozen=frozen)
    if isinstance(covariance, BlockLinearOperator):
        raise UnsupportedModelError(
            f"model: forward returned a {type(covariance).__name__}, a batch of "
            f"kernels, one for each output; {NO_BATCHES}"
        )
    raise UnsupportedModelError(
        f"model: forward returned a covariance with a {type(covariance).__name__},"
        " which is not a function of two points. Build it from kernels called on"
        " inputs, their sums, products and constant multiples; write a product of"
        " kernels as (kernel_1 * kernel_2)(x), and put noise into the likelihood."
    )


def _leaf(covariance: LazyEvaluatedKernelTensor, scale: Tensor | None) -> Leaf:
    if covariance.x1 is not covariance.x2:
        raise UnsupportedModelError(
            f"model: forward calls a {type(covariance.kernel).__name__} on two "
            "different sets of points; expected kernel(x)"
        )
    if covariance.x1.ndim != 2:
        raise UnsupportedModelError(
            f"model: forward calls a kernel on inputs of shape "
            f"{tuple(covariance.x1.shape)}; {NO_BATCHES}"
        )
    if scale is not None and (scale.numel() != 1 or float(scale.detach()) <= 0):
        raise UnsupportedModelError(
            f"model: a kernel is multiplied by {scale.tolist()} in forward; expected "
            "one positive number"
        )
    return Leaf(covariance.kernel, covariance.x1, scale)


def nugget_of(covariance: LinearOperator) -> float:
    """Variance that ``forward`` itself adds to the diagonal (``add_jitter``)."""
    if isinstance(covariance, ConstantDiagLinearOperator):
        return float(covariance.diag_values.detach().flatten()[0])
    if isinstance(covariance, SumLinearOperator):
        return sum(nugget_of(term) for term in covariance.linear_ops)
    if isinstance(covariance, ConstantMulLinearOperator):
        constant = float(covariance._constant.detach())
        return constant * nugget_of(covariance.base_linear_op)
    return 0.0


def is_plain(tree: Tree, inputs: Tensor) -> bool:
    """Whether the kernel is called on the model's inputs themselves.

    Equal values would not be enough: relu(x) equals x on some inputs and not on
    others. Kernels with active dims see a selection, never the inputs themselves.
    """
    return (
        isinstance(tree, Leaf)
        and tree.kernel.active_dims is None
        and tree.inputs is inputs
        and tree.outputs == 1
        and not _is_traced(tree.scale)
    )


def columns_of(
    tree: Tree, points: Tensor | None = None, tasks: Tensor | None = None
) -> Tensor:
    """The matrix of kernel inputs (N, p): every leaf's columns side by side.

    A constant with a graph is a column of its own, its square root: so its gradient is
    one of the inputs, for which every operator has a path.

    Args:
        tree: The covariance's kernels.
        points: Index of each row's point (N,). Default: all in order.
        tasks: Task of each row (N,), where there are several outputs.
    """
    found = []
    for leaf in _leaves(tree):
        inputs = leaf.inputs if points is None else leaf.inputs[points]
        found.append(inputs)
        if leaf.outputs > 1:
            assert tasks is not None
            found.append(tasks.to(inputs).unsqueeze(1))
        if leaf.scale is not None and _is_traced(leaf.scale):
            root = leaf.scale.sqrt().reshape(1, 1)
            found.append(root.to(inputs).expand(len(inputs), 1))
    if len(found) == 1:
        return found[0]
    kept = next((f for f in found if f.is_floating_point()), None)
    return torch.cat([f if kept is None else f.to(kept) for f in found], dim=-1)


def kernel_of(tree: Tree) -> Kernel:
    """One kernel over ``columns_of(tree)``."""
    # What is made here is where the inputs are, whatever torch's default device is.
    with next(_leaves(tree)).inputs.device:
        if isinstance(tree, Leaf) and tree.outputs == 1 and not _is_traced(tree.scale):
            plain = tree.kernel.active_dims is None
            kernel = tree.kernel if plain else on_columns(tree.kernel, None)
            return _scaled(kernel, tree.scale)
        return _kernel_from(tree, 0)[0]


def _kernel_from(tree: Tree, start: int) -> tuple[Kernel, int]:
    """The kernel over columns from ``start`` on, and where those end."""
    if isinstance(tree, Branch):
        kernels = []
        for part in tree.parts:
            kernel, start = _kernel_from(part, start)
            kernels.append(kernel)
        return tree.kind(*kernels), start
    width = tree.inputs.shape[-1]
    kernel = tree.kernel
    if tree.outputs > 1:
        kernel = multitask_kernel(kernel, width)
        width += 1
    device = tree.inputs.device
    kernel = on_columns(kernel, torch.arange(start, start + width, device=device))
    start += width
    if not _is_traced(tree.scale):
        return _scaled(kernel, tree.scale), start
    return ProductKernel(kernel, _square_of_column(start, tree.inputs)), start + 1


def _leaves(tree: Tree) -> Iterator[Leaf]:
    if isinstance(tree, Leaf):
        yield tree
    else:
        for part in tree.parts:
            yield from _leaves(part)


def _is_traced(scale: Tensor | None) -> bool:
    return scale is not None and scale.requires_grad


def _scaled(kernel: Kernel, scale: Tensor | None) -> Kernel:
    """The kernel times a constant without a graph."""
    if scale is None:
        return kernel
    # It takes over the kernel's active dims and calls its forward past them.
    outer = ScaleKernel(kernel)
    outer.raw_outputscale.requires_grad_(False)
    outer.raw_outputscale.data = outer.raw_outputscale.data.to(scale)
    outer.outputscale = scale
    return outer


def _square_of_column(column: int, like: Tensor) -> Kernel:
    """k(x, x') = x_c x'_c."""
    kernel = LinearKernel(active_dims=[column]).to(like)
    kernel.variance = torch.ones(1, 1).to(like)
    return kernel.requires_grad_(False)
