"""Pieces of work on threads: settings stay the user's, errors stop everybody."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from sgdgp.core import threads
from sgdgp.core.threads import share


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_have_one_thread_and_the_users_stay_as_they_are(three_threads, workers):
    together = threading.Barrier(workers)
    found: list[tuple[int, bool, bool]] = []

    def piece() -> Iterator[None]:
        together.wait(10)  # all of them at once
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        found.append((torch.get_num_threads(), inference, grad))
        yield

    for inference in (False, True):
        with torch.inference_mode(inference):
            share([piece() for _ in range(workers)], workers)
    assert found == workers * [(1, False, False)] + workers * [(1, True, False)]
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_every_piece_is_carried_out_once():
    done: list[int] = []

    def piece(number: int) -> Iterator[None]:
        yield
        done.append(number)

    for workers in (1, 2):
        share(map(piece, range(20)), workers)
    assert sorted(done) == sorted([*range(20), *range(20)])


def test_an_error_stops_the_others_and_is_raised():
    def endless() -> Iterator[None]:
        while True:
            yield

    def failing() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share([endless(), failing(), endless()], 2)


def test_where_no_thread_starts_the_work_is_done_here(three_threads, monkeypatch):
    start, started = threading.Thread.start, []

    def start_three(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threading.Thread, "start", start_three)
    pieces = iter([iter([0]), iter([0])])
    share(pieces, 4)
    assert list(pieces) == []
    for thread in started:
        thread.join(10)  # none waits for those that never came
        assert not thread.is_alive()
    assert torch.get_num_threads() == 3


def test_any_number_of_workers_have_their_threads_from_one_pool(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    for workers in (2, 4, 3, 4):
        share([iter([0]), iter([0])], workers)
    assert threads._pool._size <= max(4, torch.get_num_threads())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own():
    share([iter([0]), iter([0])], 2)
    child = os.fork()
    if child == 0:  # pragma: no cover
        share([iter([0]), iter([0])], 2)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
