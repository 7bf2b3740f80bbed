"""Where draws of chains go as they come: into memory, or onto the end of a file.

A file has no header: it is the weights of one draw of all chains (chains, D) after
another, as the processor has them. What is in it is known by the checkpoint beside it:
how much, and a hash of each part that was written between two checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.errors import CheckpointError

_READ = 2**24  # bytes of a file at a time


class ChainStorage(Protocol):
    """Draws in the order in which they come."""

    def put(self, number: int, weights: Float[Tensor, "chains D"]) -> None:
        """One draw of each chain; a number comes after those before it, or again."""

    def draws(self, count: int) -> Float[Tensor, "chains count D"]:
        """The first ``count`` of them."""


class InMemory(ChainStorage):
    """Draws in memory.

    Args:
        count: How many there will be.
        like: The weights of all chains at once (chains, D).
    """

    def __init__(self, count: int, like: Float[Tensor, "chains D"]) -> None:
        self._all = like.new_empty(count, *like.shape, device="cpu")

    def put(self, number: int, weights: Float[Tensor, "chains D"]) -> None:
        self._all[number] = weights

    def draws(self, count: int) -> Float[Tensor, "chains count D"]:
        return self._all[:count].transpose(0, 1)


class InFile(ChainStorage):
    """Draws in a file, of which memory holds none.

    Args:
        path: The file.
        like: The weights of all chains at once (chains, D).
        parts: Of each part that the file must hold, the number of draws up to its end
            and its hash. What comes after them will be written anew.

    Attributes:
        path: The file.
        parts: The same, with what ``close_part`` adds.

    Raises:
        CheckpointError: The file lacks some of them, or holds others.
    """

    def __init__(
        self,
        path: Path,
        like: Float[Tensor, "chains D"],
        parts: Sequence[tuple[int, str]],
    ) -> None:
        self.parts = [(count, found) for count, found in parts]
        self.path = path
        self._like = like.new_empty(like.shape, device="cpu")
        self._size = 0
        for count, expected in self.parts:
            if not path.exists() or self._hash_upto(count) != expected:
                raise CheckpointError(
                    f"checkpoint: the draws in {path} are missing, damaged or those of "
                    "another run; delete it and the checkpoint to start anew"
                )

    @functools.cached_property
    def _file(self) -> BinaryIO:
        """It is there from the first draw on."""
        if not self.parts:
            # What another run left: its draws may still be mapped, and stay so.
            self.path.unlink(missing_ok=True)
        return self.path.open("r+b" if self.parts else "w+b")

    def put(self, number: int, weights: Float[Tensor, "chains D"]) -> None:
        self._file.seek(number * self._like.nbytes)
        self._file.write(weights.cpu().contiguous().numpy().tobytes())

    def close_part(self, count: int) -> None:
        """Wait until the disk has so many draws, and know the new ones by a hash."""
        if count > (self.parts[-1][0] if self.parts else 0):
            self._file.flush()
            os.fsync(self._file.fileno())
            self.parts.append((count, self._hash_upto(count)))

    def _hash_upto(self, count: int) -> str:
        """Of what follows the last part, up to so many draws from the beginning."""
        found, stop = hashlib.sha256(), count * self._like.nbytes
        self._file.seek(self._size)
        while self._size < stop:
            read = self._file.read(min(stop - self._size, _READ))
            if not read:
                return "nothing"
            found.update(read)
            self._size += len(read)
        return found.hexdigest()

    def draws(self, count: int) -> Float[Tensor, "chains count D"]:
        if not count:
            return self._like.new_empty(len(self._like), 0, self._like.shape[1])
        self._file.flush()
        kind = torch.empty(0, dtype=self._like.dtype).numpy().dtype
        # Read when it is looked at; what is written to the tensor stays in memory.
        content = np.memmap(self.path, kind, "c", shape=(count, *self._like.shape))
        return torch.from_numpy(content).transpose(0, 1)
