"""Draws in symmetric copies of a mode, brought together ("rebasin").

Each draw is moved by the member of a network's symmetry group that takes it closest to
a reference. Units of one hidden layer are then one assignment problem, of inner
products of all weights that touch a unit, of their absolute values where units may
change their signs: solved exactly. Of several layers one is matched at a time, as in
Git Re-Basin (Ainsworth et al. 2023), to a local optimum. The reference is a network, or
the mean of the aligned draws, in rounds that begin at the first of them (generalised
Procrustes).

Alignment brings together symmetric copies and nothing else: chains in different modes
stay apart, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import scipy  # and scipy.optimize by its name, which takes half a second to import
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sgdgp.core.checks import check_count, check_finite
from sgdgp.core.seeds import generator_of
from sgdgp.networks.sampling.diagnostics import split_r_hat
from sgdgp.networks.sampling.draws import MIXED, Draws
from sgdgp.networks.sampling.symmetry import (
    Block,
    HiddenAxis,
    Symmetry,
    SymmetryGroup,
    call_arguments,
)
from sgdgp.networks.sampling.tracing import CONTRACTIONS, name_of

Match: TypeAlias = Literal["weights", "activations"]
"""By what units are told apart"""

_ROUNDS = 100
"""Most sweeps over hidden layers, and most means that draws are aligned to."""

_GAIN = 1e-12
"""Least rise of an inner product that counts, relative to the norms."""

_BALANCED = 1e-12
"""Largest logarithm of a scale that is as good as one."""

_NUMBERS = 2**24
"""Weights that are matched together: a few temporaries of 128 MiB."""

_LEAST_DRAWS = 4  # of a chain, for R-hat

_TYPICAL, _WORST = 1.1, 1.5
"""R-hat of weights above which chains are in different places: median, largest."""

_FEW_DRAWS = 10  # of a chain: the largest R-hat of fewer says nothing

_SOME_WEIGHTS = 10_000
"""Weights by which the median R-hat of single chains is judged."""

_CLEAR = 3.0
"""Standard deviations by which exchanging two units makes an assignment worse."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """What alignment has done, and whether the draws agree; ``print`` it.

    Attributes:
        symmetries: What each draw was moved by, a batch (chains, draws).
        match: By what units were told apart.
        variance_before: Summed over weights, of the draws as they were.
        variance_after: The same of aligned draws.
        r_hat_before: Split R-hat of each weight; None for fewer than four draws.
        r_hat_after: The same of aligned draws: what it shows is no symmetry.
        warnings: Sentences that say what the draws cannot be used for.
    """

    symmetries: Symmetry
    match: Match
    variance_before: float
    variance_after: float
    r_hat_before: Float[Tensor, " D"] | None
    r_hat_after: Float[Tensor, " D"] | None
    warnings: tuple[str, ...]

    @property
    def variance_reduction(self) -> float:
        """The part of the draws' variance that was between symmetric copies."""
        if not self.variance_before:
            return 0.0  # one network many times
        return 1 - self.variance_after / self.variance_before

    @property
    def transpositions(self) -> dict[str, Tensor]:
        """Of each draw (chains, draws), by hidden axis."""
        return self.symmetries.transpositions

    def __str__(self) -> str:
        """The report."""
        group = self.symmetries.group
        chains, draws = self.symmetries.batch
        lines = [
            f"{chains} chains x {draws} draws, aligned by {self.match}",
            f"  variance {self.variance_before:.4g} -> {self.variance_after:.4g} "
            f"({-self.variance_reduction:+.1%})",
        ]
        if self.r_hat_before is not None and self.r_hat_after is not None:
            before, after = map(_extremes, (self.r_hat_before, self.r_hat_after))
            lines.append(
                f"  R-hat of weights: median {before[0]:.3f} -> {after[0]:.3f}, "
                f"largest {before[1]:.3f} -> {after[1]:.3f}"
            )
        for axis in group.axes:
            count = float(self.transpositions[axis.name].double().mean())
            lines.append(
                f"  {axis.name}: {axis.size} units, {count:.1f} transpositions "
                f"(random: {group.expected_transpositions[axis.name]:.1f})"
            )
        return "\n".join([*lines, *(f"  {sentence}" for sentence in self.warnings)])


