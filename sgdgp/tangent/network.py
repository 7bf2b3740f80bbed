"""Which networks have a tangent model, and which of their weights it is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
    first = parameters[names[0]]
    for name in names:
        weight = parameters[name]
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"weights: parameter {name!r} is {weight.dtype}; derivatives need "
                "float32 or float64, so convert a copy: copy.deepcopy(network).float()"
            )
        if (weight.dtype, weight.device) != (first.dtype, first.device):
            raise TypeError(
                f"weights: parameter {name!r} is {weight.dtype} on {weight.device}, "
                f"but {names[0]!r} is {first.dtype} on {first.device}; expected one "
                "dtype and one device"
            )
        if not torch.isfinite(weight).all():
            raise ValueError(f"weights: parameter {name!r} is not finite")
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
        code = getattr(type(module).forward, "__code__", None)
        # It computes something else in training, as far as its code says.
        has_modes = "training" in getattr(code, "co_names", ())
        if module.training and (has_modes or isinstance(module, _BY_MODE)):
            raise ValueError(
                f"network: layer {name!r} ({type(module).__name__}) is in training "
                "mode; call network.eval() first"
            )


def arguments(x: Any) -> Any:
    """A network's inputs with mappings of any kind as dictionaries."""
    if isinstance(x, Mapping):
        return {key: arguments(part) for key, part in x.items()}
    if isinstance(x, list | tuple):
        parts = [arguments(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def used_last(names: Mapping[int, str], run: Callable[[], object]) -> str | None:
    """The last of some tensors that a function of torch gets in a run.

    Args:
        names: Their names by ``id``.
        run: Runs the network.
    """
    with _Uses(names) as uses:
        run()
    return uses.last


def inputs_of_linear(weight: Tensor, run: Callable[[], object]) -> Tensor | None:
    """What a linear layer gets that is called once in a run; None if it is not.

    Args:
        weight: The layer's.
        run: Runs the network.
    """
    with _LinearInputs(weight) as found:
        run()
    return found.inputs[0] if len(found.inputs) == 1 else None


class _LinearInputs(TorchFunctionMode):
    """Notes inputs of linear layers with a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function's value."""
        if func is F.linear and len(args) > 1 and args[1] is self._weight:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


class _Uses(TorchFunctionMode):
    """Notes which tensors functions get."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.last: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function's value."""
        for leaf in tree_leaves((args, kwargs)):
            self.last = self._names.get(id(leaf), self.last)
        return func(*args, **(kwargs or {}))


def _names(
    network: nn.Module, parameters: dict[str, nn.Parameter], weights: Weights
) -> list[str]:
    floating = [
        n for n, p in parameters.items() if p.is_floating_point() or p.is_complex()
    ]
    trained = [n for n in floating if parameters[n].requires_grad]
    if weights is None:
        return trained
    if weights == "all":
        return floating
    if weights == "no_norms":
        norms = [m for m in network.modules() if isinstance(m, NORMS)]
        scales = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
        return [n for n in trained if id(parameters[n]) not in scales]
    if weights == "last_layer":
        others = [m for m in network.modules() if not isinstance(m, NORMS)]
        owned = [{id(p) for p in m.parameters(recurse=False)} for m in others]
        last = next(filter(None, reversed(owned)), set())
        return [n for n, p in parameters.items() if id(p) in last]
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


def _words(weights: Weights) -> str:
    if weights is None:
        return "None (all parameters that need a gradient)"
    return "the function" if callable(weights) else repr(weights)


def _listed(parameters: dict[str, nn.Parameter], most: int = 12) -> str:
    names = ", ".join(repr(name) for name in list(parameters)[:most])
    rest = len(parameters) - most
    return f"{names or 'none'}" + (f" and {rest} more" if rest > 0 else "")
