"""The head phantom: reconstruction, uncertainty and time; other methods; samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from skimage.data import shepp_logan_phantom
from skimage.transform import resize
from torch import Tensor

from benchmarks.checks import Check
from benchmarks.study import Record, Row
from benchmarks.tomography.methods import dropout_samples, ensemble
from benchmarks.tomography.scores import (
    oracle,
    pixel_scores,
    plus_minus,
    posterior_scores,
    psnr,
    sample_scores,
)
from sgdgp.networks import Dual
from sgdgp.solvers import CG
from sgdgp.solvers.preconditioners import Nystrom
from sgdgp.tomography import (
    ImagePosterior,
    ParallelBeam,
    Reconstruction,
    reconstruct,
)

_SIZES = {32: 15, 48: 20}
"""Pixels along an axis, and angles."""

_SEEDS = (0, 1, 2)

_PSNR = {32: 31.4, 48: 33.6}
"""Of a reproduction of the published method, by a peak of one."""

_GAIN, _COVERAGE, _SECONDS = 0.4, (0.93, 0.99), 180.0

_CHANNELS = (32, 32, 32)

_COUNTS = (16, 64, 256)
"""Of samples."""

_RATIO, _DIFFERENCE = 1.25, 0.01
"""Error of variances by what their number predicts; of the log density, in nats."""


def _problem(size: int, seed: int) -> tuple[Tensor, ParallelBeam, Tensor]:
    """Truth, measurement and data with 5 % noise.

    The phantom is scikit-image's, made small: less sharp than ``phantoms.shepp_logan``,
    and that of the reproduction.
    """
    whole = resize(shepp_logan_phantom(), (size, size), anti_aliasing=True)
    truth, geometry = torch.from_numpy(whole).float(), ParallelBeam(size, _SIZES[size])
    return truth, geometry, geometry.simulate(truth, 0.05, seed=seed)


def _posterior(fit: Reconstruction, **settings: Any) -> ImagePosterior:
    return fit.linearise().fit(progress=False, **settings)


def _measure(size: int) -> Callable[[int], Record]:
    def measure(seed: int) -> Record:
        truth, geometry, data = _problem(size, seed)
        begun, core = time.perf_counter(), time.process_time()
        fit = reconstruct(data, geometry, seed=seed, progress=False)
        fitted = time.perf_counter() - begun
        posterior = _posterior(fit, seed=seed)
        deviation = posterior.standard_deviation
        seconds = time.perf_counter() - begun
        return {
            "ours": {
                **posterior_scores(posterior, truth),
                "psnr": psnr(posterior.mean, truth, peak=1.0),
            },
            "oracle": oracle(posterior.mean, truth),
            "mean deviation": float(deviation.mean()),
            "noise": posterior.noise / float((data - geometry(truth)).std()),
            "steps": fit.history[-1].step,
            "reason": fit.reason,
            "seconds of the fit": fitted,
            "seconds": seconds,
            "seconds of a core": time.process_time() - core,
        }

    return measure


def _checks(size: int) -> Callable[[Sequence[Record]], Iterator[Check]]:
    low, high = _COVERAGE

    def checks(records: Sequence[Record]) -> Iterator[Check]:
        name = f"Shepp-Logan {size}, {_SIZES[size]} angles ({len(records)})"
        ours = [r["ours"] for r in records]
        psnr = [r["psnr"] for r in ours]
        least = _PSNR.get(size, -math.inf)
        yield Check(
            f"{name}: PSNR",
            plus_minus(psnr, 1),
            f"≥ {least}" if size in _PSNR else "",
            _mean(psnr) >= least,
        )
        gain = [r["ours"]["log density"] - r["oracle"] for r in records]
        yield Check(
            f"{name}: log density of pixels",
            plus_minus([r["log density"] for r in ours]),
            "",
            True,
        )
        yield Check(
            f"{name}: beyond the best fixed variance",
            plus_minus(gain),
            f"≥ {_GAIN}",
            _mean(gain) >= _GAIN,
        )
        for side in ("2", "5", "image"):
            yield Check(
                f"{name}: log density of patches of {side}",
                plus_minus([r["patches"][side] for r in ours]),
                "",
                True,
            )
        coverage = [r["coverage"] for r in ours]
        yield Check(
            f"{name}: coverage of 95 % intervals",
            plus_minus(coverage, 3),
            f"{low} to {high}",
            low <= _mean(coverage) <= high,
        )
        yield Check(
            f"{name}: correlation of error and deviation",
            plus_minus([r["correlation"] for r in ours]),
            "",
            True,
        )
        # Of one core, whatever else runs on the machine.
        longest = max(r["seconds of a core"] for r in records)
        yield Check(
            f"{name}: seconds of a core, the longest",
            f"{longest:.0f}",
            f"< {_SECONDS:.0f}",
            longest < _SECONDS,
        )

    return checks


def measure_others(seed: int) -> Record:
    """Dropout and an ensemble, with the fits' own settings."""
    truth, geometry, data = _problem(32, seed)
    found: Record = {}
    for name, method in (("MC dropout", dropout_samples), ("ensemble of 4", ensemble)):
        begun = time.perf_counter()
        samples = method(data, geometry, _CHANNELS, seed)
        seconds = time.perf_counter() - begun
        mean = samples.mean(0)
        found[name] = {
            **sample_scores(samples, truth),
            "psnr": psnr(mean, truth, peak=1.0),
            "oracle": oracle(mean, truth),
            "seconds": seconds,
        }
    return found


