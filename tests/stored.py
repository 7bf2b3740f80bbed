"""What a value is after it has been in a file."""

from __future__ import annotations

import json
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.core.codec import decode, encode
from sgdgp.features.storage import given_by_kernel, parts_of_kernel


def stored(
    value: Any, kernel: Kernel | None = None, like: Tensor | None = None, name: str = ""
) -> Any:
    """Encode, write down as text, and decode.

    Args:
        value: Anything that can be stored.
        kernel: What a file leaves out is found in it. Default: nothing is left out.
        like: Inputs of the kernel.
        name: Of the value in messages. Default: "value".
    """
    tensors: dict[str, Tensor] = {}
    mark = None if kernel is None else given_by_kernel
    state = json.loads(json.dumps(encode(value, name or "value", tensors, mark)))
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    find = None if kernel is None or like is None else parts_of_kernel(kernel, like)
    return decode(state, copies, torch.device("cpu"), find)
