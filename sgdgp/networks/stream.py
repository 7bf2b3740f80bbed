"""A data set that is passed over many times: the same examples, numbered, every time.

Noise is drawn per example and targets are looked up per example, so every pass has to
meet the same examples in the same order. A shuffling DataLoader over an indexed data
set is rebuilt in order; anything else that can be iterated again is taken as it comes,
and its first batch is compared from pass to pass.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from sgdgp.core.checks import check_finite
from sgdgp.core.processes import Processes, current_processes
from sgdgp.core.seeds import derived_generator
from sgdgp.core.slices import slices
from sgdgp.tangent.network import arguments

DEFAULT_BATCH = 128
"""Examples per batch of a data set that comes without a loader: many enough to fill a
device with images, few enough for the activations of a large network."""

KEPT_BYTES = 2**30
"""A data set of up to so many bytes is read once and kept: a GiB is little beside the
samples of a network, and decoding images takes longer than most passes over them."""

Split: TypeAlias = Callable[[Any], tuple[Any, Tensor]]
"""From what the loader yields to (inputs, targets)."""


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

    def parts(self, most: int) -> Iterator[Batch]:
        """At most so many examples at a time; all where inputs do not divide."""
        count = len(self.rows)
        if any(leaf.ndim == 0 or len(leaf) != count for leaf in _leaves_of(self.x)):
            most = count
        for some in slices(count, most):
            x = tree_map_only(Tensor, operator.itemgetter(some), self.x)
            yield Batch(self.rows[some], self.examples[some], x, self.y[some])


class Stream(ABC):
    """Numbered batches of (inputs, targets), those of this process only.

    Attributes:
        num_examples: Examples in the whole data set.
        num_rows: Examples of this process.
        num_batches: Batches of this process in a pass.
        processes: Who shares the data.
        device: Where batches are.
    """

    num_examples: int
    num_rows: int
    num_batches: int

    def __init__(
        self, source: Any, device: torch.device, split: Split, processes: Processes
    ) -> None:
        self.processes = processes
        self._source = source
        self.device = device
        self._split = split
        self._sums: dict[int, tuple[float, ...]] = {}
        self._kept: list[Batch] = []
        self._count()

    @abstractmethod
    def _count(self) -> None:
        """Find the examples, and how many there are."""

    @property
    def mark(self) -> float:
        """A number that other data would not have; known after the first pass."""
        return float(sum(sum(sums) for sums in self._sums.values()))

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """One pass, in the order of the data."""

    def forget(self) -> None:
        """Keep no batches in memory; the next pass reads them again."""
        self._kept = []

    def shuffled(self, generator: torch.Generator) -> Iterator[Batch]:
        """One pass in random order; streams without an index keep theirs."""
        return iter(self)

    def take(self, rows: Tensor) -> Batch:
        """The examples of this process at ``rows`` (b,).

        Raises:
            TypeError: The data set cannot be indexed.
        """
        raise TypeError(
            "loader: the dual solver reads examples by their index; give a DataLoader "
            "over a data set with an index"
        )

    def _inputs_and_targets(self, loaded: Any) -> tuple[Any, Tensor]:
        return tree_map_only(
            Tensor,
            lambda tensor: tensor.to(self.device, non_blocking=True),
            arguments(self._split(loaded)),
        )

    def _check(self, batch: Batch) -> None:
        """Refuse a batch that has NaN, or differs from that of an earlier pass."""
        # Masks of attention have minus infinity.
        leaves = [
            leaf.nan_to_num(math.nan, math.inf, 0.0)
            if leaf.dtype.is_floating_point
            else leaf
            for leaf in _leaves_of(batch.x)
        ] + _leaves_of(batch.y)
        sums = tuple(float(leaf.double().sum()) for leaf in leaves)
        first = int(batch.rows[0])
        if first not in self._sums:
            for leaf in leaves:
                check_finite("loader", leaf)
            self._sums[first] = sums
        elif self._sums[first] != sums:
            raise ValueError(
                f"loader: the batch from example {int(batch.examples[0])} on differs "
                "from that of an earlier pass; switch shuffling and random "
                "augmentation off"
            )


def stream_of(
    source: Any,
    device: torch.device,
    split: Split | None = None,
    processes: Processes | None = None,
) -> Stream:
    """The stream behind whatever a user trains with.

    Args:
        source: A ``DataLoader``, an indexed ``Dataset``, or a collection of batches.
        device: Where batches are moved.
        split: From a batch to (inputs, targets). Default: the batch is that pair.
        processes: Who shares the data. Default: the group that torchrun started.

    Raises:
        TypeError: ``source`` cannot be iterated twice.
        ValueError: It is empty, or draws examples with replacement.
    """
    split = split or _pair
    processes = current_processes() if processes is None else processes
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        source = DataLoader(source, batch_size=DEFAULT_BATCH)
    if isinstance(source, DataLoader) and not isinstance(
        source.dataset, IterableDataset
    ):
        return IndexedStream(source, device, split, processes)
    if not isinstance(source, Iterable) or isinstance(source, Tensor):
        raise TypeError(
            "loader: expected a DataLoader, a Dataset or a collection of (inputs, "
            f"targets) batches, found {type(source).__name__}"
        )
    if isinstance(source, Iterator):
        raise TypeError(
            f"loader: found {type(source).__name__}, which can be iterated only once; "
            "give a DataLoader or a list of batches"
        )
    return RepeatedStream(source, device, split, processes)


class IndexedStream(Stream):
    """The examples of a map-style data set, read by their index.

    Each process takes a contiguous share of the batches. Data set, batch size, collate
    function and workers are those of a loader.
    """

    def _count(self) -> None:
        loader = self._source
        if loader.batch_sampler is None:
            raise ValueError(
                "loader: expected batches, found a DataLoader with batch_size=None"
            )
        examples = _examples_of(loader)
        if len(examples) == 0:
            raise ValueError("loader: the data set is empty")
        self._batch = loader.batch_size or DEFAULT_BATCH
        self.num_examples = len(examples)
        # Whole batches, so that they are the same however many processes there are.
        count, size = -(-len(examples) // self._batch), self.processes.size
        if count < size:
            raise ValueError(
                f"loader: expected a batch for each of {size} processes, found "
                f"{count}; use smaller batches or fewer processes"
            )
        share = self.processes.share(count)
        start = share.start * self._batch
        stop = min(len(examples), share.stop * self._batch)
        self._first = start
        self._examples = list(examples[start:stop])
        self.num_rows = len(self._examples)
        self.num_batches = len(share)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept:
            yield from self._kept
            return
        kept: list[Batch] | None = []
        for batch in self._in_order(torch.arange(self.num_rows, device="cpu")):
            self._check(batch)
            if kept is not None:
                kept.append(batch)
            size = sum(
                leaf.numel() * leaf.itemsize for leaf in _leaves_of((batch.x, batch.y))
            )
            if size * self.num_batches > KEPT_BYTES:
                kept = None
            yield batch
        self._kept = kept or []

    def shuffled(self, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(
            self.num_rows, generator=generator, device=generator.device
        )
        yield from self._in_order(order.cpu())

    def take(self, rows: Tensor) -> Batch:
        collate = self._source.collate_fn or default_collate
        data = self._source.dataset
        found = collate([data[self._examples[int(row)]] for row in rows])
        return self._batch_of(found, rows)

    def _in_order(self, rows: Tensor) -> Iterator[Batch]:
        source = self._source
        loader: DataLoader[Any] = DataLoader(
            source.dataset,
            batch_size=self._batch,
            sampler=[self._examples[row] for row in rows.tolist()],
            num_workers=source.num_workers,
            collate_fn=source.collate_fn,
            pin_memory=source.pin_memory,
            worker_init_fn=source.worker_init_fn,
        )
        for found, part in zip(loader, rows.split(self._batch), strict=True):
            yield self._batch_of(found, part)

    def _batch_of(self, found: Any, rows: Tensor) -> Batch:
        x, y = self._inputs_and_targets(found)
        if len(y) != len(rows):
            raise ValueError(
                f"loader: a batch of {len(rows)} examples has {len(y)} targets"
            )
        rows = rows.to(self.device)
        return Batch(rows, rows + self._first, x, y)


class RepeatedStream(Stream):
    """Batches in the order of their source, the same in every pass.

    The source can be iterated again and again; processes take turns.
    """

    def _count(self) -> None:
        self._counted = False
        self.num_examples = self.num_rows = self.num_batches = 0
        for batch in self:
            self.num_rows += len(batch.y)
            self.num_batches += 1
        if self.num_examples == 0:
            raise ValueError("loader: it yields no examples")
        self._counted = True

    def __iter__(self) -> Iterator[Batch]:
        seen = mine = 0
        for turn, found in enumerate(self._source):
            x, y = self._inputs_and_targets(found)
            first, seen = seen, seen + len(y)
            if turn % self.processes.size != self.processes.rank:
                continue
            numbers = torch.arange(len(y), device=self.device)
            batch = Batch(mine + numbers, first + numbers, x, y)
            self._check(batch)
            mine += len(y)
            yield batch
        if not self._counted:
            self.num_examples = seen
        elif seen != self.num_examples:
            raise ValueError(
                f"loader: it gave {self.num_examples} examples at first and {seen} "
                "now; every pass must give the same"
            )


def _examples_of(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices that a loader reads in an epoch, in the order of the data."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    length = len(loader.dataset)  # type: ignore[arg-type]
    # The processes share the examples themselves.
    if isinstance(sampler, SequentialSampler | DistributedSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == length
    ):
        return range(length)
    if sampler is None:
        found = [int(index) for batch in loader.batch_sampler or () for index in batch]
    else:
        found = [int(index) for index in sampler]
    if len(set(found)) != len(found):
        raise ValueError(
            f"loader: its {type(sampler or loader.batch_sampler).__name__} draws "
            "examples more than once; the posterior counts each example once"
        )
    return sorted(found)


def example_hashes(stream: Stream) -> Tensor:
    """A number of 64 bits for the inputs of each example (n,), sorted; one pass.

    The same inputs have the same number, whatever the sign of a zero and the order of a
    dictionary; others have another but for one chance in 10^17. Dtypes of floating
    point matter only as far as they round: values are compared in float32, so float64
    and float32 agree, and a copy in float16 only where it has the same values. What a
    batch has once for all its examples does not count. In a group of processes all call
    this.
    """
    found = torch.zeros(stream.num_examples, dtype=torch.int64, device=stream.device)
    for batch in stream:
        leaves = _leaves_of(_in_order_of_keys(batch.x))
        for i, leaf in enumerate(leaves):
            if leaf.ndim == 0 or len(leaf) != len(batch.y):
                continue
            rows = leaf.reshape(len(batch.y), -1)
            floats = rows.is_floating_point()
            bits = ((rows.float() + 0.0).view(torch.int32) if floats else rows).long()
            # Whole numbers end in zeros, which would be digits less of every product.
            bits = bits ^ (bits >> 16)
            generator = derived_generator(0, "hashes of examples", i)
            odd = torch.randint(
                -(2**62), 2**62, (rows.shape[1],), generator=generator, device="cpu"
            )
            words = (2 * odd + 1).to(rows.device)
            found[batch.examples] += (bits * words).sum(1)
    stream.processes.sum_(found)
    return found.sort().values


def _in_order_of_keys(value: Any) -> Any:
    """Inputs whose dictionaries are sorted."""
    if isinstance(value, Mapping):
        return [_in_order_of_keys(value[key]) for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_in_order_of_keys(part) for part in value]
    return value


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if (
        isinstance(batch, list | tuple)
        and len(batch) == 2
        and isinstance(batch[1], Tensor)
    ):
        return batch[0], batch[1]
    kind = type(batch).__name__
    if isinstance(batch, list | tuple):
        kind = f"{kind} of {', '.join(type(part).__name__ for part in batch)}"
    raise TypeError(
        f"loader: expected batches (inputs, targets), found {kind}; give split=, a "
        "function from a batch to that pair"
    )


def _leaves_of(value: Any) -> list[Tensor]:
    """The tensors of inputs or targets."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
