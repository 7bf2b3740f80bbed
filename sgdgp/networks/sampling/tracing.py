"""Which axes of a network's weights count the same hidden units, from one run of it.

The network runs once on some inputs, and every function of torch that it calls says
what it does to the units: ``RULES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sgdgp.networks.sampling.units import (
    Axis,
    Factor,
    Space,
    Trace,
    Value,
    aligned,
    fitted,
    leaves,
    plain,
    size_of,
    split,
    values_of,
)


def traced(
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    constants: Mapping[str, str],
    output: Callable[[Any], Any] | None = None,
) -> Trace:
    """Run a network and find which units may be exchanged.

    Args:
        network: In evaluation mode.
        args: Its arguments.
        kwargs: Those with names.
        constants: Parameters and buffers that are the same in all draws, by name, and
            what they are: an axis along which their entries differ holds still.
        output: Takes what the network returns to what counts. Default: all of it.

    Raises:
        ValueError: A function of torch whose symmetry is not known; names the layer.
    """
    tracer = Tracer(network, constants)
    hooks = []
    for name, module in network.named_modules():
        enter, leave = tracer.hooks(name, module)
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad(), tracer:
            out = network(*args, **kwargs)
            out = out if output is None else output(out)
    finally:
        for hook in hooks:
            hook.remove()
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            for factor in tracer.value(leaf).factors():
                factor.space.hold()
    tracer.close()
    return tracer.trace


class Tracer(TorchFunctionMode):
    """Follows the axes of tensors through the functions of torch that run in it."""

    def __init__(self, network: nn.Module, constants: Mapping[str, str]) -> None:
        super().__init__()
        self.trace = Trace()
        self._layers: list[str] = []
        # The tensors are held so that no other has their id.
        self._values: dict[int, tuple[Tensor, Value]] = {}
        self._indices: dict[int, tuple[Tensor, list[Factor]]] = {}
        held = [*network.named_parameters(), *network.named_buffers()]
        for name, tensor in held:
            axes = [
                [Factor(Space(size), frozenset({(name, i)}))] if size > 1 else []
                for i, size in enumerate(tensor.shape)
            ]
            if name in constants:
                _hold_where_it_differs(tensor, axes, f"{constants[name]} {name!r}")
            self.trace.axes[name] = axes
            self._values[id(tensor)] = tensor, Value(axes, is_weight=True)

    def hooks(self, name: str, module: nn.Module) -> tuple[Callable, Callable]:
        """Told when a layer begins and ends, so that errors can name it."""

        def enter(*_: Any) -> None:
            kind = type(module).__name__
            self._layers.append(
                f"layer {name!r} ({kind})" if name else f"the forward of {kind}"
            )
            self.trace.layer = self._layers[-1]

        def leave(*_: Any) -> None:
            self._layers.pop()
            self.trace.layer = self._layers[-1] if self._layers else ""

        return enter, leave

    def close(self) -> None:
        """Let axes of parameters hold still that no function has used."""
        for name, axes in self.trace.axes.items():
            for i, axis in enumerate(axes):
                if (name, i) not in self.trace.roles:
                    for factor in axis:
                        factor.space.hold()

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor: of one from elsewhere, that nothing can move."""
        found = self._values.get(id(tensor))
        return found[1] if found else Value([plain(size) for size in tensor.shape])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function's value, whose axes are followed."""
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        values = [self.value(t) for t in inputs if id(t) in self._values]
        for tensor in inputs:
            for factor in self._indices.get(id(tensor), (tensor, []))[1]:
                factor.space.hold(f"{self.trace.layer} asks which unit is largest")
        out = func(*args, **kwargs)
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = name_of(func)
        self.trace.calls += name in CONTRACTIONS
        moving = any(not f.space.still for v in values for f in v.factors())
        if moving and name in ("setitem", "set"):  # in place, and nothing comes out
            raise self._error(name)
        if not found or not moving:
            for tensor in found:  # what was known before it was changed in place
                self._values.pop(id(tensor), None)
            return out
        rule = RULES.get(name)
        call = Call(self.trace, self.value, name, args, kwargs, found[0])
        try:
            if rule is None:
                raise _Unknown
            value = rule(call)
        except (_Unknown, IndexError, AttributeError, TypeError) as error:
            raise self._error(name) from error
        for tensor in found:
            if len(found) > 1 and not tensor.is_floating_point():
                # Where a maximum is: of no matter to what asks for its value alone.
                factors = [f for v in values for f in v.factors()]
                self._indices[id(tensor)] = tensor, factors
                continue
            known = fitted(value, tensor.shape)
            if known is not None:
                self._values[id(tensor)] = tensor, known
            elif tensor.is_floating_point():
                raise self._error(name)
        return out

    def _error(self, name: str) -> ValueError:
        return ValueError(
            f"network: {self.trace.layer} calls {name!r} of hidden units, whose "
            "symmetry is not known; give it by hand: SymmetryGroup.given(network,"
            " {'hidden': ('odd', [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])})"
        )


