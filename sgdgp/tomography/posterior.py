"""The posterior of an image that a network shows, given one linear measurement.

Near its weights theta the network of the deep image prior is f(w) = f + J (w - theta).
Behind a measurement A it is a network of data, and its linearised Laplace posterior is
that of any regression (``sgdgp.networks.linearise``), whose weights say what the image
may be: with w ~ N(0, S) and noise of variance s^2,

    x ~ N(x_hat, C),    C = K - K A^T (A K A^T + s^2 I)^-1 A K,    K = J S J^T,

x_hat being the reconstruction (Antoran et al., "Uncertainty estimation for computed
tomography with a linearised deep image prior", TMLR 2023, eq. 11). S and s^2 maximise
the evidence of the data; the paper adds a prior of S by total variation, and takes the
evidence at the trained weights instead of the linear model's. Measured on Shepp-Logan
phantoms, the trained weights, most of which are still what they were drawn as, ask for
so much variance that all pixels lie within two standard deviations; a precision for
each block fits the data too well, and 80 % do. One for all weights covers 94 to 99 %.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.core.checks import check_count, check_finite, check_positive
from sgdgp.core.errors import warn_user
from sgdgp.core.memory import check_fits, resolve_budget
from sgdgp.core.slices import slices
from sgdgp.core.summary import Summarised
from sgdgp.metrics import interval_coverage
from sgdgp.networks import (
    Gaussian,
    Isotropic,
    LinearisedNetwork,
    LinearisedPosterior,
    WeightCG,
    WeightCholesky,
    load,
)
from sgdgp.networks import linearise as linearise_network
from sgdgp.networks.priors import PriorSettings
from sgdgp.networks.weight_solvers import WeightSolver
from sgdgp.solvers.base import Callback
from sgdgp.tangent import Tangent, TangentBatch, Weights
from sgdgp.tangent.network import chosen_weights
from sgdgp.tomography.design import Criterion, check_choice, chosen_views, root_of
from sgdgp.tomography.geometry import Beam
from sgdgp.tomography.measurement import Measurement

_MOST_ROWS = 2048
"""Measured numbers up to which their covariance is a matrix, and learning exact."""

_MOST_WORK = 2**41
"""Multiplications of an exact covariance of pixels: a minute or two of a core."""

_JACOBIAN = 2**26
"""Numbers of a Jacobian that is formed at a time: 512 MiB in float64."""

_COLUMNS = 4096
"""Weights that are copied to float64 at a time."""

_RANK, _TOLERANCE, _MOST_PASSES = 200, 0.1, 100.0
"""Of conjugate gradients in the weights, and their bounds on errors, which are a tenth
of them. For 544 rays of a 24 x 24 phantom that determine 162 of 5,328 weights, mean and
16 samples take 228, 102, 49 and 20 passes with a rank of 0, 50, 100 and 200, and images
are off by 1 % (float64; in float32 by a fifth to a half more passes). Among the data in
place of the weights (``Dual``) a rank of 200 takes 170, and 610 do not suffice with 50:
an error there is larger by the root of the largest eigenvalue. There, too, learning by
4 or 8 samples finds precisions within 5 % and noise within 1 % of those of the exact
evidence, and minibatches of 1, 4 or all 16 views are no way: by ``WeightSGD`` images
are off by 6 to 14 times what they should be after 500 to 2,000 passes, by
``Dual(SDD())`` by 22 times. 48 x 48 pixels and 1,360 rays, 319 dimensions, by what is
seen in the data: one column takes 10 passes to 1 % with a rank of 200, and 60 to 20 %
without; 16 at a time 20 to 2 % without."""

RESOLUTION = 1 / 255
"""Standard deviation that every pixel has at least, by the range of the image: a grey
level of 256. Behind a saturated sigmoid the linear model is sure of a pixel to 1e-6,
which no measurement is: a digit's white of .99 shown as 1 would cost thousands of nats.
"""


class Views(nn.Module):
    """What a network's image looks like in views of a measurement.

    An example is a set of views (b, v); its outputs are what they measure. All of them
    share one pass through the network.

    Args:
        network: Shows an image.
        input: For this input.
        image_shape: Shape of the image.
        measurement: A. Default: the image itself, whose first axis is that of views.
        data: y. Files of fits know input, measurement and data by this module's state.
    """

    input: Tensor

    def __init__(
        self,
        network: nn.Module,
        input: Tensor,
        image_shape: tuple[int, ...],
        measurement: Measurement | None = None,
        data: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.measurement = measurement
        self.image_shape = image_shape
        self.register_buffer("input", input)
        if measurement is not None and data is not None:
            self.register_buffer("seen", measurement.adjoint(data))
        self.eval()

    def forward(self, views: Tensor) -> Tensor:
        """Data (b, v, *view_shape)."""
        image = self.network(self.input).reshape(self.image_shape)
        data = image if self.measurement is None else self.measurement(image)
        return data[views.flatten()].unflatten(0, views.shape)

    def all_views(self) -> Tensor:
        """The example of all views (1, V)."""
        count = self.image_shape[0]
        if self.measurement is not None:
            count = self.measurement.num_views
        return torch.arange(count, device=self.input.device)[None]


def linearise(
    network: nn.Module,
    input: Tensor,
    measurement: Any,
    data: Any,
    prior: PriorSettings | None = None,
    *,
    noise: float | None = None,
    weights: Weights = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> LinearisedImage:
    """Take a network that shows an image as a linear model of what is measured of it.

    Args:
        network: Shows the image for ``input``, fitted to the data.
        input: What it is fed with.
        measurement: A; whatever ``Measurement.of`` takes.
        data: y (num_views, *view_shape).
        prior: Of the weights. Default: ``Isotropic()``, one precision for all, which
            covers best behind the default network. ``Layerwise(block)`` has one for
            each block of a network, ``Filters(groups=block)`` smooth filters as well,
            ``GPrior(probes=256)`` one for weights scaled by the Jacobian, with wider
            intervals: for networks with norms, behind which weights have no scale.
        noise: Standard deviation of the noise. Default: learned.
        weights: Which weights are uncertain, as in ``networks.linearise``. Default: all
            but biases and those of normalisation layers, as published.
        dtype: Of the posterior; the network is copied. Default: the network's.
            Matrices are formed and factorised in float64 whatever it is, so that
            float32 is off by 1e-6 there; conjugate gradients, beyond 2,048 measured
            numbers, take up to half as many passes again in float32 as in float64,
            each of which costs half as much or less.
        memory_budget: Bytes for temporaries. Default: half of what is free.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes do not match, or an argument is out of range.
    """
    weight = next(network.parameters(), None)
    if weight is None:
        raise ValueError("network: expected weights, found none")
    device, dtype = weight.device, weight.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected float32 or float64, found {dtype}")
    input = torch.as_tensor(input).detach().to(device, dtype)
    measurement = Measurement.of(measurement).to(device, dtype)
    y = measurement.as_data(data, single=True)
    if noise is not None:
        check_positive("noise", noise)
    network = _laid_out(copy.deepcopy(network).eval().to(dtype))
    with torch.no_grad():
        shown = tuple(network(input).shape)
    if math.prod(shown) != math.prod(measurement.image_shape):
        raise ValueError(
            f"network: expected an image of shape {measurement.image_shape}, found "
            f"{shown}"
        )
    chosen = chosen_weights(network, "no_norms" if weights is None else weights)
    if weights is None:
        chosen = {name: weight for name, weight in chosen.items() if weight.ndim > 1}
    model = linearise_network(
        Views(network, input, measurement.image_shape, measurement, y),
        Gaussian() if noise is None else Gaussian(noise=float(noise) ** 2),
        Isotropic() if prior is None else prior,
        weights=lambda name, _: name.removeprefix("network.") in chosen,
        mean="linear",
        offset=True,
        memory_budget=memory_budget,
    )
    return LinearisedImage(model, measurement, y)


linearize = linearise
"""The same in US spelling."""


def block(name: str) -> str:
    """The block of a network that a weight belongs to, such as "up.1": a grouping.

    That is the part of its name up to the first number, or the first layer.
    """
    parts = name.removeprefix("network.").split(".")
    stop = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: stop + 1])


@dataclass(frozen=True)
class LinearisedImage:
    """A network that shows an image, as a linear model of the measured data.

    Attributes:
        model: The network behind the measurement, linearised.
        measurement: A.
        data: y (num_views, *view_shape).
    """

    model: LinearisedNetwork
    measurement: Measurement
    data: Tensor = field(repr=False)

    def fit(
        self,
        *,
        num_samples: int = 8,
        final_samples: int = 64,
        steps: int = 40,
        precision: float | None = None,
        solver: WeightSolver | str = "auto",
        exact: bool | None = None,
        batch_views: int | None = None,
        seed: int | torch.Generator = 0,
        progress: bool | None = None,
        callback: Callback | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | float = 60,
    ) -> ImagePosterior:
        """Learn prior and noise by the evidence, and draw images.

        Up to 2,048 measured numbers the evidence is exact, by the covariance matrix of
        the data; beyond, it is maximised by expectation maximisation with samples.

        Args:
            num_samples: Samples that learn, where that is not exact.
            final_samples: Images that are drawn.
            steps: Most steps of learning. With 0 the prior has ``precision``.
            precision: Of the prior, to start from; that of the last posterior where
                data are added. Default: found.
            solver: As in ``LinearisedNetwork.fit``. "auto": Cholesky up to 2,048
                measured numbers, then conjugate gradients in the weights with a Nystrom
                preconditioner, without which they hardly converge.
            exact: Whether standard deviations are by the covariance matrix of the
                pixels, without sampling error. Default: where that takes minutes.
            batch_views: Views in a minibatch, for solvers that take them, such as
                ``networks.Dual()`` and ``networks.WeightSGD()``. A minibatch costs a
                pass through the network, whatever its size, and at a precision that is
                learned hundreds of passes are too few for them. No more than these, and
                a divisor of the number of views. Default: as many as pay.
            seed: Of everything random.
            progress: Show a progress bar. Default: on a terminal.
            callback: Called as solves advance; returning True stops.
            checkpoint: File that keeps the fit, which goes on from there.
            checkpoint_every: Seconds between two writes of it, at least.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: An argument does not fit.
            MemoryError: ``exact``, or so many samples, need more memory than there is;
                says how much.
        """
        if exact:
            self._check_exact()
        self._check_samples(final_samples)
        seen = self.model.tangent.network
        assert isinstance(seen, Views)
        views = seen.all_views()
        rows = self.data.numel()
        if batch_views is None:
            batch_views = self._views_at_once() if rows <= _MOST_ROWS else views.numel()
        check_count("batch_views", batch_views, 1)
        size = next(
            n
            for n in range(min(batch_views, views.numel()), 0, -1)
            if views.numel() % n == 0
        )
        examples = views.reshape(-1, size)
        loader = DataLoader(
            TensorDataset(examples, self.data.reshape(len(examples), -1)), batch_size=1
        )
        if solver == "auto":
            solver = WeightCholesky() if rows <= _MOST_ROWS else _preconditioned()
        weights = self.model.fit(
            loader,
            num_samples=num_samples,
            final_samples=final_samples,
            steps=steps,
            precision=precision,
            solver=solver,
            seed=seed,
            progress=progress,
            callback=callback,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )
        if weights.reason == "interrupted":
            warn_user(weights.warnings[-1])
        return self._posterior(replace(weights, mean_of="network"), exact)

    def _posterior(
        self, weights: LinearisedPosterior, exact: bool | None
    ) -> ImagePosterior:
        exact = self._is_small if exact is None else exact
        return ImagePosterior(weights, self.measurement, exact)

    def load(
        self, path: str | os.PathLike[str], *, exact: bool | None = None
    ) -> ImagePosterior:
        """Read a posterior of this model that was saved.

        Args:
            path: The file.
            exact: As in ``fit``.

        Raises:
            StorageError: The file is missing, damaged, or of another network, input,
                measurement or data.
            MemoryError: ``exact`` needs more memory than there is.
        """
        if exact:
            self._check_exact()
        tangent = self.model.tangent
        weights = load(path, tangent.network, memory_budget=tangent.memory_budget)
        return self._posterior(weights, exact)

    @property
    def _is_small(self) -> bool:
        """Whether the covariance matrix of the pixels takes minutes at most."""
        m, d = self.measurement.shape
        work = d**2 * (self.model.tangent.num_weights + m)
        return work <= _MOST_WORK and self._exact_bytes() <= _budget_of(
            self.model.tangent
        )

    def _exact_bytes(self) -> int:
        (m, d), size = self.measurement.shape, self.model.tangent.num_weights
        # The Jacobian as it is found and scaled; matrices of pixels, what is measured
        # of them, and the smaller of the two systems.
        jacobian = 2 * d * size * self.measurement.dtype.itemsize
        return jacobian + 8 * (3 * d**2 + 3 * m * d + 3 * min(m, d) ** 2)

    def _check_exact(self) -> None:
        check_fits(
            f"exact: the covariance of {self.measurement.shape[1]} pixels",
            self._exact_bytes(),
            _budget_of(self.model.tangent),
            "leave exact=False, for variances by samples",
        )

    def _check_samples(self, count: int) -> None:
        """Refuse images that do not fit, before long work."""
        d, size = self.measurement.shape[1], self.model.tangent.num_weights
        # Images and what they add to the mean; their weights, whitened and not.
        each = 2 * (d + size) * self.measurement.dtype.itemsize
        budget = _budget_of(self.model.tangent)
        check_fits(
            f"final_samples: {count} times {d} pixels and {size} weights",
            count * each,
            budget,
            f"take at most {budget // each}",
        )

    def _views_at_once(self) -> int:
        """Views whose Jacobian is held at a time."""
        each = math.prod(self.measurement.view_shape) * self.model.tangent.num_weights
        return max(1, _JACOBIAN // each)


def _preconditioned() -> WeightCG:
    return WeightCG(_TOLERANCE, _MOST_PASSES, _RANK)


def _laid_out(network: nn.Module) -> nn.Module:
    """With channels beside each other in volumes on a CPU.

    Convolutions of eight channels at 64^3 are two to six times as fast so, products of
    whole networks up to 1.6 times. Derivatives of ``GroupNorm`` know no such layout
    under ``vmap``.
    """
    if not any(p.ndim == 5 and p.device.type == "cpu" for p in network.parameters()):
        return network
    has_norm = any(isinstance(module, nn.GroupNorm) for module in network.modules())
    layout = torch.contiguous_format if has_norm else torch.channels_last_3d
    return network.to(memory_format=layout)  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False, repr=False)
class ImagePosterior(Summarised):
    """A Gaussian posterior over images.

    Attributes:
        weights: That of the network behind the measurement, over its weights; its own
            ``noise`` is a variance. A ``scale`` of it scales all variances here.
        measurement: What was measured.
        exact: Whether standard deviations are by the covariance of the pixels; else
            they are by the samples.
    """

    weights: LinearisedPosterior
    measurement: Measurement
    exact: bool = False

    def _facts(self) -> dict[str, Any]:
        return {
            "image_shape": self.image_shape,
            "measurement": type(self.measurement).__name__,
            "noise": self.noise,
            "exact": self.exact,
            "num_samples": self.weights.num_samples,
            "passes": self.weights.passes,
            "seconds": self.weights.seconds,
            "warnings": self.weights.warnings,
            "reason": self.weights.reason,
        }

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return self.measurement.image_shape

    @property
    def noise(self) -> float:
        """Standard deviation of the noise."""
        variance = self.weights.likelihood.variance
        assert isinstance(variance, float)
        return math.sqrt(variance)

    @property
    def _shown(self) -> TangentBatch:
        """The tangent model of the image; not kept, as it holds the network's graph."""
        tangent = self.weights.tangent
        views = tangent.network
        assert isinstance(views, Views)
        seen = Views(views.network, views.input, views.image_shape)
        image = Tangent(
            seen,
            weights=lambda name, _: name in tangent.names,
            memory_budget=tangent.memory_budget,
        )
        return image.at(seen.all_views())

    @cached_property
    def mean(self) -> Float[Tensor, "*i"]:
        """The image that the network shows (*image_shape)."""
        return self._shown.outputs.reshape(self.image_shape)

    @cached_property
    def resolution(self) -> float:
        """Standard deviation that every pixel has on its own, whatever the samples."""
        return RESOLUTION * float(self.mean.max() - self.mean.min())

    @cached_property
    def _fluctuations(self) -> Float[Tensor, K * i]:
        """What the samples add to the mean."""
        with torch.no_grad():
            added = self._shown.jvp(self.weights.weight_samples)[0]
        added = added * self.weights.scale**0.5
        return added.mT.reshape(-1, *self.image_shape)

    def samples(self, count: int | None = None) -> Float[Tensor, K * i]:
        """Images of the posterior (count, *image_shape).

        Args:
            count: How many. Default: all that ``fit`` drew.

        Raises:
            ValueError: ``fit`` drew fewer.
        """
        have = self.weights.num_samples
        count = have if count is None else count
        check_count("count", count, 1)
        if count > have:
            raise ValueError(
                f"count: expected at most the {have} samples that fit drew, found "
                f"{count}; fit with final_samples={count}"
            )
        return self.mean + self._fluctuations[:count]

    def covariance(self) -> Float[Tensor, "d d"]:
        """C of all pixels, without sampling error (d, d), in float64.

        With ``resolution`` on its diagonal.
        """
        return self._covariance

    @cached_property
    @torch.no_grad()
    def _covariance(self) -> Float[Tensor, "d d"]:
        prior = self._prior_covariance()
        m, d = self.measurement.shape
        if m <= d:
            cross = self._measured(prior)
            system = self._measured(cross.mT) / self.noise**2
            half = _half(system, cross.mT / self.noise)
            found = prior.addmm_(half.mT, half, alpha=-1)
        else:
            root = root_of(prior)
            images = self._measured(root) / self.noise
            half = _half(images @ images.mT, root)
            found = half.mT @ half
        found.mul_(self.weights.scale)
        found.diagonal().add_(self.resolution**2)
        return found

    def _measured(self, images: Float[Tensor, "k d"]) -> Float[Tensor, "k m"]:
        """A x of flat images in float64."""
        measurement = self.measurement.to(torch.float64)
        return measurement(images.reshape(-1, *self.image_shape)).flatten(1)

    def _prior_covariance(self) -> Float[Tensor, "d d"]:
        """K of all pixels, in float64."""
        with torch.no_grad():
            jacobian = self._shown.jacobian()[0]
        phi = self.weights.prior.root_adjoint(jacobian.mT).mT
        found = phi.new_zeros(len(phi), len(phi), dtype=torch.float64)
        for columns in slices(phi.shape[1], _COLUMNS):
            some = phi[:, columns].double()
            found.addmm_(some, some.mT)
        return found

    @cached_property
    def standard_deviation(self) -> Float[Tensor, "*i"]:
        """Of every pixel (*image_shape), at least ``resolution``."""
        if self.exact:
            variance = self.covariance().diagonal().clamp_min(self.resolution**2)
            return variance.sqrt().to(self.mean).reshape(self.image_shape)
        return (self._fluctuations.square().mean(0) + self.resolution**2).sqrt()

    def next_angles(
        self, candidates: Any = 180, k: int = 5, criterion: Criterion = "eig"
    ) -> Float[Tensor, " k"]:
        """The angles to measure next, of a geometry of rays.

        Args:
            candidates: A geometry, angles in degrees, or how many equidistant ones.
                Leave out those that cannot be measured again.
            k: How many.
            criterion: As in :meth:`next_views`.

        Returns:
            Angles in degrees (k), the best one first.

        Raises:
            TypeError: The measurement is not one by rays.
            ValueError: An argument does not fit.
            MemoryError: Too many candidates at a time.

        Example:
            >>> angles = posterior.next_angles(k=5)
            >>> data = torch.cat([dip.data, scan(angles)])
            >>> geometry = geometry.at(torch.cat([geometry.angles, angles]))
            >>> dip = reconstruct(data, geometry, network=dip.network, input=dip.input)
            >>> precision = float(posterior.weights.precisions[0])
            >>> posterior = dip.linearise().fit(precision=precision)
        """
        if not isinstance(candidates, Beam):
            if not isinstance(self.measurement, Beam):
                raise TypeError(
                    "next_angles: expected a posterior by a ParallelBeam or FanBeam, "
                    f"found {type(self.measurement).__name__}; next_views takes any "
                    "measurement"
                )
            candidates = self.measurement.at(candidates)
        return candidates.angles[self.next_views(candidates, k, criterion)]

    def next_views(
        self, candidates: Any, k: int = 1, criterion: Criterion = "eig"
    ) -> Int[Tensor, " k"]:
        """The views to measure next: one after the other, each given those before it.

        Criteria are, with the covariance V of what a view would measure and the noise's
        variance s^2,

        - "eig": the expected information gain, log det(I + V / s^2) / 2;
        - "diagonal": the same of every number for itself, sum log(1 + V_ii / s^2) / 2;
        - "variance": sum V_ii.

        Where the posterior is not ``exact`` they are by the samples. K samples tell of
        no more than K directions: V has that rank, which makes "eig" too small for
        views of as many numbers, and after views of K numbers in all nothing is left to
        learn. Have several times as many samples as the k views have numbers (there is
        a warning below as many); the first view by the other criteria needs few.

        Args:
            candidates: Views of the same image; whatever ``Measurement.of`` takes.
                Measured ones may be among them: they are worth less.
            k: How many; no view is chosen twice.
            criterion: What a view is worth.

        Returns:
            Numbers of the views (k), the best one first.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: Images of another shape, fewer than k candidates, or no such
                criterion.
            MemoryError: Too many candidates at a time; says how much they need.
        """
        shape = None if isinstance(candidates, Measurement) else self.image_shape
        candidates = Measurement.of(candidates, shape)
        if candidates.image_shape != self.image_shape:
            raise ValueError(
                f"candidates: expected views of images {self.image_shape}, found "
                f"{candidates.image_shape}"
            )
        check_choice(k, candidates.num_views, criterion)
        rows = self.measurement.shape[1] if self.exact else self.weights.num_samples
        kind = torch.float64 if self.exact else self.mean.dtype
        check_fits(
            f"candidates: what {candidates.num_views} views see of {rows} images",
            2 * rows * candidates.shape[0] * kind.itemsize,
            _budget_of(self.weights.tangent),
            "give fewer views",
        )
        numbers = k * candidates.shape[0] // candidates.num_views
        if not self.exact and rows < numbers:
            warn_user(
                f"{rows} samples tell less than the {numbers} numbers of {k} views: "
                "which views come after the first is up to chance; fit with "
                f"final_samples={4 * numbers}, or choose fewer."
            )
        if self.exact:
            root = root_of(self.covariance()).reshape(-1, *self.image_shape)
        else:
            root = self._fluctuations / math.sqrt(rows)
        seen = candidates.to(root.device, kind)(root)
        seen = seen.reshape(*seen.shape[:2], -1)
        return chosen_views(seen, self.noise, k, criterion)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which ``reconstruction.linearise().load`` reads.

        Network and measurement are not in it: save the reconstruction as well.

        Raises:
            StorageError: Nothing can be written there.
        """
        self.weights.save(path)

    def log_density(self, truth: Any, patch: int | None = 1) -> float:
        """Log density of the true image, in nats and by the number of pixels.

        Args:
            truth: The image (*image_shape).
            patch: Side of the patches that are taken for independent of each other: 1,
                pixels; None, the whole image. Covariances of patches are exact where
                standard deviations are; by samples, those between pixels are halved,
                which leaves them positive definite however few samples there are (as
                in SWAG).
        """
        error = (self._checked(truth) - self.mean).double()
        if patch is None:
            patch = max(self.image_shape)
        check_count("patch", patch, 1)
        if patch == 1:
            variance = self.standard_deviation.double().square()
            each = error.square() / variance + variance.log()
            return -0.5 * (float(each.mean()) + math.log(2 * math.pi))
        total = 0.0
        for pixels in patches_of(self.mean, patch):
            root = torch.linalg.cholesky(self._covariance_of(pixels))
            white = torch.linalg.solve_triangular(
                root, error.flatten()[pixels, None], upper=False
            )
            total += float(white.square().sum() + 2 * root.diagonal().log().sum())
        return -0.5 * (total / error.numel() + math.log(2 * math.pi))

    def coverage(self, truth: Any, level: float = 0.95) -> float:
        """Share of pixels of the true image within their central intervals.

        Args:
            truth: The image (*image_shape).
            level: Probability of an interval.
        """
        mean, y = self.mean.double(), self._checked(truth).double()
        variance = self.standard_deviation.double().square()
        return interval_coverage(mean.flatten(), variance.flatten(), y.flatten(), level)

    def _checked(self, truth: Any) -> Tensor:
        if not torch.is_tensor(truth):
            truth = torch.from_numpy(np.ascontiguousarray(truth))
        x = truth.to(self.mean)
        check_finite("truth", x)
        if tuple(x.shape) != self.image_shape:
            raise ValueError(
                f"truth: expected shape {self.image_shape}, found {tuple(x.shape)}"
            )
        return x

    def _covariance_of(self, pixels: Tensor) -> Float[Tensor, "p p"]:
        """C of some pixels, in float64."""
        if self.exact:
            return self.covariance()[pixels[:, None], pixels]
        check_fits(
            f"patch: the covariance of {len(pixels)} pixels",
            24 * len(pixels) ** 2,
            _budget_of(self.weights.tangent),
            "take smaller patches",
        )
        some = self._fluctuations.flatten(1)[:, pixels].double()
        found = some.mT @ some / (2 * len(some))
        found.diagonal().mul_(2).add_(self.resolution**2)
        return found


def patches_of(image: Tensor, side: int) -> list[Tensor]:
    """Numbers of the pixels of each patch; those at the edge may be smaller."""
    parts = [torch.arange(image.numel(), device=image.device).reshape(image.shape)]
    for axis in range(image.ndim):
        parts = [q for p in parts for q in p.split(side, axis)]
    return [part.flatten() for part in parts]


def _half(
    system: Float[Tensor, "r r"], right: Float[Tensor, "r d"]
) -> Float[Tensor, "r d"]:
    """L^-1 B with L L^T = S + I; S is overwritten."""
    system = 0.5 * (system + system.mT)
    system.diagonal().add_(1.0)
    root = torch.linalg.cholesky(system)
    return torch.linalg.solve_triangular(root, right, upper=False)


def _budget_of(tangent: Tangent) -> int:
    return resolve_budget(tangent.memory_budget, tangent.device)
