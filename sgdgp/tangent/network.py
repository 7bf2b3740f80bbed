"""A network as a function of its weights: which of them, and of which networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from sgdgp.core.checks import check_finite

Weights = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
"""All that need a gradient (None), "all", "last_layer", "no_norms", patterns of
names, or a predicate of name and parameter."""

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
"""Layers whose weights are scales and shifts of normalised values."""

_BY_MODE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RNNBase)
"""Layers of torch that compute something else in training, in code of their parents."""

_WRAPPERS = {
    "DistributedDataParallel": "network.module",
    "FullyShardedDataParallel": "the network before it was sharded",
    "DataParallel": "network.module",
    "OptimizedModule": "network._orig_mod",
}


class WeightFunction:
    """A network as a function of its chosen weights, with all else a constant.

    Arguments and errors are those of :class:`Tangent`.
    """

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


def chosen_weights(network: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The uncertain weights by name, each once, as detached views.

    Args:
        network: The network.
        weights: None for all parameters that need a gradient; ``"all"`` for those of
            ``requires_grad=False`` too; ``"last_layer"`` for the parameters of the
            last registered module that has any and is no normalisation layer;
            ``"no_norms"`` for all that need a gradient but those of normalisation
            layers; a pattern such as ``"layer4.*"`` (``fnmatch``), or several; or a
            function of name and parameter. A pattern and a function choose among all
            floating-point parameters.

    Raises:
        TypeError: ``weights`` is none of these, or a chosen parameter is neither
            float32 nor float64, or they are not of one dtype and device.
        ValueError: Nothing is chosen, a pattern matches nothing, or a chosen
            parameter is not finite.
    """
    parameters = dict(network.named_parameters())
    names = _names(network, parameters, weights)
    if not names:
        raise ValueError(
            f"weights: {_words(weights)} chooses no parameter of "
            f"{type(network).__name__}; it has {_listed(parameters)}"
        )
    for name in names:
        _check_weight(name, parameters[name], names[0], parameters[names[0]])
    return {name: parameters[name].detach() for name in names}


def check_network(network: nn.Module) -> None:
    """Refuse networks that have no tangent model, or not one example by example.

    Raises:
        TypeError: Not a module, a wrapper of one, or a scripted one.
        ValueError: Lazy parameters, or a layer in training mode; a batch norm
            without running statistics, or one that synchronises.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: expected a torch.nn.Module, found {type(network)}")
    kind = type(network).__name__
    if kind in _WRAPPERS:
        raise TypeError(f"network: pass {_WRAPPERS[kind]} instead of its {kind}")
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError("network: pass the module itself instead of its ScriptModule")
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"network: parameter {name!r} is lazy; run the network on a batch once"
            )
    check_evaluation_mode(network)
    for name, module in network.named_modules():
        where = f"network: layer {name!r} ({type(module).__name__})"
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{where} synchronises statistics; use the same BatchNorm without it"
            )
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch and module.running_mean is None:
            raise ValueError(
                f"{where} normalises by the statistics of the batch (no running "
                "statistics), so that an output depends on the other examples"
            )


def check_evaluation_mode(network: nn.Module) -> None:
    """Refuse a network in which a layer behaves as it does in training.

    Raises:
        ValueError: Names the layer.
    """
    for name, module in network.named_modules():
        if module.training and _has_modes(module):
            raise ValueError(
                f"network: layer {name!r} ({type(module).__name__}) is in training "
                "mode; call network.eval() first"
            )


def _has_modes(module: nn.Module) -> bool:
    """Whether it computes something else in training, as far as its code says."""
    code = getattr(type(module).forward, "__code__", None)
    return isinstance(module, _BY_MODE) or "training" in getattr(code, "co_names", ())


def _names(
    network: nn.Module, parameters: dict[str, nn.Parameter], weights: Weights
) -> list[str]:
    floating = [n for n, p in parameters.items() if _is_number(p)]
    trained = [n for n in floating if parameters[n].requires_grad]
    if weights is None:
        return trained
    if weights == "all":
        return floating
    if weights == "no_norms":
        norms = _owned_by(network, NORMS)
        return [n for n in trained if id(parameters[n]) not in norms]
    if weights == "last_layer":
        return _last_layer(network, parameters)
    if callable(weights):
        return [n for n in floating if weights(n, parameters[n])]
    patterns = [weights] if isinstance(weights, str) else weights
    if not isinstance(patterns, Sequence) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise TypeError(
            "weights: expected None, a string, a sequence of strings or a function, "
            f"found {weights!r}"
        )
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in floating):
            raise ValueError(
                f"weights: {pattern!r} matches no parameter of "
                f"{type(network).__name__}; it has {_listed(parameters)}"
            )
    return [n for n in floating if any(fnmatchcase(n, p) for p in patterns)]


def _last_layer(network: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    layers = [
        module
        for module in network.modules()
        if not isinstance(module, NORMS)
        and any(True for _ in module.parameters(recurse=False))
    ]
    last = {id(p) for p in layers[-1].parameters(recurse=False)} if layers else set()
    return [n for n, p in parameters.items() if id(p) in last]


def _owned_by(network: nn.Module, kinds: tuple[type, ...]) -> set[int]:
    return {
        id(parameter)
        for module in network.modules()
        if isinstance(module, kinds)
        for parameter in module.parameters(recurse=False)
    }


def _is_number(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _check_weight(name: str, weight: Tensor, first_name: str, first: Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"weights: parameter {name!r} is {weight.dtype}; derivatives need float32 "
            "or float64, so convert a copy: copy.deepcopy(network).float()"
        )
    if (weight.dtype, weight.device) != (first.dtype, first.device):
        raise TypeError(
            f"weights: parameter {name!r} is {weight.dtype} on {weight.device}, but "
            f"{first_name!r} is {first.dtype} on {first.device}; expected one dtype "
            "and one device"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"weights: parameter {name!r} is not finite")


def _words(weights: Weights) -> str:
    if weights is None:
        return "None (all parameters that need a gradient)"
    return "the function" if callable(weights) else repr(weights)


def _listed(parameters: dict[str, nn.Parameter], most: int = 12) -> str:
    names = ", ".join(repr(name) for name in list(parameters)[:most])
    rest = len(parameters) - most
    return f"{names or 'none'}" + (f" and {rest} more" if rest > 0 else "")
