"""Streams: every example once, numbered alike in every pass, whatever the source."""

from __future__ import annotations

from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sgdgp.core.processes import Processes
from sgdgp.networks.stream import stream_of

N = 23
CPU = torch.device("cpu")
X = torch.arange(2.0 * N).reshape(N, 2)
Y = torch.arange(N)
DATA = TensorDataset(X, Y)


class Streamed(IterableDataset):
    """Examples one after another, without an index."""

    def __iter__(self):
        yield from zip(X, Y, strict=True)


def batches(size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


SOURCES = {
    "in order": DataLoader(DATA, batch_size=5),
    "shuffled, last batch dropped": DataLoader(
        DATA, batch_size=5, shuffle=True, drop_last=True
    ),
    "batch sampler": DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, drop_last=True)
    ),
    "a subset of all, at random": DataLoader(
        DATA, batch_size=5, sampler=SubsetRandomSampler(range(N))
    ),
    "one process's part, as DDP has it": DataLoader(
        DATA, batch_size=5, sampler=DistributedSampler(DATA, num_replicas=2, rank=1)
    ),
    "batches of an own kind": DataLoader(
        DATA, batch_sampler=[*torch.arange(N).split(5)]
    ),
    "data set": DATA,
    "subset": Subset(DATA, range(N)),
    "iterable data set": DataLoader(Streamed(), batch_size=5),
    "list of batches": batches(),
    "uneven batches": [(X[:2], Y[:2]), (X[2:19], Y[2:19]), (X[19:], Y[19:])],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_pass_meets_every_example_once_under_its_number(source):
    stream = stream_of(source, CPU)
    assert stream.num_examples == stream.num_rows == N
    for _ in range(3):
        found = list(stream)
        assert len(found) == stream.num_batches
        assert torch.equal(torch.cat([b.examples for b in found]), torch.arange(N))
        assert torch.equal(torch.cat([b.rows for b in found]), torch.arange(N))
        assert torch.equal(torch.cat([b.y for b in found]), Y)
        assert torch.equal(torch.cat([b.x for b in found]), X)


@pytest.mark.parametrize("source", ["in order", "list of batches"])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_examples_without_overlap(source: str, size: int):
    seen = []
    for rank in range(size):
        stream = stream_of(SOURCES[source], CPU, processes=Processes(rank, size))
        found = list(stream)
        assert stream.num_examples == N
        assert stream.num_rows == sum(len(b.y) for b in found)
        rows = torch.cat([b.rows for b in found])
        assert torch.equal(rows, torch.arange(stream.num_rows))
        for batch in found:
            assert torch.equal(batch.y, Y[batch.examples])
        seen += [b.examples for b in found]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(N))


@pytest.mark.parametrize("rank", range(3))
def test_fewer_batches_than_processes_are_refused_by_all(rank):
    loader = DataLoader(DATA, batch_size=-(-N // 2))
    with pytest.raises(ValueError, match="each of 3 processes, found 2"):
        stream_of(loader, CPU, processes=Processes(rank, 3))


def test_shuffled_passes_differ_and_keep_the_numbers():
    stream = stream_of(SOURCES["in order"], CPU)
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(2):
        found = list(stream.shuffled(generator))
        for batch in found:
            assert torch.equal(batch.y, Y[batch.examples])
            assert torch.equal(batch.x, X[batch.rows])
        orders.append(torch.cat([b.rows for b in found]))
        assert torch.equal(orders[-1].sort().values, torch.arange(N))
    assert not torch.equal(*orders)


def test_examples_can_be_taken_by_their_row():
    rows = torch.tensor([17, 3, 11])
    batch = stream_of(SOURCES["in order"], CPU).take(rows)
    assert torch.equal(batch.y, Y[rows])
    assert torch.equal(batch.x, X[rows])


def test_a_sampled_subset_is_all_there_is():
    chosen = [20, 4, 9]
    loader = DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler(chosen))
    found = list(stream_of(loader, CPU))
    assert torch.cat([b.y for b in found]).tolist() == [4, 9, 20]
    assert torch.cat([b.examples for b in found]).tolist() == [0, 1, 2]


def test_batches_of_an_own_kind_may_leave_examples_out():
    loader = DataLoader(DATA, batch_sampler=[[20, 4], [9]])
    found = list(stream_of(loader, CPU))
    assert torch.cat([b.y for b in found]).tolist() == [4, 9, 20]


def test_a_split_takes_batches_apart_and_dicts_go_through():
    source = [{"pixels": x, "label": y} for x, y in batches()]
    stream = stream_of(source, CPU, lambda b: ({"pixels": b["pixels"]}, b["label"]))
    found = list(stream)
    assert torch.equal(torch.cat([b.x["pixels"] for b in found]), X)
    assert torch.equal(torch.cat([b.y for b in found]), Y)


class Tokens(NamedTuple):
    """Inputs by name, as some tokenizers give them."""

    words: Tensor
    mask: Tensor


@pytest.mark.parametrize(
    "kind", [lambda words, mask: UserDict(words=words, mask=mask), Tokens]
)
def test_inputs_may_be_mappings_and_named_tuples_with_masks(kind):
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    words, y = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])
    stream = stream_of([(kind(words, mask), y)], CPU)
    for _ in range(2):
        (found,) = stream
        x = found.x._asdict() if isinstance(found.x, Tokens) else found.x
        assert torch.equal(x["words"], words)
        assert torch.equal(x["mask"], mask)
    with pytest.raises(ValueError, match="finite"):
        stream_of([(kind(words, mask.abs()), y)], CPU)


