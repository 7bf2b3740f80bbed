"""How much memory an operator may use when nobody says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from sgdgp.core.checks import check_number

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_UNKNOWN_FREE = 4 * 2**30
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of memory that are free on ``device``.

    On Linux the kernel's own estimate of what can be had without swapping, or what
    the limits of a container or of the process leave; on other systems half of the
    physical memory, or 4 GiB where that is unknown too. On a GPU with what torch
    holds without using it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return max(0, min((_of_machine(), *_of_containers(), *_of_process())))


def _of_machine() -> int:
    with contextlib.suppress(OSError):
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN_FREE


def _of_containers() -> Iterator[int]:
    """What the memory limits of control groups leave, of versions 1 and 2."""
    try:
        groups = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            root, limit, used = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        # A limit holds for all groups below, and the path may be that of the host.
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            # No such file, or the limit "max".
            with contextlib.suppress(OSError, ValueError):
                allowed = int((folder / limit).read_text())
                cached = _inactive_files(folder / "memory.stat")
                yield allowed - int((folder / used).read_text()) + cached


def _inactive_files(statistics: Path) -> int:
    """Bytes of cached files that count as used, and are given up when needed."""
    with contextlib.suppress(OSError, ValueError):
        for line in statistics.read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0


def _of_process() -> Iterator[int]:
    """What limits of the process leave (``ulimit -v`` and ``-d``)."""
    if resource is None:
        return
    with contextlib.suppress(OSError, ValueError):
        pages = (_PROC / "self" / "statm").read_text().split()
        size = os.sysconf("SC_PAGE_SIZE")
        for what, used in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
            allowed, _ = resource.getrlimit(what)
            if allowed != resource.RLIM_INFINITY:
                yield allowed - size * int(pages[used])


def check_fits(what: str, needed: int, available: int, remedy: str) -> None:
    """Refuse what does not fit in memory, before it is made.

    Args:
        what: Argument or class, and what of it takes memory.
        needed: Bytes, about.
        available: Bytes; see :func:`free_memory`.
        remedy: What to give in its place.

    Raises:
        MemoryError: Says both numbers of bytes.
    """
    if needed > available:
        raise MemoryError(
            f"{what} needs about {needed:,} bytes, {available:,} are available; "
            f"{remedy}"
        )


@contextlib.contextmanager
def named_if_too_large(what: str) -> Iterator[None]:
    """Say what did not fit in memory, and which argument helps.

    Raises:
        torch.cuda.OutOfMemoryError: In the place of torch's own errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch has no class of its own for it.
        if not isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) and (
            "allocate memory" not in str(error)
        ):
            raise
        raise torch.cuda.OutOfMemoryError(
            f"{what} does not fit in memory; give a smaller memory_budget (bytes), "
            'and leave operator and solver to "auto", which keep to it'
        ) from error


def resolve_budget(
    memory_budget: int | None, device: torch.device | str = "cpu"
) -> int:
    """The memory budget in bytes; by default half of what is free.

    Processes that torchrun started on one machine share its memory.

    Raises:
        TypeError: The budget is no number.
        ValueError: It is not positive.
    """
    if memory_budget is None:
        on_cpu = torch.device(device).type == "cpu"
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if on_cpu else 1
        return max(1, free_memory(device) // (2 * sharing))
    check_number("memory_budget", memory_budget)
    if memory_budget <= 0:
        raise ValueError(
            f"memory_budget must be a positive number of bytes, found {memory_budget}"
        )
    return int(memory_budget)
