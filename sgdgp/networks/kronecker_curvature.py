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

L_n has as many columns as the network has outputs, each a pass back through a batch.
Where these are many, random sums of them stand for all, L_n e with independent signs e:
their second moments are H_n in expectation, and those of examples that are drawn at
random scatter more than those of a few signs for each.

Sums of a layer are taken while the network runs forwards and back: no gradient of one
column is kept for the next, nor of one layer for another. Outer products are in the
network's dtype, their sums in float64: what is lost of definiteness is the rounding of
one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.memory import resolve_budget
from sgdgp.core.processes import Processes
from sgdgp.networks.curvature import TangentData, example_noise
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.priors import KroneckerPrior, KroneckerSum
from sgdgp.networks.priors.factors import symmetric
from sgdgp.networks.priors.kronecker import LARGEST_FACTOR
from sgdgp.tangent import Tangent
from sgdgp.tangent.layers import differentiable_layers

_CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_NORMS = (*_CHANNEL_NORMS, nn.LayerNorm, nn.RMSNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)

MOST_COLUMNS = 32
"""Passes back through a batch, unless one asks for more."""

_SHARE = 16
"""A convolution's patches take this part of the memory budget at most."""


class _Factors:
    """Sums over the data of one parameter tensor, in float64.

    Args:
        module: Its layer.
        own: Its name there.

    Attributes:
        first: Of g g^T, or of the whole vector's outer products.
        second: Of a a^T; none of a vector.
        positions: How many a were added up.
        called: Whether the layer was.
    """

    def __init__(self, module: nn.Module, own: str) -> None:
        weight = module.get_parameter(own)
        self.is_vector = own == "bias" or isinstance(module, _NORMS)
        self.is_embedding = isinstance(module, nn.Embedding)
        wide = weight.detach().double()
        out = weight.numel() if self.is_vector else weight.shape[0]
        sides = [_moment(wide.new_zeros(1, n)) for n in (out, weight.numel() // out)]
        if self.is_embedding:
            sides = [sides[1], wide.new_zeros(out)]
        self.first, self.second = sides[0], None if self.is_vector else sides[1]
        self.positions, self.called = wide.new_zeros(()), False

    def add_inputs(self, moment: Tensor, positions: int) -> None:
        """Add moments of inputs, or how often each word was met."""
        assert self.second is not None
        self.second += moment
        self.positions += positions

    def pair(self, processes: Processes) -> tuple[Tensor, Tensor]:
        """Both sides of the weight's block, from the sums of all processes."""
        if self.second is None:
            processes.sum_(self.first)
            return self.first, self.first.new_ones(1)
        processes.sum_(self.first, self.second, self.positions)
        second = self.second / self.positions.clamp_min(1)
        return (second, self.first) if self.is_embedding else (self.first, second)


@outside_inference_mode
def kronecker_curvature(
    data: TangentData,
    likelihood: Likelihood,
    outputs: Float[Tensor, "r C"],
    *,
    columns: int = MOST_COLUMNS,
    seed: int = 0,
) -> KroneckerPrior:
    """The curvature of the loss as a precision, to be added to one that is regular.

    In a group of processes all of them must call this; they get the same.

    Args:
        data: The data set seen through a tangent model.
        likelihood: H.
        outputs: Where H is evaluated (r, C), a table.
        columns: Of L_n: all C if they are no more, else as many random sums of them.
        seed: Of their signs, which are a function of the example.

    Returns:
        A block for each parameter tensor. It is singular where the data are silent: a
        prior is ``precision_sum(isotropic, curvature)``.

    Raises:
        ValueError: A parameter is in no layer that has factors; names it.
    """
    tangent = data.tangent
    owners = _owners(tangent)
    layers: dict[nn.Module, dict[str, _Factors]] = {}
    for module, own in owners.values():
        layers.setdefault(module, {})[own] = _Factors(module, own)
    most = resolve_budget(tangent.memory_budget, tangent.device) // _SHARE
    for batch in data.stream:
        f = outputs[batch.rows]
        if f.shape[1] <= columns:
            signs = torch.eye(f.shape[1]).expand(len(f), -1, -1)
        else:
            noise = example_noise(batch.examples, f.shape[1], range(columns), seed)
            signs = noise.sign() / columns**0.5
        roots = likelihood.hessian_root(f, signs.to(f))
        mask = data.mask(batch)
        roots = roots if mask is None else roots * mask
        _add_batch(tangent, layers, batch.x, roots, mask is not None, most)
    blocks = []
    like = torch.empty(0, dtype=tangent.dtype, device=tangent.device)
    for name, (module, own) in owners.items():
        factors = layers[module].pop(own)
        if not factors.called:
            raise ValueError(
                f"weights: {name!r} is used otherwise than by calling its layer, which "
                "has no Kronecker factors; leave it out (weights=...)"
            )
        left, right = factors.pair(data.stream.processes)
        blocks.append(
            KroneckerSum([(symmetric(left).to(like), symmetric(right).to(like))])
        )
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
    layers: dict[nn.Module, dict[str, _Factors]],
    x: Any,
    roots: Float[Tensor, "b C k"],
    masked: bool,
    most: int,
) -> None:
    """Add the sums of a batch, whose L_n (or random sums of its columns) are given.

    Args:
        tangent: The network.
        layers: Whose sums, by parameters' names in their layers.
        x: Inputs.
        roots: Columns that are pulled back.
        masked: Whether some outputs count for nothing.
        most: Bytes that patches of inputs may take.
    """
    # All that is added depends on it, so that gradients reach what follows a layer.
    anchor = torch.zeros((), dtype=tangent.dtype, device=tangent.device)
    anchor.requires_grad_()
    calls: list[_Call] = []

    def noted(module: nn.Module, given: tuple[Any, ...], returned: Tensor) -> Tensor:
        a = given[0].detach()
        call = _Call(module, layers[module], a, len(roots), masked, most)
        calls.append(call)
        returned = returned + anchor
        if returned.requires_grad:
            returned.register_hook(call.add_gradients)
        return returned

    function = tangent.function(x)  # which may run the network, to learn about it
    hooks = [module.register_forward_hook(noted) for module in layers]
    try:
        with torch.enable_grad(), differentiable_layers(tangent.network):
            rows = tangent.weights_of(tangent.theta.mT)
            f = function({name: row[0] for name, row in rows.items()})
    finally:
        for hook in hooks:
            hook.remove()
    for column in roots.unbind(-1):
        torch.autograd.grad(f, anchor, column, retain_graph=True)
    for call in calls:
        call.end()


class _Call:
    """One call of a layer, whose sums are added to when they are known.

    Inputs that no gradient needs are not kept.

    Args:
        module: The layer.
        factors: Sums of its parameters, by their names in it.
        a: What it was given (b, ...).
        examples: b.
        masked: Some outputs count for nothing: nor do positions that only reach those.
        most: Bytes that patches of inputs may take.
    """

    def __init__(
        self,
        module: nn.Module,
        factors: dict[str, _Factors],
        a: Tensor,
        examples: int,
        masked: bool,
        most: int,
    ) -> None:
        self._module, self._factors, self._most = module, factors, most
        self._examples, self._masked = examples, masked
        self._reached: Tensor | None = None
        self._a: Tensor | None = a
        if isinstance(module, nn.Embedding):
            words = a.round().long().flatten()
            # Padding is a constant.
            padding = -1 if module.padding_idx is None else module.padding_idx
            self._a, self._keep = words, words != padding
        for sums in factors.values():
            sums.called = True
        if not masked:
            self._add_inputs()
            if not isinstance(module, (*_NORMS, nn.Embedding)):
                self._a = None

    def end(self) -> None:
        """All gradients have been here."""
        if self._masked:
            self._add_inputs()

    @torch.no_grad()
    def add_gradients(self, g: Tensor) -> None:
        """Add the moments of one column of the output's gradients (b, ...).

        They may be (b t, ...) where positions are rows.
        """
        for own, sums in self._factors.items():
            rows = self._rows(own, g)
            if sums.is_vector:
                sums.first += _moment(rows.sum(1))
                continue
            if self._masked:
                reached, old = rows.any(2), self._reached
                self._reached = reached if old is None else old | reached
            rows = rows.flatten(0, 1)
            sums.first += _moment(rows[self._keep] if sums.is_embedding else rows)

    def _rows(self, own: str, g: Tensor) -> Float[Tensor, "b t n"]:
        """Gradients of one example's positions one after another."""
        module = self._module
        if isinstance(module, _NORMS) and own == "weight":
            assert self._a is not None
            g = g * _normalised(module, self._a)
        if isinstance(module, (*_CONVOLUTIONS, *_CHANNEL_NORMS)):
            return g.flatten(2).mT if g.ndim > 2 else g.unsqueeze(1)
        norm = isinstance(module, _NORMS)
        size = module.get_parameter(own).numel() if norm else g.shape[-1]
        examples = len(g) if len(g) % self._examples else self._examples
        return g.reshape(examples, -1, size)

    @torch.no_grad()
    def _add_inputs(self) -> None:
        module, sums = self._module, self._factors.get("weight")
        if sums is None or sums.is_vector:
            return
        a, reached = self._a, self._reached
        assert a is not None
        if isinstance(module, nn.Embedding):
            keep = self._keep if reached is None else self._keep & reached.flatten()
            count = torch.bincount(a[keep], minlength=module.num_embeddings)
            sums.add_inputs(count, int(keep.sum()))
        elif isinstance(module, nn.Linear):
            inputs = a.reshape(-1, a.shape[-1])
            inputs = inputs if reached is None else inputs[reached.flatten()]
            sums.add_inputs(_moment(inputs), len(inputs))
        else:
            for inputs in self._patches(a):
                sums.add_inputs(_moment(inputs), len(inputs))

    def _patches(self, a: Tensor) -> Iterator[Float[Tensor, "m rest"]]:
        """Rows of a convolution's inputs, one for each position that counts, and group.

        They come in parts, a few examples at a time.
        """
        start, step = 0, 1
        while start < len(a):
            found = _patches(self._module, a[start : start + step])
            # Patches, and a copy of them in another order.
            bytes_each = max(1, 2 * found.nbytes // len(found))
            if self._reached is not None:
                rows = self._reached[start : start + step].unsqueeze(1)
                found = found[rows.expand(found.shape[:3])]
            yield found.reshape(-1, found.shape[-1])
            start, step = start + step, max(1, self._most // bytes_each)


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


def _patches(module: nn.Module, a: Tensor) -> Float[Tensor, "b groups t rest"]:
    """What a convolution sees at each position, in each group of channels."""
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
    return found.transpose(2, 3)
