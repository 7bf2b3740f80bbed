"""Posteriors of networks in files: samples and prior, but never the network itself.

The network is given on loading, and has to be the one that was linearised: hashes of
its weights and buffers are in the file, and another network is refused by what differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgdgp.core.errors import StorageError, UnusableFileError
from sgdgp.core.files import FileKind, check_place_of, read_file, write_file
from sgdgp.core.hashes import digest
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.stored_values import decoded, encoded
from sgdgp.posterior.storage import _versions
from sgdgp.tangent import Tangent

KIND = FileKind("sgdgp.networks", 1, "posterior of a network")

_NAMED = 5
_COUNTERS = ("num_batches_tracked",)
"""Buffers that a network in evaluation mode does not use."""


def save(posterior: LinearisedPosterior, path: str | os.PathLike[str]) -> None:
    """Write a posterior into a file: see ``LinearisedPosterior.save``."""
    own = {
        field.name: getattr(posterior, field.name)
        for field in fields(posterior)
        if field.name != "tangent"
    }
    save_fields(path, posterior.tangent, own)


def load(
    path: str | os.PathLike[str],
    network: nn.Module,
    *,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
) -> LinearisedPosterior:
    """Read a posterior that was saved; it predicts the same numbers.

    Args:
        path: The file.
        network: The network that was linearised, with the same weights and buffers;
            it may be on another device, and the posterior will be there.
        output: As it was given to ``linearise``; a function is not in the file.
        memory_budget: Bytes for temporaries. Default: half of what is free.

    Raises:
        StorageError: The file is missing, damaged, of another kind or of a newer
            format; or the network is another one, which names what differs.
        TypeError: An argument is of the wrong kind.

    Example:
        >>> posterior.save("posterior.safetensors")
        >>> same = sgdgp.networks.load("posterior.safetensors", network)
    """
    tangent, own = load_fields(
        path, network, output=output, memory_budget=memory_budget
    )
    try:
        return LinearisedPosterior(tangent=tangent, **own)
    except TypeError as error:
        raise StorageError(f"{path} does not fit this version: {error}") from error


def save_fields(
    path: str | os.PathLike[str], tangent: Tangent, values: Mapping[str, Any]
) -> None:
    """Write a posterior of a network into a file, in one step.

    Args:
        path: The file; one that is there is replaced.
        tangent: The linearised network; the names and hashes of its weights are
            stored, not they themselves.
        values: All else by name, see ``stored_values.encoded``.

    Raises:
        StorageError: Nothing can be written there.
        NotStorableError: A field cannot be stored, a likelihood of the user's own that
            is not registered for one.
        TypeError: ``path`` is no path.
        OSError: The disk is full; an old file is untouched.
    """
    place = _place(path).resolve()
    try:
        check_place_of(place)
    except UnusableFileError as error:
        raise StorageError(f"path: {error}") from error
    tensors: dict[str, Tensor] = {}
    state = {
        "versions": _versions(),
        "weights": list(tangent.names),
        "shapes": [list(shape) for shape in tangent.shapes],
        "network": network_fingerprint(tangent.network),
        "fields": {k: encoded(v, k, tensors) for k, v in values.items()},
    }
    write_file(place, KIND, tensors, state)


def load_fields(
    path: str | os.PathLike[str],
    network: nn.Module,
    *,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
) -> tuple[Tangent, dict[str, Any]]:
    """What ``save_fields`` wrote, and the tangent model of the network it belongs to.

    Arguments and errors are those of ``load``.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network: expected a torch.nn.Module, found {type(network).__name__}"
        )
    place = _place(path)
    try:
        tensors, state = read_file(place, KIND)
    except UnusableFileError as error:
        raise StorageError(str(error)) from error
    try:
        differing = differences(state["network"], network_fingerprint(network))
        if differing:
            raise StorageError(
                f"network: {place} belongs to another one. {in_words(differing)}. Load "
                "the weights that were linearised into it first"
            )
        names = list(state["weights"])
        tangent = Tangent(
            network,
            weights=lambda name, parameter: name in names,
            output=output,
            memory_budget=memory_budget,
        )
        if list(tangent.names) != names:
            raise StorageError(
                f"network: {place} has the weights in the order {names[:_NAMED]}..., "
                f"found {list(tangent.names)[:_NAMED]}..."
            )
        values = {
            k: decoded(v, tensors, tangent.device) for k, v in state["fields"].items()
        }
    except StorageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StorageError(f"{place} does not fit this network: {error}") from error
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


def differences(stored: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What is not the same, in words: layers first, then shapes, then values."""
    layers, shapes, values = [], [], []
    for key in [*stored, *(key for key in here if key not in stored)]:
        before, now = stored.get(key), here.get(key)
        if before == now:
            continue
        kind, _, name = key.partition(" ")
        if before is None or now is None:
            place = "here" if before is None else "in the file"
            layers.append(f"{kind.replace('weights', 'tensor')} {name!r} only {place}")
        elif kind in ("layer", "setting"):
            layers.append(f"{kind} {name!r} is {now}, expected {before}")
        elif before.rpartition(" ")[0] != now.rpartition(" ")[0]:
            shapes.append(
                f"{name!r} is {now.rpartition(' ')[0]}, expected "
                f"{before.rpartition(' ')[0]}"
            )
        else:
            values.append(f"{name!r} has other values")
    return [*layers, *shapes, *values]


def in_words(differing: list[str]) -> str:
    """The first few of them as one sentence."""
    more = len(differing) - _NAMED
    rest = f"; and {more} more" if more > 0 else ""
    return "; ".join(differing[:_NAMED]) + rest


def _place(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path, found {path!r}")
    return Path(path)
