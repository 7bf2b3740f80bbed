"""One process leads and the others work for it, over ``torch.distributed``.

Process 0 runs the user's program; what takes long it asks of all (``together``), and
every process does a share. Whatever is decided, drawn at random, timed or written
happens in one place, so that processes cannot disagree. A message is pickled and goes
over a socket, large tensors travel beside it as they lie in memory, by
``torch.distributed``, and what is needed again stays where it was sent (``keep``).

A function that fails, wherever that was, has failed for the leader, with its reason,
and all are ready for the next one. A process that has ended ends the others.
"""

from __future__ import annotations

import hmac
import io
import os
import pickle
import secrets
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from sgdgp.core.processes import (
    Processes,
    ProcessesError,
    current_processes,
    local_device,
    process_group,
)

T = TypeVar("T")

Found: TypeAlias = tuple[Tensor, ...]
"""What a function returns, as many in every process."""

_INLINE = 2**19
"""Bytes up to which a tensor is part of the message, as are the moves of a stochastic
step: 512 rows of 65 columns (a mean and 64 samples) in float64."""

_QUEUED = 64
"""Changes of what was sent that wait for the next message; more go on their own."""

_TOKEN, _RANK = 32, 4
"""Bytes by which a process that connects shows that it belongs to the team, and of the
rank that follows."""

_HANDSHAKE = 5.0
"""Seconds for that: others may connect and say nothing."""

_ARRIVAL = timedelta(minutes=5)
"""Until all have found each other."""

_PATIENCE = timedelta(days=365)
"""A large tensor waits for as long as the other end has work of its own. A process that
ends is noticed at once."""

_teams: list[Team] = []
"""Under the lead of this process; none or one."""


def distribute(
    main: Callable[[], T], *, device: torch.device | None = None
) -> T | None:
    """Run a program in one process, with the others that ``torchrun`` started at work.

    While it runs, kernel products, prior draws, predictions and gradients are shared
    by all. Without torchrun it is ``main()``.

    Args:
        main: The program; called in process 0 alone. Its models and kernels are sent
            to the others, which must be able to import their classes.
        device: Where this process computes. Default: see
            ``sgdgp.networks.process_group``.

    Returns:
        What ``main`` returns; None in the other processes.

    Raises:
        ProcessesError: Another process failed or has ended.

    Example:
        >>> if __name__ == "__main__":
        ...     sgdgp.distribute(main)  # torchrun --nproc-per-node 4 program.py
    """
    if _teams:
        return main()
    device = local_device() if device is None else device
    with process_group(device):
        if current_processes().size == 1:
            return main()
        team = Team(device)
        if team.processes.rank:
            team.serve()
            return None
        _teams.append(team)
        try:
            return main()
        finally:
            _teams.clear()
            team.dismiss()


def is_led() -> bool:
    """Whether there are other processes, free to work for this one."""
    return any(team.is_free for team in _teams)


def keep(what: Any, make: Callable[..., Any] | None = None, *args: Any) -> None:
    """Send an object to all processes, once, to be named in ``together``.

    Args:
        what: The object.
        make: What stands for it elsewhere is ``make(*args)``. Default: a copy.
        *args: Arguments of ``make``.
    """
    if is_led():
        _teams[0].keep(what, make, args)


def is_kept(what: Any) -> bool:
    """Whether the object was sent and is in step with what stands for it."""
    return any(team.number_of(what) is not None for team in _teams)


def follow(
    function: Callable[..., Any],
    *args: Any,
    into: Any = None,
    at_once: bool = False,
) -> None:
    """Let what was sent follow a change that is made here: ``function(*args)``.

    Args:
        function: Changes its arguments, or makes an object.
        *args: Objects that were kept, and what else it takes.
        into: The object here that what is made elsewhere stands for.
        at_once: Not with the next message, but in one of its own.
    """
    for team in _teams:
        team.follow(function, args, into, at_once)