@torch.no_grad()
def align(
    draws: Draws,
    group: SymmetryGroup,
    reference: Literal["procrustes", "first"] | Float[Tensor, " D"] = "procrustes",
    match: Match = "weights",
    *,
    x: Any = None,
    canonical: bool = False,
    seed: int | torch.Generator = 0,
) -> tuple[Draws, Alignment]:
    """Move every draw to the symmetric copy that is closest to a reference.

    The draws' functions stay as they are, and so does an isotropic prior's density of
    them.

    Args:
        draws: Two or more.
        group: The network's symmetries, ``SymmetryGroup.of(posterior)``.
        reference: ``"procrustes"``: the mean of aligned draws, found in rounds;
            ``"first"``: the first draw; or weights.
        match: ``"weights"``: by inner products of all weights that touch a unit;
            ``"activations"``: of a unit's values at some inputs.
        x: These inputs, as the network takes them.
        canonical: Whether units that may be rescaled are first given weights of one
            norm on both sides. That changes the prior's density (aligned draws have no
            energies): it is for networks that were trained apart, not for draws of a
            posterior.
        seed: Decides in which order hidden layers are matched.

    Returns:
        Aligned draws, and what has been done.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: One draw only, draws of another architecture, weights that are not
            finite, or no x.
    """
    _check(draws, group, reference, match, x)
    generator, rows = generator_of(seed), draws.flat
    read = _Activations(group, x) if match == "activations" else None
    own = read.group if read else group

    def scaled(weights: Tensor) -> Symmetry:
        if canonical:
            return _canonical(weights, group)
        return group.identity(len(weights))

    def features_of(weights: Tensor) -> Tensor:
        ready = scaled(weights).apply(weights)
        return read(ready) if read else ready

    features = features_of(rows)
    if isinstance(reference, Tensor):
        target = features_of(reference.to(rows)[None])[0]
        step = _matched(features, target, own, generator)
    elif reference == "first":
        step = _matched(features, features[0], own, generator)
    else:
        step = _procrustes(features, own, generator)
    member = replace(step, group=group).compose(scaled(rows))
    aligned = member.apply(rows)
    moved = replace(
        draws,
        weights=aligned.view_as(draws.weights),
        energies=None if canonical else draws.energies,
    )
    r_hat = _r_hat(moved)
    return moved, Alignment(
        member.unflattened(*draws.weights.shape[:2]),
        match,
        _variance(rows),
        _variance(aligned),
        _r_hat(draws),
        r_hat,
        (*_disagreements(moved, r_hat), *_alike(step.apply(features), own)),
    )


@torch.no_grad()
def match_weights(
    weights: Float[Tensor, "*k D"],
    reference: Float[Tensor, " D"],
    group: SymmetryGroup,
    seed: int | torch.Generator = 0,
) -> Symmetry:
    """The member of a group that takes a network closest to another, or each of many.

    Of two networks with batch norms the buffers must move, too:
    ``match_weights(...).apply_to(network)`` with a group that has them,
    ``SymmetryGroup.of(network, x, buffers="permuted")``.

    Args:
        weights: Flat weights.
        reference: Those to come close to.
        group: The network's symmetries.
        seed: Decides in which order hidden layers are matched.

    Raises:
        TypeError: Not tensors of float32 or float64.
        ValueError: Weights of another network, or not finite.
    """
    for name, value in (("weights", weights), ("reference", reference)):
        group.check_weights(name, value)
        check_finite(name, value)
    rows = weights.reshape(-1, weights.shape[-1])
    found = _matched(rows, reference.to(rows), group, generator_of(seed))
    return found.unflattened(*weights.shape[:-1])


@torch.no_grad()
def barrier(
    potential: Callable[[Tensor], Tensor],
    a: Float[Tensor, " D"],
    b: Float[Tensor, " D"],
    points: int = 11,
) -> float:
    """How far a loss rises, from one network straight to another, above its ends.

    Args:
        potential: From flat weights (k, D) to losses (k,), such as a ``Potential``.
        a: Flat weights of one network.
        b: Of the other.
        points: Where the loss is taken, ends included.

    Returns:
        The largest difference from the line between the losses at both ends; 0 if
        there is none above it.

    Raises:
        ValueError: Weights of different shapes, or too few points.
    """
    check_count("points", points, 3)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            "a, b: expected flat weights (D,) of two networks of one architecture, "
            f"found shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    t = torch.linspace(0, 1, points, dtype=a.dtype, device=a.device)
    losses = potential(torch.lerp(a, b, t[:, None]))
    return float((losses - torch.lerp(losses[0], losses[-1], t.to(losses))).max())


