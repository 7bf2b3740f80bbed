"""Few images of a target, 1 to 50 a class.

The source are 7,500 views of 2,500 digits of five classes, turned by 0 to 54 degrees.
In "angles" the target are other digits of these classes turned by 0 to 90. In "classes"
it is the other five, in "fashion" five classes of clothes, both upright and with a new
head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.learned_priors.digits import (
    HEAD,
    digits,
    few,
    others,
    source_network,
    turned,
    with_new_head,
)
from benchmarks.learned_priors.priors import Record, class_record, measured, priors_of
from benchmarks.learned_priors.training import anchor_of, fine_tuned
from sgdgp.networks import Categorical, LearnedPrior

CLASSES = 5
EACH = (1, 5, 10, 50)
_SOURCE = (0.0, 54.0)
_TARGET = (0.0, 90.0)
_UPRIGHT = (0.0, 0.0)


def run(name: str, seed: int) -> Iterator[Record]:
    """All numbers of images a class, all methods."""
    first, *parts = digits(CLASSES, seed)
    network, source = source_network(first, *_SOURCE, seed)
    priors = priors_of(network, Categorical(), (source.x, source.y))
    rivals = {"fine-tuning": None, "EWC": anchor_of(network, source.x)}
    if name != "angles":
        parts = list(others(name, CLASSES, seed))
        network = with_new_head(network, CLASSES, seed)
        priors = {
            method: prior.extended(new=HEAD)
            if isinstance(prior, LearnedPrior)
            else prior
            for method, prior in priors.items()
        }
        # What mattered to the source's head is no news to another.
        del rivals["EWC"]
    angles = _TARGET if name == "angles" else _UPRIGHT
    target, test = (turned(part, *angles, seed) for part in parts)
    for each in EACH:
        some = few(target, each, CLASSES)
        train = some.x, some.y
        for method, prior in priors.items():
            found = measured(
                network,
                Categorical(),
                prior,
                train,
                (test.x, test.y),
                tolerance=None,
                seed=seed,
            )
            yield {"n": each, "method": method, **found}
        for method, held_at in rivals.items():
            tuned, _ = fine_tuned(network, *train, seed=seed, anchor=held_at)
            with torch.no_grad():
                p = tuned(test.x).softmax(1)
            yield {"n": each, "method": method, **class_record(p, test.y)}
