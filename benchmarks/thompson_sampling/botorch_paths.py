"""BoTorch's own sample paths: an exact update by Cholesky, in float64.

The update solves for all samples as a batch, for which PyTorch copies the factor once
per sample: 8 s n^2 bytes, 160 GB for 200 functions of 10,000 observations.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import torch
from botorch.models import SingleTaskGP
from botorch.sampling.pathwise import MatheronPath, draw_matheron_paths
from botorch.sampling.pathwise.prior_samplers import draw_kernel_feature_paths
from jaxtyping import Float
from torch import Tensor

from benchmarks.thompson_sampling.problem import KnownGP

_ENTRIES = 2**21


def check_fits(num_samples: int, num_points: int) -> None:
    """Refuse what would not fit into the machine's memory.

    Raises:
        ValueError: The copies of the Cholesky factor are too large.
    """
    needed = 8 * num_samples * num_points**2
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * available:
        raise ValueError(
            f"methods: botorch copies its factor for each of {num_samples} functions: "
            f"{needed / 1e9:.0f} GB at {num_points:,} points, and the machine has "
            f"{available / 1e9:.0f} GB; use a smaller --initial or --batch, or exact"
        )


@dataclass(frozen=True, eq=False)
class BoTorchFunctions:
    """A path of BoTorch with one sample dimension.

    Attributes:
        path: The functions.
        num_functions: How many.
        num_points: Observations behind them.
    """

    path: MatheronPath
    num_functions: int
    num_points: int

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "s n"]:
        """All functions at all points."""
        size = max(1, _ENTRIES // self.num_points)
        with torch.no_grad():
            parts = [self.path(part.double()) for part in x.split(size)]
        return torch.cat(parts, 1).to(x)

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Every function at points of its own, differentiable in x."""
        return self.path(x.double()).to(x)


def botorch_functions(
    model: KnownGP,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    *,
    num_samples: int,
    num_features: int,
    seed: int,
) -> BoTorchFunctions:
    """Draw paths of a ``SingleTaskGP`` with the model's prior and noise."""
    wide = model.double()
    gp = SingleTaskGP(
        x.double(),
        y.double().unsqueeze(1),
        likelihood=wide.likelihood,
        covar_module=wide.covar_module,
        mean_module=wide.mean_module,
        outcome_transform=None,
    )
    gp.requires_grad_(requires_grad=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # BoTorch draws from the global generator
        path = draw_matheron_paths(
            gp,
            torch.Size([num_samples]),
            prior_sampler=partial(draw_kernel_feature_paths, num_features=num_features),
        )
    return BoTorchFunctions(path, num_samples, len(x))
