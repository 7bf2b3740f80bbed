"""The maximum of every sample function: what Thompson sampling evaluates next.

Candidates are common to all functions, so that one pass over kernel and features
serves them all; the best ones are improved by gradient steps, where every function
only pays for its own points.

Candidates are uniform points, and points near observations with large values: Lin et
al. (NeurIPS 2023) draw observations in proportion to their values above the smallest
one and perturb them by N(0, (lengthscale / 2)^2), clipped to the box.

Steps are those of Adam (Kingma & Ba, ICLR 2015) with a length that falls to zero along
a cosine. Most of the points a function starts from lead to lower maxima, and which ones
shows early: all but the best are given up on the way, so that thirty starts cost about
as much as six that go on to the end. The last one goes on from the best point it has
been at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.bayesopt.functions import Functions, Source, source_of
from sgdgp.core.checks import (
    check_count,
    check_finite,
    check_followers,
    check_matrix,
    check_number,
    check_positive,
    check_same,
)
from sgdgp.core.inference import with_gradients
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import generator_of, standard_normal
from sgdgp.core.slices import slices
from sgdgp.posterior import PathwisePosterior

_WIDEST = 0.25
"""Candidates near data are perturbed by at most this share of the box."""

_BLOCK = 4096
"""Candidates drawn at a time: what is drawn depends on neither memory nor device."""

_ROWS = 4096
"""Candidates evaluated at a time, at most."""

_SMALLEST_SCORE = 1e-6
"""Added to all scores, so that there is something to draw where all are equal."""

_GROUP_CPU, _GROUP = 64, 1024
"""Functions improved at a time, at most: fewer take less memory, more fill a GPU."""

_DECAY, _SECOND_DECAY = 0.9, 0.95
"""Of Adam's moments: 0.9 as usual, 0.95 since 0.999 would remember all sixty steps."""

_GIVEN_UP = ((0.1, 3), (0.25, 10), (0.5, 1000))
"""After this share of the steps one of so many points goes on."""


@dataclass(frozen=True, eq=False)
class Maxima:
    """Where each of s functions is largest, as far as was found.

    Attributes:
        x: Points (s, d).
        values: The functions there (s,).
        candidate_values: Their largest values at candidates (s,), before any gradient
            step; never above ``values``.
    """

    x: Float[Tensor, "s d"] = field(repr=False)
    values: Float[Tensor, " s"]
    candidate_values: Float[Tensor, " s"] = field(repr=False)