def _matched(
    rows: Tensor,
    reference: Tensor,
    group: SymmetryGroup,
    generator: torch.Generator,
    *,
    near: bool = False,
) -> Symmetry:
    """What takes each row closest to the reference, as far as it is found.

    Args:
        rows: Flat weights.
        reference: Those to come close to.
        group: What may move them.
        generator: Of the order of hidden axes.
        near: Whether they are close already, so that one start is enough.
    """
    some = rows.split(max(1, _NUMBERS // rows.shape[1]))
    parts = [_Matcher(part, reference, group, generator).run(near) for part in some]
    return parts[0].concatenated(parts[1:])


class _Matcher:
    """Coordinate descent over hidden axes, for some rows at once."""

    def __init__(
        self,
        rows: Tensor,
        reference: Tensor,
        group: SymmetryGroup,
        generator: torch.Generator,
    ) -> None:
        self._start, self._reference, self._group = rows, reference, group
        self._generator = generator
        self._touched = [{block.tensor for block in a.blocks} for a in group.axes]
        tensors = [block.tensor for axis in group.axes for block in axis.blocks]
        self._exact = len(set(tensors)) == len(tensors)  # none has units on two sides
        self._places = [_places(group, axis) for axis in group.axes]
        least = max(_GAIN, 4 * torch.finfo(rows.dtype).eps)
        self._least = least * reference.norm() * rows.norm(dim=-1)

    def run(self, near: bool) -> Symmetry:
        """The best that is found of each row.

        Of several axes, each is matched by weights that others have a say in, too. So
        there are two more starts: from the first axis to the last, and back, each
        matched by what the axes before it leave in no doubt.
        """
        score = self._descend([])
        permutations, signs = self._permutations, self._signs
        forward = list(range(len(self._group.axes)))
        for order in [] if near or self._exact else [forward, forward[::-1]]:
            other = self._descend(order)
            better = (other > score + self._least).cpu()
            score = torch.maximum(score, other)
            for own, found in (
                *zip(permutations, self._permutations, strict=True),
                *zip(signs, self._signs, strict=True),
            ):
                own[better] = found[better]
        return replace(
            self._group.identity(len(self._start)),
            permutations=tuple(permutations),
            signs=tuple(signs),
        )

    def _descend(self, order: list[int]) -> Tensor:
        """Sweep until nothing improves; the inner products with the reference.

        Args:
            order: Of axes that are matched before, one after the other.
        """
        none = self._group.identity(len(self._start))
        self._rows = self._start.clone()
        self._permutations = [p.clone() for p in none.permutations]
        self._signs = [s.clone() for s in none.signs]
        live = torch.arange(len(self._start))
        for i in order:
            doubtful = order[order.index(i) :]
            self._improve(i, live, set().union(*(self._others(i, j) for j in doubtful)))
        for _ in range(1 if self._exact else _ROUNDS):
            improved = torch.zeros(len(live), dtype=torch.bool)
            axes = range(len(self._group.axes))
            for i in torch.randperm(len(axes), generator=self._generator).tolist():
                improved |= self._improve(i, live)
            live = live[improved]
            if not len(live):
                break
        return self._rows @ self._reference

    def _others(self, i: int, j: int) -> set[str]:
        """Tensors with units of an axis that have units of another, too."""
        if i != j:
            return self._touched[i] & self._touched[j]
        names = [block.tensor for block in self._group.axes[i].blocks]
        return {name for name in names if names.count(name) > 1}

    def _improve(self, i: int, live: Tensor, without: set[str] | None = None) -> Tensor:
        """Match one axis of some rows, and keep what brings them closer.

        Args:
            i: The axis.
            live: The rows.
            without: Tensors that are not compared; what is found is kept in any case.
        """
        axis, rows = self._group.axes[i], self._rows[live]
        places = self._places[i]
        if without is not None:
            places = _places(self._group, axis, without)
        moving, still = _products(self._reference, rows, places)
        scores = ((moving.abs() if axis.signs else moving) + still).numpy(force=True)
        assign = scipy.optimize.linear_sum_assignment
        order = torch.from_numpy(
            np.stack([assign(a, maximize=True)[1] for a in scores])
        )
        sign = torch.ones(order.shape, dtype=torch.float64)
        if axis.signs:
            sign[moving.cpu().gather(-1, order[..., None])[..., 0] < 0] = -1.0
        step = self._group.identity(len(live))
        step = replace(
            step,
            permutations=(*step.permutations[:i], order, *step.permutations[i + 1 :]),
            signs=(*step.signs[:i], sign, *step.signs[i + 1 :]),
        )
        moved = step.apply(rows)
        better = ((moved - rows) @ self._reference > self._least[live]).cpu()
        if without is not None:
            better[:] = True
        kept, order = live[better], order[better]
        self._rows[kept] = moved[better]
        self._permutations[i][kept] = self._permutations[i][kept].gather(-1, order)
        self._signs[i][kept] = sign[better] * self._signs[i][kept].gather(-1, order)
        return better


def _procrustes(
    rows: Tensor, group: SymmetryGroup, generator: torch.Generator
) -> Symmetry:
    """Align to the mean of aligned rows until their variance stops falling."""
    member = _matched(rows, rows[0], group, generator)
    aligned = member.apply(rows)
    variance = _variance(aligned)
    for _ in range(_ROUNDS):
        step = _matched(aligned, aligned.mean(0), group, generator, near=True)
        moved = step.apply(aligned)
        smaller = _variance(moved)
        if not smaller < variance * (1 - _GAIN):
            break
        member, aligned, variance = step.compose(member), moved, smaller
    return member


def _variance(rows: Tensor) -> float:
    """Summed over weights."""
    return float(rows.var(0, correction=0).sum())


def _places(
    group: SymmetryGroup, axis: HiddenAxis, without: Collection[str] = ()
) -> tuple[Tensor, Tensor]:
    """Where the weights of each unit stand (n, m): those with its sign, and others."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    slices = group.slices
    for block in axis.blocks:
        if block.tensor in slices and block.tensor not in without:
            part = slices[block.tensor]
            places = torch.arange(part.start, part.stop)
            places = places.view(block.before, axis.size, block.after)
            found[block.role == "fixed"].append(places.transpose(0, 1).flatten(1))
    none = torch.zeros(axis.size, 0, dtype=torch.long)
    moving, still = (torch.cat([none, *places], dim=1) for places in found)
    return moving, still


def _products(
    reference: Tensor, rows: Tensor, places: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Inner products (k, n, n) of the reference's units with those of each row."""
    moving, still = (torch.matmul(reference[p], rows[:, p].mT) for p in places)
    return moving, still


def _canonical(rows: Tensor, group: SymmetryGroup) -> Symmetry:
    """Scales that give the weights into and out of each unit one norm."""
    member = group.identity(len(rows))
    axes = [i for i, axis in enumerate(group.axes) if axis.scales]
    for _ in range(_ROUNDS):
        largest = 0.0
        for i in axes:
            axis, now = group.axes[i], member.apply(rows)
            shape = (len(rows), axis.size)
            squares = {r: torch.zeros(shape).double() for r in ("out", "in", "fixed")}
            for block in axis.blocks:
                part = now[:, group.slices[block.tensor]].double().cpu().square()
                part = part.view(len(rows), block.before, axis.size, block.after)
                squares[block.role] += part.sum((1, 3))
            factor = (squares["in"] / squares["out"]) ** 0.25
            factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
            largest = max(largest, float(factor.log().abs().max()))
            scales = [*member.scales]
            scales[i] = scales[i] * factor
            member = replace(member, scales=tuple(scales))
        if largest < _BALANCED:
            break
    return member


class _Reader(TorchFunctionMode):
    """Notes what some contractions of a run get."""

    def __init__(self, axes: Sequence[HiddenAxis]) -> None:
        super().__init__()
        self._wanted = {(a.read.call, a.read.operand) for a in axes if a.read}
        self._calls = 0
        self.found: dict[tuple[int, int], Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function's value."""
        kwargs = kwargs or {}
        name = name_of(func)
        if name in CONTRACTIONS:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            for operand, tensor in enumerate(tensors[name == "addmm" :][:2]):
                if (self._calls, operand) in self._wanted:
                    self.found[self._calls, operand] = tensor
            self._calls += 1
        return func(*args, **kwargs)


class _Activations:
    """Values of hidden units at some inputs, as if they were weights.

    Attributes:
        group: What a group of networks does to them.
    """

    def __init__(self, group: SymmetryGroup, x: Any) -> None:
        assert group.network is not None
        self._network, self._weights = group.network, group
        self._args, self._kwargs = call_arguments(x)
        with torch.no_grad():
            found = self._read(dict(group.network.named_parameters()))
        axes, shapes = [], []
        for axis, part in zip(group.axes, found, strict=True):
            width = part.numel() // axis.size
            own = (Block(axis.name, 1, width, "out"),)
            axes.append(replace(axis, scales=False, blocks=own))
            shapes.append((axis.size, width))
        names = tuple(axis.name for axis in axes)
        self.group = SymmetryGroup(tuple(axes), names, tuple(shapes))

    def __call__(self, rows: Tensor) -> Tensor:
        """Activations of each network, a row (k, sum of n m)."""
        group = self._weights

        def values(row: Tensor) -> Tensor:
            parts = zip(group.slices.items(), group.shapes, strict=True)
            weights = {n: row[part].view(shape) for (n, part), shape in parts}
            return torch.cat(self._read(weights))

        size = max(1, _NUMBERS // self.group.num_weights)
        return vmap(values, chunk_size=size)(rows)

    def _read(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """Of one network, by unit and then by example."""
        with _Reader(self._weights.axes) as reader:
            functional_call(self._network, weights, self._args, self._kwargs)
        found = []
        for axis in self._weights.axes:
            assert axis.read is not None
            at = axis.read
            read = reader.found[at.call, at.operand].movedim(at.axis, 0)
            read = read.reshape(at.before, axis.size, at.after, -1)
            found.append(read.transpose(0, 1).flatten())
        return found


def _r_hat(draws: Draws) -> Tensor | None:
    """Of weights, where there are draws enough."""
    return draws.r_hat() if draws.num_draws >= _LEAST_DRAWS else None


def _extremes(r_hat: Tensor) -> tuple[float, float]:
    """Median and largest; a weight that never moves has none."""
    known = r_hat[~r_hat.isnan()]
    return (float(known.median()), float(known.max())) if len(known) else (1.0, 1.0)


def _by_chance(draws: Draws) -> tuple[float, float]:
    """Median and largest R-hat of weights that draws without fault may have, and more.

    R-hat squared is 1 + (F - 1) / h for half chains of h draws, with F about chi-square
    by its degrees of freedom k. The largest of D is bounded as by Laurent and Massart
    (2000): k + 2 (k log D)^(1/2) + 2 log D.
    """
    half, k = draws.num_draws // 2, 2 * draws.num_chains - 1
    allowed = max(_TYPICAL, 1 + 0.6 / half)  # 0.6: seen in the median of normal draws
    if draws.num_draws < _FEW_DRAWS:
        return allowed, math.inf
    log = math.log(2 * draws.num_weights)
    f = (k + 2 * math.sqrt(k * log) + 2 * log) / k
    return allowed, max(_WORST, 2 * math.sqrt(1 + (f - 1) / half) - 1)


def _disagreements(draws: Draws, r_hat: Tensor | None) -> Iterator[str]:
    """What aligned draws say against a summary of them all."""
    if r_hat is None:
        return
    typical, worst = _extremes(r_hat)
    allowed, most = _by_chance(draws)
    if typical <= allowed and worst <= most:
        return
    some = draws.weights[..., :: -(-draws.num_weights // _SOME_WEIGHTS)]
    alone = max(_extremes(split_r_hat(chain[None]))[0] for chain in some)
    drifting = alone > allowed or draws.num_chains == 1
    found = (
        f"R-hat of aligned weights is {typical:.2f} in the median, {worst:.2f} at most"
    )
    if drifting:
        yield (
            f"{found}, up to {alone:.2f} in the median of a single chain: they have "
            "not mixed. Draw more before weights are summarised."
        )
    if draws.num_chains > 1 and (not drifting or typical > _TYPICAL * alone):
        yield (
            f"{found}: these chains are in different modes, which are no symmetric "
            "copies of each other. Their mean is no network, and their variance no "
            "posterior's; summarise each by itself, or start all chains at one mode."
        )
    if draws.outputs is not None:
        _, outputs = _extremes(split_r_hat(draws.outputs))
        if outputs <= MIXED:
            yield (
                f"The networks' outputs agree (largest R-hat {outputs:.2f}): "
                "predictions of all draws can be used, statistics of weights cannot."
            )


def _alike(rows: Tensor, group: SymmetryGroup) -> Iterator[str]:
    """Units whose labels are arbitrary, as exchanging two of them costs nothing."""
    mean = rows.mean(0)
    for axis in group.axes:
        places = _places(group, axis)
        sums = squares = rows.new_zeros(axis.size, axis.size)
        for some in rows.split(max(1, _NUMBERS // (rows.shape[1] + axis.size**2))):
            moving, still = _products(mean, some, places)
            scores = (moving.abs() if axis.signs else moving) + still
            own = scores.diagonal(dim1=-2, dim2=-1)
            lost = own[..., None] + own[..., None, :] - scores - scores.mT
            sums, squares = sums + lost.sum(0), squares + lost.square().sum(0)
        average = sums / len(rows)
        spread = (squares / len(rows) - average.square()).clamp_min(0).sqrt()
        close = (average < _CLEAR * spread).triu(1)
        if close.any():
            yield (
                f"{int(close.sum())} of {axis.size * (axis.size - 1) // 2} pairs of "
                f"units of {axis.name!r} are as close to each other as draws are "
                "spread: which is which is arbitrary, and so are their transpositions."
            )


def _check(
    draws: Draws, group: SymmetryGroup, reference: Any, match: Match, x: Any
) -> None:
    """Refuse what cannot be aligned."""
    if not isinstance(draws, Draws):
        raise TypeError(f"draws: expected Draws, found {type(draws).__name__}")
    if not isinstance(group, SymmetryGroup):
        raise TypeError(
            f"group: expected a SymmetryGroup, found {type(group).__name__}; "
            "SymmetryGroup.of(posterior) makes it"
        )
    own = dict(zip(group.names, group.shapes, strict=True))
    theirs = dict(zip(draws.names, map(tuple, draws.shapes), strict=True))
    for name in [*own, *theirs]:
        if own.get(name) != theirs.get(name):
            raise ValueError(
                f"draws: expected weights {name!r} of shape {own.get(name)} as the "
                f"group's network has, found {theirs.get(name)}: they are of another "
                "architecture"
            )
    if tuple(own) != tuple(theirs):
        raise ValueError(
            f"draws: expected weights in the order {list(own)}, found {list(theirs)}"
        )
    if len(draws.flat) < 2:
        raise ValueError(
            "draws: expected two or more, found one draw of one chain; one network is "
            "taken close to another by match_weights(weights, reference, group)"
        )
    check_finite("draws.weights", draws.weights)
    if isinstance(reference, Tensor):
        group.check_weights("reference", reference)
        if reference.ndim != 1:
            raise ValueError(
                f"reference: expected flat weights (D,), found {tuple(reference.shape)}"
            )
        check_finite("reference", reference)
    elif not isinstance(reference, str) or reference not in ("procrustes", "first"):
        raise ValueError(
            "reference: expected 'procrustes', 'first' or flat weights, found "
            f"{reference!r}"
        )
    if match not in get_args(Match):
        raise ValueError(f"match: expected 'weights' or 'activations', found {match!r}")
    if match == "activations":
        if x is None:
            raise ValueError("x: expected inputs at which to match activations")
        for leaf in tree_leaves(x):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                check_finite("x", leaf)
        if group.network is None or any(axis.read is None for axis in group.axes):
            raise ValueError(
                "match: expected 'weights', found 'activations': they can be read for "
                "groups from SymmetryGroup.of(network, x) whose units go into a layer"
            )
