"""What a file knows of a model: parameters, buffers, and the structure they belong to.

A file never says which code to run. It holds a description of the model's modules, and
the model that is given on loading must have the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.errors import SgdgpError
from sgdgp.core.hashes import plain_attributes


class OtherModelError(SgdgpError, ValueError):
    """The model that was given is not built like the one that was saved."""


def structure_in_words(model: torch.nn.Module) -> dict[str, str]:
    """Class and plain attributes of every module, by its name.

    The class without the module it is defined in, so that a script and a package may
    share a file; of the model itself no attributes, since they may count its calls.
    """
    return {
        name: type(module).__qualname__
        + "".join(
            f", {key}={value!r}"
            for key, value in (plain_attributes(module) if name else ())
        )
        for name, module in model.named_modules()
    }


def with_state(
    model: ExactGP, structure: Mapping[str, str], state: Mapping[str, Tensor]
) -> ExactGP:
    """A copy of a model in eval mode with the saved parameters and buffers.

    Args:
        model: Structure of the model; it stays as it is.
        structure: The saved ``structure_in_words``.
        state: The saved ``state_dict``; tensors are taken over as they are.

    Raises:
        OtherModelError: Modules, parameters or shapes differ; says which.
    """
    data = [t for t in (model.train_inputs or ()) if torch.is_tensor(t)]
    data += [model.train_targets] if torch.is_tensor(model.train_targets) else []
    own = copy.deepcopy(model, memo={id(t): t for t in data})
    own.prediction_strategy = None
    own.eval()
    shapes = {name: tuple(value.shape) for name, value in own.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in state.items()}
    different = [
        *_differences(structure, structure_in_words(own), "module"),
        *_differences(saved, shapes, "parameter or buffer"),
    ]
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise OtherModelError(
            f"model: built otherwise than the one that was saved: "
            f"{'; '.join(different[:5])}{more}"
        )
    # Past BoTorch's own, which would transform targets again that nobody reads.
    torch.nn.Module.load_state_dict(own, dict(state), strict=True, assign=True)
    return own.requires_grad_(False)


def _differences(
    saved: Mapping[str, object], here: Mapping[str, object], what: str
) -> list[str]:
    found = []
    for name in [*saved, *(name for name in here if name not in saved)]:
        if name not in here:
            found.append(f"{what} {name!r} is missing here")
        elif name not in saved:
            found.append(f"{what} {name!r} is not in the file")
        elif saved[name] != here[name]:
            found.append(
                f"{what} {name or 'the model'!r} is {here[name]} here, was "
                f"{saved[name]}"
            )
    return found
