"""A prior of smooth filters: weights of a convolution that lie beside each other agree.

In the kernel of each pair of channels the weights at the positions p and q have the
covariance exp(-|p - q| / length) / alpha, the Matern-1/2 kernel (Antoran et al.,
"Uncertainty estimation for computed tomography with a linearised deep image prior",
2022, eq. 14), alpha a group's precision. All other weights are independent. The paper
learns a length for each group by gradients; here one length for all is chosen from
several by the evidence, with the precisions of each learned beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from sgdgp.core.checks import check_positive
from sgdgp.networks.priors.base import (
    Grouping,
    PriorSettings,
    Probes,
    check_grouping,
    grouped,
)
from sgdgp.networks.priors.blocks import MatrixRoot
from sgdgp.networks.priors.kronecker import KroneckerPrior
from sgdgp.tangent import Tangent


@dataclass(frozen=True)
class Filters(PriorSettings):
    """N(0, K / alpha) in each kernel of a convolution, K_pq = exp(-|p - q| / length).

    Attributes:
        length: Of the correlation, in pixels of the kernel; several to choose from by
            the evidence, in which the last is preferred among equals.
        groups: Which tensors share a precision, see ``Layerwise``.
    """

    length: float | Sequence[float] = (3.0, 1.0, 0.3)
    groups: Grouping = "tensors"

    def __post_init__(self) -> None:
        check_grouping(self.groups)
        if not self._lengths:
            raise ValueError("length: expected at least one length, found none")
        for length in self._lengths:
            check_positive("length", length)

    @property
    def _lengths(self) -> tuple[float, ...]:
        if isinstance(self.length, Sequence):
            return tuple(self.length)
        return (self.length,)

    def candidates(self) -> Sequence[Filters]:
        """One for each length."""
        return [replace(self, length=length) for length in self._lengths]

    def build(self, tangent: Tangent, probes: Probes) -> KroneckerPrior:
        """R = I (x) K^1/2 in every convolution.

        Raises:
            ValueError: There are several lengths left to choose from.
        """
        if len(self._lengths) > 1:
            raise ValueError(f"length: expected one, found {self.length}")
        like = tangent.theta
        blocks = []
        for name, shape in zip(tangent.names, tangent.shapes, strict=True):
            scales, sizes = like.new_ones(shape.numel()), shape[2:]
            owner = tangent.network.get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, _ConvNd) or sizes.numel() == 1 or len(shape) < 3:
                blocks.append(MatrixRoot.independent(scales))
                continue
            root = _filter_root(sizes, self._lengths[0]).to(like)
            blocks.append(MatrixRoot(scales[: shape[0] * shape[1]], root))
        return KroneckerPrior(*grouped(tangent, self.groups), blocks=blocks)


def _filter_root(sizes: torch.Size, length: float) -> Float[Tensor, "p p"]:
    """The Cholesky factor of exp(-|p - q| / length) over a kernel's positions."""
    axes = [torch.arange(n, dtype=torch.float64, device="cpu") for n in sizes]
    positions = torch.cartesian_prod(*axes).reshape(-1, len(sizes))
    covariance = (-torch.cdist(positions, positions) / length).exp()
    root, info = torch.linalg.cholesky_ex(covariance)
    if int(info):
        raise ValueError(
            f"length: expected one that leaves weights of a kernel distinct, found "
            f"{length:g}"
        )
    return root
