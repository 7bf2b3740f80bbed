"""Angles that are chosen by a posterior, beside equidistant ones, at equal counts.

Long rectangles that all lie one way are seen at 5 equidistant angles; 5 more are chosen
from whole degrees. An angle has the same noise whoever chooses it, and the images that
are compared are fitted from the same first weights. Beside ten equidistant angles
there are those by expected information gain of models of images that know no network:
independent pixels, and a Gaussian process with a Matern-1/2 kernel, whose variance and
length scale have the most evidence of the first data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.checks import Check
from benchmarks.study import Record, Row
from benchmarks.tomography.methods import network
from benchmarks.tomography.phantoms import rectangles
from benchmarks.tomography.scores import plus_minus, psnr
from sgdgp.tomography import Measurement, ParallelBeam, Reconstruction, reconstruct
from sgdgp.tomography.design import Criterion, chosen_views, root_of

_SIZE, _NOISE = 40, 0.05
_DEGREES, _START, _MORE = 180, 5, 5
_CHANNELS = (8, 8, 8)
_ITERATIONS, _RATE = 600, 5e-3

_CRITERIA: tuple[Criterion, ...] = ("eig", "diagonal", "variance")
_LENGTHS = (1.5, 3.0, 6.0, 12.0, 24.0)
"""Length scales in pixels."""


def _equidistant(count: int) -> list[int]:
    return list(range(0, _DEGREES, _DEGREES // count))


def _measure(seed: int) -> Record:
    begun = time.process_time()
    truth = rectangles(_SIZE, seed, across=(0.05, 0.15), along=(0.4, 0.7))
    every = ParallelBeam(_SIZE, _DEGREES)
    data = every.simulate(truth, _NOISE, seed=seed)
    start = _equidistant(_START)

    def fitted(views: list[int]) -> Reconstruction:
        return reconstruct(
            data[views],
            every.views(views),
            network(seed, _CHANNELS),
            iterations=_ITERATIONS,
            learning_rate=_RATE,
            seed=seed,
            progress=False,
        )

    first = fitted(start)
    posterior = first.linearise().fit(final_samples=2, seed=seed, progress=False)
    others = [v for v in range(_DEGREES) if v not in start]
    chosen = {"equidistant": _equidistant(_START + _MORE)}
    for criterion in _CRITERIA:
        found = posterior.next_views(every.views(others), _MORE, criterion)
        chosen[criterion] = [*start, *(others[i] for i in found)]
    for name, lengths in (("independent pixels", (0.0,)), ("Matern", _LENGTHS)):
        chosen[name] = _by_process(every, data, start, lengths, posterior.noise)
    return {
        "psnr": {name: psnr(fitted(v).image, truth) for name, v in chosen.items()},
        "first psnr": psnr(first.image, truth),
        "angles": chosen,
        "seconds of a core": time.process_time() - begun,
    }


def _by_process(
    every: Measurement,
    data: Tensor,
    start: list[int],
    lengths: Sequence[float],
    noise: float,
) -> list[int]:
    """Angles by a Gaussian process over pixels, of the scales with most evidence."""
    every = every.to(torch.float64)
    y = data[start].double().flatten()
    measured = every.views(start)
    best, covariance = -math.inf, torch.empty(0)
    axis = torch.arange(_SIZE).double()
    places = torch.cartesian_prod(axis, axis)
    for length in lengths:
        distance = torch.cdist(places, places)
        kernel = torch.exp(-distance / length) if length else torch.eye(len(places))
        cross = _seen(kernel.double(), measured)
        inside = _seen(cross.mT, measured)
        values, vectors = torch.linalg.eigh(0.5 * (inside + inside.mT))
        squares = (vectors.mT @ y).square()
        for variance in torch.logspace(-4, 1, 26).double():
            sizes = variance * values.clamp_min(0.0) + noise**2
            evidence = -0.5 * float((squares / sizes + sizes.log()).sum())
            if evidence > best:
                best = evidence
                half = variance * (cross @ vectors) / sizes.sqrt()
                covariance = variance * kernel - half @ half.mT
    others = [v for v in range(_DEGREES) if v not in start]
    root = root_of(covariance).reshape(-1, *every.image_shape)
    found = chosen_views(every.views(others)(root), noise, _MORE)
    return [*start, *(others[i] for i in found)]


def _seen(rows: Tensor, measurement: Measurement) -> Tensor:
    return measurement(rows.reshape(-1, *measurement.image_shape)).flatten(1)


def _checks(records: Sequence[Record]) -> Iterator[Check]:
    even = [r["psnr"]["equidistant"] for r in records]
    for name in records[0]["psnr"]:
        found = [r["psnr"][name] for r in records]
        gain = [a - b for a, b in zip(found, even, strict=True)]
        what = f"rectangles ({len(records)}), {_START + _MORE} angles by {name}: PSNR"
        yield Check(what, plus_minus(found), "", True)
        if name != "equidistant":
            asked = name == "eig"
            yield Check(
                f"{what} ahead of equidistant",
                plus_minus(gain),
                "> 0" if asked else "",
                sum(gain) > 0 or not asked,
            )


ROWS = {"angles": Row(_measure, _checks, tuple(range(10)))}
