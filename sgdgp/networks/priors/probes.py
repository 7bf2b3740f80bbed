"""Priors that are scaled by second moments of probes of the curvature.

A probe J_b^T L_b e of a batch b, e of independent random signs, has mean zero and
covariance sum_{n in b} J_n^T H_n J_n, because signs of different examples and outputs
are uncorrelated. So squares of probes, added up over the batches, estimate the diagonal
of G = sum_n J_n^T H_n J_n without per-example gradients; and for one weight matrix
M M^T and M^T M estimate the two factors of a Kronecker product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.networks.priors.base import Grouping, PriorSettings, check_grouping
from sgdgp.tangent import Tangent

PROBE_MEMORY = 2**30
"""Bytes of the probes of a batch: a GiB is what a few samples of a network take."""


@dataclass(frozen=True)
class ProbedPrior(PriorSettings):
    """Settings that priors estimated from probes have in common.

    Attributes:
        probes: Probes per batch; fewer where they would fill more than 1 GiB.
        floor: Smallest scale, relative to its parameter tensor's.
        layerwise: False: one precision. True: one for each parameter tensor; or any
            grouping of ``Layerwise``.
    """

    probes: int = 32
    floor: float = 0.1
    layerwise: bool | Grouping = False

    def __post_init__(self) -> None:
        check_count("probes", self.probes, 1)
        check_positive("floor", self.floor)
        check_grouping(self.grouping)

    @property
    def grouping(self) -> Grouping:
        """Which weights share a precision."""
        if isinstance(self.layerwise, bool):
            return "tensors" if self.layerwise else "all"
        return self.layerwise

    def affordable(self, tangent: Tangent) -> int:
        """Probes per batch that fit into memory."""
        each = tangent.num_weights * tangent.dtype.itemsize
        return max(1, min(self.probes, PROBE_MEMORY // each))


def median_of(squares: Tensor) -> float:
    """Median of the entries that are not zero; zero if all are."""
    positive = squares[squares > 0]
    return float(positive.median()) if len(positive) else 0.0


def own_levels(levels: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Levels of parameter tensors, or that of all where one is but rounding error.

    A bias that attention's softmax cancels has a Jacobian that is zero in theory and
    1e-8 in float32; scaled to unit size it would be noise.

    Raises:
        ValueError: All levels are zero.
    """
    positive = [level for level in levels if level > 0]
    if not positive:
        raise ValueError(
            "prior: all probes of the curvature are zero, so on these data the outputs "
            "do not depend on the chosen weights, or the loss is flat in the outputs; "
            "use Isotropic() or other weights"
        )
    whole = median_low(positive)
    rounding = 100 * torch.finfo(dtype).eps
    return [level if level > rounding**2 * whole else whole for level in levels]