def check_others(records: Sequence[Record]) -> Iterator[Check]:
    """Nothing is asked of them."""
    for name in ("MC dropout", "ensemble of 4"):
        them = [r[name] for r in records]
        for figure, digits in (("psnr", 1), ("log density", 2), ("coverage", 3)):
            yield Check(
                f"Shepp-Logan 32 ({len(them)}): {name}, {figure}",
                plus_minus([r[figure] for r in them], digits),
                "",
                True,
            )


def measure_axis(seed: int) -> Record:
    """Data by an axis that is off by a bin, which the reconstruction ignores."""
    truth, geometry, _ = _problem(32, seed)
    shifted = ParallelBeam(32, _SIZES[32], axis=geometry.axis + 1)
    data = shifted.simulate(truth, 0.05, seed=seed)
    fit = reconstruct(data, geometry, seed=seed, progress=False)
    posterior = _posterior(fit, seed=seed)
    noise = float((data - shifted(truth)).std())
    return {
        "coverage": posterior.coverage(truth),
        "noise of the posterior": posterior.noise / noise,
        "noise by differences": fit.noise / noise,
    }


def check_axis(records: Sequence[Record]) -> Iterator[Check]:
    """Noises are by the true one. Nothing is asked of them."""
    for figure in records[0]:
        if figure != "seed":
            what = f"Shepp-Logan 32, axis off by a bin ({len(records)}): {figure}"
            yield Check(what, plus_minus([r[figure] for r in records]), "", True)


def measure_samples(seed: int) -> Record:
    """Variances and log densities by samples beside exact ones."""
    truth, geometry, data = _problem(32, seed)
    fit = reconstruct(data, geometry, seed=seed, progress=False)
    largest = max(_COUNTS)
    exact = _posterior(fit, seed=seed, exact=True, final_samples=largest)
    found = {"Cholesky": _sampled(exact, truth, _COUNTS)}
    # With a preconditioner, as where there are more data.
    solver = Dual(CG(preconditioner=Nystrom(rank=200)), tolerance=0.01)
    iterative = _posterior(
        fit,
        seed=seed,
        exact=True,
        final_samples=64,
        solver=solver,
        steps=0,
        precision=float(exact.weights.precisions[0]),
    )
    return {**found, "conjugate gradients": _sampled(iterative, truth, (16, 64))}


def _sampled(
    posterior: ImagePosterior, truth: Tensor, counts: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Root mean squares over disjoint sets of samples, and pixels that are uncertain.

    Those are less certain than every pixel is allowed to be; others are not sampled.
    """
    mean, own = posterior.mean, posterior.resolution**2
    exact = posterior.standard_deviation.square() - own
    squares = (posterior.samples() - mean).square()
    found = {}
    for count in counts:
        sets = squares.unflatten(0, (-1, count)).mean(1)
        error = (sets / exact - 1)[:, exact > own].square().mean().sqrt()
        densities = [
            pixel_scores(mean, (v + own).sqrt(), truth)["log density"] for v in sets
        ]
        found[str(count)] = {
            "error": float(error),
            "predicted": math.sqrt(2 / count),
            "log density": _mean(densities) - posterior.log_density(truth),
        }
    return found


def check_samples(records: Sequence[Record]) -> Iterator[Check]:
    """Errors by the number of samples, and the log density with most of them."""
    for solver in ("Cholesky", "conjugate gradients"):
        for count in records[0][solver]:
            them = [r[solver][count] for r in records]
            name = f"{count} samples by {solver} ({len(them)})"
            ratio = [r["error"] / r["predicted"] for r in them]
            yield Check(
                f"{name}: error of variances by √(2 / {count})",
                plus_minus(ratio),
                f"{1 / _RATIO:.1f} to {_RATIO}",
                1 / _RATIO <= _mean(ratio) <= _RATIO,
            )
            lost = [r["log density"] for r in them]
            asked = int(count) == max(_COUNTS)
            yield Check(
                f"{name}: log density less the exact one",
                plus_minus(lost, 3),
                f"within {_DIFFERENCE}" if asked else "",
                not asked or abs(_mean(lost)) <= _DIFFERENCE,
            )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


ROWS = {
    **{f"shepp-logan-{n}": Row(_measure(n), _checks(n), _SEEDS) for n in _SIZES},
    "shepp-logan-others": Row(measure_others, check_others, _SEEDS),
    "shepp-logan-axis": Row(measure_axis, check_axis),
    "samples": Row(measure_samples, check_samples, _SEEDS),
}
"""Ours at two sizes; others at the smaller one; and samples against exact figures."""
