"""Kronecker factors of a network's curvature G = sum_n J_n^T H_n J_n, layer by layer.

A layer that takes a_t to W a_t at the positions t of an example (one of a linear layer,
the pixels of a convolution, the words of a sequence) has the Jacobian
sum_t g_t a_t^T, g_t a row of L_n^T times the Jacobian in its output, L_n L_n^T = H_n.
Its block of G is taken to be (Martens and Grosse, 2015; Grosse and Martens, 2016;
"expand" of Eschenhagen et al., 2023)

    sum_{n,t} g_t g_t^T  (x)  mean_{n,t} a_t a_t^T,

exact for a linear layer where either does not depend on the other. Biases, and scales
and shifts of normalisation layers, have no second side: their blocks are exact,
sum_n (sum_t g_t xhat_t)(...)^T, as long as they are, where the first dimension that a
layer sees is the examples', or examples' positions one after another. The a_t of an
embedding are rows of an identity, so that its second factor is a diagonal of
frequencies.

Outer products of a batch are in the network's dtype, their sums over batches in
float64: what is lost of definiteness is the rounding of one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sgdgp.networks.curvature import TangentData
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.priors import KroneckerPrior, KroneckerSum
from sgdgp.networks.priors.kronecker import LARGEST_FACTOR
from sgdgp.tangent import Tangent
from sgdgp.tangent.layers import differentiable_layers

_CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_NORMS = (*_CHANNEL_NORMS, nn.LayerNorm, nn.RMSNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)

Call: TypeAlias = tuple[Tensor, Tensor]
"""What a layer was given, and a tensor of zeros that was added to what it returned."""


@dataclass
class _Factors:
    """Sums over the data of one parameter tensor.

    Attributes:
        first: Of g g^T, or of the whole vector's outer products.
        second: Of a a^T; none of a vector.
        positions: How many a were added up.
    """

    first: Tensor | None = None
    second: Tensor | None = None
    positions: Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.float64)
    )

    def add(self, first: Tensor, second: Tensor | None, positions: int) -> None:
        """Add the sums of a batch."""
        self.first = first.double() if self.first is None else self.first + first
        if second is not None:
            wide = second.double()
            self.second = wide if self.second is None else self.second + wide
        self.positions += positions


def kronecker_curvature(
    data: TangentData, likelihood: Likelihood, outputs: Float[Tensor, "r C"]
) -> KroneckerPrior:
    """The curvature of the loss as a precision, to be added to one that is regular.

    In a group of processes all of them must call this; they get the same.

    Args:
        data: The data set seen through a tangent model.
        likelihood: H.
        outputs: Where H is evaluated (r, C), a table.

    Returns:
        A block for each parameter tensor. It is singular where the data are silent: a
        prior is ``precision_sum(isotropic, curvature)``.

    Raises:
        ValueError: A parameter is in no layer that has factors; names it.
    """
    tangent = data.tangent
    owners = _owners(tangent)
    found = {name: _Factors() for name in tangent.names}
    for batch in data.stream:
        f = outputs[batch.rows]
        eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
        roots = likelihood.hessian_root(f, eye.expand(len(f), -1, -1))
        mask = data.mask(batch)
        roots = roots if mask is None else roots * mask
        _add_batch(tangent, owners, found, batch.x, roots, mask is not None)
    blocks = []
    for name, shape in zip(tangent.names, tangent.shapes, strict=True):
        factors = found[name]
        if factors.first is None:
            raise ValueError(
                f"weights: {name!r} is used otherwise than by calling its layer, which "
                "has no Kronecker factors; leave it out (weights=...)"
            )
        sums = [factors.first, factors.positions.to(factors.first)]
        sums += [] if factors.second is None else [factors.second]
        data.stream.processes.sum_(*sums)
        second = (
            torch.ones_like(sums[1]).view(1) if len(sums) < 3 else sums[2] / sums[1]
        )
        first = sums[0]
        if isinstance(owners[name][0], nn.Embedding):
            first, second = second, first
        like = torch.empty(0, dtype=tangent.dtype, device=tangent.device)
        pair = (_symmetric(first).to(like), _symmetric(second).to(like))
        block = KroneckerSum([pair])
        assert block.num_weights == shape.numel()
        blocks.append(block)
    ones = torch.ones(1, dtype=tangent.dtype, device=tangent.device)
    return KroneckerPrior(tangent.num_weights, ones, blocks=blocks)


def _owners(tangent: Tangent) -> dict[str, tuple[nn.Module, str]]:
    """The layer of each parameter, and its name there.

    Raises:
        ValueError: A layer is of a kind that has no factors, or shares a parameter.
    """
    kinds = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_NORMS)
    network = tangent.network
    uses = [id(p) for m in network.modules() for p in m._parameters.values()]
    found: dict[str, tuple[nn.Module, str]] = {}
    for name in tangent.names:
        path, _, own = name.rpartition(".")
        module = network.get_submodule(path)
        if uses.count(id(network.get_parameter(name))) > 1:
            raise ValueError(
                f"weights: {name!r} is shared by several layers and has no Kronecker "
                "factors; leave it out (weights=...)"
            )
        if not isinstance(module, kinds):
            raise ValueError(
                f"weights: {name!r} belongs to a {type(module).__name__}, which has no "
                "Kronecker factors (linear, convolution, embedding and normalisation "
                "layers have); leave it out (weights=...)"
            )
        found[name] = (module, own)
    return found


def _add_batch(
    tangent: Tangent,
    owners: dict[str, tuple[nn.Module, str]],
    found: dict[str, _Factors],
    x: Any,
    roots: Float[Tensor, "b C C"],
    masked: bool,
) -> None:
    calls: dict[nn.Module, list[Call]] = {m: [] for m, _ in owners.values()}
    hooks = [module.register_forward_hook(_noted(calls[module])) for module in calls]
    try:
        with torch.enable_grad(), differentiable_layers(tangent.network):
            rows = tangent.weights_of(tangent.theta.mT)
            f = tangent.function(x)({name: row[0] for name, row in rows.items()})
    finally:
        for hook in hooks:
            hook.remove()
    added = [zero for own in calls.values() for _, zero in own]
    gradients = [
        torch.autograd.grad(
            f, added, roots[..., c], retain_graph=True, allow_unused=True
        )
        for c in range(roots.shape[2])
    ]
    stacked = {
        id(zero): torch.stack(
            [torch.zeros_like(zero) if g is None else g for g in each]
        )
        for zero, each in zip(added, zip(*gradients, strict=True), strict=True)
    }
    for name, (module, own) in owners.items():
        for given, zero in calls[module]:
            found[name].add(
                *_sums(module, own, given, stacked[id(zero)], len(roots), masked)
            )


def _noted(calls: list[Call]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A hook that keeps a layer's inputs and lets its outputs be differentiated by."""

    def hook(module: nn.Module, given: tuple[Any, ...], returned: Tensor) -> Tensor:
        zero = torch.zeros_like(returned).requires_grad_()
        calls.append((given[0].detach(), zero))
        return returned + zero

    return hook


