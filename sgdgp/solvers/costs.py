"""What the parts of a solve cost in seconds: the model behind every plan.

Only ratios of these numbers decide anything: whether neighbours are worth their setup,
when a factorisation is cheaper than more iterations, how large a block of new rows may
be solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgdgp.operators.base import KernelOperator
from sgdgp.operators.triton import TritonOperator


@dataclass(frozen=True)
class Costs:
    """Seconds of a kind of product, and of what competes with it.

    Attributes:
        entry: Of an entry of K in a product.
        column: What every column of the product adds to that.
        regression: Of one row on its neighbours.
        candidate: The search for neighbours, per candidate.
        factor: A Cholesky factorisation in float64, its matrix filled, per n^3.
        block_factor: One of a block in the data's dtype, per cubed row.
    """

    entry: float
    column: float
    regression: float
    candidate: float
    factor: float
    block_factor: float

    def of_entry(self, columns: int) -> float:
        """A pass with so many columns, per entry of K."""
        return self.entry + self.column * columns


# Measured on 2 cores, products in float32.
STORED = Costs(0.2e-9, 0.03e-9, 6e-5, 0.3e-9, 7e-12, 4e-12)
_STREAMED = Costs(0.6e-9, 0.03e-9, 6e-5, 0.3e-9, 7e-12, 4e-12)
# On one H100. A setup with neighbours was not timed alone: of a solve with 100,000 rows
# five seconds were no product. Factors are bounds from above.
_GPU_STORED = Costs(1.5e-12, 0.026e-12, 1e-5, 0.4e-9, 4e-14, 4e-14)
_GPU_STREAMED = Costs(21e-12, 0.06e-12, 1e-5, 0.4e-9, 4e-14, 4e-14)
_TENSOR_CORES = Costs(0.64e-12, 0.005e-12, 1e-5, 0.4e-9, 4e-14, 4e-14)


def costs_of(operator: KernelOperator) -> Costs:
    """What a solve with an operator costs."""
    if isinstance(operator, TritonOperator) and operator.is_fused:
        return _TENSOR_CORES
    streamed = operator.streaming() is operator
    if operator.device.type == "cuda":
        return _GPU_STREAMED if streamed else _GPU_STORED
    return _STREAMED if streamed else STORED
