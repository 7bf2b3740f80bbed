"""Hidden units as they go through a network: spaces, and what makes two of them one.

Every axis of every parameter begins as a space of its own, whose units anyone may
exchange. What a network computes makes spaces one where their entries meet: a layer's
columns and the units before it, both sides of a residual addition, a scale and what it
scales. What cannot move holds still: the features of the input, the outputs, pixels.
Freedom is only ever taken away, so that what is left leaves the network's function as
it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Space:
    """Units that are exchanged together.

    Attributes:
        size: How many.
        still: Whether they cannot be exchanged.
        reason: Why not, where that is not what anyone expects.
        odd: Whether each may change its sign.
        homogeneous: Whether each may be multiplied by a positive number.
    """

    size: int
    still: bool = False
    reason: str = ""
    odd: bool = True
    homogeneous: bool = True
    _parent: Space | None = None
    _parts: tuple[Space, Space] | None = None

    def leaves(self) -> list[Space]:
        """The spaces whose product this one has become."""
        root = self
        while root._parent is not None:
            root = root._parent
        if root._parts is None:
            return [root] if root.size > 1 else []
        return [leaf for part in root._parts for leaf in part.leaves()]

    def restrict(self, *, odd: bool = False, homogeneous: bool = False) -> None:
        """What a function of the units' values leaves of signs and scales."""
        for leaf in self.leaves():
            leaf.odd &= odd
            leaf.homogeneous &= homogeneous

    def hold(self, reason: str = "") -> None:
        """Let no unit move."""
        for leaf in self.leaves():
            leaf.still, leaf.reason = True, leaf.reason or reason


