"""The maximum of every sample function: what Thompson sampling evaluates next.

Candidates are common to all functions, so that one pass over kernel and features
serves them all; the best ones are improved by gradient steps, where every function
only pays for its own points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.bayesopt.ascent import Ascent, ascend, value_and_slope
from sgdgp.bayesopt.candidates import Candidates, best_candidates, cumulated_scores
from sgdgp.bayesopt.functions import Functions, Source, source_of
from sgdgp.core.checks import check_count, check_finite, check_matrix, check_same
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import generator_of
from sgdgp.core.slices import slices
from sgdgp.posterior import PathwisePosterior

_WIDEST = 0.25
"""Candidates near data are perturbed by at most this share of the box."""

_ROWS = 4096
"""Candidates evaluated at a time, at most."""

_GROUP_CPU, _GROUP = 64, 1024
"""Functions improved at a time, at most."""


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
    progress: bool = False,
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
        progress: Show a progress bar.

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
    if not 0 <= exploration <= 1:
        raise ValueError(f"exploration: expected a share 0 to 1, found {exploration}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(
            f"learning_rate: expected a positive number, found {learning_rate}"
        )
    source = source_of(posterior)
    check_bounds(bounds)
    candidates = _candidates(source, bounds, exploration, nearby, x, y)
    budget = resolve_budget(memory_budget, bounds.device)
    generator = generator_of(seed)
    functions = source.functions
    if steps:
        _probe(functions, bounds)
    rates = 2 * learning_rate * candidates.nearby
    rows = _rows_at_once(functions, bounds, budget)
    groups = list(_groups(functions, bounds, candidates.x, budget))
    with tqdm(desc="maximise", total=rounds + len(groups), disable=not progress) as bar:
        found = []
        for _ in range(rounds):
            blocks = candidates.draw(num_candidates, generator)
            with torch.no_grad():
                found.append(best_candidates(functions, blocks, starts, rows))
            bar.update()
        points = torch.cat(found, 1)
        parts: list[Ascent] = []
        for group in groups:
            some = functions
            if group != slice(0, functions.num_functions):
                some = functions.subset(range(group.start, group.stop))  # type: ignore[attr-defined]
            parts.append(ascend(some, points[group], bounds, rates, steps=steps))
            bar.update()
    return Maxima(*(torch.cat(column) for column in zip(*parts, strict=True)))


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


def _rows_at_once(functions: Functions, bounds: Tensor, budget: int) -> int:
    """Candidates at a time: about eight arrays (rows, s) in half of the budget."""
    row = 8 * functions.num_functions * bounds.element_size()
    return max(1, min(_ROWS, budget // 2 // row))


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
