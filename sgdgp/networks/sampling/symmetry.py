"""Networks that compute the same with other weights: the symmetry group of a module.

The units of a hidden layer can be exchanged, rows before them with columns after them.
Where what comes between is odd, as tanh, a unit can change its sign; where it is
positively homogeneous, as ReLU, what goes into it can be multiplied by a positive
number and what comes out divided. None of this changes the network's function, so that
draws of its weights lie in n! 2^n copies of each mode. An isotropic prior has
permutations and signs for symmetries too, but no scales.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sgdgp.core.checks import check_count
from sgdgp.core.seeds import generator_of
from sgdgp.networks.sampling.tracing import traced
from sgdgp.networks.sampling.units import Space, Trace, leaves, size_of
from sgdgp.tangent import Tangent
from sgdgp.tangent.network import Weights, arguments, check_network, chosen_weights

Role: TypeAlias = Literal["out", "in", "fixed"]
"""How weights go with a unit's sign and scale: as its value, inversely, not at all."""

Buffers: TypeAlias = Literal["constant", "permuted"]
"""Whether running statistics stay where they are, or go with their units."""

_KINDS = {
    "odd": (True, False),
    "homogeneous": (False, True),
    "linear": (True, True),
    "other": (False, False),
}
"""Activations by whether they let a unit change its sign, and its scale."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Most that a symmetry may change outputs, relative to the largest."""


@dataclass(frozen=True)
class Block:
    """Weights of a tensor that belong to units.

    Attributes:
        tensor: The parameter's or buffer's name.
        before: The tensor is (before, units, after) for this purpose.
        after: See ``before``.
        role: How they go with signs and scales.
    """

    tensor: str
    before: int
    after: int
    role: Role


class Read(NamedTuple):
    """Where activations of some units are in a run of the network.

    Attributes:
        call: Which contraction.
        operand: Which of its operands.
        axis: Of that operand.
        before: Entries of that axis before the units' own, as of ``Block``.
        after: Those after.
    """

    call: int
    operand: int
    axis: int
    before: int
    after: int


