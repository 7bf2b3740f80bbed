"""Five tasks one after another, none of whose images is kept.

A network trained on upright digits meets digits turned by 10, 20, ... 50 degrees, new
images of them in every task. "angles" has five classes throughout; in "classes" the
network knows three, the second and the fourth task bring one more, with an output of
its own. All methods are scored on test digits of the tasks so far, each among the
classes it had; ``among_all`` is the accuracy among all classes known by then.

The learned prior is ``prior.updated(posterior)`` after every task, at strength 1 and
precision 1: an example counts the same whenever it came. Fine-tuning takes as many
steps of Adam in every task. Consolidation adds up the importance of weights; of its
strengths the one is shown that is best in hindsight.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.learned_priors.digits import HEAD, digits, few, source_network, turned
from benchmarks.learned_priors.priors import SAMPLES, Record, class_record
from benchmarks.learned_priors.training import STRENGTHS, anchor_of, tuned
from benchmarks.networks.data import Images
from sgdgp.networks import Categorical, LearnedPrior, linearise

ANGLES = (10.0, 20.0, 30.0, 40.0, 50.0)
_KNOWN = {"angles": (5, 5, 5, 5, 5), "classes": (3, 4, 4, 5, 5)}
_EACH = 40
_STEPS = 300


@dataclass(frozen=True)
class Tasks:
    """In their order.

    Attributes:
        network: Trained on upright digits, with outputs for all classes.
        source: Images that it was trained on.
        known: How many classes there are in each task.
        train: Images of each.
        test: Test digits at the angle of each, of all classes.
    """

    network: nn.Sequential
    source: Images
    known: Sequence[int]
    train: Sequence[Images]
    test: Sequence[Images]

    def scores(self, predicted: Sequence[Float[Tensor, "n C"]]) -> list[Record]:
        """Of test digits of the first tasks, each among the classes that it had."""
        found = []
        for given, test, classes in zip(predicted, self.test, self.known, strict=False):
            rows = test.y < classes
            p, y = given[rows], test.y[rows]
            own = p[:, :classes] / p[:, :classes].sum(1, keepdim=True)
            among_all = float((p.argmax(1) == y).double().mean())
            found.append({**class_record(own, y), "among_all": among_all})
        return found

    def network_of(self, classes: int) -> nn.Sequential:
        """The network with outputs for the first classes only."""
        return with_outputs(self.network, classes)


def with_outputs(network: nn.Sequential, outputs: int) -> nn.Sequential:
    """A copy with some of its outputs, or with more: those are as a layer begins."""
    *body, head = copy.deepcopy(network)
    assert isinstance(head, nn.Linear)
    found = nn.Linear(head.in_features, outputs)
    with torch.no_grad():
        for new, old in zip(found.parameters(), head.parameters(), strict=True):
            both = min(outputs, head.out_features)
            new[:both] = old[:both]
    return nn.Sequential(*body, found).eval()


def run(name: str, seed: int) -> Iterator[Record]:
    """A record for each method: its scores after each task on all so far."""
    tasks = _tasks(_KNOWN[name], seed)
    yield {"method": "learned", **_learned(tasks, seed)}
    yield {"method": "fine-tuning", "after": _one_by_one(tasks, seed, 0.0)}
    found = [(s, _one_by_one(tasks, seed, s)) for s in (*STRENGTHS, 100.0)]
    strength, after = min(found, key=lambda each: sum(s["nll"] for s in each[1][-1]))
    yield {"method": "EWC", "strength": strength, "after": after}


def _tasks(known: Sequence[int], seed: int) -> Tasks:
    classes = max(known)
    first, second, held = digits(classes, seed)
    early = first.y < known[0]
    network, source = source_network(
        Images(first.x[early], first.y[early]), 0.0, 0.0, seed
    )
    network = with_outputs(network, classes)
    train = []
    for number, angle in enumerate(ANGLES):
        some = few(second, _EACH, known[number], skip=number * _EACH)
        train.append(turned(some, angle, angle, seed))
    test = [turned(held, angle, angle, seed) for angle in ANGLES]
    return Tasks(network, source, known, train, test)


def _learned(tasks: Tasks, seed: int) -> Record:
    network = tasks.network_of(tasks.known[0])
    source = TensorDataset(tasks.source.x, tasks.source.y)
    prior = LearnedPrior.from_data(network, Categorical(), source, strength=1.0)
    prior = prior.extended(grown=HEAD)
    after, sizes = [], []
    for number, (train, classes) in enumerate(
        zip(tasks.train, tasks.known, strict=True)
    ):
        posterior = linearise(tasks.network_of(classes), Categorical(), prior).fit(
            TensorDataset(train.x, train.y),
            steps=0,
            precision=1.0,
            final_samples=SAMPLES,
            progress=False,
            seed=seed,
        )
        seen = [t.x for t in tasks.test[: number + 1]]
        after.append(
            tasks.scores([posterior.samples(x).softmax(2).mean(0) for x in seen])
        )
        prior = prior.updated(posterior).extended(grown=HEAD)
        sizes.append(_bytes(prior))
    return {"after": after, "bytes": sizes}


def _one_by_one(tasks: Tasks, seed: int, strength: float) -> list[list[Record]]:
    """Fine-tuning, and with a strength consolidation."""
    known = tasks.known[0]
    network: nn.Module = tasks.network
    anchor = anchor_of(_First(network, known), tasks.source.x)
    after = []
    for number, (train, classes) in enumerate(
        zip(tasks.train, tasks.known, strict=True)
    ):
        found, _ = tuned(
            _First(network, classes),
            train.x,
            train.y,
            steps=_STEPS,
            seed=seed,
            anchor=anchor if strength else None,
            strength=strength,
        )
        network = found.network
        seen = [t.x for t in tasks.test[: number + 1]]
        after.append(tasks.scores([found(x).detach().softmax(1) for x in seen]))
        more = anchor_of(found, train.x)
        anchor = replace(more, importance=anchor.importance + more.importance)
    return after


class _First(nn.Module):
    """The first outputs of a network."""

    def __init__(self, network: nn.Module, outputs: int) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, x: Tensor) -> Float[Tensor, "b C"]:
        return self.network(x)[:, : self.outputs]


def _bytes(prior: LearnedPrior) -> int:
    """Of its file, without the hashes by which certificates know examples."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prior.safetensors"
        prior.save(path)
        return path.stat().st_size - prior.seen.nbytes
