"""Other ways to be uncertain about a reconstruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgdgp.tomography import Measurement, UNet, reconstruct

DROPOUT = 0.05
"""Probability that a number is dropped, as published for these networks."""


def network(seed: int, channels: tuple[int, ...], dropout: float = 0.0) -> UNet:
    """A network with weights by a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(channels, (0, 4, 4), dropout=dropout)


@torch.no_grad()
def dropout_samples(
    data: Tensor,
    measurement: Measurement,
    channels: tuple[int, ...],
    seed: int,
    count: int = 256,
    **settings: Any,
) -> Tensor:
    """Images by a network that drops numbers, in the fit and after (count, n, n)."""
    with torch.enable_grad():
        fit = reconstruct(
            data,
            measurement,
            network(seed, channels, DROPOUT),
            seed=seed,
            progress=False,
            **settings,
        )
    fit.network.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        images = fit.network(fit.input.expand(count, *fit.input.shape[1:]))
    return images.reshape(count, *measurement.image_shape)


def ensemble(
    data: Tensor,
    measurement: Measurement,
    channels: tuple[int, ...],
    seed: int,
    count: int = 4,
    **settings: Any,
) -> Tensor:
    """Images by networks of different first weights (count, n, n)."""
    fits = [
        reconstruct(
            data,
            measurement,
            network(1000 * (seed + 1) + k, channels),
            seed=1000 * (seed + 1) + k,
            progress=False,
            **settings,
        )
        for k in range(count)
    ]
    return torch.stack([fit.image for fit in fits])
