"""The sampler of path posteriors: the same functions at every t-batch."""

from __future__ import annotations

import torch
from botorch.posteriors.posterior import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from torch import Tensor

from sgdgp.botorch.posterior import PathPosterior


class PathSampler(MCSampler):
    """Gives out sample functions by number, all of them before any repeats.

    Values at a point do not depend on where in a batch it stands. Seeds start at
    different functions, where there are more of them than samples.
    """

    def __init__(self, sample_shape: torch.Size, seed: int | None = None) -> None:
        """A sampler of so many functions.

        Args:
            sample_shape: Shape of the samples.
            seed: Where to start. Default: at the first function.
        """
        # BoTorch would take a missing seed from the global generator.
        super().__init__(sample_shape=sample_shape, seed=0 if seed is None else seed)

    def forward(self, posterior: Posterior) -> Tensor:
        """Values (*sample_shape, *b, q, m)."""
        assert isinstance(posterior, PathPosterior)
        if self.base_samples is None:
            count = self.sample_shape.numel()
            total = 2 * posterior.num_paths
            start = self.seed * count % total
            numbers = torch.arange(start, start + count) % total
            self.register_buffer("base_samples", numbers.reshape(self.sample_shape))
        numbers = self.base_samples
        assert isinstance(numbers, Tensor)
        return posterior.rsample_from_base_samples(self.sample_shape, numbers)

    def _update_base_samples(
        self, posterior: Posterior, base_sampler: MCSampler
    ) -> None:
        """Nothing to do: a function is the same function at new points."""


@GetSampler.register(PathPosterior)
def _path_sampler(
    posterior: PathPosterior, sample_shape: torch.Size, *, seed: int | None = None
) -> PathSampler:
    return PathSampler(sample_shape=sample_shape, seed=seed)
