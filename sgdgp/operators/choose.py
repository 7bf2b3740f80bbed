"""Which operator: decided by memory, size, device and kernel, and nothing else."""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import torch
from gpytorch.kernels import Kernel, MaternKernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.memory import resolve_budget
from sgdgp.core.team import is_led
from sgdgp.operators.arguments import check_inputs
from sgdgp.operators.base import KernelOperator
from sgdgp.operators.dense import DenseOperator, streaming_operator
from sgdgp.operators.feature import FeatureOperator, features_operator
from sgdgp.operators.keops import KeopsOperator, keops_is_available
from sgdgp.operators.row_blocks import RowBlocksOperator
from sgdgp.operators.sharded import ShardedOperator
from sgdgp.operators.tiled import TiledOperator
from sgdgp.operators.triton import MediumTritonOperator, TritonOperator

OperatorName: TypeAlias = Literal[
    "dense",
    "tiled",
    "triton",
    "triton_medium",
    "keops",
    "row_blocks",
    "features",
    "sharded",
]

TRITON_FROM = 5_000
"""On a GPU, Triton is chosen from so many points, even if K fits: there entries are
made faster than they are read. Below, a product with K is over before four kernels are
launched."""

KEOPS_FROM = 20_000
"""On a GPU, KeOps is chosen from so many points; below, tiles are as fast."""

FILL_UP_TO = 2_000
"""Rows up to which a matrix of entries made from features is worth filling.

Entries take n^2 M / 2 multiply-adds, the features themselves about 20 forward passes of
a network for each row; a product with features 2 n M, or 5 forward passes, for each
column. A solve multiplies with a thousand columns, say twenty in each of fifty passes.
"""

SHARE_FROM = 5_000
"""Rows from which other processes are asked for help, where there are some: a product
then takes twenty times as long as the messages that it needs."""

STORE_UP_TO = 16_384
"""Rows up to which K is stored although its tiles are compiled: 1 GB in float32.

Filling K costs as much as five to ten of the passes that it saves (one core, 8
dimensions, 17 columns: 6 ns an entry; 1.8 in a pass of tiles, 2.5 in one by rows, 1.2
of a stored K), and direct solvers, and those that take rows in any order, come back
often.
"""

FEW_FEATURES = 16
"""Features are few if there are this many times as many rows: no solver then spends
more on the features than on a matrix in memory."""

_OPERATORS: dict[str, type[KernelOperator]] = {
    "dense": DenseOperator,
    "tiled": TiledOperator,
    "triton": TritonOperator,
    "triton_medium": MediumTritonOperator,
    "keops": KeopsOperator,
    "row_blocks": RowBlocksOperator,
    "features": FeatureOperator,
    "sharded": ShardedOperator,
}