@with_gradients
def maximise(
    posterior: PathwisePosterior | Functions,
    bounds: Float[Tensor, "2 d"],
    num_candidates: int = 1024,
    *,
    exploration: float = 0.1,
    nearby: float | Float[Tensor, " d"] | None = None,
    rounds: int = 30,
    starts: int = 1,
    steps: int = 60,
    learning_rate: float = 0.2,
    x: Float[Tensor, "n d"] | None = None,
    y: Float[Tensor, " n"] | None = None,
    seed: int | torch.Generator = 0,
    memory_budget: int | None = None,
    progress: bool | None = None,
) -> Maxima:
    """Maximise every posterior sample function over a box.

    In each round all functions see the same candidates: some uniform in the box,
    the others near observations with large values. The best of each round are where
    gradient steps start (Lin et al., NeurIPS 2023).

    Args:
        posterior: A posterior of one output, or functions such as
            ``posterior.functions`` and ``posterior.draw(k)``.
        bounds: Lower and upper corner of the box (2, d), in the units of x.
        num_candidates: Candidates of each round.
        exploration: Share of uniform candidates.
        nearby: Standard deviations of the others around observations. Default: half
            a lengthscale of the kernel, at most a quarter of the box; a quarter of
            the box where there is no lengthscale.
        rounds: Rounds of candidates.
        starts: Candidates of each function and round that are improved.
        steps: Gradient steps; 0 for none.
        learning_rate: Length of the first step in units of 2 ``nearby``; it falls
            to zero.
        x: Observations to look near (n, d). Default: those of the posterior; without
            any all candidates are uniform.
        y: Their values (n,).
        seed: Seed or generator of the candidates.
        memory_budget: Bytes that may be used beside posterior and result. Default:
            half of what is free.
        progress: Show a progress bar. Default: on a terminal.

    Returns:
        Points (s, d) and values (s,), each at least that of the best candidate.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument does not fit; says which and why. Or the functions
            have no gradient in x, and ``steps`` is not 0.

    Example:
        >>> bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> maxima = sgdgp.bayesopt.maximise(posterior, bounds)
        >>> maxima.x, maxima.values
    """
    for name, value, least in (
        ("num_candidates", num_candidates, 1),
        ("rounds", rounds, 1),
        ("starts", starts, 1),
        ("steps", steps, 0),
    ):
        check_count(name, value, least)
    check_number("exploration", exploration)
    if not 0 <= exploration <= 1:
        raise ValueError(f"exploration: expected a share 0 to 1, found {exploration}")
    check_positive("learning_rate", learning_rate)
    check_followers(progress)
    source = source_of(posterior)
    check_bounds(bounds)
    candidates = _candidates(source, bounds, exploration, nearby, x, y)
    budget = resolve_budget(memory_budget, bounds.device)
    generator = generator_of(seed)
    functions = source.functions
    if steps:
        _probe(functions, bounds)
    rates = 2 * learning_rate * candidates.nearby
    # About eight arrays (rows, s) in half of the budget.
    row = 8 * functions.num_functions * bounds.element_size()
    rows = max(1, min(_ROWS, budget // 2 // row))
    groups = list(_groups(functions, bounds, candidates.x, budget))
    hidden = None if progress is None else not progress
    with tqdm(desc="maximise", total=rounds + len(groups), disable=hidden) as bar:
        starting_points = []
        for _ in range(rounds):
            blocks = candidates.draw(num_candidates, generator)
            with torch.no_grad():
                starting_points.append(best_candidates(functions, blocks, starts, rows))
            bar.update()
        points = torch.cat(starting_points, 1)
        parts = []
        for group in groups:
            some = functions
            if group != slice(0, functions.num_functions):
                some = functions.subset(range(group.start, group.stop))  # type: ignore[attr-defined]
            parts.append(ascend(some, points[group], bounds, rates, steps=steps))
            bar.update()
    return Maxima(
        torch.cat([part.x for part in parts]),
        torch.cat([part.values for part in parts]),
        torch.cat([part.candidate_values for part in parts]),
    )


maximize = maximise
"""The same in US spelling."""


def check_bounds(bounds: Tensor) -> None:
    """Refuse anything but a lower and an upper corner of a box.

    Raises:
        TypeError: Not a tensor of floating-point numbers.
        ValueError: Not of shape (2, d), not finite, or upside down.
    """
    check_matrix("bounds", bounds)
    check_finite("bounds", bounds)
    if bounds.shape[0] != 2:
        raise ValueError(
            f"bounds: expected shape (2, d), a lower and an upper corner, found "
            f"{tuple(bounds.shape)}"
        )
    wrong = bounds[0] > bounds[1]
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"bounds: expected lower <= upper, found {float(bounds[0, first])} > "
            f"{float(bounds[1, first])} at input {first}"
        )


def _candidates(
    source: Source,
    bounds: Tensor,
    exploration: float,
    nearby: float | Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
) -> Candidates:
    """The distribution of candidates, from what the user gave or the posterior has."""
    if (x is None) != (y is None):
        raise ValueError("x, y: expected both of them or neither, found one")
    if x is None or y is None:
        x, y = source.x, source.y
    width = bounds[1] - bounds[0]
    if nearby is None:
        spread = _WIDEST * width
        if source.lengthscale is not None:
            spread = torch.minimum(spread, 0.5 * source.lengthscale.to(width))
    else:
        spread = torch.as_tensor(nearby, dtype=width.dtype, device=width.device)
        if spread.ndim > 1 or spread.numel() not in (1, len(width)):
            raise ValueError(
                f"nearby: expected a number or {len(width)} of them, one for each "
                f"input, found shape {tuple(spread.shape)}"
            )
        if not bool((torch.isfinite(spread) & (spread > 0)).all()):
            raise ValueError(f"nearby: expected positive numbers, found {nearby}")
        spread = spread.expand_as(width)
    if x is None or y is None:
        return Candidates(bounds, exploration, spread)
    check_matrix("x", x, len(width))
    check_same("bounds", bounds, "x", x)
    if y.shape != (len(x),):
        raise ValueError(f"y: expected shape ({len(x)},), found {tuple(y.shape)}")
    check_finite("y", y)
    return Candidates(bounds, exploration, spread, x.detach(), cumulated_scores(y))


def _probe(functions: Functions, bounds: Tensor) -> None:
    """Ask for one gradient, so that functions without one say so before long work."""
    if hasattr(functions, "subset"):
        functions = functions.subset([0])
    middle = bounds.mean(0)
    value_and_slope(functions, middle.expand(functions.num_functions, 1, -1))


def _groups(
    functions: Functions, bounds: Tensor, x: Tensor | None, budget: int
) -> Iterator[slice]:
    """Functions that are improved at a time: all, unless some can be taken out."""
    count = functions.num_functions
    if not hasattr(functions, "subset"):
        yield slice(0, count)
        return
    # Weights of functions, copied a few times.
    one = 8 * bounds.element_size() * (1 if x is None else len(x))
    most = _GROUP_CPU if bounds.device.type == "cpu" else _GROUP
    yield from slices(count, max(1, min(most, budget // 2 // one)))


@dataclass(frozen=True, eq=False)
class Candidates:
    """A distribution of candidate points in a box.

    Attributes:
        bounds: Lower and upper corner (2, d).
        exploration: Share of uniform points.
        nearby: Standard deviations of perturbations (d,).
        x: Points to look near (n, d), or None: all candidates are uniform.
        cumulated: Their weights, summed up to each of them, in float64 (n,).
    """

    bounds: Float[Tensor, "2 d"]
    exploration: float
    nearby: Float[Tensor, " d"]
    x: Tensor | None = field(default=None, repr=False)
    cumulated: Tensor | None = field(default=None, repr=False)

    def draw(
        self, count: int, generator: torch.Generator
    ) -> Iterator[Float[Tensor, "b d"]]:
        """``count`` candidates, block by block, on the device of the bounds."""
        for rows in slices(count, _BLOCK):
            yield self._block(rows.stop - rows.start, generator)

    def _block(self, count: int, generator: torch.Generator) -> Tensor:
        lower, upper = self.bounds
        shape = (count, len(lower))

        def uniform(*size: int) -> Tensor:
            return torch.rand(
                size, generator=generator, device=generator.device, dtype=torch.float64
            ).to(lower.device)

        anywhere = lower + (upper - lower) * uniform(*shape).to(lower)
        if self.x is None or self.cumulated is None:
            return anywhere
        near = uniform(count) >= self.exploration
        mass = uniform(count) * self.cumulated[-1]
        index = torch.searchsorted(self.cumulated, mass, right=True)
        centre = self.x[index.clamp_max(len(self.x) - 1)]
        step = standard_normal(*shape, like=self.cumulated, generator=generator)
        moved = torch.clamp(centre + self.nearby * step.to(lower), lower, upper)
        return torch.where(near.unsqueeze(1), moved, anywhere)


def cumulated_scores(y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Running sums of what each value is above the smallest one, and a little more.

    The published code adds the smallest value where it has to be taken away, and so
    draws with negative weights.
    """
    y = y.double()
    return (y - y.min() + _SMALLEST_SCORE).cumsum(0)


def best_candidates(
    functions: Functions,
    blocks: Iterator[Float[Tensor, "b d"]],
    count: int,
    rows: int,
) -> Float[Tensor, "s k d"]:
    """The ``count`` candidates where each function is largest, in no order.

    Args:
        functions: s functions; all see the same candidates.
        blocks: The candidates.
        count: How many to keep for each function.
        rows: Candidates to evaluate at a time.
    """
    values: list[Tensor] = []
    points: list[Tensor] = []
    for block in blocks:
        for part in block.split(rows):
            largest, index = _largest(functions(part), count)
            values.append(largest)
            points.append(part[index])
            if len(values) > 1:
                largest, index = _largest(torch.cat(values, 1), count)
                values, points = [largest], [pick(torch.cat(points, 1), index)]
    return points[0]


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each row, and their columns."""
    largest, index = values.topk(min(count, values.shape[1]), 1)
    return largest, index


def pick(
    points: Float[Tensor, "s q d"], index: Int[Tensor, "s k"]
) -> Float[Tensor, "s k d"]:
    """Some of each function's own points."""
    return points.gather(1, index.unsqueeze(-1).expand(-1, -1, points.shape[-1]))


def ascend(
    functions: Functions,
    x: Float[Tensor, "s q d"],
    bounds: Float[Tensor, "2 d"],
    rates: Float[Tensor, " d"],
    *,
    steps: int,
) -> Maxima:
    """Follow the gradient of every function from all of its points.

    Args:
        functions: s functions.
        x: Where to start (s, q, d).
        bounds: Lower and upper corner (2, d).
        rates: Length of the first step along each input (d,).
        steps: Gradient steps; with zero the functions are only evaluated.

    Returns:
        The best of all points that were visited; candidates are where they started.
    """
    lower, upper = bounds
    survivors = _survivors(x.shape[1], steps)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    values, slope = value_and_slope(functions, x, wanted=steps > 0)
    best, best_values, best_slope, start = x, values, slope, values.amax(1)
    for step in range(steps):
        if step in survivors:
            best_values, index = best_values.topk(survivors[step], 1)
            x, best, slope, best_slope, first, second = (
                pick(points, index)
                for points in (x, best, slope, best_slope, first, second)
            )
            if survivors[step] == 1:
                x, slope, first = best, best_slope, torch.zeros_like(first)
        first = first.lerp(slope, 1 - _DECAY)
        second = second.lerp(slope.square(), 1 - _SECOND_DECAY)
        mean = first / (1 - _DECAY ** (step + 1))
        size = (second / (1 - _SECOND_DECAY ** (step + 1))).sqrt()
        direction = mean / size.clamp_min(torch.finfo(x.dtype).tiny)
        length = 0.5 * (1 + math.cos(math.pi * step / steps))
        x = torch.clamp(x + length * rates * direction, lower, upper)
        values, slope = value_and_slope(functions, x, wanted=step + 1 < steps)
        better = values > best_values
        best_values = torch.where(better, values, best_values)
        best = torch.where(better.unsqueeze(-1), x, best)
        best_slope = torch.where(better.unsqueeze(-1), slope, best_slope)
    top = best_values.argmax(1, keepdim=True)
    return Maxima(pick(best, top)[:, 0], best_values.gather(1, top)[:, 0], start)


def value_and_slope(
    functions: Functions, x: Float[Tensor, "s q d"], *, wanted: bool = True
) -> tuple[Float[Tensor, "s q"], Float[Tensor, "s q d"]]:
    """Every function at its own points, and its gradients; x in their place if not."""
    if not wanted:
        with torch.no_grad():
            return functions.each(x), x
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = functions.each(x)
        (slope,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), slope


def _survivors(count: int, steps: int) -> dict[int, int]:
    """How many points of each function go on from which step."""
    survivors: dict[int, int] = {}
    for share, one_of in _GIVEN_UP:
        remaining = math.ceil(count / one_of)
        if remaining < min(survivors.values(), default=count):
            survivors[max(1, round(share * steps))] = remaining
    return survivors
