"""Mass matrices of Hamiltonian dynamics: the precision of the posterior, roughly.

With M the posterior's precision all directions oscillate at about frequency one,
however long and narrow the posterior is: a step has the size of a posterior standard
deviation in every direction, and a trajectory of length pi / 2 forgets where it began.

That M is another one at every weight vector, and in each copy of a network whose units
are permuted: chains that do not begin about the trained weights have one each.

Momenta p are kept as velocities u = M^-1 p, so that a step needs one product only,
that with M^-1: u ~ N(0, M^-1), kinetic energy u^T M u / 2. Vectors are rows (k, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.errors import warn_user
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.kronecker_curvature import kronecker_curvature
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.potential import Potential
from sgdgp.networks.priors import DiagonalPrior, WeightPrior, precision_sum
from sgdgp.networks.priors.base import no_probes
from sgdgp.tangent import Tangent

_MOST_DENSE = 2048
"""Weights up to which M is a matrix: its factorisation takes a second, a product with
it as long as the gradient of a network of as many weights at 500 examples."""


@runtime_checkable
class MassMatrix(Protocol):
    """M (D, D) by what trajectories need of it."""

    def velocity(self, gradient: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        """M^-1 g."""

    def draw(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        """N(0, M^-1) from standard normal numbers."""

    def kinetic(self, u: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
        """u^T M u / 2."""


class DenseMass(MassMatrix):
    """A matrix.

    Args:
        matrix: M, symmetric and positive definite.
        like: In whose dtype products are.

    Raises:
        ValueError: It is not.
    """

    def __init__(self, matrix: Float[Tensor, "D D"], like: Tensor) -> None:
        skew = float((matrix - matrix.mT).abs().max())
        if skew > torch.finfo(like.dtype).eps ** 0.5 * float(matrix.abs().max()):
            raise ValueError(
                "mass: expected a symmetric matrix, found entries that differ from "
                f"those across the diagonal by {skew:.3g}"
            )
        factor, info = torch.linalg.cholesky_ex(matrix.double())
        if int(info) or not bool(factor.isfinite().all()):
            raise ValueError(
                "mass: expected a symmetric positive definite matrix, found one that "
                f"is not at row {int(info)}"
            )
        self._inverse = torch.cholesky_inverse(factor).to(like).contiguous()
        self._factor = factor.to(like).contiguous()

    def velocity(self, gradient: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return gradient @ self._inverse

    def draw(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return torch.linalg.solve_triangular(self._factor, z, upper=False, left=False)

    def kinetic(self, u: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
        return 0.5 * (u @ self._factor).square().sum(1)


class DiagonalMass(MassMatrix):
    """Independent weights.

    Args:
        precision: The diagonal of M, positive.
        like: In whose dtype products are.

    Raises:
        ValueError: It is not positive and finite.
    """

    def __init__(self, precision: Float[Tensor, " D"], like: Tensor) -> None:
        if not bool((precision.isfinite() & (precision > 0)).all()):
            raise ValueError("mass: expected positive finite numbers on the diagonal")
        self._precision = precision.to(like)
        self._inverse = self._precision.reciprocal()

    def velocity(self, gradient: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return gradient * self._inverse

    def draw(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return z * self._inverse.sqrt()

    def kinetic(self, u: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
        return 0.5 * (u.square() @ self._precision)


@dataclass(frozen=True)
class PriorMass(MassMatrix):
    """The precision of a Gaussian over the weights, block by block."""

    prior: WeightPrior

    def velocity(self, gradient: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return self.prior.covariance(gradient.mT).mT

    def draw(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return self.prior.root(z.mT).mT

    def kinetic(self, u: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
        return 0.5 * (u * self.prior.matmul(u.mT).mT).sum(1)


@dataclass(frozen=True)
class PerChain(MassMatrix):
    """A mass matrix for each row."""

    masses: Sequence[MassMatrix]

    def velocity(self, gradient: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        parts = zip(self.masses, gradient.split(1), strict=True)
        return torch.cat([mass.velocity(g) for mass, g in parts])

    def draw(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        parts = zip(self.masses, z.split(1), strict=True)
        return torch.cat([mass.draw(each) for mass, each in parts])

    def kinetic(self, u: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
        parts = zip(self.masses, u.split(1), strict=True)
        return torch.cat([mass.kinetic(each) for mass, each in parts])


def given_mass(potential: Potential, given: WeightPrior | Tensor) -> MassMatrix:
    """A Gaussian over the weights, a diagonal (D,) or a matrix (D, D) as one.

    Raises:
        TypeError: It is none of these.
        ValueError: It is over other weights, or not positive definite.
    """
    like, size = potential.theta, potential.num_weights
    if isinstance(given, WeightPrior):
        return _of_prior(given.build(potential.tangent, no_probes), like)
    if isinstance(given, Tensor):
        if given.shape not in ((size,), (size, size)):
            raise ValueError(
                f"mass: expected shape ({size},) or ({size}, {size}), found "
                f"{tuple(given.shape)}"
            )
        return (DiagonalMass if given.ndim == 1 else DenseMass)(given.detach(), like)
    raise TypeError(
        "mass: expected a prior of sgdgp.networks.priors, a tensor or None, found "
        f"{type(given).__name__}"
    )


def prior_mass(potential: Potential) -> MassMatrix:
    """The prior's precision P."""
    return _of_prior(potential.prior, potential.theta)