def together(
    function: Callable[..., Found], *args: Any, by: Literal["rows", "sum"] = "rows"
) -> Found:
    """``function(processes, *args)`` in every process, joined in this one.

    Alone, or within another one, it is called with the one process that there is.

    Args:
        function: Does the share of ``processes``; a function of a module.
        *args: Its arguments; kept objects are those that stand for them.
        by: What joins the tensors of all: their rows in order, or their sum.

    Raises:
        ProcessesError: It failed in another process, or one has ended.
    """
    if not is_led():
        return alone(function, *args)
    return _teams[0].together(function, args, by)


def alone(
    function: Callable[..., Found], *args: Any, by: Literal["rows", "sum"] = "rows"
) -> Found:
    """The same in this process, whatever others there are."""
    return function(Processes(), *args)


@dataclass
class _Request:
    """What all processes do now: ``function(processes, *args)``, joined by ``by``."""

    function: Callable[..., Found]
    args: tuple[Any, ...]
    by: Literal["rows", "sum"]


class Team:
    """The processes of the default group, under the lead of the first.

    Args:
        device: Where this process computes; all do on the same kind.

    Attributes:
        processes: All of them, and which one this is.
    """

    def __init__(self, device: torch.device) -> None:
        self.processes = current_processes()
        self._device = device
        self._busy = threading.Lock()
        self._lost = False
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with self._connected():
            group = dist.new_group(backend=backend, timeout=_ARRIVAL)
            _set_pg_timeout(_PATIENCE, group)
            self.processes = replace(self.processes, group=group)
            # The leader's to all others, by their ranks; theirs to the leader, 0.
            self._connections = _connections(self.processes)
        # Of the leader: numbers of what was sent, and what waits for a message.
        self._numbers: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._count = 0
        self._dropped: list[int] = []
        self._queue: list[tuple[bytes, list[Tensor]]] = []
        # Of the others: what was sent, by its number, and what went wrong with that.
        self._kept: dict[int, Any] = {}
        self._problem: Exception | None = None

    # Of the leader.

    @property
    def is_free(self) -> bool:
        """Whether the others wait for the leader; not while all are at work."""
        return not self._busy.locked()

    def together(
        self, function: Callable[..., Found], args: tuple[Any, ...], by: Any
    ) -> Found:
        """See the function of this name."""
        with self._busy, _late_interrupts() as heard:
            self._send(_Request(function, args, by))
            return self._join(function, args, by, heard=heard)

    def keep(
        self, what: Any, make: Callable[..., Any] | None, args: tuple[Any, ...]
    ) -> None:
        """See the function of this name."""
        if self.number_of(what) is not None:
            return
        if make is None:
            make, args = _itself, (what,)
        with self._busy, _late_interrupts():
            # Before it has a number, by which it would be named in the message.
            self._queue.append(self._packed((make, args, self._count)))
            self._send(None)
            self._enter(what)

    def follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        into: Any,
        at_once: bool,
    ) -> None:
        """See the function of this name."""
        number = None if into is None else self._count
        content, tensors = self._packed((function, args, number))
        # They may be written into before they are sent.
        self._queue.append((content, [tensor.clone() for tensor in tensors]))
        if into is not None:
            self._enter(into)
        if at_once or len(self._queue) > _QUEUED:
            with self._busy, _late_interrupts():
                self._send(None)

    def number_of(self, what: Any) -> int | None:
        """The number of an object that was sent."""
        number, here = self._numbers.get(id(what), (None, None))
        return number if here is not None and here() is what else None

    def dismiss(self) -> None:
        """Let the others go, unless they are gone."""
        if not self._lost:
            with suppress(ProcessesError):
                self._send(_Request(_nothing, (), "rows"))
        self._close()

    def _enter(self, what: Any) -> None:
        """Give an object the next number, for as long as it is there."""
        number, key = self._count, id(what)
        self._count += 1

        def drop(_: object) -> None:
            # Anything may be under way here: it is told with the next message.
            if self._numbers.get(key, (None,))[0] == number:
                del self._numbers[key]
            self._dropped.append(number)

        self._numbers[key] = number, weakref.ref(what, drop)

    def _forget(self) -> None:
        """Send everything anew: what failed elsewhere may have been a change of it."""
        self._dropped += [number for number, _ in self._numbers.values()]
        self._numbers.clear()

    def _send(self, request: _Request | None) -> None:
        """All that waits, and a request, in one message."""
        # What waits stays there if the request cannot be pickled.
        own = [] if request is None else [self._packed(request)]
        parts, self._queue = [*self._queue, *own], []
        dropped, self._dropped = self._dropped, []
        header = (
            request is not None,
            dropped,
            [(content, len(beside)) for content, beside in parts],
        )
        tensors = [tensor for _, beside in parts for tensor in beside]
        with self._connected():
            self._write(header, tensors)

    def _packed(self, what: Any) -> tuple[bytes, list[Tensor]]:
        """Bytes, and the large tensors that belong to them."""
        file = io.BytesIO()
        pickler = _Pickler(file, self.number_of)
        pickler.dump(what)
        return file.getvalue(), pickler.tensors

    # Of the others.

    def serve(self) -> None:
        """Do what the leader asks for, until it has no more to ask.

        Raises:
            ProcessesError: The leader has ended.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        answer = None
        if in_main_thread:
            # Ctrl-C reaches all processes of a terminal: it is the leader's to answer.
            answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            while True:
                request = self._receive()
                if request is None:
                    continue
                if request.function is _nothing:
                    break
                problem, self._problem = self._problem, None
                self._join(request.function, request.args, request.by, problem)
        finally:
            self._close()
            if answer is not None:
                signal.signal(signal.SIGINT, answer)

    def _receive(self) -> _Request | None:
        """The next message, and what it asks for."""
        with self._connected():
            (asks, dropped, parts), tensors = self._read(0)
        request = None
        for content, count in parts:
            own, tensors = tensors[:count], tensors[count:]
            try:
                found = self._unpacked(content, own)
                if isinstance(found, _Request):
                    request = found
                    continue
                function, args, number = found
                made = function(*args)
                if number is not None:
                    self._kept[number] = made
            except Exception as error:
                # Told with the next request, which may be this one.
                self._problem = self._problem or error
        for number in dropped:
            self._kept.pop(number, None)
        if asks and request is None:
            request = _Request(_unread, (), "rows")
        return request

    # Of all.

    def _join(
        self,
        function: Callable[..., Found],
        args: tuple[Any, ...],
        by: Literal["rows", "sum"],
        problem: BaseException | None = None,
        heard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Found:
        """Do the own share, in which Ctrl-C is heard, and join it with the others'.

        Raises:
            ProcessesError: In the leader, if another has failed.
            BaseException: In the leader, what went wrong there.
        """
        own: Found = ()
        if problem is None:
            try:
                with heard():
                    own = function(self.processes, *args)
            except BaseException as error:
                problem = error
        said = None if problem is None else f"{type(problem).__name__}: {problem}"
        with self._connected():
            if self.processes.rank:
                self._write(*self._packed((said, own)))
                return own
            replies = {i: self._read(i) for i in self._connections}
        found = {i: self._unpacked(*reply) for i, reply in replies.items()}
        each = [f"process {i}: {said}" for i, (said, _) in found.items() if said]
        if each:
            self._forget()
        if problem is not None:
            raise problem
        if each:
            raise ProcessesError("; ".join(each))
        shares = zip(own, *(share for _, share in found.values()), strict=True)
        return tuple(_joined(parts, by) for parts in shares)

    def _write(self, header: Any, tensors: Sequence[Tensor]) -> None:
        """A header and tensors, to all others or to the leader."""
        message = pickle.dumps((header, [_described(tensor) for tensor in tensors]))
        for connection in self._connections.values():
            connection.send_bytes(message)
        for tensor in tensors:
            if self.processes.rank:
                dist.send(_bytes(tensor), 0, group=self.processes.group)
            else:
                dist.broadcast(_bytes(tensor), 0, group=self.processes.group)

    def _read(self, rank: int) -> tuple[Any, list[Tensor]]:
        """What another process wrote, each tensor into an empty one."""
        message = self._connections[rank].recv_bytes()
        header, descriptions = pickle.loads(message)
        tensors = []
        for shape, dtype, device, _ in descriptions:
            where = self._device if device == self._device.type else device
            tensors.append(torch.empty(shape, dtype=dtype, device=where))
            if rank:
                dist.recv(_bytes(tensors[-1]), rank, group=self.processes.group)
            else:
                dist.broadcast(_bytes(tensors[-1]), 0, group=self.processes.group)
        return header, tensors

    def _unpacked(self, content: bytes, tensors: list[Tensor]) -> Any:
        """What ``_packed`` packed."""
        return _Unpickler(content, tensors, self._kept, self._device).load()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """What goes wrong in here ends the work of all: nobody waits for the others.

        Raises:
            ProcessesError: Another process has ended.
        """
        if self._lost:
            raise ProcessesError(
                "the other processes are gone, or were left amid their work; start the "
                "program again"
            )
        try:
            yield
        except ProcessesError:
            self._lost = True
            raise
        except (RuntimeError, OSError, EOFError) as error:
            self._lost = True
            who = "process 0" if self.processes.rank else "another process"
            raise ProcessesError(
                f"{who} of {self.processes.size} has ended, or cannot be reached any "
                "more: its own output says why"
            ) from error
        except BaseException:
            self._lost = True
            raise

    def _close(self) -> None:
        """What the others still wait for will not come."""
        for connection in self._connections.values():
            connection.close()
        if not self._lost:
            dist.destroy_process_group(self.processes.group)


def _connections(processes: Processes) -> dict[int, Connection]:
    """Sockets between the leader and every other process, by the rank of the other.

    Gloo hands each message to threads of its own. Where every core computes these have
    to wait for one, for milliseconds, which is as long as a stochastic step.

    Raises:
        ProcessesError: One cannot reach the leader.
    """
    if processes.rank:
        host, port, token = _agreed(None, processes)
        try:
            own = socket.create_connection((host, port))
        except OSError as error:
            raise ProcessesError(
                f"process {processes.rank} cannot reach process 0 at {host}, port "
                f"{port} ({error}); let MASTER_ADDR be an address of its machine"
            ) from error
        own.sendall(token + processes.rank.to_bytes(_RANK))
        return {0: _connection(own)}
    name, token = _own_name(), secrets.token_bytes(_TOKEN)
    found: dict[int, Connection] = {}
    v6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if v6 else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=v6) as server:
        _agreed((name, server.getsockname()[1], token), processes)
        end = time.monotonic() + _ARRIVAL.total_seconds()
        while len(found) < processes.size - 1:
            server.settimeout(max(1e-3, end - time.monotonic()))
            try:
                own, _ = server.accept()
            except TimeoutError as error:
                missing = sorted({*range(1, processes.size)} - {*found})
                raise ProcessesError(
                    f"processes {missing} of {processes.size} did not reach process 0 "
                    f"at {name} within {_ARRIVAL}; let MASTER_ADDR be an address of "
                    "its machine"
                ) from error
            said = _said(own, _TOKEN + _RANK)
            is_whole = len(said) == _TOKEN + _RANK
            if is_whole and hmac.compare_digest(said[:_TOKEN], token):
                found[int.from_bytes(said[_TOKEN:])] = _connection(own)
            else:
                own.close()
    return dict(sorted(found.items()))


def _said(own: socket.socket, size: int) -> bytes:
    """So many bytes from who has connected; fewer, if they do not come soon."""
    said, end = b"", time.monotonic() + _HANDSHAKE
    with suppress(OSError):
        while len(said) < size:
            own.settimeout(max(1e-3, end - time.monotonic()))
            part = own.recv(size - len(said))
            if not part:
                break
            said += part
    return said


def _own_name() -> str:
    """By which others find the leader's machine: torchrun has its store there."""
    name = os.environ.get("MASTER_ADDR") or socket.gethostname()
    with suppress(OSError):
        socket.getaddrinfo(name, None)
        return name
    return "localhost"  # a machine that is alone need not know its own name


