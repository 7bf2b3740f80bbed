"""Posteriors and fits of networks in files: never the network itself.

The network is given on loading, and has to be the one that was linearised: hashes of
its weights and buffers are in the file, and another network is refused by what differs.
The file of a fit holds all that a run knows between two stages. In a group of processes
all of them know the same: process 0 writes, and every process reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sgdgp.core import format_1
from sgdgp.core.checkpoint import Checkpoint
from sgdgp.core.codec import fitting, read_values, write_values
from sgdgp.core.errors import StorageError
from sgdgp.core.files import FileKind, path_of, place_of
from sgdgp.core.hashes import differences, digest, in_words
from sgdgp.core.processes import current_processes
from sgdgp.networks.fitting import RunState
from sgdgp.tangent import Tangent
from sgdgp.tangent.layers import PASS

KIND = FileKind("sgdgp.networks", 2, "posterior of a network", format_1.network)
FIT_KIND = FileKind(
    "sgdgp.networks.fit", 2, "checkpoint of a network's fit", format_1.network_fit
)

_COUNTERS = ("num_batches_tracked",)
"""Buffers that a network in evaluation mode does not use."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""A function's address, which is another one in every process."""


def save_fields(
    path: str | os.PathLike[str], tangent: Tangent, values: Mapping[str, Any]
) -> None:
    """Write a posterior of a network into a file, in one step: its values by name.

    Of the network they are the names and hashes of its weights. Errors are those of
    ``LinearisedPosterior.save``.
    """
    values = {
        "weights": list(tangent.names),
        "network": network_fingerprint(tangent.network),
        "fields": dict(values),
    }
    write_values(place_of(path), KIND, values)


def load_fields(
    path: str | os.PathLike[str],
    network: nn.Module,
    *,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
) -> tuple[Tangent, dict[str, Any]]:
    """What ``save_fields`` wrote, and the tangent model of the network it belongs to.

    Arguments and errors are those of ``networks.load``.
    """
    place = path_of(path)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network: expected a torch.nn.Module for {place}, the posterior of a "
            f"network, found {type(network).__name__}"
        )
    found = read_values(place, KIND)
    with fitting(place, "network"):
        differing = differences(found["network"], network_fingerprint(network))
        if differing:
            raise StorageError(
                f"network: {place} belongs to another one. Different here: "
                f"{in_words(differing)}. Load the weights that were linearised into it "
                "first"
            )
        names = found["weights"]
        tangent = Tangent(
            network,
            weights=lambda name, parameter: name in names,
            output=output,
            memory_budget=memory_budget,
        )
        if list(tangent.names) != names:
            raise StorageError(
                f"network: {place} has the weights in the order {names[:5]}..., found "
                f"{list(tangent.names)[:5]}..."
            )
        found.device = tangent.device
        values: dict[str, Any] = found["fields"]
    return tangent, values


def network_fingerprint(network: nn.Module) -> dict[str, str]:
    """Hashes of weights and buffers, and the kinds of the layers, by name."""
    found = {
        f"layer {name or 'network'}": type(module).__name__
        for name, module in network.named_modules()
    }
    with PASS:
        held = network.state_dict()
    for name, value in held.items():
        if name.rpartition(".")[2] in _COUNTERS or not isinstance(value, Tensor):
            continue
        kind = str(value.dtype).removeprefix("torch.")
        found[f"weights {name}"] = f"{kind} {tuple(value.shape)} {digest(value)}"
    return found


class RunKeeper(Checkpoint):
    """The file of one fit: ``load`` it once, then ``keep`` the state now and then.

    Args:
        path: The file; its directory must exist.
        every: Seconds between two writes, at least.
        tangent: The linearised network.
        settings: What else makes two fits the same one, such as the seed or the number
            of examples, by the names that users know; compared as text.
    """

    kind = FIT_KIND
    work = "fit"

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int | float,
        tangent: Tangent,
        settings: Mapping[str, object],
    ) -> None:
        super().__init__(path, every)
        self._processes = current_processes()
        self._device = tangent.device
        self.components = {
            **network_fingerprint(tangent.network),
            "setting weights": str(list(tangent.names)),
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
