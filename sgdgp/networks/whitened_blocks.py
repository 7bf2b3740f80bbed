"""The curvature of a network as Kronecker products, one for each layer.

For one weight matrix (out, rest), with its bias as a column more, the rows of phi are
matrices M, and the block of phi^T phi is a sum of vec M vec M^T. By the moments
B = sum M M^T and A = sum M^T M it is nearly (B (x) A) / tr A. That is KFAC (Martens and
Grosse, ICML 2015) with every gradient weighted by the length of its input, for layers
of any kind. Blocks of different layers are independent. The prior's identity is not
folded into the factors: in their eigenvectors B (x) A / tr A + I is diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.curvature import WeightSystem, curvature_probes
from sgdgp.networks.priors.base import PROBE_MEMORY
from sgdgp.networks.priors.blocks import MatrixRoot
from sgdgp.networks.priors.factors import eigen
from sgdgp.networks.priors.kronecker import LARGEST_FACTOR
from sgdgp.tangent import Tangent

_PROBES = 1024
"""Rows of random signs over all batches, at least: moments of 100 by 100 then have
relative errors of a few per cent."""


@dataclass(frozen=True)
class LayerMatrix:
    """The weights of one layer as a matrix.

    Attributes:
        parts: Where they are: a matrix, and perhaps its bias.
        shape: (out, rest), with the bias in the last column.
    """

    parts: tuple[slice, ...]
    shape: tuple[int, int]

    def take(self, rows: Float[Tensor, "k D"]) -> Float[Tensor, "k out rest"]:
        """Out of rows of weights."""
        found = [rows[:, s].reshape(len(rows), self.shape[0], -1) for s in self.parts]
        return torch.cat(found, 2)

    def put(self, x: Float[Tensor, "k out rest"], rows: Float[Tensor, "k D"]) -> None:
        """Into rows of weights."""
        at = 0
        for s in self.parts:
            width = (s.stop - s.start) // self.shape[0]
            rows[:, s] = x[:, :, at : at + width].flatten(1)
            at += width


@dataclass(frozen=True)
class KroneckerBlock:
    """B (x) A / tr A + I on the weights of one layer.

    Attributes:
        layer: Which weights.
        vectors: Eigenvectors of B and of A.
        values: Eigenvalues of B (x) A / tr A (out, rest).
    """

    layer: LayerMatrix
    vectors: MatrixRoot
    values: Float[Tensor, "out rest"]

    def inverse_root(
        self, x: Float[Tensor, "k out rest"]
    ) -> Float[Tensor, "k out rest"]:
        """(B (x) A / tr A + I)^-1/2, the symmetric root, times each of k matrices."""
        return self.vectors.apply(self.vectors.adjoint(x) * (self.values + 1).rsqrt())

    def shares(self) -> Float[Tensor, "out rest"]:
        """One minus the posterior variance of each weight."""
        inner = (self.values / (self.values + 1)).sqrt()
        return replace(self.vectors, inner=inner).variances()


@torch.no_grad()
def kronecker_blocks(system: WeightSystem, seed: int) -> list[KroneckerBlock]:
    """Phi^T phi of a system by layers, one pass over the data.

    Args:
        system: phi.
        seed: Of the signs that stand for the rows of phi where these are many.
    """
    like = system.outputs
    layers = list(_layers(system.data.tangent))
    moments = [
        [like.new_zeros((n, n) if n <= LARGEST_FACTOR else (n,)) for n in layer.shape]
        for layer in layers
    ]
    for rows in _rows(system, seed):
        for layer, (left, right) in zip(layers, moments, strict=True):
            x = layer.take(rows)
            _add_moment(left, x)
            _add_moment(right, x.mT)
    found = []
    for layer, factors in zip(layers, moments, strict=True):
        system.data.stream.processes.sum_(*factors)
        (b, left), (a, right) = map(eigen, factors)
        values = torch.outer(b, a) / a.sum().clamp_min(torch.finfo(a.dtype).tiny)
        found.append(KroneckerBlock(layer, MatrixRoot(left, right), values.to(like)))
    return found


def _layers(tangent: Tangent) -> Iterator[LayerMatrix]:
    """Which weights are a matrix together: a bias is a column of its weight's."""
    shapes = dict(zip(tangent.names, tangent.shapes, strict=True))
    biases = {}
    for name, shape in shapes.items():
        head, found, tail = name.rpartition("weight")
        bias = f"{head}bias{tail}"
        if found and len(shape) > 1 and shapes.get(bias) == shape[:1]:
            biases[name] = bias
    for name, shape in shapes.items():
        if name in biases.values():
            continue
        both = [name, *([biases[name]] if name in biases else [])]
        out = shape[0] if shape else 1
        width = sum(shapes[n].numel() for n in both) // out
        yield LayerMatrix(tuple(tangent.slices[n] for n in both), (out, width))


def _rows(system: WeightSystem, seed: int) -> Iterator[Float[Tensor, "m D"]]:
    """Rows whose second moment is phi^T phi: those of phi, or random mixtures."""
    data = system.data
    if data.keeps_jacobian:
        for batch, at in data.batches():
            yield system.features(batch, at)
        return
    each = system.num_weights * data.tangent.dtype.itemsize
    count = -(-_PROBES // max(1, data.stream.num_batches))
    count = max(1, min(max(count, 8), PROBE_MEMORY // each))
    likelihood = system.likelihood
    for probes in curvature_probes(data, likelihood, system.outputs, count, seed):
        yield system.prior.root_adjoint(probes).mT / count**0.5


def _add_moment(moment: Tensor, x: Tensor) -> None:
    """Add the sum of X X^T over matrices (m, n, r), or its diagonal."""
    if moment.ndim == 1:
        moment.add_(x.square().sum((0, 2)))
    else:
        flat = x.transpose(0, 1).flatten(1)
        moment.addmm_(flat, flat.mT)
