"""Pieces of work on as many Python threads as the user gave torch, with one each.

Inside one operation torch's threads wait for each other, and passes over a tile that
stays in a cache are too short for that: two threads take .88 of the time of one. On
pieces of their own they take half. Neither torch's operations nor compiled code hold
Python's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import torch


def share(pieces: Iterable[Iterator[object]], workers: int) -> None:
    """Carry all pieces to their ends; each worker takes the next when it is free.

    An error, Ctrl-C for one, stops the others where they yield, and is raised.

    Args:
        pieces: What to do, as generators; what they yield is ignored. With several
            workers they must not write to the same place.
        workers: Threads. With one, or where no thread can be started (a limit of the
            system; the end of the program), pieces are carried out here, by torch's
            threads.
    """
    if workers <= 1:
        for piece in pieces:
            for _ in piece:
                pass
        return
    queue, stop = iter(pieces), threading.Event()
    inference = torch.is_inference_mode_enabled()

    def take() -> Iterator[object] | None:
        with taking:
            return next(queue, None)

    def work() -> None:
        try:
            # Modes belong to a thread.
            with torch.inference_mode(inference), torch.no_grad():
                while (piece := take()) is not None:
                    for _ in piece:
                        if stop.is_set():
                            return
        except BaseException:
            stop.set()
            raise

    taking = threading.Lock()
    running: list[Future[None]] = []
    try:
        with suppress(RuntimeError):
            pool = _pool.of(workers)
            for _ in range(workers):
                running.append(pool.submit(work))
        if not running:
            work()
        for each in running:
            each.result()
    except BaseException:
        stop.set()
        wait(running)
        raise


class _Pool:
    """Threads of which each computes with one thread of torch; kept for later."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            # Threads do not survive a fork.
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._starting = threading.Lock()
        self._size = 0
        self._started: ThreadPoolExecutor | None = None

    def of(self, workers: int) -> ThreadPoolExecutor:
        """At least so many threads."""
        with self._starting:
            if self._started is None or self._size < workers:
                size = max(workers, torch.get_num_threads())
                # Threads of a former one end when its last work is done.
                self._started, self._size = _started(size), size
            return self._started


def _started(workers: int) -> ThreadPoolExecutor:
    # ``set_num_threads`` holds for the thread that calls it, and for all that start
    # later: those get back what they would have had, from a thread that then ends.
    with ThreadPoolExecutor(1) as other:
        inherited = other.submit(torch.get_num_threads).result()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="sgdgp")
        everyone = threading.Barrier(workers)

        def prepare() -> None:
            torch.get_num_threads()  # a thread's first call takes what is inherited
            torch.set_num_threads(1)
            everyone.wait()

        try:
            for each in [pool.submit(prepare) for _ in range(workers)]:
                each.result()
        except BaseException:
            everyone.abort()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            other.submit(torch.set_num_threads, inherited).result()
    return pool


_pool = _Pool()
