"""Training of the study's networks, the same for all methods."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.data import NUM_CLASSES, Images, Task
from benchmarks.networks.network import build_network
from benchmarks.networks.settings import Recipe

MEMBERS = 3
_MEMBER_SEED = 1000


def trained(task: Task, member: int = 0) -> nn.Module:
    """A network of the task's setting, trained, in eval mode.

    Args:
        task: The training images.
        member: Which of the ensemble's; 0 is the one that all other methods share.

    Returns:
        The same network for the same task and member.
    """
    seed = _MEMBER_SEED * (member + 1) + task.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(task.setting, task.train.x.shape[1:], NUM_CLASSES)
    generator = torch.Generator().manual_seed(seed)
    return train(network, task.train, task.setting.recipe, generator)


def train(
    network: nn.Module, images: Images, recipe: Recipe, generator: torch.Generator
) -> nn.Module:
    """Train a network on images.

    Returns:
        The network itself, in eval mode.
    """
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=recipe.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
    batch = min(recipe.batch, len(images))
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.epochs * steps
    )
    network.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps * batch].split(batch):
            optimiser.zero_grad()
            x = images.x[rows]
            if recipe.shift:
                x = moved(x, recipe.shift, generator)
            loss = functional.cross_entropy(network(x), images.y[rows])
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval().requires_grad_(True)


def moved(
    x: Float[Tensor, "b c h w"], most: int, generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Images mirrored at random, and moved together by up to ``most`` pixels."""
    mirror = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    shifts = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    return torch.where(mirror, x.flip(3), x).roll(shifts, (2, 3))


@torch.no_grad()
def outputs(
    network: nn.Module, x: Float[Tensor, "n c h w"], batch: int = 200
) -> Float[Tensor, "n o"]:
    """The network's outputs, in batches."""
    return torch.cat([network(part) for part in x.split(batch)])
