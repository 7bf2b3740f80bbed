"""Who is let in, where processes of a team find each other."""

from __future__ import annotations

import io
import queue
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from sgdgp.core import team
from sgdgp.core.processes import Processes, ProcessesError
from sgdgp.operators.tracked import Move
from sgdgp.solvers.sdd import default_block_size


@pytest.fixture
def told(monkeypatch) -> queue.Queue:
    """What the leader says to all, without processes."""
    said: queue.Queue = queue.Queue()

    def agreed(what, processes):
        if processes.rank:
            return said.get(timeout=10)
        for _ in range(processes.size):
            said.put(what)
        return what

    monkeypatch.setattr(team, "_agreed", agreed)
    monkeypatch.setattr(team, "_HANDSHAKE", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return said


def test_strangers_are_left_outside(told):
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(team._connections, Processes(0, 3))
        host, port, _ = told.get(timeout=10)
        strangers = [socket.create_connection((host, port)) for _ in range(3)]
        strangers[1].sendall(b"0")
        strangers[2].sendall(bytes(team._TOKEN + team._RANK))
        last = pool.submit(team._connections, Processes(2, 3)).result()[0]
        first = team._connections(Processes(1, 3))[0]
        found = leader.result()
    assert [*found] == [1, 2]
    for connection, other in ((found[1], first), (found[2], last)):
        connection.send_bytes(b"here")
        assert other.recv_bytes() == b"here"
    for stranger in strangers:
        assert stranger.recv(1) == b""
        stranger.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_a_default_solve_are_messages_without_tensors_beside(dtype):
    rows, columns = default_block_size(10**6), 1 + 64
    pickler = team._Pickler(io.BytesIO(), lambda what: None)
    pickler.dump(Move(slice(0, rows), torch.zeros(rows, columns, dtype=dtype)))
    assert not pickler.tensors


def test_an_address_that_nobody_reaches_is_named(told, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    told.put(("127.0.0.1", port, b""))
    with pytest.raises(ProcessesError, match=f"process 1 .* port {port} .*MASTER_ADDR"):
        team._connections(Processes(1, 2))
    monkeypatch.setattr(team, "_ARRIVAL", timedelta(seconds=0.1))
    with pytest.raises(ProcessesError, match=r"processes \[1\] of 2 .*MASTER_ADDR"):
        team._connections(Processes(0, 2))
