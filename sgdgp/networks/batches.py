"""Batches of numbered examples, and whether they stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgdgp.core.checks import check_finite


@dataclass(frozen=True)
class Batch:
    """Some examples.

    Attributes:
        rows: Their places among the examples of this process (b,).
        examples: Their numbers in the whole data set (b,).
        x: Inputs, as the network takes them.
        y: Targets, (b,) or (b, ...).
    """

    rows: Tensor
    examples: Tensor
    x: Any
    y: Tensor


class Marks:
    """Notices data that change from pass to pass, and data that are no numbers."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, ...]] = {}

    @property
    def total(self) -> float:
        """One number for all that was seen."""
        return float(sum(sum(marks) for marks in self._seen.values()))

    def check(self, batch: Batch) -> None:
        """Refuse a batch that has NaN, or differs from that of an earlier pass."""
        leaves = list(leaves_of((batch.x, batch.y)))
        marks = tuple(float(leaf.double().sum()) for leaf in leaves)
        first = int(batch.rows[0])
        if first not in self._seen:
            for leaf in leaves:
                check_finite("loader", leaf)
            self._seen[first] = marks
        elif self._seen[first] != marks:
            raise ValueError(
                f"loader: the batch from example {int(batch.examples[0])} on differs "
                "from that of an earlier pass; switch shuffling and random "
                "augmentation off"
            )


def size_of(batch: Batch) -> int:
    """Bytes of a batch."""
    return sum(leaf.numel() * leaf.itemsize for leaf in leaves_of((batch.x, batch.y)))


def moved_to(value: Any, device: torch.device) -> Any:
    """Tensors, and tuples, lists and mappings of them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        moved = {key: moved_to(part, device) for key, part in value.items()}
        return moved if type(value) is dict else type(value)(moved)  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        return type(value)(moved_to(part, device) for part in value)
    return value


def leaves_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a structure of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from leaves_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves_of(part)