def test_a_pass_that_is_broken_off_does_not_shorten_the_next():
    stream = stream_of(SOURCES["in order"], CPU)
    for _ in stream:
        break
    assert sum(len(b.y) for b in stream) == N
    assert sum(len(b.y) for b in stream) == N


class Augmented(Dataset):
    """The same labels, other inputs in every pass, from some example on."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int):
        moved = torch.rand((), generator=self.generator) if i >= self.start else 0.0
        return X[i] + moved, int(Y[i])


@pytest.mark.parametrize("start", [0, 20])
def test_random_augmentation_is_noticed_wherever_data_are_read_twice(
    monkeypatch, start: int
):
    monkeypatch.setattr("sgdgp.networks.stream.KEPT_BYTES", 0)
    stream = stream_of(DataLoader(Augmented(start), batch_size=5), CPU)
    list(stream)
    with pytest.raises(ValueError, match=f"batch from example {start} on differs"):
        list(stream)


def test_small_data_are_read_once_so_that_all_passes_agree():
    stream = stream_of(DataLoader(Augmented(0), batch_size=5), CPU)
    first, second = (torch.cat([b.x for b in stream]) for _ in range(2))
    assert torch.equal(first, second)


class Shrinking:
    """Batches of which there is one less each time."""

    def __init__(self) -> None:
        self.left = 5

    def __iter__(self):
        self.left -= 1
        yield from batches()[: self.left]


def test_sources_that_change_their_length_are_refused():
    stream = stream_of(Shrinking(), CPU)
    with pytest.raises(ValueError, match="gave 20 examples at first and 15 now"):
        list(stream)


def with_nan() -> list[tuple[Tensor, Tensor]]:
    found = batches()
    x = found[1][0].clone()
    x[2, 0] = torch.nan
    return [found[0], (x, found[1][1])]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (iter(batches()), TypeError, "iterated only once"),
        ((b for b in batches()), TypeError, "found generator"),
        (X, TypeError, "found Tensor"),
        (3, TypeError, "found int"),
        ((X, Y), TypeError, "found Tensor; give split="),
        ([(X.numpy(), Y.numpy())], TypeError, "tuple of ndarray, ndarray"),
        ([(X, Y, Y)], TypeError, "tuple of Tensor, Tensor, Tensor"),
        ([], ValueError, "no examples"),
        (TensorDataset(X[:0], Y[:0]), ValueError, "empty"),
        (DataLoader(DATA, batch_size=None), ValueError, "batch_size=None"),
        (
            DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * N, 3 * N)),
            ValueError,
            "WeightedRandomSampler draws examples more than once",
        ),
        (
            DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)),
            ValueError,
            "RandomSampler draws examples more than once",
        ),
        (with_nan(), ValueError, "loader: expected finite"),
    ],
)
def test_sources_that_are_no_data_set_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        stream_of(source, CPU)


def test_batches_with_too_few_targets_are_refused():
    loader = DataLoader(
        DATA, batch_size=5, collate_fn=lambda b: (torch.zeros(len(b), 2), Y[:3])
    )
    with pytest.raises(ValueError, match="batch of 5 examples has 3 targets"):
        list(stream_of(loader, CPU))


def test_a_source_without_an_index_says_what_the_dual_needs():
    with pytest.raises(TypeError, match="give a DataLoader"):
        stream_of(batches(), CPU).take(torch.tensor([0]))


def test_a_stream_that_forgets_reads_the_same_again():
    data = TensorDataset(torch.arange(10.0).unsqueeze(1), torch.arange(10))
    stream = stream_of(data, torch.device("cpu"))
    before = [batch.x for batch in stream]
    stream.forget()
    after = [batch.x for batch in stream]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before[0] is not after[0]
