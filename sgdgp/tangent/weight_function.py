"""A network as a function of its weights, with everything else a constant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from sgdgp.core.checks import check_finite
from sgdgp.tangent.weight_choice import (
    Weights,
    check_evaluation_mode,
    check_network,
    chosen_weights,
)


class WeightFunction:
    """A network as a function of its chosen weights; see :class:`Tangent`."""

    def __init__(
        self,
        network: nn.Module,
        *,
        weights: Weights = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_network(network)
        self.network = network
        self.output = output
        self._theta = chosen_weights(network, weights)
        held = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self._rest = {n: t.detach() for n, t in held.items() if n not in self._theta}
        self._versions = {n: t._version for n, t in self._tensors()}
        self.names = tuple(self._theta)
        self.shapes = tuple(p.shape for p in self._theta.values())
        self.slices: dict[str, slice] = {}
        self.num_weights = 0
        for name, p in self._theta.items():
            self.slices[name] = slice(self.num_weights, self.num_weights + p.numel())
            self.num_weights += p.numel()
        first = next(iter(self._theta.values()))
        self.dtype, self.device = first.dtype, first.device

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightFunction:
        """Itself: it never changes."""
        return self

    def function(self, x: Any) -> Callable[[dict[str, Tensor]], Tensor]:
        """Chosen weights by name -> outputs (b, C) at a batch.

        Args:
            x: The network's argument; a tuple or list of arguments; or a dictionary
                of keyword arguments.

        Raises:
            RuntimeError: A parameter or buffer has changed since the start.
            ValueError: The network is no longer in evaluation mode.
        """
        self._check_unchanged()
        return functools.partial(self._outputs_at, x)

    @torch.no_grad()
    def outputs(self, x: Any) -> Float[Tensor, "b C"]:
        """The network's own outputs."""
        out = self.function(x)(self._theta)
        check_finite("network outputs", out)
        return out

    def weights_of(self, rows: Float[Tensor, "k D"]) -> dict[str, Tensor]:
        """Rows of weights as tensors (k, *shape) by name."""
        return {
            name: rows[:, self.slices[name]].reshape(-1, *shape)
            for name, shape in zip(self.names, self.shapes, strict=True)
        }

    def _outputs_at(self, x: Any, theta: dict[str, Tensor]) -> Tensor:
        positional = tuple(x) if isinstance(x, tuple | list) else (x,)
        args, kwargs = ((), x) if isinstance(x, dict) else (positional, {})
        out = functional_call(self.network, {**self._rest, **theta}, args, kwargs)
        return self._as_matrix(out if self.output is None else self.output(out), x)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self._theta.items(), *self._rest.items()]

    def _check_unchanged(self) -> None:
        check_evaluation_mode(self.network)
        for name, tensor in self._tensors():
            if tensor._version != self._versions[name]:
                raise RuntimeError(
                    f"{name!r} of the network has changed since it was linearised; "
                    "linearise a copy (copy.deepcopy) of a network that goes on to "
                    "be trained"
                )

    def _as_matrix(self, out: Any, x: Any) -> Tensor:
        if not isinstance(out, Tensor):
            keys = f" with {list(out)}" if isinstance(out, dict) else ""
            raise TypeError(
                f"network: expected it to return a tensor, found {type(out).__name__}"
                f"{keys}; pass output=..., a function that takes the tensor from it"
            )
        if out.ndim == 0 or out.numel() == 0:
            raise ValueError(
                "network outputs: expected shape (examples, ...), found "
                f"{tuple(out.shape)}"
            )
        if isinstance(x, Tensor) and out.shape[0] != x.shape[0]:
            raise ValueError(
                f"network outputs: expected {x.shape[0]} examples along the first "
                f"axis as in x, found shape {tuple(out.shape)}"
            )
        if out.dtype != self.dtype:
            raise TypeError(
                f"network outputs: expected the dtype of its weights, {self.dtype}, "
                f"found {out.dtype}"
            )
        return out.reshape(out.shape[0], -1)
