"""A Gaussian over the weights of a network in few numbers: means, deviations, factors.

Draws from a posterior, aligned so that permuted copies of a network coincide, are
summarised by N(m, diag(r) + F F^T) with a mean and a remainder r for each weight and
factors F (D, k): none where weights are independent, some leading directions of the
draws, or all of them. The marginal variance of each weight is that of the draws
whatever k is: what factors leave out of it stays in the remainder.

With no more draws than weights the empirical covariance S is singular. For a density
correlations are then shrunk towards none, (1 - s) S + s diag(S), by the s of least
expected squared error (Schaefer and Strimmer, Statistical Applications in Genetics and
Molecular Biology 4, 2005), which takes draws for independent ones. Little of it is much
where a network holds combinations of weights far more tightly than each weight: samples
predict better without (``shrinkage=0``).

A mean-field fit has *conditional* deviations, about 1 / sqrt of the precision's
diagonal: they are smaller than the marginal ones of draws wherever weights are
correlated, however well either is found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal, kl_divergence

from sgdgp.core.checks import check_count, check_finite, check_matrix, check_number
from sgdgp.core.seeds import generator_of, standard_normal
from sgdgp.networks.evidence import EXACT_SIZE
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.sampling.alignment import match_weights
from sgdgp.networks.sampling.draws import Draws
from sgdgp.networks.sampling.symmetry import SymmetryGroup
from sgdgp.tangent.network import chosen_weights

Covariance: TypeAlias = Literal["diagonal", "low_rank", "full"]
"""Which correlations are kept: none, those of leading directions, or all, shrunk."""

Deviations: TypeAlias = Literal["marginal", "conditional"]
"""Of each weight whatever the others are, or given the others."""

Network = TypeVar("Network", bound=nn.Module)

_MIXED = 1.1
"""Largest R-hat of weights that goes without saying: of aligned chains of one mode the
largest of a thousand weights is about 1.05, of copies or modes it is beyond 1.5."""

DEFAULT_RANK = 10
"""Factors of a low rank unless told otherwise."""


@dataclass(frozen=True, repr=False, eq=False)
class CompactGaussian:
    """N(mean, diag(remainder) + F F^T) over D weights.

    Attributes:
        mean: (D,).
        remainder: Variance of each weight that is its own (D,).
        factors: F (D, k), k = 0 where weights are independent.
        names: Of the network's parameters that the weights are, in order. Default:
            all that need a gradient.
        deviations: What the standard deviations are, "marginal" or "conditional".
        warnings: Sentences that say what the summary hides.
    """

    mean: Float[Tensor, " D"]
    remainder: Float[Tensor, " D"]
    factors: Float[Tensor, "D k"]
    names: tuple[str, ...] = ()
    deviations: Deviations = "marginal"
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        draws: Draws | Float[Tensor, "K D"],
        covariance: Covariance = "diagonal",
        *,
        rank: int | None = None,
        shrinkage: float | None = None,
    ) -> CompactGaussian:
        """Mean and covariance of draws.

        Args:
            draws: Aligned ``Draws``, or weights of K networks as rows (K, D).
            covariance: "diagonal", "low_rank" or "full".
            rank: Factors of a low rank, at most K - 2. Default: 10, or fewer if so.
            shrinkage: Of the correlations of a full covariance, from 0 to 1 (none are
                left). Default: none with more draws than weights, else estimated; at 0
                there are samples then, but no density.

        Raises:
            TypeError: Not a matrix of floating-point numbers.
            ValueError: One draw only, or settings that do not fit; says which.
        """
        rows = draws.flat if isinstance(draws, Draws) else draws
        check_matrix("draws", rows)
        check_finite("draws", rows)
        if len(rows) < 2:
            raise ValueError(
                "draws: one network has no variance; expected at least two draws, "
                "found 1"
            )
        mean = rows.mean(0)
        root = (rows - mean) / (len(rows) - 1) ** 0.5
        found = cls._of_root(mean, root, covariance, rank, shrinkage)
        if not isinstance(draws, Draws):
            return found
        warnings = (*found.warnings, *_caveats(draws))
        return replace(found, names=tuple(draws.names), warnings=warnings)

    @classmethod
    @torch.no_grad()
    def of_posterior(
        cls,
        posterior: LinearisedPosterior,
        covariance: Covariance = "diagonal",
        *,
        rank: int | None = None,
        shrinkage: float | None = None,
    ) -> CompactGaussian:
        """The linearised posterior's weights, around those of the network.

        Up to 512 weights their variances are exact where the posterior knows its
        training data (one pass); else, as factors always, they are by its samples.

        Args:
            posterior: Of the network.
            covariance: As of ``of``.
            rank: As of ``of``.
            shrinkage: As of ``of``.
        """
        tangent, centre = posterior.tangent, posterior.centre
        mean = tangent.theta
        if centre is not None:
            # The prior's mean is elsewhere, and the network has not seen these data.
            mean = mean + centre + posterior.weight_mean
        samples = posterior.weight_samples.mT
        # Their mean is known to be zero.
        root = samples * (posterior.scale / len(samples)) ** 0.5
        found = cls._of_root(mean[:, 0], root, covariance, rank, shrinkage)
        if (
            covariance == "diagonal"
            and posterior.stream is not None
            and tangent.num_weights <= EXACT_SIZE
        ):
            exact = posterior.scale * _exact_variance(posterior)
            found = replace(found, remainder=exact.to(found.mean))
        return replace(found, names=tangent.names, warnings=posterior.warnings)

    @classmethod
    def _of_root(
        cls,
        mean: Float[Tensor, " D"],
        root: Float[Tensor, "K D"],
        covariance: Covariance,
        rank: int | None,
        shrinkage: float | None,
    ) -> CompactGaussian:
        """From rows whose Gram matrix root^T root is the covariance."""
        if covariance not in get_args(Covariance):
            raise ValueError(
                'covariance: expected "diagonal", "low_rank" or "full", found '
                f"{covariance!r}"
            )
        if rank is not None and covariance != "low_rank":
            raise ValueError(f"rank: a {covariance} covariance has none")
        if shrinkage is not None and covariance != "full":
            raise ValueError(f"shrinkage: a {covariance} covariance has none")
        size, count = len(root), root.shape[1]
        variance = root.square().sum(0)
        if covariance == "diagonal":
            return cls(mean, variance, root.new_zeros(count, 0))
        if covariance == "low_rank":
            _, values, directions = torch.linalg.svd(root, full_matrices=False)
            # Draws that repeat have fewer directions than there are of them.
            least = torch.finfo(root.dtype).eps * max(root.shape) * values[0]
            most = min(int((values > least).sum()) - 1, size - 2, count - 1)
            if most < 1:
                raise ValueError(
                    "draws: a low rank takes three different ones of two weights, "
                    f"found {size} of {count}"
                )
            rank = min(DEFAULT_RANK, most) if rank is None else rank
            check_count("rank", rank, 1)
            if rank > most:
                raise ValueError(
                    f"rank: expected at most {most} with {size} draws of {count} "
                    f"weights, found {rank}"
                )
            factors = (values[:rank, None] * directions[:rank] * (variance > 0)).mT
            # Rounding may leave less than nothing.
            left = variance - factors.square().sum(1)
            left = left.maximum(torch.finfo(root.dtype).eps * variance)
            return cls(mean, left, factors)
        singular = size <= count
        if shrinkage is None:
            shrinkage = _shrinkage(root) if singular else 0.0
        check_number("shrinkage", shrinkage)
        if not 0 <= shrinkage <= 1:
            raise ValueError(
                f"shrinkage: expected a number from 0 to 1, found {shrinkage}"
            )
        if singular:
            factors = root.mT * (1 - shrinkage) ** 0.5
            found = cls(mean, shrinkage * variance, factors)
            if shrinkage == 0:
                return found
            warning = (
                f"Correlations of {size} draws of {count} weights were shrunk by "
                f"{shrinkage:.2g} of themselves."
            )
            return replace(found, warnings=(warning,))
        deviation = variance.sqrt()
        z = root / deviation.where(deviation > 0, 1.0)
        values, vectors = torch.linalg.eigh(z.mT @ z)
        least = torch.finfo(root.dtype).eps * count * values[-1]
        values = (1 - shrinkage) * values.where(values > least, 0.0) + shrinkage
        # What all directions have is the remainder, so that nothing cancels.
        own = 0.5 * values[0]
        factors = deviation[:, None] * vectors * (values - own).sqrt()
        return cls(mean, own * variance, factors)

    def __str__(self) -> str:
        rank = self.factors.shape[1]
        kind = f"{rank} factors" if rank else "independent weights"
        deviations = self.standard_deviation.sort().values
        low, middle, high = (
            float(deviations[int(q * (len(deviations) - 1))]) for q in (0.05, 0.5, 0.95)
        )
        lines = [
            f"Gaussian of {len(self.mean)} weights, {kind}; {self.deviations} standard "
            f"deviations {middle:.3g} (5 to 95 %: {low:.3g} to {high:.3g})",
            *self.warnings,
        ]
        return "\n".join(lines)

    @property
    def marginal_variance(self) -> Float[Tensor, " D"]:
        """Variance of each weight (D,)."""
        return self.remainder + self.factors.square().sum(1)

    @property
    def standard_deviation(self) -> Float[Tensor, " D"]:
        """Standard deviation of each weight (D,)."""
        return self.marginal_variance.sqrt()

    @property
    def signal_to_noise(self) -> Float[Tensor, " D"]:
        """|mean| / standard deviation of each weight (D,)."""
        return self.mean.abs() / self.standard_deviation

    @property
    def independent(self) -> CompactGaussian:
        """The same means and variances without correlations."""
        if not self.factors.shape[1]:
            return self
        none = self.factors[:, :0]
        return replace(self, remainder=self.marginal_variance, factors=none)

    @property
    def distribution(self) -> LowRankMultivariateNormal:
        """The same in torch.distributions, in float64.

        Raises:
            ValueError: It is singular, so that there is no density.
        """
        if not (self.remainder > 0).all():
            fixed = (self.marginal_variance <= 0).nonzero().flatten().tolist()
            raise ValueError(
                "shrinkage: without any, no more draws than weights have a singular "
                "covariance and no density (those that repeat are one)"
                if not fixed
                else f"draws: weight {fixed[0]} is the same in all of them, so that "
                "they have no density"
            )
        factors = self.factors.double()
        if not factors.shape[1]:
            # torch's needs one.
            factors = factors.new_zeros(len(factors), 1)
        return LowRankMultivariateNormal(
            self.mean.double(), factors, self.remainder.double(), validate_args=False
        )

    def log_density(self, rows: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
        """Log density of weights, in nats; its mean over held-out draws is E[log q]."""
        check_matrix("rows", rows, len(self.mean))
        return self.distribution.log_prob(rows.double())

    def divergence(self, other: CompactGaussian) -> float:
        """KL(self || other) in nats."""
        if len(self.mean) != len(other.mean):
            raise ValueError(
                f"other: expected {len(self.mean)} weights, found {len(other.mean)}"
            )
        return float(kl_divergence(self.distribution, other.distribution))

    def sample(
        self, k: int, *, seed: int | torch.Generator = 0
    ) -> Float[Tensor, "k D"]:
        """Weights of k networks as rows."""
        check_count("k", k, 1)
        generator = generator_of(seed)
        own, common = (
            standard_normal(k, size, like=self.mean, generator=generator)
            for size in self.factors.shape
        )
        return self.mean + own * self.remainder.sqrt() + common @ self.factors.mT

    def mapped(
        self, action: Callable[[Float[Tensor, "k D"]], Float[Tensor, "k D"]]
    ) -> CompactGaussian:
        """What it becomes where a symmetry acts on the weights.

        Args:
            action: Takes rows of weights to rows; each weight moves to another place
                and is multiplied by a number there.
        """
        rows = torch.stack([self.mean, self.remainder.sqrt(), *self.factors.mT])
        mean, own, *factors = action(rows)
        return replace(
            self,
            mean=mean,
            remainder=own.square(),
            factors=torch.stack(factors, 1) if factors else self.factors,
        )

    def aligned(
        self, reference: Float[Tensor, " D"], group: SymmetryGroup
    ) -> CompactGaussian:
        """The same in the frame of a network: with its means closest to some weights.

        Args:
            reference: Those weights, or the means of another Gaussian.
            group: The network's symmetries.
        """
        return self.mapped(match_weights(self.mean, reference, group).apply)

    def mean_network(self, network: Network) -> Network:
        """A copy of a network with the mean for its weights.

        Raises:
            ValueError: The network has other parameters, or another number of weights.
        """
        found = copy.deepcopy(network)
        parameters: dict[str, Any] = dict(found.named_parameters())
        chosen = tuple(self.names) or tuple(chosen_weights(network, None))
        if missing := [name for name in chosen if name not in parameters]:
            raise ValueError(
                f"network: expected a parameter {missing[0]!r}, found "
                f"{list(parameters)}"
            )
        sizes = [parameters[name].numel() for name in chosen]
        if self.mean.shape != (sum(sizes),):
            raise ValueError(
                f"network: expected one of {tuple(self.mean.shape)} weights, found "
                f"{sum(sizes)}"
            )
        with torch.no_grad():
            for name, part in zip(chosen, self.mean.split(sizes), strict=True):
                parameters[name].copy_(part.view_as(parameters[name]))
        return found


def _caveats(draws: Draws) -> Iterator[str]:
    """What draws say against their moments."""
    yield from draws.caveats()
    try:
        r_hat = draws.r_hat()
    except ValueError:
        return  # too few draws of each chain, of which there is a caveat
    moving = r_hat[~r_hat.isnan()]
    if len(moving) and float(moving.max()) > _MIXED:
        yield (
            f"R-hat of the weights is {float(moving.median()):.2f} in the median and "
            f"{float(moving.max()):.2f} at most, expected up to {_MIXED}: the moments "
            "are over copies of the network that differ by a symmetry (align the draws "
            "first), or over different modes."
        )


def _exact_variance(posterior: LinearisedPosterior) -> Float[Tensor, " D"]:
    """The diagonal of R (I + phi^T phi)^-1 R^T."""
    stream, prior = posterior.stream, posterior.prior
    assert stream is not None
    gram = posterior.system(stream).gram
    stream.forget()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv(gram + identity)
    # R twice, from either side.
    half = prior.root(inverse.to(prior.precisions))
    return prior.root(half.mT.contiguous()).diagonal().clone()


def _shrinkage(root: Float[Tensor, "K D"]) -> float:
    """Variance of the correlations over their squares, both summed over pairs."""
    count = len(root)
    norms = torch.linalg.vector_norm(root.double(), dim=0)
    z = root.double()[:, norms > 0] / norms[norms > 0]
    # Sums over all pairs of weights i != j of r_ij^2 and of sum_k (z_ki z_kj)^2.
    squares = float((z @ z.mT).square().sum()) - z.shape[1]
    fourths = float(z.square().sum(1).square().sum() - z.pow(4).sum())
    if squares <= 0:
        return 1.0
    # r_ij = sum_k z_ki z_kj: the variance of a sum of K terms.
    variance = count / (count - 1) * (fourths - squares / count)
    return min(1.0, max(0.0, variance / squares))