def _sums(
    module: nn.Module, own: str, a: Tensor, g: Tensor, examples: int, masked: bool
) -> tuple[Tensor, Tensor | None, int]:
    """Sums over a batch of g g^T and a a^T, and the number of positions.

    Args:
        module: The layer.
        own: "weight" or "bias".
        a: What it was given (b, ...).
        g: Columns c of its output's gradients (c, b, ...), or (c, b t, ...) where
            positions are rows.
        examples: b.
        masked: Some outputs count for nothing: nor do positions that only reach those.
    """
    channels_last = not isinstance(module, (*_CONVOLUTIONS, *_CHANNEL_NORMS))
    if isinstance(module, _NORMS):
        size = module.get_parameter(own).numel()
        g = g if own == "bias" else g * _normalised(module, a)
    else:
        size = g.shape[-1] if channels_last else g.shape[2]
    columns, rows = g.shape[:2]
    if channels_last:
        examples = rows if rows % examples else examples
        g = g.reshape(columns, examples, -1, size)
    else:
        g = g.reshape(columns, rows, size, -1).mT
    if own == "bias" or isinstance(module, _NORMS):
        return _moment(g.sum(2).flatten(0, 1)), None, 0
    if isinstance(module, nn.Embedding):
        words = a.round().long().flatten()
        # Padding is a constant.
        keep = words != (-1 if module.padding_idx is None else module.padding_idx)
        g = g.reshape(columns, -1, size)
        if masked:
            keep &= g.any(2).any(0)
        words, g = words[keep], g[:, keep]
        count = torch.bincount(words, minlength=module.num_embeddings)
        return _moment(g.reshape(-1, size)), count.to(g), len(words)
    linear = isinstance(module, nn.Linear)
    inputs = a.reshape(-1, a.shape[-1]) if linear else _patches(module, a)
    if masked:
        g = g.reshape(columns, -1, size)
        inputs = inputs[g.any(2).any(0)]
    return _moment(g.reshape(-1, size)), _moment(inputs), len(inputs)


def _moment(rows: Float[Tensor, "m n"]) -> Tensor:
    """rows^T rows, or its diagonal where that is long."""
    if rows.shape[1] > LARGEST_FACTOR:
        return rows.square().sum(0)
    return rows.mT @ rows


def _normalised(module: nn.Module, a: Tensor) -> Tensor:
    """What a normalisation layer multiplies by its weight."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(a, list(module.normalized_shape), eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(a, list(module.normalized_shape), eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(a, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


def _patches(module: nn.Module, a: Tensor) -> Float[Tensor, "m rest"]:
    """Rows of a convolution's inputs, one for each position, and group."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    flat = isinstance(module, nn.Conv1d)
    padding = module._reversed_padding_repeated_twice
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a, pads = F.pad(a, padding, mode=mode), (0,) * len(module.kernel_size)
    else:
        pads = tuple(int(p) for p in module.padding)
    sizes = [module.kernel_size, module.dilation, pads, module.stride]
    if flat:
        a = a.unsqueeze(2)
        sizes = [(k, *s) for k, s in zip((1, 1, 0, 1), sizes, strict=True)]
    kernel, dilation, pad, stride = sizes
    found = F.unfold(a, kernel, dilation=dilation, padding=pad, stride=stride)
    found = found.unflatten(1, (module.groups, -1))  # (b, groups, rest, t)
    return found.transpose(2, 3).flatten(0, 2)


def _symmetric(side: Tensor) -> Tensor:
    return side if side.ndim == 1 else (side + side.mT) / 2