@dataclass(frozen=True)
class HiddenAxis:
    """Hidden units, or channels, that can be exchanged.

    Attributes:
        name: The layer that computes them.
        size: How many.
        signs: Whether each can change its sign.
        scales: Whether each can be multiplied by a positive number.
        blocks: All weights that belong to them.
        read: Where their activations can be read.
    """

    name: str
    size: int
    signs: bool
    scales: bool
    blocks: tuple[Block, ...]
    read: Read | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class SymmetryGroup:
    """Permutations, signs and scales of hidden units that leave a network as it is.

    Attributes:
        axes: Hidden layers, or several of them that residual connections tie.
        names: Of the weights' tensors, in the order of flat weights.
        shapes: Theirs.
        fixed: Units that could not be let go, by name, and why.
        network: The network.
    """

    axes: tuple[HiddenAxis, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    fixed: Mapping[str, str] = field(default_factory=dict)
    network: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        network: nn.Module | Any,
        x: Any = None,
        weights: Weights = None,
        *,
        buffers: Buffers = "constant",
    ) -> SymmetryGroup:
        """The group of a network, from one run of it.

        Linear, convolutional (in one group, or depthwise), normalising and embedding
        layers, activations, pooling, flattening and residual additions are followed. A
        random member of the group, and one that moves every unit, are tried before it
        is returned. Not followed is the
        sign of a layer's only unit: ``given`` takes it.

        Args:
            network: In evaluation mode; or what has one as its ``tangent``, such as a
                posterior, whose uncertain weights are meant.
            x: Some inputs, one example will do. Default: random ones, if the first
                layer is linear.
            weights: The uncertain weights, see
                :func:`sgdgp.tangent.network.chosen_weights`. All others are constants,
                which hold still the units that they tell apart.
            buffers: ``"constant"``: running statistics are the same in all draws, so
                that units with a batch norm cannot be exchanged. ``"permuted"``: they
                go with their units, as between networks that were trained apart; then
                it takes ``apply_to`` to keep the function.

        Raises:
            TypeError: Not a network.
            ValueError: A layer that cannot be followed, no hidden units, or the network
                is not a function of what has been followed.
        """
        output = getattr(getattr(network, "tangent", network), "output", None)
        network, names, shapes = _layout(network, weights)
        if buffers not in get_args(Buffers):
            raise ValueError(
                f"buffers: expected 'constant' or 'permuted', found {buffers!r}"
            )
        args, kwargs = call_arguments(_some_inputs(network) if x is None else x)
        moving = set(names)
        constants = {
            name: "the constant weights"
            for name, _ in network.named_parameters()
            if name not in moving
        }
        found = [name for name, _ in network.named_buffers()]
        if buffers == "permuted":
            moving |= set(found)
        else:
            constants |= dict.fromkeys(found, "the buffer")
        trace = traced(network, args, kwargs, constants, output)
        axes, fixed = _axes_of(trace, moving)
        if not axes:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in fixed.items())
            raise ValueError(
                "network: expected hidden units that can be exchanged, found none"
                + (f" ({why})" if why else "")
            )
        group = cls(axes, names, shapes, fixed, network)
        group._check(args, kwargs, output)
        return group

    @classmethod
    def given(
        cls,
        network: nn.Module | Any,
        axes: Mapping[str, tuple[str, Sequence[tuple[Any, ...]]]],
        x: Any = None,
        weights: Weights = None,
    ) -> SymmetryGroup:
        """The group of a network, by hand.

        Args:
            network: See ``of``.
            axes: For each hidden layer, by a name, the kind of all that is done to its
                units (``"odd"``, ``"homogeneous"``, ``"linear"`` or ``"other"``), and
                the weights that belong to them: tuples of the tensor's name and its
                axis that counts the units, and, as far as they are not so, entries of
                the axis for each unit (1; pixels of a channel that was flattened) and
                role (``"out"`` of axis 0, ``"in"`` of others): ``{"hidden": ("odd",
                [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)])}``.
            x: Inputs at which a random member is tried. Default: none is.
            weights: See ``of``.

        Raises:
            TypeError: Not a network, or tuples of something else.
            ValueError: No such tensor, axis, kind or role, units of several numbers, or
                the network's function changes.
        """
        output = getattr(getattr(network, "tangent", network), "output", None)
        network, names, shapes = _layout(network, weights)
        sizes = dict(zip(names, shapes, strict=True))
        group = cls(
            tuple(_given(name, *what, sizes) for name, what in axes.items()),
            names,
            shapes,
            network=network,
        )
        if not group.axes:
            raise ValueError("axes: expected a hidden layer, found none")
        if x is not None:
            group._check(*call_arguments(x), output)
        return group

    def restricted(self, *, signs: bool = True, scales: bool = True) -> SymmetryGroup:
        """The subgroup without signs, or without scales."""
        axes = tuple(
            replace(axis, signs=axis.signs and signs, scales=axis.scales and scales)
            for axis in self.axes
        )
        return replace(self, axes=axes)

    @property
    def num_weights(self) -> int:
        """D."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each tensor stands in flat weights."""
        found, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            found[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        return found

    @property
    def expected_transpositions(self) -> dict[str, float]:
        """Mean number of transpositions of a random permutation: n - H_n."""
        return {
            axis.name: axis.size - sum(1 / k for k in range(1, axis.size + 1))
            for axis in self.axes
        }

    def identity(self, *batch: int) -> Symmetry:
        """The member that changes nothing, or a batch of it."""
        ones = [torch.ones(*batch, a.size, dtype=torch.float64) for a in self.axes]
        return Symmetry(
            self,
            tuple(torch.arange(a.size).expand(*batch, a.size) for a in self.axes),
            tuple(ones),
            tuple(ones),
        )

    def sample(
        self, seed: int | torch.Generator = 0, count: int | None = None
    ) -> Symmetry:
        """Random members: uniform permutations and signs.

        Scales are powers of two from 1/4 to 4, so that undoing them is exact.

        Args:
            seed: Where random numbers come from.
            count: How many. Default: one, without an axis for their number.
        """
        if count is not None:
            check_count("count", count, 1)
        generator = generator_of(seed)
        batch = () if count is None else (count,)
        parts = []
        for axis in self.axes:
            shape = (*batch, axis.size)
            order = torch.rand(*shape, generator=generator, dtype=torch.float64)
            flips = 1.0 - 2.0 * torch.randint(2, shape, generator=generator)
            powers = torch.randint(-2, 3, shape, generator=generator)
            one = torch.ones(shape, dtype=torch.float64)
            parts.append(
                (
                    order.argsort(-1),
                    flips.double() if axis.signs else one,
                    2.0 ** powers.double() if axis.scales else one,
                )
            )
        permutations, signs, scales = zip(*parts, strict=True)
        return Symmetry(self, permutations, signs, scales)

    def check_weights(self, name: str, weights: Tensor) -> None:
        """Refuse flat weights of another network.

        Raises:
            TypeError: Not a tensor of float32 or float64.
            ValueError: Of another length.
        """
        if not isinstance(weights, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, found {type(weights)}")
        if weights.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: expected float32 or float64, found {weights.dtype}"
            )
        if weights.ndim == 0 or weights.shape[-1] != self.num_weights:
            raise ValueError(
                f"{name}: expected {self.num_weights} weights along the last axis, as "
                f"the group's network has, found shape {tuple(weights.shape)}"
            )

    def _check(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Callable[[Any], Any] | None,
    ) -> None:
        """Try a random member, and one that moves every unit.

        Raises:
            ValueError: The network's function has changed.
        """
        assert self.network is not None
        shifts = tuple(order.roll(1) for order in self.identity().permutations)
        members = (self.sample(), replace(self.sample(1), permutations=shifts))
        with torch.no_grad():
            found = []
            for one in (self.network, *(m.apply_to(self.network) for m in members)):
                out = one(*args, **kwargs)
                parts = tree_leaves(out if output is None else output(out))
                found.append(torch.cat([part.flatten() for part in parts]))
        before, after = found[0], torch.stack(found[1:])
        allowed = _TOLERANCE.get(before.dtype, 1e-3) * max(
            1.0, float(before.abs().max())
        )
        change = float((after - before).abs().max())
        if not change <= allowed:
            raise ValueError(
                f"network: its outputs change by {change:.2g} under what was taken for "
                f"a symmetry of {[axis.name for axis in self.axes]}: it is random, or "
                "its functions are not those of torch; give the group by hand, "
                "SymmetryGroup.given(network, axes)"
            )


@dataclass(frozen=True, eq=False)
class Symmetry:
    """A member of a group, or a batch of members.

    Unit i of a new network is unit ``permutation[i]`` of the old one, times its sign
    and scale. Permutations and signs are undone to the last bit, scales if they are
    powers of two.

    Attributes:
        group: The group.
        permutations: One of shape (..., n) for each hidden axis.
        signs: The same; +1 or -1.
        scales: The same; positive.
    """

    group: SymmetryGroup
    permutations: tuple[Int[Tensor, "*batch _"], ...]
    signs: tuple[Float[Tensor, "*batch _"], ...]
    scales: tuple[Float[Tensor, "*batch _"], ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """Shape of the batch of members; () is one."""
        return tuple(self.permutations[0].shape[:-1])

    def apply(self, weights: Float[Tensor, "*k D"]) -> Float[Tensor, "*m D"]:
        """Weights of the network with its units exchanged.

        Args:
            weights: Flat weights; a batch of them is broadcast with that of members.

        Raises:
            TypeError: Not a tensor of float32 or float64.
            ValueError: Weights of another network.
        """
        self.group.check_weights("weights", weights)
        batch = torch.broadcast_shapes(weights.shape[:-1], self.batch)
        found = weights.expand(*batch, weights.shape[-1]).clone()
        for name, part in self.group.slices.items():
            found[..., part] = self._moved(name, found[..., part])
        return found

    def apply_to(self, network: nn.Module) -> nn.Module:
        """A copy of a network of this architecture, with its units exchanged.

        Buffers go with them where the group has them (``buffers="permuted"``).

        Raises:
            ValueError: A batch of members, or a network of another architecture.
        """
        if self.batch:
            raise ValueError(
                f"symmetry: expected one member, found a batch {self.batch} of them; "
                "apply takes it to flat weights"
            )
        moved = copy.deepcopy(network)
        found = {name: tuple(p.shape) for name, p in moved.named_parameters()}
        for name, shape in zip(self.group.names, self.group.shapes, strict=True):
            if found.get(name) != shape:
                raise ValueError(
                    f"network: expected weights {name!r} of shape {shape} as the "
                    f"group's network has, found {found.get(name)}"
                )
        own = {block.tensor for axis in self.group.axes for block in axis.blocks}
        with torch.no_grad():
            for name, tensor in [*moved.named_parameters(), *moved.named_buffers()]:
                if name in own:
                    tensor.copy_(self._moved(name, tensor.flatten()).view_as(tensor))
        return moved

    def inverse(self) -> Symmetry:
        """What undoes it."""
        back = tuple(p.argsort(-1) for p in self.permutations)
        signs, scales = (
            tuple(v.gather(-1, p) for v, p in zip(values, back, strict=True))
            for values in (self.signs, self.scales)
        )
        return Symmetry(self.group, back, signs, tuple(1 / s for s in scales))

    def compose(self, other: Symmetry) -> Symmetry:
        """The other first, then this one.

        Raises:
            ValueError: The other is of another network's group.
        """
        own, theirs = (
            {axis.name: axis.size for axis in m.group.axes} for m in (self, other)
        )
        if own != theirs:
            raise ValueError(
                f"other: expected hidden units {own}, found {theirs}: it is of "
                "another network"
            )
        parts = []
        batch = torch.broadcast_shapes(self.batch, other.batch)
        for i, order in enumerate(self.permutations):
            permutation, sign, scale = (
                values[i].expand(*batch, -1).gather(-1, order.expand(*batch, -1))
                for values in (other.permutations, other.signs, other.scales)
            )
            parts.append((permutation, self.signs[i] * sign, self.scales[i] * scale))
        permutations, signs, scales = zip(*parts, strict=True)
        return Symmetry(self.group, permutations, signs, scales)

    def unflattened(self, *batch: int) -> Symmetry:
        """The same members in a batch of another shape."""
        return Symmetry(
            self.group,
            *(
                tuple(value.reshape(*batch, value.shape[-1]) for value in values)
                for values in (self.permutations, self.signs, self.scales)
            ),
        )

    def concatenated(self, others: Sequence[Symmetry]) -> Symmetry:
        """These members and others, one batch after the other."""
        return Symmetry(
            self.group,
            *(
                tuple(map(torch.cat, zip(*parts, strict=True)))
                for parts in zip(
                    *((m.permutations, m.signs, m.scales) for m in (self, *others)),
                    strict=True,
                )
            ),
        )

    @property
    def transpositions(self) -> dict[str, Int[Tensor, "*batch"]]:
        """Fewest transpositions that make each permutation: n minus its cycles."""
        names = (axis.name for axis in self.group.axes)
        return dict(zip(names, map(_transpositions, self.permutations), strict=True))

    @property
    def total_transpositions(self) -> Int[Tensor, "*batch"]:
        """The same of all hidden axes."""
        return torch.stack(list(self.transpositions.values())).sum(0)

    def _moved(self, name: str, flat: Tensor) -> Tensor:
        """One tensor, flattened, with the units of all of its axes exchanged."""
        batch = flat.shape[:-1]
        for i, axis in enumerate(self.group.axes):
            permutation, sign, scale = (
                values[i].to(flat.device)
                for values in (self.permutations, self.signs, self.scales)
            )
            for block in axis.blocks:
                if block.tensor != name:
                    continue
                parts = flat.reshape(*batch, block.before, axis.size, block.after)
                index = permutation[..., None, :, None].expand(parts.shape)
                parts = parts.gather(-2, index)
                if block.role != "fixed" and (axis.signs or axis.scales):
                    factor = sign * (scale if block.role == "out" else 1 / scale)
                    parts = parts * factor.to(flat.dtype)[..., None, :, None]
                flat = parts.reshape(*batch, -1)
        return flat


def call_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a network is called with: inputs are one argument, several, or by name."""
    inputs = arguments(x)
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _transpositions(permutation: Tensor) -> Tensor:
    """How many units are not the least member of their cycle."""
    least = torch.arange(permutation.shape[-1]).expand(permutation.shape)
    first, jump = least, permutation
    for _ in range(max(1, permutation.shape[-1] - 1).bit_length()):
        least = torch.minimum(least, least.gather(-1, jump))
        jump = jump.gather(-1, jump)
    return (least != first).sum(-1)


def _layout(
    network: nn.Module | Any, weights: Weights
) -> tuple[nn.Module, tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """A network, and names and shapes of its uncertain weights."""
    tangent = getattr(network, "tangent", network)
    if isinstance(tangent, Tangent):
        if weights is not None:
            raise ValueError("weights: expected None, they have been chosen before")
        shapes = tuple(tuple(shape) for shape in tangent.shapes)
        return tangent.network, tangent.names, shapes
    check_network(network)
    chosen = chosen_weights(network, weights)
    return network, tuple(chosen), tuple(tuple(w.shape) for w in chosen.values())


def _some_inputs(network: nn.Module) -> Tensor:
    """Random inputs of a network whose first layer is linear.

    Raises:
        ValueError: It is another.
    """
    first = next((m for m in network.modules() if [*m.parameters(recurse=False)]), None)
    if not isinstance(first, nn.Linear):
        raise ValueError(
            f"x: the first layer of the network is {type(first).__name__}; expected "
            "some inputs, such as one example"
        )
    weight = first.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator, dtype=torch.float64)
    return x.to(weight)


def _axes_of(
    trace: Trace, moving: set[str]
) -> tuple[tuple[HiddenAxis, ...], dict[str, str]]:
    """Hidden axes of a trace, and why others hold still."""
    blocks: dict[Space, list[Block]] = {}
    for name, axes in trace.axes.items():
        sizes = [size_of(axis) for axis in axes]
        for i, axis in enumerate(axes):
            before, after = math.prod(sizes[:i]), math.prod(sizes[i:])
            roles = trace.roles.get((name, i), {"fixed"})
            role: Role = "fixed"
            if "fixed" not in roles:
                role = "out" if "out" in roles else "in"
            for factor in leaves(axis):
                space = factor.space
                after //= space.size
                found = blocks.setdefault(space, [])
                found.append(Block(name, before, after, role))
                before *= space.size
                if len(roles) > 1:
                    space.restrict(odd="fixed" not in roles, homogeneous=False)
    reads: dict[Space, Read] = {}
    for contraction in trace.contractions:
        before, after = 1, size_of(contraction.factors)
        for factor in leaves(contraction.factors):
            after //= factor.space.size
            where = (contraction.call, contraction.operand, contraction.axis)
            reads.setdefault(factor.space, Read(*where, before, after))
            before *= factor.space.size
    found_axes: list[HiddenAxis] = []
    fixed: dict[str, str] = {}
    for space, own in blocks.items():
        computed = next((b for b in own if b.role == "out"), own[0])
        name = computed.tensor.rpartition(".")[0] or computed.tensor
        while name in {axis.name for axis in found_axes} | set(fixed):
            name += "'"
        if space.still:
            if space.reason:
                fixed[name] = space.reason
            continue
        # Constants that hold no unit are the same for all.
        blocks_of = tuple(block for block in own if block.tensor in moving)
        if blocks_of:
            flags = (space.size, space.odd, space.homogeneous)
            found_axes.append(HiddenAxis(name, *flags, blocks_of, reads.get(space)))
    return tuple(found_axes), fixed


def _given(
    name: str,
    kind: str,
    tensors: Sequence[tuple[Any, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> HiddenAxis:
    """A hidden axis by hand.

    Raises:
        ValueError: Something is not there, or does not fit.
    """
    where = f"axes[{name!r}]"
    if kind not in _KINDS:
        raise ValueError(f"{where}: expected one of {list(_KINDS)}, found {kind!r}")
    blocks, sizes = [], {}
    for tensor, dim, *rest in tensors:
        if tensor not in shapes:
            raise ValueError(
                f"{where}: no weights {tensor!r}; there are {list(shapes)}"
            )
        shape = shapes[tensor]
        if not 0 <= dim < len(shape):
            raise ValueError(f"{where}: {tensor!r} of shape {shape} has no axis {dim}")
        numbers = [part for part in rest if not isinstance(part, str)]
        words = [part for part in rest if isinstance(part, str)]
        block = numbers[0] if numbers else 1
        role: Any = words[0] if words else "out" if dim == 0 else "in"
        if role not in get_args(Role) or shape[dim] % block:
            raise ValueError(
                f"{where}: expected entries for each unit that divide {shape[dim]}, "
                f"and 'out', 'in' or 'fixed', found {(tensor, dim, *rest)}"
            )
        sizes[tensor] = shape[dim] // block
        before, after = math.prod(shape[:dim]), block * math.prod(shape[dim + 1 :])
        blocks.append(Block(tensor, before, after, role))
    if len(set(sizes.values())) != 1:
        raise ValueError(f"{where}: expected one number of units, found {sizes}")
    return HiddenAxis(name, next(iter(sizes.values())), *_KINDS[kind], tuple(blocks))
