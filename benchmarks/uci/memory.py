"""Peak memory of this process, and whether there is enough for a run.

``ru_maxrss`` will not do: on Linux a child inherits the high-water mark its parent
had when it started it. ``VmHWM`` belongs to the address space, which is new in a
new process, so it is the peak of that process alone.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a process may be measured that has no use for it
    import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")

LEFT_OUT = 3
"""Exit status of a run that needs more memory than there is."""


class DoesNotFitError(MemoryError):
    """The run needs more memory than there is: it is left out, and has not failed."""


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in units of 1e6 bytes."""
    if _STATUS.exists():
        return _kilobytes(_STATUS, "VmHWM") * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def peak_mb(device: torch.device) -> float:
    """The same of a GPU's own memory where that is what the run is on."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    return peak_rss_mb()


def available_bytes(device: torch.device | None = None) -> float:
    """Memory that can be had without swapping; infinite where it is not known."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.exists():
        return _kilobytes(_MEMINFO, "MemAvailable") * 1024
    return float("inf")


def check_fits(peer: str, n: int, needed: float) -> None:
    """Find out before the work whether there is memory for it.

    Raises:
        DoesNotFitError: There is not.
    """
    available = available_bytes()
    if needed > available:
        raise DoesNotFitError(
            f"{peer} at n = {n} needs about {needed / 1e9:.1f} GB, found "
            f"{available / 1e9:.1f} GB available"
        )


def _kilobytes(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"{path} has no {key}")
