"""Processes: two real ones under gloo, and what a single one does without them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgdgp.core.processes import (
    Processes,
    ProcessesError,
    current_processes,
    process_group,
    started,
)

FIT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sgdgp.networks import Categorical, WeightCG, linearise
from sgdgp.networks.curvature import TangentData
from sgdgp.networks.kronecker_curvature import kronecker_curvature
from sgdgp.networks.stream import stream_of
from sgdgp.tangent import Tangent

def fitted():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=g).double()
    y = (x.sum(1) > 0).long()
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    for p in network.parameters():
        p.data.normal_(generator=g)
    return linearise(network.eval(), Categorical()).fit(
        DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True),
        num_samples=3,
        final_samples=4,
        steps=2,
        solver=WeightCG(tolerance=1e-6),
        progress=False,
    )

def curved():
    # A product with the Kronecker factors of eleven examples.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(11, 2, 5, generator=g).double()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten())
    network.append(nn.Linear(12, 4)).double().eval()
    tangent = Tangent(network)
    loader = DataLoader(TensorDataset(x, torch.zeros(11)), batch_size=2)
    data = TangentData(tangent, stream_of(loader, tangent.device))
    outputs = data.network_outputs
    found = kronecker_curvature(data, Categorical(), outputs, columns=3)
    w = torch.arange(67.0).double().sin().view(-1, 1)
    return found.matmul(w)[:, 0].tolist()
"""

CHILD = (
    FIT
    + """
import json
from sgdgp.core import processes as room
from sgdgp.networks.priors import GPrior, Kronecker

torch.set_num_threads(1)
found = {}
with room.process_group() as processes:
    rank = processes.rank
    found["who"] = [rank, processes.size, room.current_processes().size]
    found["share"] = list(processes.share(7))
    # A transposed block, a slice of something larger, a scalar, another dtype.
    block = (torch.arange(6.0).reshape(2, 3) * (rank + 1)).mT
    slab = torch.full((4, 4), float(rank + 1))
    scalar, count = torch.tensor(rank + 0.5), torch.tensor([rank + 1])
    processes.sum_(block, slab[:, 1:3], scalar, count)
    found["sums"] = [block.tolist(), slab.tolist(), float(scalar), count.tolist()]
    room._BUCKET = 3
    large, small, last = torch.ones(2, 3).mT * (rank + 1), torch.ones(2), torch.ones(2)
    processes.sum_(large, small, last)
    found["buckets"] = [large.tolist(), small.tolist(), last.tolist()]
    processes.check_agree("examples", 5)
    try:
        processes.check_agree("examples", 5 + rank)
    except room.ProcessesError as error:
        found["disagree"] = str(error)
    tangent = Tangent(nn.Linear(3, 2).double())
    g = torch.Generator().manual_seed(0)
    batches = torch.randn(5, 4, 8, generator=g).double()
    mine = batches[list(processes.share(5))]
    found["priors"] = []
    for setting in (GPrior(probes=4), Kronecker(probes=4)):
        prior = setting.build(tangent, lambda count: (b.mT for b in mine))
        root = prior.root(torch.eye(8).double())
        found["priors"].append(root.tolist())
    found["curvature"] = curved()
    posterior = fitted()
    found["fit"] = posterior.predict(torch.ones(4, 3).double().cumsum(0)).tolist()
    found["precisions"] = posterior.precisions.tolist()
    processes.barrier()
found["after"] = room.current_processes().size
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    """What two processes report."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [child.communicate(timeout=120) for child in children]
    assert [c.returncode for c in children] == [0, 0], ends
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


def test_processes_know_each_other(pair):
    assert [found["who"] for found in pair] == [[0, 2, 2], [1, 2, 2]]
    assert [found["after"] for found in pair] == [1, 1]


def test_their_shares_partition_the_examples(pair):
    assert [found["share"] for found in pair] == [[0, 1, 2], [3, 4, 5, 6]]


def test_sums_are_equal_in_all_processes_and_touch_nothing_else(pair):
    block = (3 * torch.arange(6.0).reshape(2, 3)).mT.tolist()
    for rank, found in enumerate(pair):
        slab = torch.full((4, 4), float(rank + 1))
        slab[:, 1:3] = 3
        assert found["sums"] == [block, slab.tolist(), 2.0, [3]]


def test_tensors_that_do_not_fit_one_message_are_summed_in_several(pair):
    for found in pair:
        assert found["buckets"] == [[[3.0, 3.0]] * 3, [2.0, 2.0], [2.0, 2.0]]


def test_counts_that_differ_are_refused_everywhere(pair):
    for found in pair:
        assert found["disagree"] == (
            "examples: expected the same number in all 2 processes, found 5 in "
            "process 0, 6 in process 1"
        )


def test_priors_of_shared_data_are_those_of_all_data(pair):
    from torch import nn

    from sgdgp.networks.priors import GPrior, Kronecker
    from sgdgp.tangent import Tangent

    tangent = Tangent(nn.Linear(3, 2).double())
    g = torch.Generator().manual_seed(0)
    batches = torch.randn(5, 4, 8, generator=g).double()
    for i, setting in enumerate((GPrior(probes=4), Kronecker(probes=4))):
        prior = setting.build(tangent, lambda count: (b.mT for b in batches))
        root = prior.root(torch.eye(8).double())
        for found in pair:
            there = torch.tensor(found["priors"][i], dtype=torch.float64)
            torch.testing.assert_close(there, root, rtol=1e-10, atol=1e-10)


def test_a_fit_of_shared_data_is_that_of_one_process(pair):
    namespace: dict = {}
    exec(FIT, namespace)
    alone = namespace["fitted"]()
    predictions = alone.predict(torch.ones(4, 3).double().cumsum(0))
    for found in pair:
        there = torch.tensor(found["fit"], dtype=torch.float64)
        torch.testing.assert_close(there, predictions, rtol=1e-7, atol=1e-9)
        assert found["precisions"] == pytest.approx(alone.precisions.tolist())


def test_the_curvature_of_shared_data_is_that_of_one_process(pair):
    namespace: dict = {}
    exec(FIT, namespace)
    alone = namespace["curved"]()
    assert len(alone) == 67
    for found in pair:
        assert found["curvature"] == pytest.approx(alone, rel=1e-9, abs=1e-12)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_are_contiguous_balanced_and_complete(n, size):
    shares = [Processes(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_without_a_group_there_is_one_process_and_nothing_moves():
    processes = current_processes()
    assert (processes.rank, processes.size) == (0, 1)
    x = torch.ones(3)
    processes.sum_(x)
    processes.barrier()
    processes.check_agree("examples", 3)
    assert x.tolist() == [1.0, 1.0, 1.0]


def test_a_group_without_torchrun_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as processes:
        assert processes.size == 1
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with process_group() as processes:
        assert processes.size == 1


def test_half_of_torchruns_environment_is_refused(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ProcessesError, match="but not RANK, MASTER_ADDR, MASTER_PORT"),
        process_group(),
    ):
        pass


def test_a_negative_share_is_refused():
    with pytest.raises(ValueError, match="n: expected at least 0"):
        Processes().share(-1)


def test_the_old_name_of_a_process_group_is_accepted():
    with (
        pytest.warns(DeprecationWarning, match="started is now called process_group"),
        started() as processes,
    ):
        assert processes.size >= 1
