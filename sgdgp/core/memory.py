"""How much memory an operator may use when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sgdgp.core.checks import check_number

_UNKNOWN_FREE = 4 * 2**30


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of memory that are free on ``device``.

    On Linux the kernel's own estimate of what can be had without swapping; on
    other systems half of the physical memory, or 4 GiB where that is unknown too.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN_FREE


def resolve_budget(
    memory_budget: int | None, device: torch.device | str = "cpu"
) -> int:
    """The memory budget in bytes; by default half of what is free.

    Raises:
        TypeError: The budget is no number.
        ValueError: It is not positive.
    """
    if memory_budget is None:
        return free_memory(device) // 2
    check_number("memory_budget", memory_budget)
    if memory_budget <= 0:
        raise ValueError(
            f"memory_budget must be a positive number of bytes, found {memory_budget}"
        )
    return int(memory_budget)
