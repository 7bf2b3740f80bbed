"""The linear system (K + Sigma) V = B in the form every solver works on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite, check_same
from sgdgp.core.slices import slices
from sgdgp.features.base import CastFeatures
from sgdgp.operators.arguments import whole_points
from sgdgp.operators.base import KernelOperator, nudged
from sgdgp.operators.feature import FeatureOperator
from sgdgp.operators.tracked import TrackedVectors

_WIDE_ROWS = 4096  # of B and V that are in float64 at a time
_PROBE_ROWS = 128  # to measure rounding: their mean square is known to a tenth or so
_PROBE_PARTS = 4  # of a product, rounded each on its own, see ``rounding_level``
# Times what arithmetic alone leaves: more than rounding of x does to a kernel (3e6 for
# periods, far from zero).
_WORST_KERNEL = 1e7
_PROBE_COLUMNS = 1024  # that stand for all where K is made of features: no whole sweep
# Part of a residual that may be rounding: its norm is then right to half a per cent, as
# the two are independent.
_TRUSTED = 0.1


@dataclass(frozen=True)
class System:
    """(K + Sigma) V = B with every column of B scaled to unit norm.

    Attributes:
        operator: K (n, n).
        noise: The diagonal of Sigma (n, 1).
        rhs: B with unit columns (n, k); a zero column stays zero.
        scale: Norms of the given columns (k,); one for a zero column.
    """

    operator: KernelOperator
    noise: Float[Tensor, "n 1"]
    rhs: Float[Tensor, "n k"]
    scale: Float[Tensor, " k"]

    @property
    def n(self) -> int:
        """Number of equations."""
        return self.rhs.shape[0]

    def product(self, v: Tensor) -> Tensor:
        """(K + Sigma) v, one pass."""
        return self.operator.matmul(v).addcmul_(self.noise, v)

    def residual(self, v: Tensor) -> Tensor:
        """B - (K + Sigma) v (n, k), one pass."""
        return self.product(v).neg_().add_(self.rhs)

    def columns(self, chosen: Tensor) -> System:
        """The system of some right-hand sides only (indices or a mask)."""
        return System(
            self.operator, self.noise, self.rhs[:, chosen], self.scale[chosen]
        )

    def to(self, dtype: torch.dtype) -> System:
        """The system in another dtype, its kernel evaluated anew and not stored."""
        return System(
            self.operator.streaming().to(dtype),
            self.noise.to(dtype),
            self.rhs.to(dtype),
            self.scale.to(dtype),
        )

    def permuted(self, order: Tensor) -> System:
        """The system with its equations and unknowns in another order.

        Args:
            order: Rows (n,), such as ``operator.random_order`` gives.

        Raises:
            ValueError: The rows of a point with several are torn apart.
        """
        points = whole_points(order, self.operator.outputs_per_input)
        return System(
            self.operator.permuted(points),
            self.noise[order],
            self.rhs[order],
            self.scale,
        )


def as_system(operator: KernelOperator, noise: Tensor | float, rhs: Tensor) -> System:
    """Check the arguments of a solve and normalise its columns.

    Raises:
        ValueError: A shape, dtype, device or value does not fit.
    """
    n, columns = operator.shape
    if n != columns:
        raise ValueError(f"operator: expected a square operator, found {n} x {columns}")
    if rhs.ndim != 2 or rhs.shape[0] != n or rhs.shape[1] == 0:
        raise ValueError(f"rhs: expected shape ({n}, k), found {tuple(rhs.shape)}")
    check_same("rhs", rhs, "operator", operator.x)
    check_finite("rhs", rhs)
    # Of features the diagonal takes a pass.
    if not (operator.has_features or _has_finite_diagonal(operator)):
        raise ValueError(
            f"kernel: its values leave the range of {rhs.dtype}; give float64 data, or "
            "a smaller scale of inputs or kernel"
        )
    noise = torch.as_tensor(noise, dtype=rhs.dtype, device=rhs.device)
    if noise.ndim > 1 or (noise.ndim == 1 and noise.shape[0] not in (1, n)):
        raise ValueError(
            f"noise: expected a number or shape ({n},), found {tuple(noise.shape)}"
        )
    if not bool((torch.isfinite(noise) & (noise > 0)).all()):
        raise ValueError(
            "noise: expected positive finite variances, found a smallest of "
            f"{float(noise.min())}"
        )
    # Two steps: the squares of very large or small columns leave the float range.
    largest = rhs.abs().amax(dim=0)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    norms = (rhs / largest).norm(dim=0)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    scale = norms * largest
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"rhs: a column's norm is beyond the range of {rhs.dtype}")
    return System(
        operator, noise.reshape(-1, 1).expand(n, 1), (rhs / largest).div_(norms), scale
    )


def _has_finite_diagonal(operator: KernelOperator) -> bool:
    return math.isfinite(float(operator.diagonal().abs().amax()))


def initial_weights(
    system: System, initial: Tensor | None, name: str = "initial"
) -> Tensor:
    """Starting point, or what has a ``name``, in the system's scale (n, k); or zero.

    Raises:
        ValueError: The shape, dtype or values do not fit.
    """
    if initial is None:
        return torch.zeros_like(system.rhs)
    if initial.shape != system.rhs.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(system.rhs.shape)}, found "
            f"{tuple(initial.shape)}"
        )
    check_same(name, initial, "rhs", system.rhs)
    check_finite(name, initial)
    return initial / system.scale


def true_residual(system: System, v: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """B - (K + Sigma) v with the differences in float64 (n, k), one pass."""
    out = system.operator.matmul(v).double().neg_()
    for rows in slices(system.n, _WIDE_ROWS):
        out[rows] += system.rhs[rows].double()
        out[rows] -= system.noise[rows].double() * v[rows].double()
    return out


def believed_norms(
    system: System, v: Float[Tensor, "n k"], residual: Float[Tensor, "n k"]
) -> Float[Tensor, " k"]:
    """Norms of a ``true_residual``, in float64 throughout where rounding shows."""
    norms = residual.norm(dim=0)
    if bool(torch.isfinite(norms).all()) and rounding_shows(system, v, norms):
        return float64_residual(system, v).norm(dim=0)
    return norms


def rounding_shows(system: System, v: Tensor, norms: Tensor) -> bool:
    """Whether rounding is over a tenth of the residuals (k,) of v in its own dtype."""
    if v.dtype == torch.float64:
        return False
    return bool((rounding_level(system, v) > _TRUSTED * norms).any())


def float64_residual(system: System, v: Tensor) -> Tensor:
    """B - (K + Sigma) v (n, k), kernel and products in float64.

    It is that of the weights which the caller gets back: their scale, once undone,
    rounds them, and an ill-conditioned system feels it.
    """
    wide = system.to(torch.float64)
    return wide.residual((v * system.scale).double() / wide.scale)


def float32_warnings(system: System, v: Tensor, tolerance: float) -> tuple[str, ...]:
    """A sentence, if the tolerance is below what the system's dtype resolves at v."""
    if v.dtype == torch.float64:
        return ()
    floor = float(rounding_level(system, v).max())
    if floor <= tolerance / 3.0:
        return ()
    return (
        f"In {v.dtype} residuals are rounded at about {floor:.1e} here, the tolerance "
        f"is {tolerance:g}: give float64 data, or a larger tolerance or noise.",
    )