class _Unknown(Exception):
    """No rule for what a function is asked."""


@dataclass(frozen=True)
class Call:
    """A call of a function of torch.

    Attributes:
        trace: What it leaves its marks in.
        value_of: From a tensor to what is known of it.
        name: The function's.
        args: Its arguments.
        kwargs: Those with names.
        out: The first tensor of what it returned.
    """

    trace: Trace
    value_of: Callable[[Tensor], Value]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Tensor

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def tensor(self, position: int, name: str = "input") -> Value:
        """What is known of an argument."""
        found = self.get(position, name)
        if not isinstance(found, Tensor):
            raise _Unknown
        return self.value_of(found)

    def optional(self, position: int, name: str) -> Value | None:
        """The same; None if it is not there."""
        found = self.get(position, name)
        return self.value_of(found) if isinstance(found, Tensor) else None


def name_of(func: Callable[..., Any]) -> str:
    """A function's name without what says that it is a method, or in place."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    operator = re.fullmatch(r"__(\w+)__", name)
    if operator:
        name = operator[1]
        if name.removeprefix("i") in ("add", "sub", "mul", "truediv", "div"):
            name = name.removeprefix("i")
    return name.rstrip("_")


def _hold_where_it_differs(tensor: Tensor, axes: list[Axis], reason: str) -> None:
    """Constants leave units alike only where they are the same for all."""
    for i, axis in enumerate(axes):
        if axis and not torch.equal(tensor, tensor.narrow(i, 0, 1).expand_as(tensor)):
            axis[0].space.hold(reason)
        elif axis:
            axis[0].space.restrict()


def _elementwise(odd: bool, homogeneous: bool) -> Callable[[Call], Value]:
    return lambda call: call.trace.mapped(call.tensor(0), odd, homogeneous)


def _dropout(call: Call) -> Value:
    if call.get(2, "training", True):
        raise _Unknown
    return call.tensor(0)


def _clamp(call: Call) -> Value:
    hard = call.name == "hardtanh"
    low = call.get(1, "min_val" if hard else "min", -1.0 if hard else None)
    high = call.get(2, "max_val" if hard else "max", 1.0 if hard else None)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise _Unknown
    odd = low is not None and high is not None and low == -high
    homogeneous = (low, high) in ((0, None), (None, 0))
    return call.trace.mapped(call.tensor(0), odd, homogeneous)


def _power(call: Call) -> Value:
    exponent = call.get(1, "exponent")
    if not isinstance(exponent, int | float):
        raise _Unknown
    odd = exponent % 2 == 1
    return call.trace.mapped(call.tensor(0), odd, homogeneous=False)


def _prelu(call: Call) -> Value:
    value, slope = call.tensor(0), call.tensor(1, "weight")
    call.trace.mapped(value, odd=False, homogeneous=True)
    beside = _along(slope, 1 if len(value.axes) > 1 else 0, len(value.axes))
    return call.trace.multiplied(value, beside)


def _sum(call: Call) -> Value:
    value, other = call.optional(0, "input"), call.optional(1, "other")
    if value and other:
        return call.trace.added(value, other)
    value = value or other
    if value is None:
        raise _Unknown
    return call.trace.mapped(value, odd=False, homogeneous=False)


def _product(call: Call) -> Value:
    value, other = call.optional(0, "input"), call.optional(1, "other")
    if value and other:
        return call.trace.multiplied(value, other)
    value = value or other
    if value is None:
        raise _Unknown
    inverse = call.name in ("rdiv", "rtruediv")
    return call.trace.mapped(value, odd=True, homogeneous=not inverse)


def _quotient(call: Call) -> Value:
    value, other = call.tensor(0), call.optional(1, "other")
    if call.kwargs.get("rounding_mode"):
        value = call.trace.mapped(value, odd=False, homogeneous=False)
    return call.trace.multiplied(value, call.trace.opaque(other)) if other else value


def _matmul(call: Call) -> Value:
    a, b = call.tensor(0), call.tensor(1, "other" if call.name == "matmul" else "mat2")
    return _matrix_product(call.trace, a, b)


def _matrix_product(trace: Trace, a: Value, b: Value) -> Value:
    along = max(len(b.axes) - 2, 0)
    trace.contracted(0, a, len(a.axes) - 1, b, along)
    both = a.is_weight and b.is_weight
    rows = a.axes[-2:-1]
    columns = b.axes[-1:] if len(b.axes) > 1 else []
    for value, axis in ((a, rows), (b, columns)):
        if value.is_weight and not both:
            trace.assign([f for part in axis for f in part], "out")
    batch = aligned(Value(a.axes[:-2]), Value(b.axes[:-2]))
    for x, y in batch:
        if x and y:
            trace.assign([*x, *y], "fixed")
            for factor in [*x, *y]:
                factor.space.restrict()
    axes = [trace.unify(x, y) for x, y in batch] + rows + columns
    return Value(axes if both else [values_of(axis) for axis in axes], both)


def _addmm(call: Call) -> Value:
    a, b = call.tensor(1, "mat1"), call.tensor(2, "mat2")
    return call.trace.added(_matrix_product(call.trace, a, b), call.tensor(0))


def _linear(call: Call) -> Value:
    trace = call.trace
    x, weight = call.tensor(0), call.tensor(1, "weight")
    bias = call.optional(2, "bias")
    if x.is_weight and not weight.is_weight:
        raise _Unknown
    out = _matrix_product(trace, x, Value(weight.axes[::-1], weight.is_weight))
    return trace.added(out, bias) if bias else out


def _convolution(call: Call) -> Value:
    trace = call.trace
    transposed = "transpose" in call.name
    x, weight = call.tensor(0), call.tensor(1, "weight")
    bias = call.optional(2, "bias")
    groups = call.get(6, "groups", 1)
    count = int(call.name[-2])
    channel = len(x.axes) - count - 1
    shapes = [plain(size) for size in call.out.shape[channel + 1 :]]
    for axis in weight.axes[2:]:
        trace.hold(axis)
    _mix(trace, x.axes[channel + 1 :])
    inputs = x.axes[channel]
    size = size_of(inputs)
    into, out = (0, 1) if transposed else (1, 0)
    if groups == 1:
        trace.contracted(0, x, channel, weight, into)
        channels = weight.axes[out]
        trace.assign(channels, "out")
    elif groups == size and not transposed:
        many = call.out.shape[channel] // size
        channels = trace.unify(weight.axes[0], [*inputs, *plain(many)])
        trace.assign(channels, "fixed")
    else:
        reason = f"{trace.layer} is a convolution in {groups} groups"
        for axis in (inputs, *weight.axes[:2]):
            trace.hold(axis, reason)
        channels = plain(call.out.shape[channel], reason)
    value = Value([*x.axes[:channel], values_of(channels), *shapes])
    if bias:
        value = trace.added(value, _along(bias, channel, len(value.axes)))
    return value


def _along(value: Value, axis: int, ndim: int) -> Value:
    """A vector that stands along one axis of several."""
    axes: list[Axis] = [[] for _ in range(ndim)]
    axes[axis] = value.axes[0] if value.axes else []
    return Value(axes, value.is_weight)


def _affine(
    trace: Trace, value: Value, weight: Value | None, bias: Value | None
) -> Value:
    if weight:
        value = trace.multiplied(value, weight)
    return trace.added(value, bias) if bias else value


def _batch_norm(call: Call) -> Value:
    trace, value, ndim = call.trace, call.tensor(0), call.out.ndim
    if call.get(5, "training", False):
        raise _Unknown
    mean, variance, weight, bias = (
        None if found is None else _along(found, 1, ndim)
        for found in (
            call.optional(1, "running_mean"),
            call.optional(2, "running_var"),
            call.optional(3, "weight"),
            call.optional(4, "bias"),
        )
    )
    if mean is None or variance is None:
        raise _Unknown
    value = trace.added(value, mean)
    value = trace.mapped(value, odd=True, homogeneous=False)
    value = trace.multiplied(value, variance)
    return _affine(trace, value, weight, bias)


def _group_norm(call: Call) -> Value:
    trace, value, ndim = call.trace, call.tensor(0), call.out.ndim
    instance = call.name == "instance_norm"
    channels = call.out.shape[1]
    groups = channels if instance else call.get(1, "num_groups")
    first = 3 if instance else 2
    if instance and call.optional(1, "running_mean"):
        raise _Unknown
    weight, bias = call.optional(first, "weight"), call.optional(first + 1, "bias")
    if groups not in (1, channels):
        trace.hold(value.axes[1], f"{trace.layer} normalises groups of channels")
    value = trace.mapped(value, odd=groups == channels, homogeneous=False)
    for factor in Value(value.axes[2:]).factors():  # their mean is taken off
        factor.space.restrict()
    parts = (None if part is None else _along(part, 1, ndim) for part in (weight, bias))
    return _affine(trace, value, *parts)


def _layer_norm(call: Call) -> Value:
    trace, value = call.trace, call.tensor(0)
    count = len(call.get(1, "normalized_shape"))
    centred = call.name == "layer_norm"
    if centred:
        for factor in (f for axis in value.axes[-count:] for f in axis):
            factor.space.restrict()
    value = trace.mapped(value, odd=True, homogeneous=False)
    bias = call.optional(3, "bias") if centred else None
    return _affine(trace, value, call.optional(2, "weight"), bias)


def _pooled(odd: bool) -> Callable[[Call], Value]:
    def rule(call: Call) -> Value:
        trace, value = call.trace, call.tensor(0)
        digits = re.search(r"(\d)d", call.name)
        count = int(digits[1]) if digits else call.out.ndim - 2
        return _spread(trace, value, call.out, count, odd)

    return rule


def _spread(trace: Trace, value: Value, out: Tensor, count: int, odd: bool) -> Value:
    """A function that mixes the entries of the last axes, for each unit alike."""
    value = trace.mapped(value, odd=odd, homogeneous=True)
    _mix(trace, value.axes[-count:])
    mixed = [plain(size) for size in out.shape[-count:]]
    return Value([*value.axes[:-count], *mixed], value.is_weight)


def _mix(trace: Trace, axes: Sequence[Axis]) -> None:
    """Units along these axes are neighbours."""
    for axis in axes:
        for factor in leaves(axis):
            if not factor.space.still:
                factor.space.hold(f"{trace.layer} mixes neighbours along the axis")


def _chosen(call: Call) -> Value:
    trace = call.trace
    condition, value, other = (
        call.get(i, n) for i, n in enumerate(("condition", "input", "other"))
    )
    found = call.value_of(condition)
    for tensor in (value, other):
        if isinstance(tensor, Tensor):
            found = trace.added(found, call.value_of(tensor))
    return trace.mapped(found, odd=False, homogeneous=False)


def _pad(call: Call) -> Value:
    count = len(call.get(1, "pad")) // 2
    value = call.tensor(0)
    if call.get(2, "mode", "constant") == "constant" and call.get(3, "value"):
        value = call.trace.mapped(value, odd=False, homogeneous=False)
    return _spread(call.trace, value, call.out, count, odd=True)


def _reshaped(call: Call) -> Value:
    value = call.tensor(0)
    factors, axes = value.factors(), []
    for size in call.out.shape:
        axis, missing = [], size
        while missing > 1:
            factor, need = factors[0], factors[0].space.size
            if missing % need == 0:
                axis.append(factor)
                factors, missing = factors[1:], missing // need
            elif need % missing == 0:
                split(factor.space, missing)
                factors = leaves(factors)
            else:
                raise _Unknown
        axes.append(axis)
    # A split has changed what the axes before it are made of, too.
    return Value([leaves(axis) for axis in axes], value.is_weight)


def _turned(call: Call) -> Value:
    value = call.tensor(0)
    shape = range(2, 2 + len(value.axes))
    marked = torch.empty(*shape, device="meta")
    if call.name in ("T", "mT", "H", "mH"):
        marked = getattr(marked, call.name)
    elif call.name == "t":
        marked = marked.t()
    else:
        marked = getattr(marked, call.name)(*call.args[1:], **call.kwargs)
    return Value([value.axes[size - 2] for size in marked.shape], value.is_weight)


def _widened(call: Call) -> Value:
    value, shape = call.tensor(0), call.out.shape
    axes: list[Axis] = [[] for _ in range(len(shape) - len(value.axes))] + value.axes
    return Value(
        [a or plain(s) for a, s in zip(axes, shape, strict=True)], value.is_weight
    )


def _reduced(odd: bool, homogeneous: bool) -> Callable[[Call], Value]:
    def rule(call: Call) -> Value:
        trace, value = call.trace, call.tensor(0)
        dim = call.get(1, "dim", call.kwargs.get("axis"))
        if isinstance(dim, Tensor):  # max(x, y)
            both = trace.added(value, call.value_of(dim))
            return trace.mapped(both, odd=False, homogeneous=True)
        ndim = len(value.axes)
        dims = range(ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        gone = {d % ndim for d in dims}
        for i in gone:
            for factor in value.axes[i]:
                factor.space.restrict()
        value = trace.mapped(value, odd=odd, homogeneous=homogeneous)
        if value.is_weight:
            value = trace.opaque(value)
        kept = call.out.ndim == ndim
        axes = [
            [] if i in gone else axis
            for i, axis in enumerate(value.axes)
            if kept or i not in gone
        ]
        return Value(axes, value.is_weight)

    return rule


def _indexed(call: Call) -> Value:
    trace, value, index = call.trace, call.tensor(0), call.args[1]
    index = index if isinstance(index, tuple) else (index,)
    used = sum(part is not None and part is not Ellipsis for part in index)
    axes: list[Axis] = []
    left = list(value.axes)
    sizes = [size_of(axis) for axis in left]
    for part in index:
        if part is None:
            axes.append([])
        elif part is Ellipsis:
            for _ in range(len(value.axes) - used):
                axes.append(left.pop(0))
                sizes.pop(0)
        elif isinstance(part, slice):
            axis, size = left.pop(0), sizes.pop(0)
            if part.indices(size) != (0, size, 1):
                _picked(trace, axis)
                axis = plain(len(range(*part.indices(size))))
            axes.append(axis)
        elif isinstance(part, int) and not isinstance(part, bool):
            _picked(trace, left.pop(0))
            sizes.pop(0)
        else:
            raise _Unknown
    return Value([*axes, *left], value.is_weight)


def _picked(trace: Trace, axis: Axis) -> None:
    """Some of the units go another way than the others."""
    for factor in axis:
        if not factor.space.still:
            factor.space.hold(f"{trace.layer} takes some of the units")
    trace.assign(axis, "fixed")


def _parts(call: Call) -> Value:
    value = call.tensor(0)
    gone = call.name in ("unbind", "select")
    first = gone or call.name == "narrow"
    dim = call.get(1 if first else 2, "dim", 0) % len(value.axes)
    _picked(call.trace, value.axes[dim])
    axes = list(value.axes)
    axes[dim : dim + 1] = [] if gone else [plain(call.out.shape[dim])]
    return Value(axes, value.is_weight)


def _chained(call: Call) -> Value:
    trace = call.trace
    values = [call.value_of(tensor) for tensor in call.get(0, "tensors")]
    dim = call.get(1, "dim", 0) % call.out.ndim
    if call.name == "stack":
        values = [
            Value([*v.axes[:dim], [], *v.axes[dim:]], v.is_weight) for v in values
        ]
    for value in values:
        for factor in value.axes[dim]:
            if not factor.space.still:
                factor.space.hold(f"{trace.layer} joins units end to end")
        trace.assign(value.axes[dim], "fixed")
    pieces = [
        Value([[] if i == dim else a for i, a in enumerate(v.axes)], v.is_weight)
        for v in values
    ]
    found = pieces[0]
    for piece in pieces[1:]:
        found = trace.added(found, piece)
    axes = list(found.axes)
    axes[dim] = plain(call.out.shape[dim])
    return Value(axes, found.is_weight)


def _embedding(call: Call) -> Value:
    index, weight = call.get(0, "input"), call.tensor(1, "weight")
    call.trace.hold(weight.axes[0])
    call.trace.assign(weight.axes[1], "out")
    return Value([*(plain(s) for s in index.shape), values_of(weight.axes[1])])


def _table(names: str, rule: Callable[[Call], Value]) -> dict[str, Any]:
    return dict.fromkeys(names.split(), rule)


def _each(stems: Iterable[str], dims: Iterable[int] = (1, 2, 3)) -> str:
    return " ".join(f"{stem}{d}d" for stem in stems for d in dims)


CONTRACTIONS = {
    **_table("matmul mm bmm mv", _matmul),
    **_table(_each(["conv", "conv_transpose"]), _convolution),
    "linear": _linear,
    "addmm": _addmm,
}
"""Functions that may sum over units."""

RULES: dict[str, Callable[[Call], Value]] = {
    **CONTRACTIONS,
    **_table(
        "clone contiguous detach data neg negative positive to type float double "
        "type_as cpu cuda requires_grad zeros_like alias",
        _elementwise(odd=True, homogeneous=True),
    ),
    **_table(
        "tanh erf softsign sin sinh asinh arcsinh atan arctan asin arcsin tanhshrink "
        "softshrink hardshrink",
        _elementwise(odd=True, homogeneous=False),
    ),
    **_table("relu leaky_relu abs absolute", _elementwise(odd=False, homogeneous=True)),
    **_table(
        "sigmoid log_sigmoid logsigmoid silu gelu elu selu celu mish softplus relu6 "
        "hardsigmoid hardswish exp expm1 log log1p sqrt rsqrt cos square reciprocal "
        "erfc threshold softmax log_softmax softmin normalize ones_like gt lt ge le",
        _elementwise(odd=False, homogeneous=False),
    ),
    **_table("hardtanh clamp clip clamp_min", _clamp),
    **_table(
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
        _dropout,
    ),
    "pow": _power,
    "prelu": _prelu,
    "batch_norm": _batch_norm,
    "pad": _pad,
    "where": _chosen,
    "getitem": _indexed,
    "embedding": _embedding,
    **_table("add radd sub rsub subtract", _sum),
    **_table("mul rmul multiply rdiv rtruediv", _product),
    **_table("div truediv divide true_divide", _quotient),
    **_table("group_norm instance_norm", _group_norm),
    **_table("layer_norm rms_norm", _layer_norm),
    **_table(
        _each(["max_pool", "adaptive_max_pool"])
        + " "
        + _each(["max_pool", "adaptive_max_pool"]).replace("d", "d_with_indices"),
        _pooled(odd=False),
    ),
    **_table(
        _each(["avg_pool", "adaptive_avg_pool"]) + " interpolate upsample",
        _pooled(odd=True),
    ),
    **_table(
        "flatten reshape view view_as reshape_as unflatten squeeze unsqueeze ravel",
        _reshaped,
    ),
    **_table(
        "permute transpose t T mT H mH swapaxes swapdims movedim moveaxis", _turned
    ),
    **_table("expand expand_as broadcast_to", _widened),
    **_table("mean sum", _reduced(odd=True, homogeneous=True)),
    **_table(
        "amax amin max min maximum minimum", _reduced(odd=False, homogeneous=True)
    ),
    **_table("chunk split tensor_split narrow unbind select", _parts),
    **_table("cat concat concatenate stack", _chained),
}
"""What functions of torch do to units, by name."""
