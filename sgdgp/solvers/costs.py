"""What the parts of a solve cost in seconds: the model behind every plan.

Only ratios of these numbers decide anything: whether neighbours are worth their setup,
when a factorisation is cheaper than more iterations, how large a block of new rows may
be solved at once. They were measured on 2 cores, products in float32: ``BLOCK_FACTOR``
for corrections on a subset of rows, the others for the plan of "auto".
"""

from __future__ import annotations

_IN_MEMORY, _STREAMED = 0.2e-9, 0.6e-9  # a pass over a stored K, or one evaluated anew
_COLUMN = 0.03e-9  # what every column of a product adds to an entry
REGRESSION = 6e-5  # of one row on its neighbours
CANDIDATE = 0.3e-9  # the search for neighbours, per candidate
FACTOR = 7e-12  # a Cholesky factorisation in float64, its matrix filled, per n^3
BLOCK_FACTOR = 4e-12  # one of a block in the data's dtype, per cubed row


def entry_cost(columns: int, *, streamed: bool = False) -> float:
    """A pass with so many columns, per entry of K."""
    return (_STREAMED if streamed else _IN_MEMORY) + _COLUMN * columns
