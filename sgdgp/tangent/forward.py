"""Directional derivatives of a network for many directions, in one forward pass.

``torch.func`` has forward-mode differentiation, but it runs the network's own pass
once more, and takes a batch norm with constant statistics apart into many passes over
the activations. Here the network runs once, with an autograd graph for the reverse
mode; each of its functions also maps the derivatives of its arguments. A convolution
or batch norm does so by a rule (``RULES``), everything else by ``torch.func`` on that
one function.

A rule is called as ``rule(of, func, *args, **kwargs)`` with the arguments of the
function, and ``of`` to look derivatives up. It returns those of the value, or None
where it does not fit. Derivatives in k directions come in parts, so that those of one
part stay in the cache.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from sgdgp.core.errors import SgdgpError
from sgdgp.tangent.layers import PASS

Chunks = list[Tensor]
"""Derivatives of a tensor in k directions: parts (c, *shape) of them."""

Known = Callable[[Any], Chunks | None]
"""Derivatives of an argument, None for a constant."""

_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"}


class NoForwardRule(SgdgpError, NotImplementedError):
    """A function of the network has no derivative here; names the layer."""


class ForwardMode(TorchFunctionMode):
    """Within it, functions of tensors with known derivatives pass them on.

    Every tensor that needs a gradient must come from the given ones: that is how a
    function that went unnoticed is found. Derivatives of a tensor live as long as the
    tensor itself, so :func:`light_graph` has to be active, too.

    Args:
        tensors: Where derivatives are known.
        tangents: Those of each, in the same parts.
        network: Whose layers errors name.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        tangents: Sequence[Chunks],
        network: nn.Module,
    ) -> None:
        super().__init__()
        self.widest = 1
        self._names = {id(module): name for name, module in network.named_modules()}
        self._thread = threading.get_ident()
        self._known = WeakTensorKeyDictionary()
        for tensor, tangent in zip(tensors, tangents, strict=True):
            self._known[tensor] = tangent

    def of(self, tensor: Any) -> Chunks | None:
        """Derivatives of a tensor, None for a constant."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        found = self._known.get(tensor)
        if found is None:
            source = tensor.grad_fn.name() if tensor.grad_fn is not None else "a weight"
            raise NoForwardRule(
                f"no forward derivative of {source}, which is used{self._layer()}"
            )
        return found

    def __enter__(self) -> ForwardMode:
        """Also watch what layers return: the first unknown derivative names one."""
        hook = torch.nn.modules.module.register_module_forward_hook(self._watch)
        self._handle = hook
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """No longer."""
        self._handle.remove()
        super().__exit__(*error)

    def _watch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = self._names.get(id(module))
        # Every thread calls the hook.
        if name is None or threading.get_ident() != self._thread:
            return
        for tensor in tree_leaves(output):
            if _varies(tensor) and tensor not in self._known:
                source = tensor.grad_fn.name() if tensor.grad_fn is not None else ""
                raise NoForwardRule(
                    f"no forward derivative of {source} (in layer {name!r}, "
                    f"{type(module).__name__})"
                )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The function's value, after noting its derivatives."""
        kwargs = kwargs or {}
        changed = _changed(func, args, kwargs)
        if changed is None:
            out = func(*args, **kwargs)
            if any(_varies(o) for o in tree_leaves(out)):
                self._put(out, self._derivatives(func, args, kwargs))
            return out
        if not any(_varies(leaf) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if changed._is_view():
            name = getattr(func, "__name__", str(func))
            raise NoForwardRule(f"{name} changes a view in place{self._layer()}")
        found = self._derivatives(_out_of_place(func), args, kwargs, always=changed)
        out = func(*args, **kwargs)
        self._put(changed, found)
        return out

    def _put(self, out: Any, parts: Sequence[Tensor | tuple[Tensor, ...]]) -> None:
        for i, tensor in enumerate(_numbers(out)):
            if _varies(tensor):
                self._known[tensor] = [p if torch.is_tensor(p) else p[i] for p in parts]
                self.widest = max(self.widest, tensor.numel())

    def _derivatives(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        always: Tensor | None = None,
    ) -> Sequence[Tensor | tuple[Tensor, ...]]:
        """Those of all outputs, part by part, by a rule that fits or ``torch.func``."""
        if func in RULES:
            with torch.no_grad():
                found = RULES[func](self.of, func, *args, **kwargs)
            if found is not None:
                return found
        leaves, spec = tree_flatten((args, kwargs))
        moving = [
            i
            for i, leaf in enumerate(leaves)
            if _varies(leaf) or (always is not None and leaf is always)
        ]
        chunks = [self.of(leaves[i]) for i in moving]

        point = tuple(leaves[i].detach() for i in moving)

        def value(*inputs: Tensor) -> tuple[Tensor, ...]:
            """The function's tensors, with other ones in those places."""
            replaced = list(leaves)
            for i, tensor in zip(moving, inputs, strict=True):
                replaced[i] = tensor
            args, kwargs = tree_unflatten(replaced, spec)
            return _numbers(func(*args, **kwargs))

        def push(*tangents: Tensor) -> tuple[Tensor, ...]:
            return jvp(value, point, tangents)[1]

        known = next(c for c in chunks if c is not None)
        parts = [
            [
                p.new_zeros(len(known[j]), *p.shape) if c is None else c[j]
                for p, c in zip(point, chunks, strict=True)
            ]
            for j in range(len(known))
        ]
        try:
            # The level of torch's forward mode is the whole process's.
            with PASS, torch.no_grad():
                return [vmap(push)(*part) for part in parts]
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise NoForwardRule(f"{error}{self._layer()}") from error

    def _layer(self) -> str:
        """Where in the network we are, by the innermost module on the stack."""
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in self._names:
                name = self._names[id(module)] or "the network itself"
                return f" (in layer {name!r}, {type(module).__name__})"
            frame = frame.f_back  # type: ignore[assignment]
        return ""


@contextmanager
def light_graph() -> Iterator[None]:
    """Graphs built within hold values, not the tensors that the network handled."""
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept):
        yield