def tangent_mass(
    potential: Potential, places: Float[Tensor, "k D"] | None = None
) -> MassMatrix:
    """The precision of the tangent model, that of the prior where it has none.

    Args:
        potential: What is sampled.
        places: Weights of which each has one. Default: one, of the network's own.
    """
    tangents = [potential.tangent]
    if places is not None:
        tangents = [potential.tangent.moved(place) for place in places]
    masses = [curvature_mass(potential, t) or prior_mass(potential) for t in tangents]
    return masses[0] if places is None else PerChain(masses)


def curvature_mass(potential: Potential, tangent: Tangent) -> MassMatrix | None:
    """The precision of a tangent model, J^T H J + P.

    A matrix for up to 2,048 weights, beyond that with Kronecker factors of J^T H J, to
    which independent weights add one precision a tensor: only then are products in
    closed form. None for a loss that is no likelihood, which has no H, and for layers
    that have no such factors.
    """
    like, size = potential.theta, potential.num_weights
    likelihood, prior = potential.likelihood, potential.prior
    if not isinstance(likelihood, Likelihood):
        return None
    data = TangentData(tangent, potential.stream, likelihood)
    matrix = None
    if size <= _MOST_DENSE:
        one = DiagonalPrior(size, torch.ones_like(like[:1]))
        gram = WeightSystem(data, one, likelihood, data.network_outputs).gram
        unit = torch.eye(size, dtype=like.dtype, device=like.device)
        matrix = gram + prior.matmul(unit).double()
    try:
        if matrix is not None:  # which may not be definite: a prior next to none
            return DenseMass(matrix, like)
        curvature = kronecker_curvature(data, likelihood, data.network_outputs)
    except ValueError as error:
        warn_user(f"The mass matrix is the prior's precision: {error}")
        return None
    return PriorMass(precision_sum(_by_tensor(prior, tangent), curvature))


def _by_tensor(prior: WeightPrior, tangent: Tangent) -> WeightPrior:
    """Independent weights with one variance a tensor, the geometric mean of its own."""
    if not prior.is_diagonal:
        return prior
    logs = prior.marginal_variance().log()
    means = [logs[s].mean().expand(s.stop - s.start) for s in tangent.slices.values()]
    scales = torch.cat(means).mul(0.5).exp()
    ones = torch.ones_like(scales[:1])
    return DiagonalPrior(tangent.num_weights, ones, scales=scales)


def _of_prior(prior: WeightPrior, like: Tensor) -> MassMatrix:
    if prior.is_diagonal:
        return DiagonalMass(prior.marginal_variance().reciprocal(), like)
    return PriorMass(prior)
