"""Digits from few angles, beside dropout and the best fixed variance.

A digit's row has its own angles and noise; its seeds are numbers of MNIST's digits. The
fixed variance is chosen for every digit by the truth, around our reconstruction: no
method with one variance can do better.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.checks import Check
from benchmarks.study import Record, Row
from benchmarks.tomography.methods import dropout_samples, network
from benchmarks.tomography.phantoms import digit
from benchmarks.tomography.scores import (
    oracle,
    plus_minus,
    posterior_scores,
    sample_scores,
)
from sgdgp.tomography import ParallelBeam, reconstruct

ANGLES, NOISE = (5, 10, 20, 30), (5, 10)

_CHANNELS = (16, 16, 16)
_SETTINGS: dict[str, Any] = {"iterations": 600, "learning_rate": 5e-3}
"""Of all methods alike, for minutes in place of hours. With 8 channels, errors at 20
and 30 angles are those of a network that is too small, which no method foresees."""


def _measure(angles: int, noise: int) -> Callable[[int], Record]:
    def measure(seed: int) -> Record:
        begun = time.process_time()
        truth, geometry = digit(seed), ParallelBeam(28, angles)
        data = geometry.simulate(truth, noise / 100, seed=seed)
        fit = reconstruct(
            data,
            geometry,
            network(seed, _CHANNELS),
            seed=seed,
            progress=False,
            **_SETTINGS,
        )
        posterior = fit.linearise().fit(final_samples=2, seed=seed, progress=False)
        ours = posterior_scores(posterior, truth)
        ours["noise"] = posterior.noise / float((data - geometry(truth)).std())
        other = dropout_samples(data, geometry, _CHANNELS, seed, **_SETTINGS)
        return {
            "ours": ours,
            "MC dropout": sample_scores(other, truth),
            "fixed variance": {"log density": oracle(fit.image, truth)},
            "steps": fit.history[-1].step,
            "seconds of a core": time.process_time() - begun,
        }

    return measure


def _checks(name: str) -> Callable[[Sequence[Record]], Iterator[Check]]:
    def checks(records: Sequence[Record]) -> Iterator[Check]:
        def all_of(method: str, figure: str) -> list[float]:
            return [r[method][figure] for r in records]

        ours = all_of("ours", "log density")
        others = {m: all_of(m, "log density") for m in ("MC dropout", "fixed variance")}
        best = max(others, key=lambda m: sum(others[m]))
        gain = [a - b for a, b in zip(ours, others[best], strict=True)]
        what = f"{name} ({len(records)})"
        yield Check(
            f"{what}: log density, MC dropout, fixed variance",
            ", ".join(plus_minus(v) for v in (ours, *others.values())),
            "ours best",
            sum(gain) > 0,
        )
        yield Check(f"{what}: ahead of {best}", plus_minus(gain), "> 0", sum(gain) > 0)
        for figure in ("psnr", "coverage"):
            yield Check(
                f"{what}: {figure}, MC dropout",
                ", ".join(
                    plus_minus(all_of(m, figure), 3 if figure == "coverage" else 1)
                    for m in ("ours", "MC dropout")
                ),
                "",
                True,
            )

    return checks


ROWS = {
    f"digits-{angles:02d}-{noise:02d}": Row(
        _measure(angles, noise),
        _checks(f"digits, {angles} angles, {noise} %"),
        tuple(range(25)),
    )
    for noise in NOISE
    for angles in ANGLES
}
"""Of angles and per cent of noise."""
