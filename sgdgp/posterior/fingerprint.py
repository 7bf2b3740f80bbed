"""What makes two conditioning problems the same one.

Two halves. The *components* are hashes of everything that is given: data, parameters,
structure of the model, seed and sizes; they are known before any work and must agree
bit by bit. The *probe* holds a few numbers of the system that follows from them. It is
compared within a tolerance, so that another device or thread count is no other
problem, while code that changed (a kernel's forward, a library's random stream) is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.hashes import digest, structure_of
from sgdgp.operators.base import KernelOperator

_POINTS = 16
_WORDS = {
    "x": "the training inputs x",
    "y": "the training targets y",
    "seed": "the seed, or the state of the generator that was passed",
}
_PROBED = {
    "kernel": (1e-3, "values of the kernel"),
    "noise": (1e-5, "noise variances"),
    "rhs": (
        1e-3,
        "targets and prior draws made from the same seed (they also change with the "
        "versions of sgdgp and torch)",
    ),
}
"""Relative tolerances and words."""


def components(
    model: torch.nn.Module,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    generator: torch.Generator,
    *,
    num_samples: int,
    num_features: int,
) -> dict[str, str]:
    """Hashes of what a problem is made of, by name.

    Args:
        model: The model whose prior and noise are conditioned.
        x: Training inputs (n, d).
        y: Training targets (n,).
        generator: Source of the prior draws, before the first of them.
        num_samples: Posterior sample functions.
        num_features: Random features of each group of draws.
    """
    found = {
        "x": digest(x),
        "y": digest(y),
        "dtype": str(x.dtype),
        "num_samples": str(num_samples),
        "num_features": str(num_features),
        "seed": digest(generator.get_state()),
    }
    for name, value in model.state_dict().items():
        found[f"parameter {name}"] = digest(value)
    return {**found, **structure_of(model)}


def probe(
    operator: KernelOperator, noise: Float[Tensor, " n"], rhs: Float[Tensor, "n k"]
) -> dict[str, Tensor]:
    """A few kernel values, the noise and two numbers of each right-hand side.

    Args:
        operator: K (n, n).
        noise: Noise variances (n,).
        rhs: Targets and prior draws (n, k).
    """
    n = rhs.shape[0]
    points = torch.linspace(0, n - 1, min(n, _POINTS), device=rhs.device).long()
    wave = torch.arange(n, dtype=torch.float64, device=rhs.device).cos()
    # Column by column: all of them in float64 would double the memory.
    sketch = [
        torch.stack([column.norm(), wave @ column])
        for column in (rhs[:, i].double() for i in range(rhs.shape[1]))
    ]
    return {
        "kernel": operator.streaming().block(points, points).detach().double().cpu(),
        "noise": noise.detach().cpu(),
        "rhs": torch.stack(sketch, dim=1).cpu(),
    }


def differing_components(
    stored: Mapping[str, str], here: Mapping[str, str]
) -> list[str]:
    """Names of the components that are not the same, in words."""
    names = [*here, *(name for name in stored if name not in here)]
    return [
        _WORDS.get(name, name) for name in names if stored.get(name) != here.get(name)
    ]


def differing_probes(
    stored: Mapping[str, Tensor], here: Mapping[str, Tensor]
) -> list[str]:
    """Names of the probed quantities that are not the same, in words."""
    return [
        words
        for name, (tolerance, words) in _PROBED.items()
        if not _is_close(stored.get(name), here[name], tolerance)
    ]


def _is_close(stored: Tensor | None, here: Tensor, tolerance: float) -> bool:
    if stored is None or stored.shape != here.shape:
        return False
    # Relative to the largest of a column: an off-diagonal entry, or the product of the
    # wave with a column, may be near zero by accident. Noise is compared one by one.
    size = here.abs().amax(dim=0) if here.ndim == 2 else here.abs()
    return bool(((stored - here).abs() <= tolerance * size).all())
