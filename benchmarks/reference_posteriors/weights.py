"""Weights of digit classifiers: draws of chains, raw and aligned, and mean field.

A 64-8-10 network on 500 of scikit-learn's digits, N(0, 1) on every weight. Chains of
``hmc`` begin in networks that were trained apart, so that they sit in copies of the
network that differ by a symmetry: the mean of raw draws predicts nothing, that of
aligned draws does. Held-out draws are every second one. Mean field is held against the
aligned draws, as it was trained and aligned to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.checks import Check
from benchmarks.reference_posteriors.alignment import digits
from benchmarks.study import Record, Row
from sgdgp.metrics import accuracy, negative_log_likelihood
from sgdgp.networks import (
    Categorical,
    CompactGaussian,
    Draws,
    Potential,
    SymmetryGroup,
    align,
    compare,
    ensemble,
    hmc,
    mean_field,
)
from sgdgp.networks.sampling.diagnostics import split_r_hat

_TRAIN, _HIDDEN, _CHAINS, _MEMBERS = 500, 8, 4, 20
_DRAWS, _WARMUP = 300, 150
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "ReLU": nn.ReLU}

_FALL, _RISE = 3.0, 30.0
"""Of the mean network's NLL by alignment, times; of E[log q], nats."""

_CLOSER, _LESS = 0.4, 0.25
"""What alignment adds to the correlation of means, and takes off the divergence."""

_DIGITS = 3
"""Of the numbers that are kept for a figure."""


def measure(seed: int) -> Record:
    """Figures of both activations."""
    return {name: _measured(kind, seed) for name, kind in _ACTIVATIONS.items()}


def _measured(activation: type[nn.Module], seed: int) -> Record:
    images, classes = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    (x, x_test), (y, y_test) = (
        rows[order].tensor_split([_TRAIN]) for rows in (images.flatten(1), classes)
    )
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(64, _HIDDEN), activation(), nn.Linear(_HIDDEN, 10)
    )
    network.eval()
    group = SymmetryGroup.of(network)
    potential = Potential.from_network(network, Categorical(), [(x, y)])
    members = ensemble(potential, _MEMBERS, steps=500, learning_rate=0.02, seed=seed)
    # The mass matrix is that of one of them.
    nn.utils.vector_to_parameters(members.flat[0], network.parameters())
    potential = Potential.from_network(network, Categorical(), [(x, y)])
    start = members.flat[:_CHAINS]
    draws = hmc(
        potential, chains=_CHAINS, draws=_DRAWS, warmup=_WARMUP, start=start, seed=seed
    )
    fresh = ensemble(potential, 1, steps=1, seed=seed + 1).flat[0]
    variational = mean_field(potential, steps=6000, samples=4, start=fresh, seed=seed)

    aligned, report = align(draws, group)
    frame = aligned.flat.mean(0)
    together, _ = align(members, group, frame)
    frames = {
        "raw": (draws, variational, members),
        "aligned": (aligned, variational.aligned(frame, group), together),
    }
    found: Record = {
        "variance_reduction": report.variance_reduction,
        "output_r_hat": float(_largest_r_hat(draws)),
        "mean_field_warnings": list(variational.warnings),
        "hmc": _scores(draws, potential, x_test, y_test),
    }
    for name, (own, beside, ensembles) in frames.items():
        first = own.weights[:, 0::2].flatten(0, 1)
        held_out = own.weights[:, 1::2].flatten(0, 1)
        log_density = CompactGaussian.of(first).log_density(held_out).mean()
        compact = CompactGaussian.of(own)
        full = CompactGaussian.of(own, "full", shrinkage=0.0)
        mean = potential.outputs(compact.mean[None], x_test)[0].softmax(1)
        side = compare(beside, compact).weights
        many = CompactGaussian.of(ensembles)
        others = compare(many, compact).weights
        found[name] = {
            "mean_network": {
                "accuracy": accuracy(mean, y_test),
                "nll": negative_log_likelihood(mean, y_test),
            },
            "held_out_log_density": float(log_density),
            "diagonal": _against(compact, draws, potential, x_test, y_test),
            "full": _against(full, draws, potential, x_test, y_test),
            "mean_field": vars(side),
            "ensemble": vars(others),
        }
        if activation is nn.Tanh:  # for a figure
            found[name]["scatter"] = {
                "HMC": _points(compact),
                "mean field": _points(beside),
                "ensemble": _points(many),
            }
    compact = CompactGaussian.of(aligned)
    found["mean_field_and_hmc"] = {
        name: vars(compare(beside, compact).weights)
        for name, (_, beside, _) in frames.items()
    }
    found["mean_field_scores"] = _against(variational, draws, potential, x_test, y_test)
    return found


def _against(
    gaussian: CompactGaussian, draws: Draws, potential: Potential, x: Tensor, y: Tensor
) -> Record:
    """Samples of a Gaussian against the draws that it is of."""
    function = compare(gaussian, draws, model=potential, x=x, y=y).function
    assert function is not None
    assert function.scores is not None
    return {
        "accuracy": function.scores["accuracy"][0],
        "nll": function.scores["nll"][0],
        "agreement": function.agreement,
        "total_variation": function.total_variation,
        "deviation_ratio": function.deviation_ratio,
    }


def _scores(draws: Draws, potential: Potential, x: Tensor, y: Tensor) -> Record:
    found = draws.predict(potential, x)
    assert isinstance(found, Tensor)
    return {"accuracy": accuracy(found, y), "nll": negative_log_likelihood(found, y)}


def _largest_r_hat(draws: Draws) -> float:
    assert draws.outputs is not None
    found = split_r_hat(draws.outputs)
    return float(found[~found.isnan()].max())


def _points(gaussian: CompactGaussian) -> list[str]:
    """Means and deviations, a line of numbers each."""
    pair = (gaussian.mean, gaussian.standard_deviation)
    return [" ".join(f"{v:.{_DIGITS}g}" for v in values.tolist()) for values in pair]


def checks(records: Sequence[Record]) -> Iterator[Check]:
    """What alignment has to do for the moments, means over seeds."""
    for name in _ACTIVATIONS:
        raw, aligned = ([r[name][f] for r in records] for f in ("raw", "aligned"))
        where = f"digits, {name}: "
        nll = [
            a["mean_network"]["nll"] / b["mean_network"]["nll"]
            for a, b in zip(raw, aligned, strict=True)
        ]
        yield _check(where + "mean network's NLL falls by", _mean(nll), _FALL, " times")
        rise = [
            b["held_out_log_density"] - a["held_out_log_density"]
            for a, b in zip(raw, aligned, strict=True)
        ]
        yield _check(where + "held-out E[log q] rises by", _mean(rise), _RISE, " nats")
        own = [r[name]["mean_field_and_hmc"] for r in records]
        closer = [
            r["aligned"]["mean_correlation"] - r["raw"]["mean_correlation"] for r in own
        ]
        what = "correlation of means, mean field and HMC, rises by"
        yield _check(where + what, _mean(closer), _CLOSER)
        less = [1 - r["aligned"]["divergence"] / r["raw"]["divergence"] for r in own]
        what = "KL(mean field || HMC) falls by"
        yield _check(where + what, 100 * _mean(less), 100 * _LESS, " %")


def _check(what: str, figure: float, least: float, unit: str = "") -> Check:
    return Check(
        what, f"{figure:.3g}{unit}", f"at least {least:g}{unit}", figure >= least
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


ROWS = {"weights": Row(measure, checks, (0, 1, 2))}
