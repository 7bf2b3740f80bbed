"""Fits of networks that survive the end of their process.

One file holds all that a run knows between two stages. In a group of processes all of
them know the same: process 0 writes, and every process reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from sgdgp.core import format_1
from sgdgp.core.checkpoint import Checkpoint
from sgdgp.core.files import FileKind
from sgdgp.core.processes import Processes, current_processes
from sgdgp.networks.fitting import RunState
from sgdgp.networks.storage import network_fingerprint
from sgdgp.tangent import Tangent

KIND = FileKind(
    "sgdgp.networks.fit", 2, "checkpoint of a network's fit", format_1.network_fit
)

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class RunKeeper(Checkpoint):
    """The file of one fit: ``load`` it once, then ``keep`` the state now and then.

    Args:
        path: The file; its directory must exist.
        every: Seconds between two writes, at least.
        tangent: The linearised network.
        settings: What else makes two fits the same one, such as the seed or the number
            of examples, by the names that users know; compared as text.
        processes: Who takes part. Default: those of the default group.

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
        super().__init__(path, every, KIND, "fit")
        self._processes = current_processes() if processes is None else processes
        self._device = tangent.device
        self.components = {
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
        found = self.open(self.components, device=self._device)
        state = None
        if found is not None:
            with self.reading():
                state = found["run"]
                if not isinstance(state, RunState):
                    raise TypeError(f"found {type(state).__name__}")
        # Also keeps process 0 from writing what others have yet to read.
        where = -1 if state is None else 1000 * state.step + state.finished
        self._processes.check_agree(f"checkpoint: steps in {self.path}", where)
        return state

    def keep(self, state: RunState, *, now: bool = False) -> None:
        """Write where the fit is, if it is time or must be now."""
        if self._processes.rank == 0 and (now or self.is_due):
            self.write(run=state)