def split(space: Space, first: int) -> None:
    """Make a leaf the product of two: its units are exchanged in blocks."""
    facts = (space.still, space.reason, space.odd, space.homogeneous)
    space._parts = (Space(first, *facts), Space(space.size // first, *facts))


def _join(space: Space, other: Space) -> None:
    """Make two leaves of one size the same."""
    if space is other:
        return
    space.still |= other.still
    space.reason = space.reason or other.reason
    space.odd &= other.odd
    space.homogeneous &= other.homogeneous
    other._parent = space


@dataclass(frozen=True)
class Factor:
    """A space, and the axes of parameters that it is read from."""

    space: Space
    sources: frozenset[tuple[str, int]] = frozenset()

    def leaves(self) -> list[Factor]:
        """The same by the leaves of the space."""
        return [Factor(leaf, self.sources) for leaf in self.space.leaves()]


Axis = list[Factor]
"""Factors of an axis, the outermost first; an axis of one entry has none."""


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes:
        axes: One for each of its axes.
        is_weight: Whether it comes from parameters and buffers alone. All else changes
            its sign and scale along with the units that it has.
    """

    axes: list[Axis]
    is_weight: bool = False

    def factors(self) -> list[Factor]:
        """All of them."""
        return [leaf for axis in self.axes for leaf in leaves(axis)]


def leaves(axis: Axis) -> Axis:
    """An axis by the leaves of its spaces."""
    return [leaf for factor in axis for leaf in factor.leaves()]


def size_of(axis: Axis) -> int:
    """Entries of an axis."""
    return math.prod(factor.space.size for factor in leaves(axis))


def plain(size: int, reason: str = "") -> Axis:
    """An axis that holds still."""
    return [Factor(Space(size, still=True, reason=reason))] if size > 1 else []


@dataclass(frozen=True)
class Contraction:
    """A sum over units: where hidden activations are read.

    Attributes:
        call: Number of the call of one of ``CONTRACTIONS``.
        operand: Which of its arguments has the activations, the first ones tensors.
        axis: Their axis.
        factors: Its factors.
    """

    call: int
    operand: int
    axis: int
    factors: Axis


@dataclass
class Trace:
    """What a run of a network has shown.

    Attributes:
        axes: Axes of each parameter and buffer.
        roles: How an axis of a parameter goes with the units: ``"out"`` as their
            values do, ``"in"`` inversely, ``"fixed"`` not at all (signs and scales).
        contractions: Sums over units.
        layer: The layer that runs, in words.
        calls: Calls so far of functions that may sum over units.
    """

    axes: dict[str, list[Axis]] = field(default_factory=dict)
    roles: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    layer: str = ""
    calls: int = 0

    def assign(self, axis: Axis, role: str) -> None:
        """Note how the parameters behind an axis go with its units."""
        for source in (s for factor in axis for s in factor.sources):
            self.roles.setdefault(source, set()).add(role)

    def unify(self, axis: Axis, other: Axis) -> Axis:
        """Let the units of two axes be the same, and return them."""
        left, right = leaves(axis), leaves(other)
        found: Axis = []
        while left and right:
            a, b = left[0], right[0]
            if a.space.size == b.space.size:
                for one, beside in ((a, b), (b, a)):
                    if beside.space.still and not (one.sources or one.space.still):
                        one.space.reason = beside.space.reason or (
                            f"{self.layer} joins them to what cannot be exchanged"
                        )
                _join(a.space, b.space)
                found.append(Factor(a.space.leaves()[0], a.sources | b.sources))
                left, right = left[1:], right[1:]
                # What was split or joined may stand further on.
                left, right = leaves(left), leaves(right)
                continue
            large, small = (a, b) if a.space.size > b.space.size else (b, a)
            if large.space.size % small.space.size:
                reason = f"{self.layer} joins blocks that do not fit"
                for factor in (*left, *right):
                    factor.space.hold(reason)
                return [*found, *left]
            split(large.space, small.space.size)
            left, right = leaves(left), leaves(right)
        return [*found, *left, *right]

    def hold(self, axis: Axis, reason: str = "") -> None:
        """Let an axis hold still."""
        self.assign(axis, "fixed")
        for factor in axis:
            factor.space.hold(reason)

    def mapped(self, value: Value, odd: bool, homogeneous: bool) -> Value:
        """A function of each entry, or one that treats all units alike."""
        for factor in value.factors():
            factor.space.restrict(odd=odd, homogeneous=homogeneous)
        if not value.is_weight or (odd and homogeneous):
            return value
        return self.opaque(value)

    def opaque(self, value: Value) -> Value:
        """A function of a weight that only goes along when units are exchanged."""
        for axis in value.axes:
            self.assign(axis, "fixed")
            for factor in axis:
                factor.space.restrict()
        axes = [[Factor(f.space) for f in axis] for axis in value.axes]
        return Value(axes, value.is_weight)

    def added(self, value: Value, other: Value) -> Value:
        """A sum: both sides change signs and scales together."""
        axes = []
        for a, b in aligned(value, other):
            for axis, beside in ((a, b), (b, a)):
                if axis and not beside:  # the same number for every unit
                    for factor in axis:
                        factor.space.restrict()
            axes.append(self.unify(a, b))
        if value.is_weight and other.is_weight:
            return Value(axes, is_weight=True)
        self.assign([f for axis in axes for f in axis], "out")
        return Value([values_of(axis) for axis in axes])

    def multiplied(self, value: Value, other: Value) -> Value:
        """A product of entries: a weight scales units, and does not go with them."""
        axes = []
        both = value.is_weight and other.is_weight
        for a, b in aligned(value, other):
            if both or value.is_weight == other.is_weight:
                for factor in [*a, *b]:
                    factor.space.restrict()
            for axis, found in ((a, value), (b, other)):
                if found.is_weight:
                    self.assign(axis, "fixed" if both or (a and b) else "out")
            axes.append(values_of(self.unify(a, b)))
        return Value(axes, is_weight=both)

    def contracted(
        self, operand: int, value: Value, axis: int, other: Value, along: int
    ) -> None:
        """A sum over products along an axis of each."""
        a, b = value.axes[axis], other.axes[along]
        if value.is_weight == other.is_weight:
            if not value.is_weight:  # both sides change
                for factor in [*a, *b]:
                    factor.space.restrict()
            self.assign(a, "in")
            self.assign(b, "out")
            self.unify(a, b)
            return
        joined = self.unify(a, b)
        self.assign(joined, "in")
        if value.is_weight:
            operand, axis = 1 - operand, along
        found = Contraction(self.calls - 1, operand, axis, joined)
        self.contractions.append(found)


def values_of(axis: Axis) -> Axis:
    """An axis of values that no parameter is read from."""
    return [Factor(factor.space) for factor in axis]


def aligned(value: Value, other: Value) -> list[tuple[Axis, Axis]]:
    """Axes beside each other, as shapes are broadcast."""
    size = max(len(value.axes), len(other.axes))
    empty: Axis = []
    a, b = ([empty] * (size - len(v.axes)) + v.axes for v in (value, other))
    return list(zip(a, b, strict=True))


def fitted(value: Value, shape: Sequence[int]) -> Value | None:
    """What is known of a tensor of that shape; None if it cannot be."""
    if len(value.axes) != len(shape):
        return None
    axes = []
    for axis, size in zip(value.axes, shape, strict=True):
        factors = leaves(axis)
        if size_of(factors) != size:
            if not all(factor.space.still for factor in factors):
                return None
            factors = plain(size)  # one of several outputs
        axes.append(factors)
    return Value(axes, value.is_weight)
