"""Networks trained on a source, and what else can be made of them on a target.

Fine-tuning and elastic weight consolidation (Kirkpatrick et al., PNAS 2017) choose
their number of steps, and the latter its strength, by a held-out fifth of the target's
examples, and then train on all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

Network = TypeVar("Network", bound=nn.Module)

STRENGTHS = (0.1, 1.0, 10.0)
"""Of consolidation; at 1 an example of the source counts as one of the target."""

_EVERY = 10
"""Steps between two looks at the held-out examples."""

_LIKE_SOURCE = 1000
"""Examples of the source that stand for all in the importance of weights."""


@dataclass(frozen=True)
class Anchor:
    """Where consolidation holds weights, and how much each of them matters.

    Attributes:
        weights: (D,).
        importance: Diagonal of the Fisher information of all examples (D,).
    """

    weights: Float[Tensor, " D"]
    importance: Float[Tensor, " D"]

    def penalty(self, network: nn.Module) -> Tensor:
        """Half the square of what has moved, by importance."""
        moved = flat(network) - self.weights
        return 0.5 * (self.importance * moved.square()).sum()


def flat(network: nn.Module) -> Float[Tensor, " D"]:
    """All weights."""
    return torch.cat([p.flatten() for p in network.parameters()])


def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean square error of numbers, cross-entropy of classes."""
    f = network(x)
    if y.is_floating_point():
        return functional.mse_loss(f, y)
    return functional.cross_entropy(f, y)


def trained(
    network: Network,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    rate: float,
    batch: int,
    decay: float = 0.0,
    seed: int = 0,
) -> Network:
    """A copy trained by Adam with one cycle of the learning rate."""
    network = copy.deepcopy(network)
    optimiser = torch.optim.Adam(network.parameters(), rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for rows in _batches(len(x), batch, steps, seed):
        optimiser.zero_grad()
        loss(network, x[rows], y[rows]).backward()
        optimiser.step()
        schedule.step()
    return network


def fine_tuned(
    network: Network,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    anchor: Anchor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    most_steps: int = 400,
) -> tuple[Network, float]:
    """A copy fine-tuned to a target, and the held-out loss that chose how far.

    Args:
        network: Of the source.
        x: Inputs of the target.
        y: Its targets.
        seed: Of what is held out, and of the batches.
        anchor: Of consolidation. Default: none.
        strengths: Of consolidation, to choose from.
        most_steps: Of Adam.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, kept = order.tensor_split([max(1, len(x) // 5)])
    best = None
    for strength in strengths if anchor else (0.0,):
        *_, losses = tuned(
            network,
            x[kept],
            y[kept],
            steps=most_steps,
            seed=seed,
            anchor=anchor,
            strength=strength,
            held=(x[held], y[held]),
        )
        found = min((value, i) for i, value in enumerate(losses))
        if best is None or found < best[0]:
            best = found, strength
    assert best is not None
    (value, i), strength = best
    steps = i * _EVERY
    final, _ = tuned(
        network, x, y, steps=steps, seed=seed, anchor=anchor, strength=strength
    )
    return final, value


def tuned(
    network: Network,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    seed: int,
    anchor: Anchor | None = None,
    strength: float = 0.0,
    held: tuple[Tensor, Tensor] | None = None,
) -> tuple[Network, list[float]]:
    """A copy after some steps, and what it lost on held-out examples on its way."""
    network = copy.deepcopy(network)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for step, rows in enumerate(_batches(len(x), 32, steps, seed)):
        if held is not None and step % _EVERY == 0:
            with torch.no_grad():
                losses.append(float(loss(network, *held)))
        optimiser.zero_grad()
        total = loss(network, x[rows], y[rows])
        if anchor is not None:
            total = total + strength / len(x) * anchor.penalty(network)
        total.backward()
        optimiser.step()
    return network, losses


def _batches(n: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Rows of each step, all examples once before any twice."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, n)
    found: list[Tensor] = []
    while len(found) < steps:
        order = torch.randperm(n, generator=generator)
        found += order[: n // size * size].split(size)
    return found[:steps]


def anchor_of(network: nn.Module, x: Tensor) -> Anchor:
    """Weights of a network of classes, and their Fisher information on its inputs."""
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, weights, (x.unsqueeze(0),))[0]

    some = x[:_LIKE_SOURCE]
    total = torch.zeros_like(flat(network)).detach()
    for part in some.split(100):
        each = vmap(jacrev(outputs), (None, 0))(weights, part)
        jacobian = torch.cat([j.flatten(2) for j in each.values()], 2)
        p = network(part).detach().softmax(1).unsqueeze(2)
        centred = jacobian - (p * jacobian).sum(1, keepdim=True)
        total += (p * centred.square()).sum((0, 1))
    return Anchor(flat(network).detach(), total * (len(x) / len(some)))
