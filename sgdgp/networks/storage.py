"""Posteriors of networks in files: samples and prior, but never the network itself.

The network is given on loading, and has to be the one that was linearised: hashes of
its weights and buffers are in the file, and another network is refused by what differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sgdgp.core import format_1
from sgdgp.core.codec import fitting, read_values, write_values
from sgdgp.core.errors import StorageError
from sgdgp.core.files import FileKind, path_of, place_of
from sgdgp.core.hashes import differences, digest, in_words
from sgdgp.tangent import Tangent

KIND = FileKind("sgdgp.networks", 2, "posterior of a network", format_1.network)

_COUNTERS = ("num_batches_tracked",)
"""Buffers that a network in evaluation mode does not use."""


def save_fields(
    path: str | os.PathLike[str], tangent: Tangent, values: Mapping[str, Any]
) -> None:
    """Write a posterior of a network into a file, in one step.

    Args:
        path: The file; one that is there is replaced.
        tangent: The linearised network; the names and hashes of its weights are
            stored, not they themselves.
        values: All else by name, see ``core.codec.encode``.

    Raises:
        StorageError: Nothing can be written there.
        NotStorableError: A field cannot be stored, a likelihood of the user's own that
            is not registered for one.
        TypeError: ``path`` is no path.
        OSError: The disk is full; an old file is untouched.
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
    for name, value in network.state_dict().items():
        if name.rpartition(".")[2] in _COUNTERS or not isinstance(value, Tensor):
            continue
        kind = str(value.dtype).removeprefix("torch.")
        found[f"weights {name}"] = f"{kind} {tuple(value.shape)} {digest(value)}"
    return found
