"""Symmetry groups and alignment: exactness, barriers, transpositions.

Networks are trained to their maximum a posteriori on the digits of scikit-learn, many
at once as rows of weights, each with minibatches in an order of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from benchmarks.checks import Check
from benchmarks.study import Record, Row
from sgdgp.networks import Draws, SymmetryGroup, align, barrier, match_weights
from sgdgp.networks.sampling import Symmetry
from sgdgp.tangent import Tangent

TRAIN, PIXELS, CLASSES = 1200, 8, 10
_BATCH, _RATE = 100, 0.01


class ResidualNetwork(nn.Module):
    """Convolutions with one skip connection, which ties the channels at its ends."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Linear(channels * (PIXELS // 2) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = functional.avg_pool2d(functional.relu(self.stem(x)), 2)
        h = functional.relu(h + self.two(functional.relu(self.one(h))))
        return self.head(h.flatten(1))


def dense(*hidden: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A network of images of digits."""
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = (PIXELS**2, *hidden, CLASSES)
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    return nn.Sequential(*layers[:-1]).eval()


@cache
def digits() -> tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]:
    """All 1,797, the same random order for all."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(
        len(found.target), generator=torch.Generator().manual_seed(0)
    )
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return x[order], torch.tensor(found.target)[order]


def initial(network: nn.Module, count: int, seed: int) -> Float[Tensor, "k D"]:
    """Weights of many networks, by the network's own initialisation."""
    torch.manual_seed(seed)
    rows = []
    for _ in range(count):
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
        rows.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    return torch.stack(rows)