def _agreed(what: Any, processes: Processes) -> Any:
    """The leader's object, in all processes."""
    told = [what]
    dist.broadcast_object_list(
        told, 0, group=processes.group, device=torch.device("cpu")
    )
    return told[0]


def _connection(own: socket.socket) -> Connection:
    """Messages over a socket, each sent at once, and not with the next one."""
    own.settimeout(None)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Connection(own.detach())


@contextmanager
def _late_interrupts() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Ctrl-C takes effect afterwards: amid a message it would leave the others alone.

    Yields:
        What it is heard at once in, even so.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if before is None or not is_main:
        yield nullcontext
        return
    waiting = False

    def wait(*_: object) -> None:
        nonlocal waiting
        waiting = True

    def answer() -> None:
        nonlocal waiting
        signal.signal(signal.SIGINT, before)
        if waiting:
            waiting = False
            signal.raise_signal(signal.SIGINT)

    @contextmanager
    def heard() -> Iterator[None]:
        try:
            answer()
            yield
        finally:
            signal.signal(signal.SIGINT, wait)

    signal.signal(signal.SIGINT, wait)
    try:
        yield heard
    finally:
        answer()


class _Pickler(pickle.Pickler):
    """Names what was sent before, and leaves large tensors to travel on their own."""

    def __init__(
        self, file: io.BytesIO, number_of: Callable[[Any], int | None]
    ) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._number_of = number_of
        self._places: dict[tuple[Any, ...], int] = {}
        self.tensors: list[Tensor] = []

    def persistent_id(self, what: Any) -> Any:
        """How an object is written that is not simply pickled."""
        number = self._number_of(what)
        if number is not None:
            return "kept", number
        if type(what) is not Tensor or what.layout is not torch.strided:
            return None
        described, what = _described(what), what.detach()
        if what.nbytes <= _INLINE:
            return "inline", described, _bytes(what.cpu()).numpy().tobytes()
        # The same tensor twice is one tensor at the other end too.
        key = what.data_ptr(), what.dtype, what.shape, what.stride()
        place = self._places.setdefault(key, len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(what)
        return "beside", place, described[-1]


class _Unpickler(pickle.Unpickler):
    """The other end of ``_Pickler``."""

    def __init__(
        self,
        content: bytes,
        tensors: list[Tensor],
        kept: dict[int, Any],
        device: torch.device,
    ) -> None:
        super().__init__(io.BytesIO(content))
        self._tensors, self._kept, self._device = tensors, kept, device

    def persistent_load(self, written: Any) -> Any:
        """The object behind a name."""
        kind, what, *data = written
        if kind == "kept":
            return self._kept[what]
        if kind == "beside":
            return self._tensors[what].requires_grad_(data[0])
        shape, dtype, device, requires_grad = what
        tensor = torch.empty(shape, dtype=dtype)
        if data[0]:
            tensor = torch.frombuffer(bytearray(data[0]), dtype=dtype).reshape(shape)
        if device == self._device.type:
            tensor = tensor.to(self._device)
        return tensor.requires_grad_(requires_grad)


def _bytes(tensor: Tensor) -> Tensor:
    """What a contiguous tensor holds, of whatever type; a copy of any other."""
    held = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return held.view(-1).view(torch.uint8)


def _described(tensor: Tensor) -> tuple[Any, ...]:
    """What the other end has to know of a tensor."""
    return tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.requires_grad


def _joined(parts: Sequence[Tensor], by: Literal["rows", "sum"]) -> Tensor:
    """The shares of all, in the order of their processes."""
    if by == "rows":
        return torch.cat(tuple(parts))
    total, *others = parts
    for part in others:
        total += part
    return total


def _itself(what: T) -> T:
    return what


def _nothing(processes: Processes) -> Found:
    """Asked for at the end: there is no more to do."""
    return ()


def _unread(processes: Processes) -> Found:
    """In the place of what could not be read, and is never called."""
    return ()
