"""Which weights a plainly trained network of MNIST digits does without.

A 196-16-10 tanh network (images of 14 x 14) trained on 3,000 images by Adam with weight
decay, its test accuracy on 2,000 others as more and more of its weights are set to
zero. Deviations are those of Hamiltonian draws around the trained weights, aligned to
them, of linearised Laplace, and of mean field, all with the prior that the weight decay
is. Biases stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional

from benchmarks.checks import Check
from benchmarks.learned_priors.training import trained
from benchmarks.networks.data import read_images
from benchmarks.study import Record, Row
from benchmarks.uci.columns import format_figure, mean_and_error
from sgdgp.networks import (
    Categorical,
    CompactGaussian,
    Isotropic,
    Potential,
    SymmetryGroup,
    align,
    hmc,
    linearise,
    mean_field,
    sparsity_curve,
)
from sgdgp.networks.sampling.pruning import Criterion

SPARSITIES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_SHOWN = (0.5, 0.8, 0.9, 0.95)
"""In the table of figures; all others are in the file."""

_TRAIN, _TEST, _HIDDEN = 3000, 2000, 16
_CHAINS, _DRAWS, _WARMUP = 4, 150, 80
_PRECISION = 1.0


def measure(seed: int) -> Record:
    """Accuracy against sparsity by each criterion."""
    images = read_images("mnist_10k.npz", "images", "labels")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    inputs = functional.avg_pool2d(images.x, 2).flatten(1)[order]
    classes = images.y[order]
    x, y = inputs[:_TRAIN], classes[:_TRAIN]
    x_test, y_test = inputs[-_TEST:], classes[-_TEST:]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(196, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, 10))
    network = trained(
        network,
        x,
        y,
        steps=60 * _TRAIN // 100,
        rate=3e-3,
        batch=100,
        decay=_PRECISION / _TRAIN,
        seed=seed,
    ).eval()
    loader = list(zip(x.split(500), y.split(500), strict=True))
    potential = Potential.from_network(
        network, Categorical(), loader, precision=_PRECISION
    )
    draws = hmc(potential, chains=_CHAINS, draws=_DRAWS, warmup=_WARMUP, seed=seed)
    aligned, report = align(draws, SymmetryGroup.of(network), potential.theta)
    linearised = linearise(network, Categorical(), Isotropic()).fit(
        loader,
        steps=0,
        precision=_PRECISION,
        final_samples=128,
        progress=False,
        seed=seed,
    )
    posteriors = {
        "HMC": CompactGaussian.of(aligned),
        "Laplace": CompactGaussian.of_posterior(linearised),
        "mean field": mean_field(potential, seed=seed),
    }

    def accuracy(pruned: nn.Module) -> float:
        with torch.no_grad():
            return float((pruned(x_test).argmax(1) == y_test).double().mean())

    curves = {}
    criteria: dict[str, Criterion] = {"SNR": "signal_to_noise", "1/sd": "precision"}
    for name, posterior in posteriors.items():
        for short, criterion in criteria.items():
            found = sparsity_curve(
                network, accuracy, SPARSITIES, criterion, posterior=posterior
            )
            curves[f"{name} {short}"] = [value for _, value in found]
    for plain in ("magnitude", "random"):
        found = sparsity_curve(network, accuracy, SPARSITIES, plain, seed=seed)
        curves[plain] = [value for _, value in found]
    return {
        "sparsities": list(SPARSITIES),
        "curves": curves,
        "deviations": {
            name: float(posterior.standard_deviation.median())
            for name, posterior in posteriors.items()
        },
        "caveats": {n: list(p.warnings) for n, p in posteriors.items()},
        "variance_reduction": report.variance_reduction,
        "seconds_hmc": draws.seconds,
    }


def checks(records: Sequence[Record]) -> Iterator[Check]:
    """Accuracies beside each other; no criterion has to win."""
    for sparsity in _SHOWN:
        at = SPARSITIES.index(sparsity)
        cells = []
        for name in records[0]["curves"]:
            mean, error = mean_and_error([r["curves"][name][at] for r in records])
            cells.append((mean, f"{name} {format_figure(mean, error, 3)}"))
        cells.sort(reverse=True)
        yield Check(
            f"MNIST, {sparsity:.0%} of the weights pruned: accuracy",
            "; ".join(cell for _, cell in cells),
            "beside each other",
            True,
        )
    unmixed = [any("not mixed" in s for s in r["caveats"]["HMC"]) for r in records]
    yield Check(
        "MNIST: seeds whose chains had not mixed (deviations of HMC are rough there)",
        f"{sum(unmixed)} of {len(unmixed)}",
        "beside",
        True,
    )


ROWS = {"pruning": Row(measure, checks, (0, 1, 2))}