def _varies(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _numbers(out: Any) -> tuple[Tensor, ...]:
    tensors = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    return tuple(tensor for tensor in tensors if tensor.is_floating_point())


def _changed(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The tensor that a function changes in place, if it does."""
    name = getattr(func, "__name__", "")
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    in_place = (
        name in _IN_PLACE
        or (name.endswith("_") and not name.endswith("__"))
        or kwargs.get("inplace") is True
    )
    found = args[0] if args else kwargs.get("input")
    return found if in_place and isinstance(found, Tensor) else None


def _out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which returns its first argument's new value."""
    name = getattr(func, "__name__", "")
    name = name[3:-2] if name in _IN_PLACE else name[:-1]
    same = getattr(Tensor, {"truediv": "div"}.get(name, name), None)
    if callable(same):
        return same
    return func if func in RULES else functools.partial(_on_copy, func)


def _on_copy(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("inplace"):
        return func(*args, **{**kwargs, "inplace": False})
    if not args or "out" in kwargs:
        raise NotImplementedError(f"{func} writes into an argument given by name")
    copy = args[0].clone()
    func(copy, *args[1:], **kwargs)
    return copy


def agrees_with_gradients(
    product: Callable[[Tensor], Tensor],
    outputs: Tensor,
    pull: Callable[[Tensor], Sequence[Tensor]],
) -> bool:
    """Whether <J w, u> = <w, J^T u> for one u and three w that show what is missing.

    One direction w is made of the gradients themselves, each tensor's scaled to count
    as much as the others', and shows what the product lacks. Two are random, scaled
    in the same way, and show what the gradients lack: they have entries everywhere.

    Args:
        product: J w as (k, b, C), for w (D, k).
        outputs: Where the gradients are taken (b, C).
        pull: Gradients of each weight for a cotangent (b, C).
    """
    generator = torch.Generator(outputs.device).manual_seed(0)
    u = torch.empty_like(outputs, requires_grad=False).normal_(generator=generator)
    gradients = pull(u)
    norms = torch.stack([g.double().norm() for g in gradients])
    # Not zero where gradients are, so that a product that is not is seen.
    least = 1e-9 * float(outputs.detach().norm()) + 1e-30
    top = norms.max().clamp_min(least)
    sizes = norms.clamp_min(1e-3 * top)
    rows = []
    for g, size in zip(gradients, sizes, strict=True):
        random = g.new_empty(2, g.numel()).normal_(generator=generator)
        own = (g / size.to(g)).reshape(1, -1)
        rows.append(torch.cat([own, random]) * (top / size).to(g))
    w = torch.cat(rows, 1).mT
    found = (product(w) * u).double().sum((1, 2)) / top
    total = (norms / sizes).square().sum()
    flat = torch.cat([g.flatten() for g in gradients])
    expected = torch.stack([total, *((flat @ w[:, 1:]).double() / top)])
    # Random ones are sums of both signs, of the size of the root of the total.
    slack = torch.stack([0.05 + 1e-3 * total, *(2 * [0.02 * total.sqrt()])])
    return bool(((found - expected).abs() <= slack).all())


def _addition(
    of: Known, func: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Chunks | None:
    """Residual connections."""
    both = [of(a) for a in args]
    if len(both) != 2 or kwargs or None in both or args[0].shape != args[1].shape:
        return None
    return [a + b for a, b in zip(*both, strict=True)]


def _rectifier(
    of: Known, func: Callable[..., Tensor], input: Tensor, inplace: bool = False
) -> Chunks | None:
    inputs = of(input)
    if inputs is None:
        return None
    return [torch.ops.aten.threshold_backward(t, input.detach(), 0) for t in inputs]


def _convolution(
    of: Known,
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Chunks | None:
    """Directions become examples for the input's part, channels for the weights'."""
    inputs, weights, biases = of(input), of(weight), of(bias)
    if input.ndim != weight.ndim or groups != 1:
        return None
    x, w = input.detach(), weight.detach()
    rest = (None, stride, padding, dilation, groups)
    out = []
    for j in range(len(inputs or weights or biases or [])):
        total = None
        if inputs is not None:
            shape = inputs[j].shape[:2]
            total = func(inputs[j].flatten(0, 1), w, *rest).unflatten(0, shape)
        if weights is not None:
            found = func(x, weights[j].flatten(0, 1), *rest)
            found = found.unflatten(1, (-1, w.shape[0])).transpose(0, 1)
            total = found.contiguous() if total is None else total.add_(found)
        if total is None:
            return None
        if biases is not None:
            total.add_(biases[j].unflatten(1, (-1,) + (1,) * (x.ndim - 2))[:, None])
        out.append(total)
    return out


def _linear(
    of: Known,
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Chunks | None:
    inputs, weights, biases = of(input), of(weight), of(bias)
    if weights is None or input.ndim < 2:
        return None
    x, w = input.detach(), weight.detach()
    out = []
    for j, directions in enumerate(weights):
        total = x.flatten(0, -2) @ directions.mT
        if biases is not None:
            total.add_(biases[j][:, None])
        total = total.unflatten(1, x.shape[:-1])
        out.append(total if inputs is None else total.add_(func(inputs[j], w)))
    return out


def _batch_norm(
    of: Known,
    func: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Chunks | None:
    """With constant statistics: a scale and a shift of each channel."""
    inputs, weights, biases = of(input), of(weight), of(bias)
    if training or inputs is None:
        return None
    shape = (-1,) + (1,) * (input.ndim - 2)
    scale = (running_var + eps).rsqrt()
    if weights is not None:
        normed = torch.addcmul(
            (-running_mean * scale).view(shape), input.detach(), scale.view(shape)
        )
    if weight is not None:
        scale = scale * weight.detach()
    out = []
    for j in range(len(inputs)):
        total = inputs[j] * scale.view(shape)
        if weights is not None:
            total.addcmul_(normed, weights[j].unflatten(1, shape)[:, None])
        if biases is not None:
            total.add_(biases[j].unflatten(1, shape)[:, None])
        out.append(total)
    return out


RULES: dict[Callable[..., Any], Callable[..., Chunks | None]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), _addition),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _rectifier),
}
