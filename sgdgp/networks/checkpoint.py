"""Fits of networks that survive the end of their process.

One file holds all that a run knows between two stages. In a group of processes all of
them know the same: process 0 writes, and every process reads.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

from torch import Tensor

from sgdgp.core.errors import CheckpointError, UnusableFileError
from sgdgp.core.files import FileKind, read_file, write_file
from sgdgp.core.processes import Processes, current_processes
from sgdgp.networks.fitting import RunState
from sgdgp.networks.storage import differences, in_words, network_fingerprint
from sgdgp.networks.stored_values import decoded, encoded
from sgdgp.posterior.checkpoint_file import checked_place
from sgdgp.tangent import Tangent

KIND = FileKind("sgdgp.networks.fit", 1, "checkpoint of a network's fit")

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class RunKeeper:
    """The file of one fit: ``load`` it once, then ``keep`` the state now and then.

    Args:
        path: The file; its directory must exist.
        every: Seconds between two writes, at least.
        tangent: The linearised network.
        settings: What else makes two fits the same one, such as the seed or the number
            of examples, by the names that users know; compared as text.
        processes: Who takes part. Default: those of the default group.

    Attributes:
        problem: Why the last write failed; None if it did not. A full disk does not
            end a fit of hours.

    Raises:
        CheckpointError: Nothing can be written at ``path``.
        TypeError: ``path`` is no path or ``every`` no number.
        ValueError: ``every`` is not positive and finite.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int | float,
        tangent: Tangent,
        settings: Mapping[str, object],
        processes: Processes | None = None,
    ) -> None:
        self.path = checked_place(path, every)
        self.problem: str | None = None
        self._processes = current_processes() if processes is None else processes
        self._device = tangent.device
        self._every = every
        self._next = time.monotonic() + every
        self._components = {
            **network_fingerprint(tangent.network),
            "setting weights": str(list(tangent.names)),
            # A function's address is another one in every process.
            **{f"setting {k}": _ADDRESS.sub("", str(v)) for k, v in settings.items()},
        }

    def load(self) -> RunState | None:
        """Where the fit was, or None if it has not begun.

        Raises:
            CheckpointError: The file is damaged, of a newer format or of another fit.
            ProcessesError: The processes find different files.
        """
        state = self._read() if self.path.exists() else None
        # Also keeps process 0 from writing what others have yet to read.
        where = -1 if state is None else 1000 * state.step + state.finished
        self._processes.check_agree(f"checkpoint: steps in {self.path}", where)
        return state

    def keep(self, state: RunState, *, now: bool = False) -> None:
        """Write where the fit is, if it is time or must be now."""
        if self._processes.rank != 0 or not (now or time.monotonic() >= self._next):
            return
        tensors: dict[str, Tensor] = {}
        stored = {
            "components": self._components,
            "run": encoded(state, "run", tensors),
        }
        self.problem = None
        try:
            write_file(self.path, KIND, tensors, stored)
        except OSError as error:
            self.problem = (
                f"The checkpoint {self.path} could not be written ({error}); it holds "
                "an earlier state, or nothing."
            )
        self._next = time.monotonic() + self._every

    def _read(self) -> RunState:
        advice = "It is left as it is; delete it or give another path to start anew."
        try:
            tensors, stored = read_file(self.path, KIND)
            differing = differences(stored["components"], self._components)
            if differing:
                raise CheckpointError(
                    f"checkpoint: {self.path} belongs to another fit. "
                    f"{in_words(differing)}. {advice}"
                )
            state = decoded(stored["run"], tensors, self._device)
            if not isinstance(state, RunState):
                raise TypeError(f"found {type(state).__name__}")
            return state
        except CheckpointError:
            raise
        except UnusableFileError as error:
            raise CheckpointError(f"checkpoint: {error}. {advice}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint: {self.path} cannot be gone on from ({error}). {advice}"
            ) from error
