"""What the parts of a solve cost in seconds: the model behind every plan.

Only ratios of these numbers decide anything: whether neighbours are worth their setup,
when a factorisation is cheaper than more iterations, how large a block of new rows may
be solved at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CostModel:
    """Seconds of the parts of a solve on one kind of device.

    Attributes:
        entry_in_memory: A pass over a stored K, per entry.
        entry_streamed: A pass that evaluates K, per entry.
        entry_and_column: What every column of a product adds to an entry.
        regression: Of one row on its neighbours.
        candidate: The search for neighbours, per candidate.
        factor: A Cholesky factorisation in float64, its matrix filled, per n^3.
        block_factor: A factorisation of a block in the data's dtype, per cubed row.
    """

    entry_in_memory: float
    entry_streamed: float
    entry_and_column: float
    regression: float
    candidate: float
    factor: float
    block_factor: float

    def entry(self, columns: int, *, streamed: bool = False) -> float:
        """A pass with so many columns, per entry of K."""
        first = self.entry_streamed if streamed else self.entry_in_memory
        return first + self.entry_and_column * columns


CPU = CostModel(
    entry_in_memory=0.2e-9,
    entry_streamed=0.6e-9,
    entry_and_column=0.03e-9,
    regression=6e-5,
    candidate=0.3e-9,
    factor=7e-12,
    block_factor=4e-12,
)
"""Measured on 2 cores, products in float32: the first six for the plan of "auto", the
last for corrections on a subset of rows."""


def costs_on(device: torch.device) -> CostModel:
    """The costs on a device; those of the CPU for all, as no other was measured."""
    return CPU