def choose_operator(
    kernel: Kernel, x: Float[Tensor, "n d"], *, memory_budget: int | None = None
) -> KernelOperator:
    """The operator for K(X, X) that suits its size and the memory there is.

    On a GPU, from 5,000 points, Triton, where it works and has a form of the kernel. In
    memory when K fits the budget, of compiled tiles (float32 on a CPU, RBF and Matern
    kernels) up to 16,384 rows. Else, on a GPU, from 20,000 points and for kernels with
    own formulas, KeOps; else fused tiles; and for kernels that have neither, row blocks
    through GPyTorch. On a CPU Triton and KeOps are never chosen: tiles are faster.

    With other processes at work (``sgdgp.distribute``) from 5,000 rows on shared by
    all of them, and not in memory.

    Kernels with exact features are special from 2,000 rows on. Where their entries are
    made from features (networks), features are chosen even if K fits; where they have
    a formula of their own (linear kernels), if there are 16 times as many rows.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        x: Inputs (n, d).
        memory_budget: Bytes that the operator may take. Default: half of what is
            free on the device of ``x``.

    Returns:
        A square operator; its ``name`` says which.

    Raises:
        TypeError: ``kernel`` is not a GPyTorch kernel, or ``x`` no tensor.
        ValueError: The kernel is not a function of two points, or an argument does
            not fit.
    """
    check_inputs(x, None)
    budget = resolve_budget(memory_budget, x.device)
    streaming = streaming_operator(kernel, x, memory_budget=budget)
    rows, columns = streaming.shape
    if rows > FILL_UP_TO:
        features = streaming if isinstance(streaming, FeatureOperator) else None
        features = features or _few_features(kernel, x, rows, budget)
        if features is not None:
            return features
    shared = is_led() and rows >= SHARE_FROM and not streaming.has_features
    fused = None
    if rows >= TRITON_FROM and isinstance(streaming, TiledOperator):
        fused = _triton_operator(kernel, x, budget)
    fits = rows * columns * x.element_size() <= budget
    quick = isinstance(streaming, TiledOperator) and streaming.tile.is_compiled(x)
    stored = fits and not (quick and rows > STORE_UP_TO)
    if fused is None and stored and not shared:
        return DenseOperator.filled_by(streaming)
    if fused is not None:
        streaming = fused
    elif (
        x.device.type == "cuda"
        and rows >= KEOPS_FROM
        and isinstance(streaming, TiledOperator)
        and streaming.tile.has_keops
        and keops_is_available(x.device)
    ):
        streaming = KeopsOperator(kernel, x, memory_budget=budget)
    return ShardedOperator.over(streaming) if shared else streaming


def _few_features(
    kernel: Kernel, x: Tensor, rows: int, budget: int
) -> FeatureOperator | None:
    """The operator of a kernel with few exact features, if it is one."""
    found = features_operator(kernel, x, memory_budget=budget)
    if found is None or FEW_FEATURES * found.features.num_features > rows:
        return None
    return found


def _triton_operator(kernel: Kernel, x: Tensor, budget: int) -> KernelOperator | None:
    """The Triton operator, where its kernel serves on the device of x."""
    if not _triton_works(x.device):
        return None
    operator = TritonOperator(kernel, x, memory_budget=budget)
    return operator if operator.is_fused else None


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton's products on a device are fast, and those of tiles."""
    return device.type == "cuda" and _agrees(device)


@torch.inference_mode(False)
@torch.enable_grad()
def _agrees(device: torch.device) -> bool:
    """Whether a first product is that of tiles, and a first gradient of a form.

    It takes a compiler, and a driver that Triton knows, and fails in many ways.
    """
    try:
        x = torch.linspace(-3.0, 3.0, 400, dtype=torch.float32, device=device)
        x = x.sin().view(100, 4)
        kernel, v = MaternKernel(1.5).to(x), x.repeat(1, 5)
        results = []
        for operator in (TritonOperator(kernel, x), TiledOperator(kernel, x)):
            form = operator.quadratic_form(v, v)
            slopes = torch.autograd.grad(form, list(kernel.parameters()))
            results.append((operator.matmul(v), *slopes))
    except Exception:
        return False
    pairs = zip(*results, strict=True)
    return all(torch.allclose(f, e, rtol=1e-4, atol=1e-3) for f, e in pairs)


def operator_by_name(
    name: OperatorName | str,
    kernel: Kernel,
    x: Float[Tensor, "n d"],
    *,
    memory_budget: int | None = None,
) -> KernelOperator:
    """The square operator of that name, or the chooser's for "auto".

    Raises:
        ImportError: It needs a package that is not installed.
        ValueError: No operator has that name, or it cannot take this kernel; or the
            budget is less than a row of K, which would take hours.
    """
    row = x.shape[0] * x.element_size()
    if memory_budget is not None and memory_budget < row:
        raise ValueError(
            f"memory_budget: expected at least {row} bytes, one row of the kernel "
            f"matrix, found {memory_budget}"
        )
    if name == "auto":
        return choose_operator(kernel, x, memory_budget=memory_budget)
    if name not in _OPERATORS:
        raise ValueError(
            f"operator: expected 'auto' or one of {sorted(_OPERATORS)}, found {name!r}"
        )
    return _OPERATORS[name](kernel, x, memory_budget=memory_budget)
