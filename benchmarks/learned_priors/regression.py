"""Regressions whose source is a part of the inputs' range.

Inputs below their 60 % quantile along a random direction are the source's range: half
of them, at most 600, train the network. The target is all that is left, so it reaches
beyond. Everything is in the source's units; certificates are of being off by half a
standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.learned_priors.priors import Examples, Record, measured, priors_of
from benchmarks.learned_priors.training import fine_tuned, trained
from benchmarks.uci.data import load_split
from sgdgp.networks import Gaussian

SIZES = (25, 50, 100, 200)
TOLERANCE = 0.5
_LOW = 0.6
_MOST = 600
_LEAST_TEST, _MOST_TEST = 100, 1000


def shifted(name: str, seed: int) -> tuple[Examples, Examples]:
    """Source and target of a data set in ``SGDGP_DATA/uci``, in random order."""
    split = load_split(name, 0, dtype=torch.float32)
    x = torch.cat([split.x, split.x_test])
    y = torch.cat([split.y, split.y_test]).unsqueeze(1)
    # Of equal inputs one: a certificate refuses what its prior has seen.
    first = torch.from_numpy(np.unique(x.numpy(), axis=0, return_index=True)[1]).sort()
    x, y = x[first.values], y[first.values]
    generator = torch.Generator().manual_seed(seed)
    along = x @ torch.randn(x.shape[1], generator=generator)
    low = along.argsort()[: int(_LOW * len(x))]
    low = low[torch.randperm(len(low), generator=generator)]
    chosen = low[: min(_MOST, len(low) // 2)]
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[chosen] = False
    others = rest.nonzero()[:, 0]
    others = others[torch.randperm(len(others), generator=generator)]
    x = (x - x[chosen].mean(0)) / x[chosen].std(0).clamp_min(1e-3)
    y = (y - y[chosen].mean(0)) / y[chosen].std(0)
    return (x[chosen], y[chosen]), (x[others], y[others])


def certificates(name: str, seed: int) -> Iterator[Record]:
    """Of the priors that no target has a say in, whose other scores come with them."""
    return run(name, seed, ("strength 1", "isotropic"))


def run(name: str, seed: int, methods: Sequence[str] | None = None) -> Iterator[Record]:
    """All sizes of target that leave 100 examples to test on, all methods or some."""
    source, (x, y) = shifted(name, seed)
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(x.shape[1], 50),
        nn.Tanh(),
        nn.Linear(50, 50),
        nn.Tanh(),
        nn.Linear(50, 1),
    )
    network = trained(
        network, *source, steps=1000, rate=1e-2, batch=len(source[0]), decay=1e-4
    ).eval()
    sizes = [n for n in SIZES if len(x) - n >= _LEAST_TEST]
    if len(sizes) < 2:
        raise ValueError(
            f"{name}: expected a target of at least {SIZES[1] + _LEAST_TEST} examples, "
            f"found {len(x)}"
        )
    priors = priors_of(network, Gaussian(), source)
    tested = slice(max(sizes), max(sizes) + _MOST_TEST)
    test = x[tested], y[tested]
    for n in sizes:
        train = x[:n], y[:n]
        for method, prior in priors.items():
            if methods is not None and method not in methods:
                continue
            yield {
                "n": n,
                "method": method,
                **measured(
                    network,
                    Gaussian(),
                    prior,
                    train,
                    test,
                    tolerance=TOLERANCE,
                    seed=seed,
                ),
            }
        if methods is not None:
            continue
        tuned, error = fine_tuned(network, *train, seed=seed)
        yield {"n": n, "method": "fine-tuning", "nll": _nll(tuned, error, test)}


@torch.no_grad()
def _nll(network: nn.Module, noise: float, test: tuple[Tensor, Tensor]) -> float:
    """With the held-out error as noise."""
    error = float((network(test[0]) - test[1]).square().mean())
    return 0.5 * (error / noise + math.log(2 * math.pi * noise))
