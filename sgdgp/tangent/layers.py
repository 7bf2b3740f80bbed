"""The network's own pass: one at a time, by layers that have all derivatives."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

PASS = threading.RLock()
"""Held during a pass, which puts other tensors in the place of a network's weights and
sets switches of the whole process; and by whoever reads the weights themselves."""

if hasattr(os, "register_at_fork"):
    # A child would have the lock and the tensors of a thread that it does not have.
    os.register_at_fork(
        before=PASS.acquire,
        after_in_parent=PASS.release,
        after_in_child=PASS.release,
    )


@contextmanager
def differentiable_layers(network: nn.Module) -> Iterator[None]:
    """Run attention, recurrent layers and embeddings by code that has all derivatives.

    Fused attention, the fast path of ``MultiheadAttention``, the mkldnn code of
    recurrent layers and bags of embeddings have no forward-mode derivative; their
    plain forms have. One thread at a time is in here.

    Args:
        network: Decides whether mkldnn has to go: it is kept without recurrent layers.
    """
    with ExitStack() as stack:
        stack.enter_context(PASS)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in network.modules()):
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                # Its context manager would set (and warn about) other flags as well.
                stack.callback(setattr, backend, "enabled", backend.enabled)
                setattr(backend, "enabled", False)  # noqa: B010
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(_PlainForms())
        yield


class _PlainForms(TorchFunctionMode):
    """Within it, some functions are made of others that have all derivatives."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function's value."""
        return _PLAIN_FORMS.get(func, func)(*args, **(kwargs or {}))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of the weight; that of padding is a constant, as it is in training.

    How gradients are stored and scaled is left to training. Rows that are too long are
    cut without changing the weight, their derivative is that of rows as training sees
    them.
    """
    input = _numbers(input)
    rows = F.embedding(input, weight)
    if max_norm is not None:
        norms = rows.detach().norm(norm_type, -1, keepdim=True)
        # As torch does it, with its 1e-7.
        cut = torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1.0)
        rows = rows + (rows * cut - rows).detach()
    if padding_idx is None:
        return rows
    is_padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(is_padding, rows.detach(), rows)


def _numbers(input: Tensor) -> Tensor:
    """Numbers of words, which may come in floating point: as a GP's inputs do."""
    if not input.is_floating_point():
        return input
    numbers = input.detach().round()
    with suppress(RuntimeError):  # vmap cannot tell; what it maps over has passed here
        if bool((numbers != input).any()):
            raise ValueError("x: an embedding expects whole numbers, found others")
    return numbers.long()


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or maxima over the rows of each bag; padding is in none of them."""
    input = _numbers(input)
    keep = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        keep = input != padding_idx % len(weight)
    if offsets is not None:
        starts = offsets[:-1] if include_last_offset else offsets
        stops = torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        lengths = stops[: len(starts)] - starts
        places = torch.arange(int(lengths.max().clamp_min(1)), device=input.device)
        is_in = places < lengths[:, None]
        places = (starts[:, None] + places).clamp_max(len(input) - 1)
        input, keep = input[places], keep[places] & is_in
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[places]
    rows = _embedding(input, weight, None, max_norm, norm_type)
    keep = keep.unsqueeze(-1)
    if mode == "max":
        largest = torch.where(keep, rows, -torch.inf).max(1).values
        return torch.where(keep.any(1), largest, 0.0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    sums = torch.where(keep, rows, 0.0).sum(1)
    return sums / keep.sum(1).clamp_min(1) if mode == "mean" else sums


_PLAIN_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
