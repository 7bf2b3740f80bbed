"""Several processes that share one pass over the data, by ``torch.distributed``.

Each process sees its share of the examples and sums what it found with the others, such
as products with a transpose, losses and counts. Everything else every process does
alike. A group is started by ``torchrun`` or by
``torch.distributed.init_process_group``; without either there is one process and
nothing is sent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sgdgp.core.checks import check_count
from sgdgp.core.deprecation import renamed
from sgdgp.core.errors import SgdgpError

_BUCKET = 2**26
"""Numbers per message when small tensors travel together: 256 MiB of float32."""

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""All four, or none of them, stand in the environment."""

_groups = itertools.count()
"""Numbers of the groups that were started, the same in every process."""


class ProcessesError(SgdgpError, RuntimeError):
    """Processes do not agree, or one failed or has ended; says which, and why."""


@dataclass(frozen=True)
class Processes:
    """Who takes part in a pass over the data.

    Attributes:
        rank: Number of this process, 0..size - 1.
        size: How many there are.
        group: Process group of ``torch.distributed``; None is the default one.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, n: int) -> range:
        """The part of 0..n - 1 that is this process's own.

        The parts of all processes partition 0..n - 1 in order, and their lengths differ
        by at most one; with fewer examples than processes some parts are empty.
        """
        check_count("n", n, 0)
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def rows(self, n: int) -> slice:
        """The same as a slice."""
        own = self.share(n)
        return slice(own.start, own.stop)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes, in place.

        Small tensors travel in one message; transposes of contiguous tensors, such as
        (D, k) blocks of weights, are sent as they lie in memory. All processes must
        pass tensors of the same shapes in the same order. With one process nothing
        happens.

        Args:
            tensors: Floating point or integer tensors on the device of the processes.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and (whole := _as_it_lies(bucket[0])) is not None:
                dist.all_reduce(whole, group=self.group)
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def check_agree(self, name: str, count: int) -> None:
        """Refuse a number that is not the same everywhere, before long work.

        Args:
            name: What it counts, in the words of a user.
            count: The number that this process has.

        Raises:
            ProcessesError: In every process; names each one's number.
        """
        if self.size == 1:
            return
        found: list[int] = [0] * self.size
        dist.all_gather_object(found, count, group=self.group)
        if len(set(found)) > 1:
            each = ", ".join(f"{value} in process {i}" for i, value in enumerate(found))
            raise ProcessesError(
                f"{name}: expected the same number in all {self.size} processes, "
                f"found {each}"
            )

    def barrier(self) -> None:
        """Wait until every process has come this far."""
        if self.size > 1:
            dist.barrier(group=self.group)


def current_processes() -> Processes:
    """The processes of the default group; one when none was started."""
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def process_group(device: torch.device | None = None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, and leave them at the end.

    Without torchrun, or inside a group that is there already, nothing is started.

    Args:
        device: Where this process computes. Default: the CUDA device of its local rank
            where there is one, else the CPU. NCCL connects GPUs, gloo the CPU.

    Yields:
        The processes.

    Example:
        >>> with sgdgp.networks.process_group() as processes:
        ...     posterior.fit(loader)
        ...     if processes.rank == 0:
        ...         posterior.save("posterior.safetensors")
    """
    present = [name for name in _SET_BY_TORCHRUN if name in os.environ]
    if not present or (dist.is_available() and dist.is_initialized()):
        yield current_processes()
        return
    missing = [name for name in _SET_BY_TORCHRUN if name not in present]
    if missing:
        if "WORLD_SIZE" not in present and "RANK" not in present:
            # A cluster may set the address alone; that starts nothing.
            yield Processes()
            return
        raise ProcessesError(
            f"found {', '.join(present)} in the environment, but not "
            f"{', '.join(missing)}; start with torchrun, or unset them"
        )
    device = local_device() if device is None else device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The store of torchrun keeps the addresses of a former group.
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"sgdgp-{next(_groups)}", store),
        rank=rank,
        world_size=size,
    )
    try:
        yield current_processes()
    finally:
        dist.destroy_process_group()


started = renamed("started", process_group)
"""The old name of ``process_group``."""


def local_device() -> torch.device:
    """The CUDA device of this process on its machine; the CPU where there is none."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        return torch.device("cuda", local)
    return torch.device("cpu")


def _as_it_lies(tensor: Tensor) -> Tensor | None:
    """A contiguous view of all of a tensor, whatever the order of its axes; or none."""
    if tensor.is_contiguous():
        return tensor
    flipped = tensor.permute(*reversed(range(tensor.ndim)))
    return flipped if flipped.is_contiguous() else None


def _buckets(tensors: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to a size; large tensors alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        fits = (
            bucket
            and tensor.dtype == bucket[0].dtype
            and tensor.device == bucket[0].device
            and size + tensor.numel() <= _BUCKET
        )
        if bucket and not fits:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