def trained(
    network: nn.Module,
    rows: Float[Tensor, "k D"],
    seed: int,
    *,
    epochs: int,
    precision: float = 1.0,
) -> Float[Tensor, "k D"]:
    """Maxima a posteriori by Adam, every row with minibatches of its own."""
    x, y = (part[:TRAIN] for part in digits())
    tangent = Tangent(network)
    generator = torch.Generator().manual_seed(seed)

    def loss(row: Tensor, x: Tensor, y: Tensor) -> Tensor:
        weights = {n: w[0] for n, w in tangent.weights_of(row[None]).items()}
        fit = functional.cross_entropy(functional_call(network, weights, (x,)), y)
        return fit + 0.5 * precision / TRAIN * row.square().sum()

    gradient = vmap(grad(loss))
    rows = rows.clone().requires_grad_()
    adam = torch.optim.Adam([rows], lr=_RATE)
    steps = epochs * (TRAIN // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        first = step % (TRAIN // _BATCH) * _BATCH
        if first == 0:
            keys = torch.rand(len(rows), TRAIN, generator=generator)
            order = keys.argsort(dim=1)
        chosen = order[:, first : first + _BATCH]
        rows.grad = gradient(rows.detach(), x[chosen], y[chosen])
        adam.step()
        schedule.step()
    return rows.detach()


def losses(network: nn.Module, rows: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
    """Mean negative log-likelihood of the test images."""
    x, y = (part[TRAIN:] for part in digits())
    tangent = Tangent(network)
    logits = tangent.outputs_of(rows, x)
    return vmap(functional.cross_entropy, in_dims=(0, None))(logits, y)


BARRIERS: dict[str, tuple[nn.Module, int, float]] = {
    "1 x 32": (dense(32), 4, 1 / 4),
    "1 x 128": (dense(128), 4, 1 / 10),
    "2 x 32": (dense(32, 32), 4, 1 / 4),
    "residual CNN, 16 channels": (ResidualNetwork(16).eval(), 2, 1 / 4),
}
"""Networks, pairs of them, and the most of a barrier that matching may leave."""

WIDTH, PAIRS = 64, 10
"""Of the networks that are exchanged unit by unit."""


def group_of(network: nn.Module) -> SymmetryGroup:
    """Permutations and signs."""
    return SymmetryGroup.of(network, digits()[0][:2]).restricted(scales=False)


def measure_barriers(seed: int) -> Record:
    """Loss barriers between networks trained apart, as they are and matched."""
    found = {}
    x, _ = digits()
    for name, (network, pairs, _) in BARRIERS.items():
        rows = trained(network, initial(network, 2 * pairs, seed), seed, epochs=40)
        group, barriers = group_of(network), []
        for a, b in rows.view(pairs, 2, -1):
            draws = Draws(torch.stack([a, b])[:, None], group.names, group.shapes)
            by_weights = match_weights(b, a, group, seed).apply(b)
            by_activations = align(draws, group, a, "activations", x=x[:300])[0].flat[1]
            others = (b, by_weights, by_activations)
            barriers.append([_barrier(network, a, other) for other in others])
        found[name] = {
            "raw": [b[0] for b in barriers],
            "weights": [b[1] for b in barriers],
            "activations": [b[2] for b in barriers],
            "loss": float(losses(network, rows).mean()),
        }
    return found


def measure_exact(seed: int) -> Record:
    """A scrambled Gaussian brought back; what members of groups change; counts."""
    generator = torch.Generator().manual_seed(seed)
    network = dense(8, activation=nn.Tanh).double()
    group = SymmetryGroup.of(network)
    mean, noise = (
        torch.randn(*shape, group.num_weights, generator=generator).double()
        for shape in ((), (6, 300))
    )
    there = mean + 0.02 * noise
    moved = group.sample(seed, 1800).unflattened(6, 300).apply(there)
    draws = Draws(moved, group.names, group.shapes)
    start = perf_counter()
    match_weights(moved, mean, group)
    seconds = perf_counter() - start
    aligned, report = align(draws, group, mean)
    _, random = next(iter(group.expected_transpositions.items()))
    counts = report.symmetries.total_transpositions.double()
    cycle = [*range(1, 8), 0]
    exchange = [1, 0, *range(2, 8)]
    return {
        "mean_error": float((aligned.flat - there.flatten(0, 1)).mean(0).abs().max()),
        "variance": report.variance_after / float(there.flatten(0, 1).var(0).sum()),
        "milliseconds": 1e3 * seconds / len(draws.flat),
        "transpositions": [
            int(exchanged_by(group, order).total_transpositions)
            for order in (list(range(8)), exchange, cycle)
        ],
        "mean_transpositions": float(counts.mean()),
        "standard_error": float(counts.std()) / math.sqrt(counts.numel()),
        "expected_transpositions": random,
        "invariance": {name: _change(net.double(), seed) for name, net in _all()},
    }


def measure_transpositions(seed: int) -> Record:
    """Copies exchanged by so many transpositions, trained apart: the paper's figure."""
    network = dense(WIDTH)
    group = group_of(network)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.linspace(0, WIDTH - 1, PAIRS).long().tolist()
    start = initial(network, 1, seed)[0]
    moves = [
        exchanged_by(group, permutation(WIDTH, count, generator)) for count in counts
    ]
    copies = torch.stack([move.apply(start) for move in moves])
    begun = torch.cat([start.expand(PAIRS, -1), copies])
    ends = trained(network, begun, seed, epochs=10)
    records = []
    for i, (count, move) in enumerate(zip(counts, moves, strict=True)):
        a, b = ends[i], ends[PAIRS + i]
        found = match_weights(b, a, group, seed)
        undone = {"undone": move.inverse().apply(b), "matched": found.apply(b)}
        records.append(
            {
                "transpositions": count,
                "at_start": int(
                    match_weights(copies[i], start, group).total_transpositions
                ),
                "after": int(found.total_transpositions),
                "barrier_at_start": _barrier(network, start, copies[i]),
                "barrier": _barrier(network, a, b),
                **{f"barrier_{k}": _barrier(network, a, w) for k, w in undone.items()},
            }
        )
    return {"pairs": records}


def permutation(
    size: int, transpositions: int, generator: torch.Generator
) -> list[int]:
    """A random one with size - transpositions cycles, of random lengths."""
    order = torch.randperm(size, generator=generator).tolist()
    cuts = torch.randperm(size - 1, generator=generator)[: size - transpositions - 1]
    bounds = [0, *sorted((cuts + 1).tolist()), size]
    found = list(range(size))
    for first, last in pairwise(bounds):
        cycle = order[first:last]
        for unit, other in pairwise([*cycle, cycle[0]]):
            found[unit] = other
    return found


def exchanged_by(group: SymmetryGroup, order: Sequence[int]) -> Symmetry:
    """The permutation of the only hidden layer."""
    none = group.identity()
    return Symmetry(group, (torch.tensor(order),), none.signs, none.scales)


def _barrier(network: nn.Module, a: Tensor, b: Tensor) -> float:
    return barrier(lambda rows: losses(network, rows), a, b)


def _all() -> Iterator[tuple[str, nn.Module]]:
    yield "1 x 32 tanh", dense(32, activation=nn.Tanh)
    yield "2 x 32", dense(32, 32)
    yield "residual CNN, 16 channels", ResidualNetwork(16).eval()


def _change(network: nn.Module, seed: int) -> float:
    """Most that outputs change under random members, signs and scales included."""
    x = digits()[0][:50].double()
    group = SymmetryGroup.of(network, x)
    members = [group.sample(seed + i) for i in range(5)]
    with torch.no_grad():
        after = torch.stack([member.apply_to(network)(x) for member in members])
        return float((after - network(x)).abs().max())


def check_exact(records: Sequence[Record]) -> Iterable[Check]:
    """Rows A1 and A2."""
    for r in records:
        yield _most("A1: mean of a scrambled Gaussian, error", r["mean_error"], 1e-12)
        counts = r["transpositions"]
        yield Check(
            "A1: transpositions of none, an exchange, a cycle of 8",
            ", ".join(map(str, counts)),
            "0, 1, 7",
            counts == [0, 1, 7],
        )
        off = abs(r["mean_transpositions"] - r["expected_transpositions"])
        yield _most(
            "A1: transpositions of random permutations off n - H_n, in standard errors",
            off / r["standard_error"],
            4.0,
        )
        for name, change in r["invariance"].items():
            yield _most(f"A2: change of outputs, {name}", change, 1e-10)


def check_barriers(records: Sequence[Record]) -> Iterable[Check]:
    """Row A5, and deeper networks."""
    for name, (_, _, allowed) in BARRIERS.items():
        for how in ("weights", "activations"):
            raw, matched = (
                [b for r in records for b in r[name][key]] for key in ("raw", how)
            )
            mean_raw, mean = sum(raw) / len(raw), sum(matched) / len(matched)
            yield _most(
                f"A5: {name}, barrier {mean_raw:.3f} -> {mean:.4f} by {how}, part left",
                mean / mean_raw,
                allowed,
            )


def check_transpositions(records: Sequence[Record]) -> Iterable[Check]:
    """What training keeps, and what undoing it leaves."""
    pairs = [pair for r in records for pair in r["pairs"]]
    counts, after, barriers = (
        torch.tensor([float(pair[key]) for pair in pairs])
        for key in ("transpositions", "after", "barrier")
    )
    for what, found in (("transpositions", after), ("the barrier", barriers)):
        correlation = float(torch.corrcoef(torch.stack([counts, found]))[0, 1])
        yield Check(
            f"correlation of {what} after training with transpositions before",
            f"{correlation:.3f}",
            "at least 0.8",
            correlation >= 0.8,
        )
    for how in ("undone", "matched"):
        left = sum(pair[f"barrier_{how}"] for pair in pairs) / sum(
            pair["barrier"] for pair in pairs
        )
        yield _most(f"part of the barriers left, permutations {how}", left, 0.25)


def _most(what: str, figure: float, threshold: float) -> Check:
    return Check(what, f"{figure:.2g}", f"at most {threshold:.2g}", figure <= threshold)


ROWS = {
    "alignment-exact": Row(measure_exact, check_exact),
    "alignment-barriers": Row(measure_barriers, check_barriers, (0, 1, 2)),
    "alignment-transpositions": Row(measure_transpositions, check_transpositions),
}
"""What ``python -m benchmarks.reference_posteriors`` runs of this module."""
