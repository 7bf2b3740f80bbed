"""Few digits of a target whose range of angles is wider than the source's.

The source are 7,500 views of 2,500 digits of five classes, turned by 0 to 54 degrees;
the target other digits of the classes turned by 0 to 90, of which there are 1 to 50 a
class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.learned_priors.digits import digits, few, source_network, turned
from benchmarks.learned_priors.priors import Record, class_record, measured, priors_of
from benchmarks.learned_priors.training import anchor_of, fine_tuned
from sgdgp.networks import Categorical

CLASSES = 5
EACH = (1, 5, 10, 50)
_SOURCE = (0.0, 54.0)
_TARGET = (0.0, 90.0)


def run(name: str, seed: int) -> Iterator[Record]:
    """All numbers of images a class, all methods."""
    first, second, held = digits(CLASSES, seed)
    network, source = source_network(first, *_SOURCE, seed)
    target, test = (turned(part, *_TARGET, seed) for part in (second, held))
    priors = priors_of(network, Categorical(), (source.x, source.y))
    anchor = anchor_of(network, source.x)
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
        for method, held_at in (("fine-tuning", None), ("EWC", anchor)):
            tuned, _ = fine_tuned(network, *train, seed=seed, anchor=held_at)
            with torch.no_grad():
                p = tuned(test.x).softmax(1)
            yield {"n": each, "method": method, **class_record(p, test.y)}
