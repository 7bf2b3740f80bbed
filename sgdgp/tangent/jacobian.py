"""The tangent model of a network: Jacobian products at its trained weights.

Near its trained weights theta a network f is f(x) + J(x) (w - theta) + ..., with
J(x) = df(x) / dtheta (C, D). J is never stored: its products with vectors are one
forward-mode sweep, those of its transpose one reverse-mode sweep.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from sgdgp.core.checks import check_finite
from sgdgp.core.inference import ordinary, outside_inference_mode
from sgdgp.core.memory import resolve_budget
from sgdgp.core.slices import check_product, slices, tracks_gradient
from sgdgp.tangent.forward import (
    ForwardMode,
    NoForwardRule,
    agrees_with_gradients,
    light_graph,
)
from sgdgp.tangent.layers import PASS, differentiable_layers
from sgdgp.tangent.network import (
    Weights,
    arguments,
    check_evaluation_mode,
    check_network,
    chosen_weights,
    inputs_of_linear,
    used_last,
)

MOST_EXAMPLES = 256
"""Most examples in one pass, where the caller leaves it open."""

CPU_ELEMENTS = 2**20
"""Elements of one layer's derivatives together on a CPU: they stay in its cache."""


class Tangent:
    """A network as a function of its weights, and its Jacobian in them.

    The network is only read: it stays as it is, and neither it nor its weights are
    copied. It has to stay as it is, too: after a training step (any in-place change
    of a parameter or buffer) or a move to another device every call raises. Threads
    may share it: their passes go through the network one after the other.

    Args:
        network: A trained network in evaluation mode. Its first axis of outputs is
            that of the examples, all others are flattened to C outputs.
        weights: The D uncertain weights, see
            :func:`sgdgp.tangent.network.chosen_weights`; all others, and
            buffers such as batch-norm statistics, are constants. A weight tied to
            another is counted once. Default: all parameters that need a gradient.
        output: Takes what the network returns to a tensor (b, ...), for networks
            that return something else. Default: what the network returns.
        memory_budget: Bytes for temporaries. Default: half of what is free.

    Raises:
        TypeError: Not a network, or weights of an unusable dtype.
        ValueError: The network cannot be linearised as it is; says what to do.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        weights: Weights = None,
        output: Callable[[Any], Tensor] | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.network = network
        self.output = output
        with PASS:
            check_network(network)
            self._theta = chosen_weights(network, weights)
            held = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self._rest = {n: t.detach() for n, t in held.items() if n not in self._theta}
        self._held = held
        self._versions = {n: _version(t) for n, t in held.items()}
        self._is_last_layer = isinstance(weights, str) and weights == "last_layer"
        self.names = tuple(self._theta)
        self.shapes = tuple(p.shape for p in self._theta.values())
        self.slices: dict[str, slice] = {}
        self.num_weights = 0
        for name, p in self._theta.items():
            self.slices[name] = slice(self.num_weights, self.num_weights + p.numel())
            self.num_weights += p.numel()
        first = next(iter(self._theta.values()))
        self.dtype, self.device = first.dtype, first.device
        self.memory_budget = memory_budget
        # Found by the first pass: elements of the widest layer for one example, why
        # forward mode does not work for this network, and whether reverse mode twice.
        self._width = 0
        self._obstacle: str | None = None
        self._is_function = self._is_repeatable = False
        # Found by the first of several networks: torch cannot batch a layer.
        self._is_one_by_one = False
        self._is_examined = self._is_checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Tangent:
        """Itself: it never changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._check_tensors()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # They are of tensors that lie elsewhere now.
        self._versions = {n: _version(t) for n, t in self._held.items()}

    def check_unchanged(self) -> None:
        """Refuse a network that is no longer what it was; who keeps functions asks.

        Raises:
            RuntimeError: A parameter or buffer has changed since the start.
            ValueError: The network is no longer in evaluation mode.
        """
        check_evaluation_mode(self.network)
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Refuse tensors that have changed; names the first."""
        for name, tensor in self._held.items():
            if _version(tensor) != self._versions[name]:
                raise RuntimeError(
                    f"{name!r} of the network has changed since it was linearised; "
                    "linearise a copy (copy.deepcopy) of a network that goes on to "
                    "be trained or moved"
                )

    def function(self, x: Any) -> Callable[[dict[str, Tensor]], Tensor]:
        """Chosen weights by name -> outputs (b, C) at a batch.

        Args:
            x: The network's argument; a tuple or list of arguments; or a mapping of
                keyword arguments.

        Raises:
            RuntimeError: A parameter or buffer has changed since the start.
            ValueError: The network is no longer in evaluation mode, or found to be no
                function of each example alone.
        """
        self.check_unchanged()
        x = arguments(x)
        if not self._is_function:
            self._check_function(x)
        return functools.partial(self._outputs_at, x)

    @torch.no_grad()
    def outputs(self, x: Any) -> Float[Tensor, "b C"]:
        """The network's own outputs."""
        out = self.function(x)(self._theta)
        check_finite("network outputs", out)
        return out

    @torch.no_grad()
    def linear_inputs(self, x: Any) -> Tensor | None:
        """What the one linear layer gets (b, ..., d) that all chosen weights are of.

        None where they are not its weight, or that and its bias, or it is used again.
        """
        weight, *others = self.names
        owner = weight.rpartition(".")[0]
        layer = self.network.get_submodule(owner)
        bias = f"{owner}.bias".removeprefix(".")
        if type(layer) is not nn.Linear or others not in ([], [bias]):
            return None
        if self._theta[weight].ndim != 2:
            return None
        run = functools.partial(self._outputs_at, arguments(x), self._theta)
        return inputs_of_linear(self._theta[weight], run)

    def weights_of(self, rows: Float[Tensor, "k D"]) -> dict[str, Tensor]:
        """Rows of weights as tensors (k, *shape) by name."""
        return {
            name: rows[:, self.slices[name]].reshape(-1, *shape)
            for name, shape in zip(self.names, self.shapes, strict=True)
        }

    @torch.no_grad()
    def outputs_of(self, rows: Float[Tensor, "k D"], x: Any) -> Float[Tensor, "k b C"]:
        """Outputs of the networks with these weights."""
        function = self.function(x)
        if not self._width:
            with suppress(NotImplementedError):  # not for its derivatives
                self.at(x).jvp(torch.zeros_like(self.theta))
        most = self.columns_forward(x) if self._width else 8
        return torch.cat([self.batched(function, some) for some in rows.split(most)])

    def batched(
        self, function: Callable[[dict[str, Tensor]], Tensor], rows: Tensor
    ) -> Float[Tensor, "k b C"]:
        """A function's outputs of some networks, one by one where torch has to.

        Args:
            function: That of a batch, see ``function``.
            rows: Their weights (k, D).
        """
        tensors = self.weights_of(rows)
        if not self._is_one_by_one:
            try:
                return vmap(function)(tensors)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                # What is the network's own error is raised once more.
                found = _stacked(function, tensors)
                self._is_one_by_one = True
                return found
        return _stacked(function, tensors)

    def moved(self, row: Float[Tensor, " D"]) -> Tangent:
        """The tangent model at other weights, of a copy of the network."""
        if torch.equal(self.theta[:, 0], row):
            return self
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, weight in self.weights_of(row[None]).items():
                network.get_parameter(name).copy_(weight[0])
        return Tangent(
            network,
            weights=lambda name, _: name in self._theta,
            output=self.output,
            memory_budget=self.memory_budget,
        )

    @property
    def theta(self) -> Float[Tensor, "D 1"]:
        """The trained weights, in the order of derivatives."""
        return torch.cat([weight.flatten() for weight in self._theta.values()])[:, None]

    def at(self, x: Any) -> TangentBatch:
        """The Jacobian at a batch."""
        return TangentBatch(self, x)

    def examples_at_once(self) -> int:
        """Examples whose graph fits into the memory budget."""
        if not self._width:
            return 8  # not known before the first pass
        budget = resolve_budget(self.memory_budget, self.device)
        # A network of a hundred layers keeps about forty times its widest tensor.
        found = budget // (40 * self._width * self.dtype.itemsize)
        return min(max(1, found), MOST_EXAMPLES)

    def columns_at_once(self, x: Any) -> int:
        """Directions whose derivatives at x fit into the memory budget."""
        budget = resolve_budget(self.memory_budget, self.device)
        # A block of a residual network holds about six of its widest tensors.
        return max(1, budget // (6 * self._elements(x) * self.dtype.itemsize))

    def columns_forward(self, x: Any) -> int:
        """Directions that one call of a layer's function takes at x."""
        if self.device.type != "cpu":
            return self.columns_at_once(x)
        # With one thread, torch has slow 1 x 1 convolutions for fewer than 16 inputs.
        filled = -(-16 // self._examples(x))
        return max(-(-CPU_ELEMENTS // self._elements(x)), filled)

    def columns_backward(self, x: Any) -> int:
        """Cotangents that one reverse pass takes at x."""
        if self.device.type != "cpu":
            return self.columns_at_once(x)
        # Half as many: there are gradients of inputs and of weights.
        return max(1, CPU_ELEMENTS // (2 * self._elements(x)))

    def _elements(self, x: Any) -> int:
        return max(1, self._examples(x) * self._width)

    def _examples(self, x: Any) -> int:
        tensors = _tensors(x)
        return max(1, len(tensors[0])) if tensors and tensors[0].ndim else 1

    @torch.no_grad()
    def _check_function(self, x: Any) -> None:
        """Refuse what is random, or depends on the other examples.

        Raises:
            ValueError: That, or another layer than the last one was chosen as it.
        """
        first = self._outputs_at(x, self._theta)
        spread = float((first - first.mean()).abs().max())
        # More than the rounding of other kernels, and of large constant outputs.
        allowed = 5e-3 * spread + 1e-5 * float(first.abs().max())
        if not self._is_repeatable:
            change = float((self._outputs_at(x, self._theta) - first).abs().max())
            if change > allowed:
                raise ValueError(
                    "network: two passes over the same inputs differ by "
                    f"{change:.2g}; something in it is random, such as dropout outside "
                    "of evaluation mode, or remembers: switch it off"
                )
            if self._is_last_layer:
                self._check_last_layer(x)
            self._is_repeatable = True
        if len(first) < 2 or not _is_by_example(x, len(first)):
            return  # nothing to compare
        # Some networks do not take one example.
        for count in (1, (len(first) + 1) // 2):
            some = _first_examples(x, len(first), count)
            try:
                found = self._outputs_at(some, self._theta)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                continue
            change = float((found - first[:count]).abs().max())
            if change > allowed:
                raise ValueError(
                    f"network: outputs for an example differ by {change:.2g} with and "
                    "without the other examples of a batch, such as by a mean over "
                    "them; expected a function of each example alone"
                )
            break
        self._is_function = True

    def _check_last_layer(self, x: Any) -> None:
        names = {id(t): n for n, t in (self._theta | self._rest).items() if t.ndim > 1}
        last = used_last(names, lambda: self._outputs_at(x, self._theta))
        if last is not None and last not in self._theta:
            raise ValueError(
                f"weights: 'last_layer' is {list(self._theta)}, the last layer that is "
                f"registered, but {last!r} is used after it; choose by name, such as "
                f'weights="{last.rpartition(".")[0] or last}*"'
            )

    def _outputs_at(
        self,
        x: Any,
        theta: dict[str, Tensor],
        rest: dict[str, Tensor] | None = None,
    ) -> Tensor:
        positional = tuple(x) if isinstance(x, tuple | list) else (x,)
        args, kwargs = ((), x) if isinstance(x, dict) else (positional, {})
        values = {**(self._rest if rest is None else rest), **theta}
        dtype = next(iter(theta.values())).dtype
        with differentiable_layers(self.network):
            try:
                out = functional_call(self.network, values, args, kwargs)
            except RuntimeError as error:
                for leaf in _tensors(x):
                    wrong = leaf.is_floating_point() and leaf.dtype != dtype
                    if wrong or leaf.device != self.device:
                        raise TypeError(
                            f"x: found {leaf.dtype} on {leaf.device}, the network's "
                            f"weights are {dtype} on {self.device}; convert x by "
                            f"x.to(...), or the network before it is linearised"
                        ) from error
                raise
            out = out if self.output is None else self.output(out)
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
        if out.dtype != dtype:
            raise TypeError(
                f"network outputs: expected the dtype of its weights, {dtype}, "
                f"found {out.dtype}"
            )
        return out.reshape(out.shape[0], -1)


def _stacked(
    function: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor]
) -> Float[Tensor, "k b C"]:
    count = len(next(iter(tensors.values())))
    each = ({name: t[i] for name, t in tensors.items()} for i in range(count))
    return torch.stack([function(weights) for weights in each])


class TangentBatch:
    """J(x) for one batch x; all of its products share one forward pass.

    A product is differentiable in x and in the vector where these need a gradient.
    """

    @outside_inference_mode
    def __init__(self, tangent: Tangent, x: Any) -> None:
        self._tangent = tangent
        self._x = tree_map_only(Tensor, ordinary, arguments(x))
        self._function = tangent.function(self._x)
        self._leaves = {
            n: p.detach().requires_grad_() for n, p in tangent._theta.items()
        }
        self._graph: Tensor | None = None

    @property
    def outputs(self) -> Float[Tensor, "b C"]:
        """The network's own outputs."""
        return self._run().detach()

    @outside_inference_mode
    def jvp(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "b C k"]:
        """J(x) w.

        Raises:
            NotImplementedError: A layer has no derivatives of this kind; names it.
        """
        check_product("w", w, self._tangent.num_weights)
        self._examine()
        if tracks_gradient(w, *_tensors(self._x)):
            self._check_reverse()
            return self._reverse_twice(w, create_graph=True)
        pushed = self._push(w)
        if pushed is not None:
            return pushed
        self._check_reverse()
        return self._reverse_twice(w)

    @outside_inference_mode
    def vjp(
        self, u: Float[Tensor, "b C k"], out: Float[Tensor, "D k"] | None = None
    ) -> Float[Tensor, "D k"]:
        """J(x)^T u, summed over the batch; added to ``out`` in place if given."""
        t = self._tangent
        self._examine()
        graph = self._run()
        if u.shape[:2] != graph.shape:
            raise ValueError(
                f"u: expected shape {(*graph.shape, 'k')}, found {tuple(u.shape)}"
            )
        if tracks_gradient(u, *_tensors(self._x)):
            rows = [self._pull(u[..., j], create_graph=True) for j in range(u.shape[2])]
            found = torch.stack([torch.cat([g.flatten() for g in r]) for r in rows]).mT
            return found if out is None else out + found
        total = u.new_zeros(u.shape[2], t.num_weights) if out is None else out.mT
        for columns in slices(u.shape[2], t.columns_backward(self._x)):
            cotangent = u[..., columns].permute(2, 0, 1)
            single = len(cotangent) == 1
            gradients = self._pull(cotangent[0] if single else cotangent)
            for name, gradient in zip(t.names, gradients, strict=True):
                flat = gradient.reshape(len(cotangent), -1)
                total[columns, t.slices[name]].add_(flat)
        return total.mT

    @outside_inference_mode
    def jacobian(self) -> Float[Tensor, "b C D"]:
        """J(x) itself, for small networks."""
        self._examine()
        graph = self._run()
        b, c = graph.shape
        # One example has nothing to batch but its outputs: a few at a time stay in the
        # cache, all together take half as long again, and the memory of all.
        if b == 1 or not _is_by_example(self._x, b):
            every = torch.eye(b * c, dtype=graph.dtype, device=graph.device).reshape(
                b, c, b * c
            )
            return self.vjp(every).mT.reshape(b, c, -1)
        try:
            return self._jacobian_together()
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            pass  # a layer that torch.func cannot batch over examples
        eye = torch.eye(c, dtype=graph.dtype, device=graph.device)
        rows = []
        for i in range(b):
            take = operator.itemgetter(slice(i, i + 1))
            example = self._tangent.at(tree_map_only(Tensor, take, self._x))
            rows.append(example.vjp(eye[None]).mT)
        return torch.stack(rows)

    def _jacobian_together(self) -> Tensor:
        t = self._tangent
        outputs = self._run().shape[1]

        def jacobian(x: Any) -> Tensor:
            example = tree_map_only(Tensor, operator.itemgetter(None), x)
            blocks = jacrev(functools.partial(t._outputs_at, example))(t._theta)
            return torch.cat([blocks[n][0].flatten(1) for n in t.names], dim=1)

        axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, self._x)
        together = max(1, 8 * CPU_ELEMENTS // (outputs * t.num_weights))
        return vmap(jacobian, in_dims=(axes,), chunk_size=together)(self._x)

    @outside_inference_mode
    def _run(self, mode: ForwardMode | None = None) -> Tensor:
        """Outputs with the graph of the reverse mode; with a mode, once more."""
        if self._graph is None or mode is not None:
            with light_graph(), torch.enable_grad(), mode or nullcontext():
                graph = self._function(self._leaves)
            if not graph.requires_grad:
                raise ValueError(
                    "network: none of the chosen weights "
                    f"{list(self._leaves)[:5]} has an effect on the outputs that can "
                    "be differentiated, such as behind detach() or no_grad()"
                )
            if self._graph is None:
                check_finite("network outputs", graph.detach())
                self._graph = graph
            if mode is not None:
                return graph
        return self._graph

    def _pull(self, cotangent: Tensor, *, create_graph: bool = False) -> Any:
        """Gradients of each weight, for one cotangent (b, C) or several (c, b, C)."""
        graph = self._run()
        leaves = tuple(self._leaves.values())
        found = torch.autograd.grad(
            graph,
            leaves,
            cotangent,
            retain_graph=True,
            create_graph=create_graph,
            is_grads_batched=cotangent.ndim > graph.ndim,
            allow_unused=True,
        )
        several = cotangent.shape[: cotangent.ndim - graph.ndim]
        return [
            leaf.new_zeros(()).expand(*several, *leaf.shape) if g is None else g
            for g, leaf in zip(found, leaves, strict=True)
        ]

    def _push(self, w: Tensor) -> Tensor | None:
        """J(x) w in forward mode, None if a function has no rule for it."""
        t = self._tangent
        if t._obstacle is not None:
            return None
        try:
            parts = [
                self._push_together(w[:, columns])
                for columns in slices(w.shape[1], t.columns_at_once(self._x))
            ]
        except NoForwardRule as error:
            t._obstacle = str(error)
            return None
        return torch.cat(parts, dim=0).permute(1, 2, 0)

    def _push_together(self, w: Tensor) -> Tensor:
        """J(x) w as (k, b, C), in one forward pass."""
        t = self._tangent
        size = t.columns_forward(self._x) if t._width else 1
        tangents = [v.split(size) for v in t.weights_of(w.mT).values()]
        leaves = list(self._leaves.values())
        mode = ForwardMode(leaves, [list(v) for v in tangents], t.network)
        graph = self._run(mode)
        t._width = max(t._width, -(-mode.widest // len(graph)))
        chunks = mode.of(graph)
        return (
            graph.new_zeros(w.shape[1], *graph.shape)
            if chunks is None
            else torch.cat(chunks)
        )

    def _examine(self) -> None:
        """Once: which mode this network has, and whether its gradients are right.

        Raises:
            NotImplementedError: They are not the derivatives of its outputs.
        """
        t = self._tangent
        if t._is_examined:
            return
        t._obstacle = self._first_obstacle()
        # Forward and reverse mode that agree are both right. Otherwise values decide.
        if t._obstacle is not None and not self._agrees_with_values():
            raise NotImplementedError(
                "the network cannot be linearised: its gradients are not the "
                "derivatives of its outputs, as differences of outputs show. Forward "
                f"mode: {t._obstacle}. Remove the hook or function that changes "
                "gradients"
            )
        t._is_examined = True

    def _agrees_with_values(self) -> bool:
        try:
            return self._agrees(self._differences)
        except (RuntimeError, TypeError, NotImplementedError):
            return True  # it does not run in float64, which differences need

    @torch.no_grad()
    def _differences(self, w: Tensor) -> Tensor:
        """J(x) w as (k, b, C), by central differences in float64."""
        t = self._tangent
        x, theta, rest = tree_map_only(
            Tensor,
            lambda leaf: leaf.double() if leaf.is_floating_point() else leaf,
            (self._x, t._theta, t._rest),
        )
        found = []
        for column in w.double().mT:
            size = 1e-5 / float(column.abs().max().clamp_min(1e-30))
            step = t.weights_of(size * column[None])
            moved = [
                {n: p + sign * step[n][0] for n, p in theta.items()} for sign in (1, -1)
            ]
            one, two = (t._outputs_at(x, values, rest) for values in moved)
            found.append((one - two) / (2 * size))
        return torch.stack(found)

    def _first_obstacle(self) -> str | None:
        """Why forward mode does not work for this network, if it does not."""
        try:
            agree = self._agrees(self._push_together)
        except NoForwardRule as error:
            return str(error)
        return None if agree else "its forward derivatives differ from its gradients"

    def _check_reverse(self) -> None:
        t = self._tangent
        if t._is_checked:
            return
        try:
            agree = self._agrees(lambda w: self._reverse_twice(w).permute(2, 0, 1))
            reason = "" if agree else "they differ from its gradients"
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error)
        if reason:
            raise NotImplementedError(
                "the network cannot be linearised. Forward mode: "
                f"{t._obstacle or 'not used'}. Derivatives of its gradients: {reason}"
            )
        t._is_checked = True

    def _agrees(self, product: Callable[[Tensor], Tensor]) -> bool:
        return agrees_with_gradients(product, self._run(), self._pull)

    def _reverse_twice(self, w: Tensor, *, create_graph: bool = False) -> Tensor:
        """J w = d/du <w, J^T u>: needs no forward mode, and takes twice as long."""
        t = self._tangent
        graph = self._run()
        u = torch.zeros_like(graph).requires_grad_()
        gradients = dict(zip(t.names, self._pull(u, create_graph=True), strict=True))
        moving = [n for n in t.names if gradients[n].requires_grad]
        rows = t.weights_of(w.mT)
        columns = [
            torch.autograd.grad(
                [gradients[n] for n in moving],
                u,
                [rows[n][j] for n in moving],
                retain_graph=True,
                create_graph=create_graph,
                materialize_grads=True,
            )[0]
            for j in range(w.shape[1])
        ]
        return torch.stack(columns, dim=-1)


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def _is_by_example(x: Any, examples: int) -> bool:
    """Whether the first axis of all inputs is that of the examples."""
    return all(leaf.ndim and len(leaf) == examples for leaf in _tensors(x))


def _first_examples(x: Any, examples: int, count: int) -> Any:
    """Inputs of the first examples alone."""
    # A square beside others may be a mask that all examples share.
    square = (examples, examples)
    is_alone = all(leaf.shape == square for leaf in _tensors(x))
    return tree_map_only(
        Tensor,
        lambda leaf: leaf[:count] if is_alone or leaf.shape != square else leaf,
        x,
    )


def _version(tensor: Tensor) -> tuple[int, int]:
    """What changes with a tensor's values, whether in place or by other storage."""
    return tensor._version, tensor.data_ptr()