def rounding_level(system: System, v: Tensor) -> Tensor:
    """What rounding in the system's dtype adds to a residual, relative (k,).

    Measured on a few rows spread over the data, against the kernel in float64. The
    columns are taken in a few parts: where all rows are alike, so is their rounding,
    and a single sum may happen to round to the truth.
    """
    rows = torch.linspace(0, system.n - 1, min(system.n, _PROBE_ROWS), device=v.device)
    rows = rows.long()
    exact = system.to(torch.float64)
    if isinstance(system.operator, FeatureOperator):
        return _rounding_of_features(system, exact, v, rows)
    squares = torch.zeros(v.shape[1], dtype=torch.float64, device=v.device)
    for first in range(min(system.n, _PROBE_PARTS)):
        part = torch.zeros_like(v)
        part[first::_PROBE_PARTS] = v[first::_PROBE_PARTS]
        product = system.operator.rows(rows).matmul(part)
        product.addcmul_(system.noise[rows], part[rows])
        wide = part.double()
        reference = exact.operator.rows(rows).matmul(wide)
        reference.addcmul_(exact.noise[rows], wide[rows])
        squares += (product.double() - reference).square().sum(0)
    return (squares * (system.n / len(rows))).sqrt()


def float64_rounding(system: System, v: Tensor, matters: float) -> Tensor:
    """What float64 itself leaves unknown of relative residuals of v (k,).

    That of the product's arithmetic, by the diagonal of K; where it may be more than
    ``matters`` also what a last digit of x and v changes in a few rows.
    """
    if system.operator.has_features:
        return torch.zeros(v.shape[1], dtype=torch.float64, device=v.device)
    deviation = system.operator.diagonal().double().clamp_min(0.0).sqrt().unsqueeze(1)
    floor = deviation.norm() * (deviation * v).norm(dim=0)
    floor *= torch.finfo(torch.float64).eps
    if not bool((_WORST_KERNEL * floor > matters).any()):
        return floor
    rows = torch.linspace(0, system.n - 1, min(system.n, _PROBE_ROWS), device=v.device)
    rows = rows.long()
    operator = system.to(torch.float64).operator
    change = operator.nudged().rows(rows).matmul(nudged(v))
    change -= operator.rows(rows).matmul(v)
    return floor.maximum(change.norm(dim=0) * math.sqrt(system.n / len(rows)))


def rounding_of_products(operator: KernelOperator, v: Float[Tensor, "n 1"]) -> float:
    """Root mean square over rows of what rounding adds to K v."""
    system = System(operator, torch.zeros_like(v), v, v.new_ones(1))
    return float(rounding_level(system, v)) / math.sqrt(len(v))


def _rounding_of_features(
    system: System, exact: System, v: Tensor, rows: Tensor
) -> Tensor:
    """The same from some columns: a product with features sweeps over all of them.

    Rounding errors of terms that differ add up like random ones. Features of a network
    have no float64 form to compare with: its kernel is the one of its own precision.
    """
    if isinstance(getattr(exact.operator, "features", None), CastFeatures):
        return torch.zeros(v.shape[1], dtype=torch.float64, device=v.device)
    columns = torch.linspace(
        0, system.n - 1, min(system.n, _PROBE_COLUMNS), device=v.device
    )
    columns = columns.long()
    part, wide = v[columns], v[columns].double()
    found = system.operator.move(columns, part)
    truth = exact.operator.move(columns, wide)
    product = system.operator.rows_of_product(rows, TrackedVectors(part, found.phi_t_v))
    reference = exact.operator.rows_of_product(
        rows, TrackedVectors(wide, truth.phi_t_v)
    )
    ratio = (system.n / len(rows)) * (system.n / len(columns))
    return (product.double() - reference).square().sum(0).mul(ratio).sqrt()
