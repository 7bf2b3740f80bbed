"""Reconstructions by the deep image prior: a network fitted to one measurement.

The image is x = f(theta), a network of a fixed input, and theta minimises

    mean((A x - y)^2) + tv * sum |dx|

by Adam (Ulyanov et al., "Deep image prior", 2018; with the total variation of Baguer
et al., 2020). Untrained convolutional networks learn images before noise, so that a fit
has to end in time: a tenth of the data is held out until its misfit no longer falls;
from the weights that predicted it best a short fit to all data follows, with a falling
learning rate.

Deviations from the papers:

1. Steps. Losses are scaled so that most gradients are clipped, which is worth up to 7
   dB in 1,500 steps.
2. Early stopping. On phantoms and digits at 5 to 30 angles with 5 % noise the image
   at the least held-out misfit is within .2 dB of the best of its fit; where moving
   variances of the image (as of Wang et al., 2021) are least, it is up to 6 dB worse,
   since they are small while a digit at 30 angles still improves. What no ray sees no
   data tell: a phantom at 5 angles loses 2 dB after its best step, stopped or not.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgdgp.core.checkpoint import Checkpoint, check_every
from sgdgp.core.checks import (
    check_count,
    check_finite,
    check_followers,
    check_number,
    check_positive,
)
from sgdgp.core.codec import (
    encode,
    fitting,
    is_stored_class,
    read_values,
    register_stored_class,
    write_values,
)
from sgdgp.core.errors import NotStorableError, StorageError, warn_user
from sgdgp.core.files import FileKind, path_of, place_of, reads
from sgdgp.core.hashes import digest, structure_of
from sgdgp.core.memory import check_fits, free_memory
from sgdgp.core.seeds import derived_generator, number_of
from sgdgp.core.summary import Summarised
from sgdgp.networks.priors import PriorSettings
from sgdgp.solvers.base import Callback, Progress, progress_bar
from sgdgp.tomography.geometry import Beam
from sgdgp.tomography.measurement import Measurement
from sgdgp.tomography.posterior import LinearisedImage, linearise
from sgdgp.tomography.unet import UNet

Schedule: TypeAlias = Literal["cosine", "constant"]
"""Of the learning rate."""

KIND = FileKind("sgdgp.tomography", 1, "reconstruction")
FIT_KIND = FileKind("sgdgp.tomography.fit", 1, "checkpoint of a reconstruction")

_EVERY = 10
"""Steps between two entries of the history, and two calls of a callback."""

_CLIP = 1.0
"""Largest norm of a gradient, of losses in units of ``_UNIT`` mean(y^2)."""

_UNIT = 0.01
"""Small enough that most gradients are clipped: 39 dB in place of 32 for a digit."""

_HELD_OUT, _LEAST_DATA = 0.1, 50
"""Share of the data that finds where to stop, where there are so many data."""

_SMOOTHING, _PATIENCE = 0.98, 300
"""Of the held-out misfit, and steps without a fall of it that end the search."""

_TAIL = 200
"""Steps on all data at the end, at most a quarter of all; 400 show more noise."""

_TV = 2.0
"""Strength of the total variation, where nobody says: exp(-_TV |dx|) is the prior of
the difference of two pixels, in units of the image's range. Measured: 1 is better for
a digit at 30 angles (by 1.2 dB than 3), 3 for phantoms and at 5 angles (by .8 dB)."""

_DIFFERENCES = 4
"""Order of the differences between bins that are taken for noise."""

_USUAL_NOISE, _MOST_NOISE = 0.05, 0.1
"""Of the mean of |y|: where no bins tell it, and at most for a default tv."""

_WELL_SCALED = (0.1, 1.05)
"""Where the largest value of a smoothed first image may lie for [0, 1] to be taken as
the range of images."""

_HEADROOM = 2.0
"""Largest value of an image by that of its smoothed first image, at most."""

_NEGATIVE, _NEGATIVE_IMAGE = 0.05, 0.2
"""Share of projections, and of a smoothed first image, below zero that noise and
artefacts do not explain: .13 was measured for images in [0, 1] by random matrices, .3
and more for images that are as often negative."""

_EXPLODED = 10.0
"""A loss so many times that of the first step is divergence."""

_LOST, _LOST_STEPS = 3.0, 300
"""So is a loss so many times the best that was not reached again in so many steps."""

_SLOWER = 0.3
"""Factor of the learning rate after divergence."""

_MOST_RESTARTS = 5

_SMALL = 2**16
"""Pixels that fit in any memory: to find out takes seconds."""

_MISSED, _MISSED_BY_GUESS = 0.05, 0.3
"""Of the data's root mean square: what a fit may miss whatever the noise, and where
that is but a guess."""

_FLAT = 1e-3
"""Range of an image, by that of its first one, that shows nothing."""

_HEAVY = 2**28
"""Bytes of a measurement that a file does not hold, unless they are a geometry's."""


@dataclass(frozen=True)
class FitEntry:
    """One line of a fit's history.

    Attributes:
        step: Steps of Adam so far.
        loss: mean((A x - y)^2) + tv * sum |dx|.
        misfit: Its first part.
        seconds: Wall time so far.
    """

    step: int
    loss: float
    misfit: float
    seconds: float


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction(Summarised):
    """An image, the network that shows it, and what it was reconstructed from.

    Attributes:
        image: The reconstruction (image_shape), of the measurement's dtype and device.
        network: In evaluation mode, with the weights of the least loss.
        input: What the network shows the image for (1, channels, ...).
        measurement: A.
        data: y, of shape (num_views, *view_shape).
        tv: Weight of the total variation in the loss.
        noise: Standard deviation of the noise: as estimated from the differences of
            bins for a ``ParallelBeam`` or ``FanBeam`` of 8 bins or more, else a guess,
            5 % of the mean of |y|.
        reason: Why the fit ended: "finished", "stopped early", "interrupted" or
            "diverged".
        history: One entry for every 10 steps.
        warnings: Sentences that say what a user may want to do about it.
    """

    image: Tensor
    network: nn.Module
    input: Tensor
    measurement: Measurement
    data: Tensor
    tv: float
    noise: float
    reason: str
    history: tuple[FitEntry, ...] = ()
    warnings: tuple[str, ...] = ()

    def _facts(self) -> dict[str, Any]:
        last = self.history[-1] if self.history else None
        return {
            "image_shape": tuple(self.image.shape),
            "network": type(self.network).__name__,
            "measurement": type(self.measurement).__name__,
            "steps": last.step if last else 0,
            "misfit": last.misfit if last else None,
            "tv": self.tv,
            "noise": self.noise,
            "warnings": self.warnings,
            "reason": self.reason,
        }

    def linearise(
        self, prior: PriorSettings | None = None, **settings: Any
    ) -> LinearisedImage:
        """The network as a linear model; ``fit`` it for the posterior of the image.

        Args:
            prior: Of the weights; see :func:`sgdgp.tomography.linearise`.
            **settings: Its other arguments: noise, weights, dtype, memory_budget.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: An argument is out of range.

        Example:
            >>> posterior = reconstruct(sinogram, geometry).linearise().fit()
            >>> posterior.standard_deviation
        """
        return linearise(
            self.network, self.input, self.measurement, self.data, prior, **settings
        )

    def linearize(self, *arguments: Any, **settings: Any) -> LinearisedImage:
        """The same in US spelling."""
        return self.linearise(*arguments, **settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it into a file, in one step; ``sgdgp.load`` reads it.

        A network other than a ``UNet`` is not in the file, but its weights are; nor is
        a measurement by a function, or by a matrix of more than 256 MiB. What is not
        there has to be given on loading.

        Raises:
            StorageError: Nothing can be written there.
        """
        network: Any = self.network
        if not is_stored_class(type(network)):
            network = dict(network.state_dict())
        values = {
            "image": self.image,
            "network": network,
            "input": self.input,
            "measurement": _stored(self.measurement),
            "misfit": _misfit(self.measurement, self.image, self.data),
            "data": self.data,
            "tv": self.tv,
            "noise": self.noise,
            "reason": self.reason,
            "history": _table(self.history),
            "warnings": self.warnings,
        }
        write_values(place_of(path), KIND, values)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        network: nn.Module | None = None,
        measurement: Any = None,
    ) -> Reconstruction:
        """What ``save`` wrote; ``sgdgp.load`` does the same.

        Args:
            path: The file.
            device: Where it goes.
            network: One like that which was fitted, where that is no ``UNet``; a copy
                gets the weights.
            measurement: That of the data, where the file does not hold it; or what it
                was made of by ``Measurement.of``.

        Raises:
            StorageError: The file is damaged, or does not fit what is given.
            TypeError: Something that the file does not hold is not given, or
                something that it holds is.
        """
        return load_reconstruction(
            path, device, network=network, measurement=measurement
        )


def reconstruct(
    data: Any,
    measurement: Any,
    network: nn.Module | None = None,
    image_shape: Sequence[int] | None = None,
    *,
    iterations: int = 3000,
    learning_rate: float = 2e-3,
    schedule: Schedule = "cosine",
    tv: float | None = None,
    input: Tensor | None = None,
    early_stopping: bool = True,
    seed: int | torch.Generator = 0,
    progress: bool | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | float = 60,
) -> Reconstruction:
    """Reconstruct an image or volume from one measurement by a deep image prior.

    Args:
        data: y, of shape (num_views, *view_shape), such as a sinogram.
        measurement: A: a ``ParallelBeam`` or any ``Measurement``, or what
            ``Measurement.of`` takes: a matrix, or a linear operator.
        network: From inputs (1, channels, ...) to images (1, channels, ...). A copy is
            fitted, from the weights as they are. Default: a ``UNet`` in two or three
            dimensions with weights by ``seed``.
        image_shape: Shape of the image, where ``measurement`` does not say.
        iterations: Steps of Adam, at most.
        learning_rate: Of Adam, at first.
        schedule: Whether it falls to zero as a "cosine" (with ``early_stopping`` in the
            last steps) or is "constant".
        tv: Weight of the total variation. Default: by the noise, as estimated from
            the differences of bins for a ``ParallelBeam`` or ``FanBeam``; 5 % of the
            mean of |y| for others, whose data have no order: give tv where you know
            that there is less noise, or more.
        input: What the network is fed with. Default: the back-projection of the data.
        early_stopping: End when the image turns from structure to noise, as a tenth
            of the data shows that is held out for most steps; needs no truth. Off for
            fewer than 50 data, of which a tenth would show nothing.
        seed: Seed or generator of the weights, and of dropout.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called every 10 steps; a ``Progress`` whose residual is
            |A x - y| / |y|, and whose weights are the image. Returning True stops.
        checkpoint: File that keeps the fit. Calling again after the process was killed
            goes on from there.
        checkpoint_every: Seconds between two writes of the checkpoint, at least.

    Returns:
        The reconstruction. After an interrupt (also from the keyboard) it is the best
        so far, and its ``reason`` says so.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument does not fit; named, with what was found.
        MemoryError: The network's activations do not fit; says how much they need.
        CheckpointError: The checkpoint is of another fit, or damaged.

    Example:
        >>> geometry = sgdgp.tomography.ParallelBeam(size=128, angles=60)
        >>> dip = sgdgp.tomography.reconstruct(sinogram, geometry)
        >>> dip.image
    """
    check_followers(progress, callback)
    check_every(checkpoint_every)
    check_count("iterations", iterations, 1)
    check_positive("learning_rate", learning_rate)
    if schedule not in get_args(Schedule):
        raise ValueError(
            f'schedule: expected "cosine" or "constant", found {schedule!r}'
        )
    if tv is not None:
        check_number("tv", tv)
        if not 0 <= tv < math.inf:
            raise ValueError(f"tv: expected a number of at least 0, found {tv}")
    if not isinstance(early_stopping, bool):
        raise TypeError(f"early_stopping: expected a bool, found {early_stopping!r}")
    number = number_of(seed)
    problem = _problem(data, measurement, image_shape, network, input, tv, number)
    settings = _Settings(
        iterations, float(learning_rate), schedule, early_stopping, number
    )
    keeper = _Keeper.at(checkpoint, checkpoint_every)
    state = None
    if keeper is not None:
        state = keeper.find(_identity(problem, settings), problem.like.device)
    fit = _Fit(problem, settings, state)
    reason = fit.state.reason
    with (
        progress_bar(progress, "deep image prior", callback) as listener,
        _keyboard() as is_pressed,
    ):
        while reason is None:
            reason = fit.advance(listener)
            if reason is None and is_pressed():
                reason = "interrupted"
            if keeper is not None and (keeper.is_due or reason is not None):
                keeper.write(fit=fit.state)
    found = fit.result(reason)
    if keeper is not None and keeper.problem is not None:
        found = replace(found, warnings=(*found.warnings, keeper.problem))
    for sentence in found.warnings:
        warn_user(sentence)
    return found


@contextmanager
def _keyboard() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which breaks no step; the second time it does."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        # None stands for a handler that is not Python's.
        known = signal.default_int_handler if before is None else before
        signal.signal(signal.SIGINT, known)


@dataclass(frozen=True)
class _Settings:
    """Arguments of the same names."""

    iterations: int
    learning_rate: float
    schedule: Schedule
    early_stopping: bool
    seed: int

    @property
    def tail(self) -> int:
        """How many steps the last part has, in which the learning rate falls."""
        return min(_TAIL, self.iterations // 4)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What is fitted to what.

    Attributes:
        measurement: As it was given.
        data: y, of its kind.
        network: Ours to change.
        input: z.
        tv: Weight of the total variation.
        noise: Its estimated standard deviation.
        warnings: What was decided.
        like: y of the network's kind.
        measure: A of that kind.
        scale: What losses are divided by for gradients.
    """

    measurement: Measurement
    data: Tensor
    network: nn.Module
    input: Tensor
    tv: float
    noise: float
    warnings: tuple[str, ...]
    like: Tensor
    measure: Measurement
    scale: float

    def image(self) -> Tensor:
        """f(theta) in the image's shape."""
        found: Tensor = self.network(self.input)
        return found.reshape(self.measurement.image_shape)

    def loss(self, image: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, its first part, and the misfit of the data that are not kept.

        Args:
            image: x.
            kept: Ones for the data that count, zeros for others; None for all.
        """
        squares = (self.measure(image) - self.like).square()
        misfit = held_out = squares.mean()
        if kept is not None:
            misfit = (squares * kept).sum() / kept.sum()
            held_out = (squares.detach() * (1 - kept)).sum() / (1 - kept).sum()
        if not self.tv:
            return misfit, misfit, held_out
        return misfit + self.tv * self.total_variation(image), misfit, held_out

    def total_variation(self, image: Tensor) -> Tensor:
        """Sum of |dx| over all axes but channels."""
        has_channels = image.ndim > 1 and self.input.shape[2:] == image.shape[1:]
        axes = range(1 if has_channels else 0, image.ndim)
        return torch.stack([image.diff(dim=a).abs().sum() for a in axes]).sum()


def _problem(
    data: Any,
    measurement: Any,
    image_shape: Sequence[int] | None,
    network: nn.Module | None,
    input: Tensor | None,
    tv: float | None,
    seed: int,
) -> _Problem:
    if network is not None and not isinstance(network, nn.Module):
        raise TypeError(
            f"network: expected a torch.nn.Module, found {type(network).__name__}"
        )
    measurement = Measurement.of(measurement, image_shape)
    y = measurement.as_data(data, single=True)
    if not y.any():
        raise ValueError("data: expected some that are not zero, found zeros only")
    warnings = []
    noise = _noise_of(y, measurement)
    if noise is None:
        noise = _USUAL_NOISE * float(y.abs().mean())
        if isinstance(measurement, Beam):
            warnings.append(
                "The noise cannot be told from differences of bins, so it is taken to "
                f"be {noise:.2g}, {_USUAL_NOISE:.0%} of the mean of |data|: give tv if "
                "you know better."
            )
    first = measurement.back_projection(y)
    check_finite("back-projection of data", first)
    low, high = _range_of(first, y, measurement)
    unit, axes = high - low, len(measurement.image_shape)
    if network is None:
        if axes not in (2, 3):
            raise ValueError(
                "network: needed for images of other than 2 or 3 axes, found shape "
                f"{measurement.image_shape}"
            )
        if (low, high) != (0.0, 1.0):
            warnings.append(
                "Images seem to lie in other units than [0, 1], so the network's are "
                + (f"within [0, {high:.3g}]" if low == 0 else "not bounded")
                + ": give network=UNet(limits=...) if you know where they lie."
            )
        with torch.random.fork_rng(_devices(y)):
            torch.manual_seed(seed)
            network = UNet(dimensions=axes, sigmoid=low == 0, limits=(low, high))
        network.to(y.device)
    else:
        network = copy.deepcopy(network)
    parameter = next((p for p in network.parameters() if p.requires_grad), None)
    if parameter is None:
        raise ValueError("network: expected weights that need a gradient, found none")
    if input is None:
        flat = isinstance(network, UNet) and network.dimensions < axes
        shape = (1, *((1,) * (not flat)), *measurement.image_shape)
        input = (first / unit).reshape(shape)
    elif not torch.is_tensor(input):
        raise TypeError(f"input: expected a torch.Tensor, found {type(input).__name__}")
    check_finite("input", input)
    if tv is None:
        # Edges of small images look like noise.
        likely = min(noise, _MOST_NOISE * float(y.abs().mean()))
        tv = 2 * _TV * likely**2 / (y.numel() * unit)
    kind: Any = {"dtype": parameter.dtype, "device": parameter.device}
    found = _Problem(
        measurement=measurement,
        data=y,
        network=network.train(),
        input=input.detach().to(**kind),
        tv=float(tv),
        noise=noise,
        warnings=tuple(warnings),
        like=y.to(**kind),
        measure=measurement.to(**kind),
        scale=_UNIT * float(y.square().mean()),
    )
    _check_memory(found)
    _check_output(found)
    return found


def _devices(tensor: Tensor) -> list[torch.device]:
    """Whose generators are forked, too."""
    return [tensor.device] if tensor.device.type == "cuda" else []


def _noise_of(y: Tensor, measurement: Measurement) -> float | None:
    """Standard deviation of the noise in projections; None if they do not tell.

    Differences of a high order between neighbouring bins are mostly noise: half the
    noise too much for coarse projections, a few per cent for fine ones. Data that are
    no projections have no neighbours.
    """
    order = _DIFFERENCES
    if not isinstance(measurement, Beam) or y.shape[-1] < 2 * order:
        return None
    differences = y.double().diff(n=order).abs()
    # Zero where rays meet nothing, in data that were cut off there.
    differences = differences[differences > 0]
    if not len(differences):
        return None
    # The median of |e| is .6745 for a standard normal e.
    scale = 0.6745 * math.sqrt(math.comb(2 * order, order))
    return float(differences.median()) / scale


def _range_of(
    first: Tensor, y: Tensor, measurement: Measurement
) -> tuple[float, float]:
    """Where images lie: [0, 1], another [0, high], or [-high, high] for no bounds.

    Args:
        first: A first image, with its artefacts.
        y: Its data, of which only projections have the sign of images.
        measurement: A.
    """
    # Averages of neighbours, since single pixels are noise.
    smooth = first.double()
    for axis in range(-min(first.ndim, 3), 0):
        lines = smooth.movedim(axis, -1)
        means = F.avg_pool1d(
            lines.reshape(-1, 1, lines.shape[-1]), 3, 1, 1, count_include_pad=False
        )
        smooth = means.reshape(lines.shape).movedim(-1, axis)
    top, size = float(smooth.max()), float(smooth.abs().max()) or 1.0
    is_beam = isinstance(measurement, Beam)
    seen, most = (y, _NEGATIVE) if is_beam else (smooth, _NEGATIVE_IMAGE)
    if float(-seen.clamp(max=0).sum()) > most * float(seen.abs().sum()):
        return -size, size
    if _WELL_SCALED[0] <= top <= _WELL_SCALED[1]:
        return 0.0, 1.0
    return 0.0, _HEADROOM * size


def _check_memory(problem: _Problem) -> None:
    """Refuse a network whose activations do not fit, before the first step.

    Raises:
        MemoryError: Says how many bytes are needed, and how many there are.
    """
    if problem.input.numel() < _SMALL:
        return
    needed = _needed_memory(problem.network, problem.input)
    if needed is not None:
        check_fits(
            f"network: a step of {type(problem.network).__name__} for an image "
            f"{problem.measurement.image_shape}",
            needed,
            free_memory(problem.like.device),
            "give a network of fewer channels, such as UNet(channels=(8, 16, 32)), or "
            "a smaller image",
        )


def _needed_memory(network: nn.Module, input: Tensor) -> int | None:
    """Bytes that one step takes beside the network, found by a run without values.

    None for a network that cannot run so.
    """
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []
    own = sum(p.nbytes for p in network.parameters())

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    try:
        ghost = copy.deepcopy(network).to("meta")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ghost(input.to("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    # Gradients and the layouts of convolutions double it, as measured in 3-d; moments
    # and the best weights; and what a layer's gradients take while they are made.
    return 2 * sum(sizes.values()) + 6 * own + 3 * max(sizes.values(), default=0)


def _check_output(problem: _Problem) -> None:
    """Refuse a network that does not show an image of the right shape.

    Raises:
        ValueError: Says what it shows, or why it does not take its input.
    """
    network, shape = problem.network, problem.measurement.image_shape
    name, given = type(network).__name__, tuple(problem.input.shape)
    network.eval()
    try:
        with torch.no_grad():
            found = network(problem.input)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"network: {name} does not take the input of shape {given} ({error}); give "
            "input= with the channels that it expects"
        ) from error
    network.train()
    if not torch.is_tensor(found):
        raise TypeError(
            f"network: expected a tensor from {name}, found {type(found).__name__}"
        )
    if tuple(found.shape) not in ((1, 1, *shape), (1, *shape)):
        raise ValueError(
            f"network: expected images of shape {(1, 1, *shape)} from {name} for an "
            f"input {given}, found {tuple(found.shape)}"
        )
    check_finite("network outputs", found)


@register_stored_class
@dataclass
class _State:
    """All that a fit knows between two steps.

    Attributes:
        weights: Of the network, buffers included.
        best: The best ones.
        moments: Adam's, first and second of each weight; none before the first step.
        best_moments: Those beside the best weights, while data are held out.
        step: How many steps are done.
        adam_steps: How many since the moments were none.
        best_step: That of the best weights.
        best_adam_steps: The same as Adam counts it.
        held_out: Smoothed misfit of the held-out data.
        best_value: What the best weights have least of: that, or the loss.
        first_loss: The loss of the first step.
        least_loss: The least loss since the fit last went back.
        least_step: When that was.
        slower: Factor of the learning rate.
        restarts: How often the fit went back to the best weights.
        tail: First step on all data; None while some are held out.
        history: Entries (n, 4).
        seconds: Wall time so far.
        reason: Why the fit ended; None if it has not.
    """

    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    moments: list[list[Tensor]] = field(default_factory=list)
    best_moments: list[list[Tensor]] = field(default_factory=list)
    step: int = 0
    adam_steps: int = 0
    best_step: int = 0
    best_adam_steps: int = 0
    held_out: float | None = None
    best_value: float = math.inf
    first_loss: float = math.inf
    least_loss: float = math.inf
    least_step: int = 0
    slower: float = 1.0
    restarts: int = 0
    tail: int | None = None
    history: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    reason: str | None = None


class _Fit:
    """One fit, ten steps at a time.

    Args:
        problem: What is fitted.
        settings: How.
        state: Where it was; None to begin.

    Attributes:
        state: Where it is.
    """

    def __init__(
        self, problem: _Problem, settings: _Settings, state: _State | None
    ) -> None:
        self._problem, self._settings = problem, settings
        if state is not None:
            problem.network.load_state_dict(state.weights)
        # Of the network itself, and so always what they are.
        weights = dict(problem.network.state_dict())
        if state is None:
            state = _State(weights, {n: w.clone() for n, w in weights.items()})
        state.weights = weights
        self.state = state
        self._parameters = [p for p in problem.network.parameters() if p.requires_grad]
        for p in self._parameters:
            p.grad = torch.zeros_like(p)  # of those that the image does not depend on
        self._optimizer = self._begin(state.moments)
        self._kept = self._chosen() if settings.early_stopping else None
        if self._kept is None and state.tail is None:
            state.tail = 0
        self._started = time.perf_counter() - state.seconds

    def _begin(self, moments: list[list[Tensor]]) -> torch.optim.Adam:
        """Adam with these moments, or none."""
        found = torch.optim.Adam(self._parameters, foreach=True)
        if moments:
            steps = torch.tensor(float(self.state.adam_steps), device="cpu")
            for p, (first, second) in zip(self._parameters, moments, strict=True):
                found.state[p] = {
                    "step": steps.clone(),
                    "exp_avg": first,
                    "exp_avg_sq": second,
                }
        return found

    def _chosen(self) -> Tensor | None:
        """Ones for data that are not held out; None for few data."""
        like, seed = self._problem.like, self._settings.seed
        if like.numel() < _LEAST_DATA:
            return None
        generator = derived_generator(seed, "held-out data of a reconstruction")
        order = torch.randperm(like.numel(), generator=generator, device="cpu")
        kept = torch.ones(like.numel(), dtype=like.dtype, device="cpu")
        kept[order[: round(_HELD_OUT * like.numel())]] = 0
        return kept.to(like.device).reshape(like.shape)

    @property
    def _last(self) -> int:
        """How many steps there will be, as far as is known."""
        total, tail = self._settings.iterations, self.state.tail
        return total if not tail else min(total, tail + self._settings.tail)

    def advance(self, listener: Callback | None) -> str | None:
        """Ten steps; why the fit ends with them, None if it does not."""
        state, like = self.state, self._problem.like
        with torch.random.fork_rng(_devices(like)):
            while True:
                image, loss, misfit = self._step()
                is_over = state.reason is not None or state.step == self._last
                if is_over or state.step % _EVERY == 0:
                    break
        if is_over and state.reason is None:
            early = state.step < self._settings.iterations
            state.reason = "stopped early" if early else "finished"
        state.seconds = time.perf_counter() - self._started
        state.history.append([float(state.step), loss, misfit, state.seconds])
        if listener is None:
            return state.reason
        told = Progress(
            passes=float(state.step),
            seconds=state.seconds,
            residuals=(misfit / like.square().mean()).sqrt()[None],
            exact=False,
            weights=lambda: image,
        )
        return ("interrupted" if listener(told) else None) or state.reason

    def _step(self) -> tuple[Tensor, float, float]:
        """One step of Adam; image, loss and misfit are those before it."""
        state, settings, problem = self.state, self._settings, self._problem
        generator = derived_generator(
            settings.seed, "dropout of a reconstruction", state.step
        )
        torch.manual_seed(generator.initial_seed())
        self._optimizer.zero_grad(set_to_none=False)
        image = problem.image()
        is_search = state.tail is None
        loss, misfit, held_out = problem.loss(image, self._kept if is_search else None)
        value = float(loss.detach())
        if state.step == 0:
            state.first_loss = value
        if self._has_diverged(value):
            self._restart()
        else:
            self._note(value, float(held_out.detach()))
            (loss / problem.scale).backward()
            nn.utils.clip_grad_norm_(self._parameters, _CLIP)
            self._optimizer.param_groups[0]["lr"] = self._rate()
            self._optimizer.step()
            state.adam_steps += 1
            if not state.moments:
                found = (self._optimizer.state[p] for p in self._parameters)
                state.moments = [[f["exp_avg"], f["exp_avg_sq"]] for f in found]
        state.step += 1
        if is_search and (
            state.step - state.best_step > _PATIENCE
            or state.step >= settings.iterations - settings.tail
        ):
            self._end_search()
        return image.detach(), value, float(misfit.detach())

    def _rate(self) -> float:
        """The learning rate of this step."""
        state, settings = self.state, self._settings
        rate = state.slower * settings.learning_rate
        if settings.schedule == "constant" or state.tail is None:
            return rate
        done = (state.step - state.tail) / (self._last - state.tail)
        return 0.5 * rate * (1 + math.cos(math.pi * done))

    def _note(self, loss: float, held_out: float) -> None:
        """Keep the weights if they are the best ones."""
        state = self.state
        if loss < state.least_loss:
            state.least_loss, state.least_step = loss, state.step
        value = loss
        if state.tail is None:
            last = held_out if state.held_out is None else state.held_out
            value = _SMOOTHING * last + (1 - _SMOOTHING) * held_out
            state.held_out = value
        if not value < state.best_value:
            return
        state.best_value, state.best_step = value, state.step
        state.best_adam_steps = state.adam_steps
        for name, weight in state.weights.items():
            state.best[name].copy_(weight)
        if state.tail is None:
            state.best_moments = [[m.clone() for m in pair] for pair in state.moments]

    def _end_search(self) -> None:
        """Go on from the best weights so far, with all data."""
        state = self.state
        self._problem.network.load_state_dict(state.best)
        state.moments, state.best_moments = state.best_moments, []
        state.adam_steps = state.best_adam_steps
        self._optimizer = self._begin(state.moments)
        state.tail, state.least_step = state.step, state.step
        state.best_value = state.least_loss = math.inf

    def _has_diverged(self, loss: float) -> bool:
        state = self.state
        if not loss <= _EXPLODED * state.first_loss:
            return True
        is_lost = state.step - state.least_step >= _LOST_STEPS
        return is_lost and loss > _LOST * state.least_loss

    def _restart(self) -> None:
        """Back to the best weights, at a smaller rate; or the end."""
        state = self.state
        self._problem.network.load_state_dict(state.best)
        state.moments, state.adam_steps = [], 0
        self._optimizer = self._begin([])
        state.restarts += 1
        state.least_loss, state.least_step = math.inf, state.step
        state.held_out = None
        state.slower *= _SLOWER
        if state.restarts > _MOST_RESTARTS:
            state.reason = "diverged"

    @torch.no_grad()
    def result(self, reason: str) -> Reconstruction:
        """The reconstruction by the best weights."""
        problem, state = self._problem, self.state
        problem.network.load_state_dict(state.best)
        problem.network.zero_grad()
        problem.network.eval()
        image = problem.image()
        return Reconstruction(
            image=image.to(problem.data),
            network=problem.network,
            input=problem.input,
            measurement=problem.measurement,
            data=problem.data,
            tv=problem.tv,
            noise=problem.noise,
            reason=reason,
            history=_entries(state.history),
            warnings=(*problem.warnings, *self._warnings(reason, image)),
        )

    def _warnings(self, reason: str, image: Tensor) -> Iterator[str]:
        """What users should know of the fit."""
        state, settings, problem = self.state, self._settings, self._problem
        if reason == "interrupted":
            yield (
                f"The fit was interrupted after {state.step} of {settings.iterations} "
                "steps: the image is the best so far."
            )
        if state.restarts:
            yield (
                f"The loss diverged {state.restarts} times, after which "
                + (
                    "the fit was given up: the image is the best before"
                    if reason == "diverged"
                    else "the fit went on from the best weights with smaller steps"
                )
                + "; give a smaller learning_rate, "
                f"{_SLOWER * settings.learning_rate:.1g} for one."
            )
        if reason == "interrupted":
            return
        size = float(problem.like.square().mean().sqrt())
        missed = math.sqrt(_misfit(problem.measure, image, problem.like))
        is_known = isinstance(problem.measurement, Beam)
        usual = _MISSED if is_known else _MISSED_BY_GUESS
        if missed < max(2 * problem.noise, usual * size):
            return
        network = problem.network
        high = network.limits[1] if isinstance(network, UNet) else math.inf
        bounded = isinstance(network, UNet) and network.sigmoid
        if bounded and bool((image > 0.99 * high).any()):
            yield (
                f"Pixels are at the end of the network's range, {high:.3g}, and A x "
                f"misses the data by {missed:.2g}, {missed / problem.noise:.1f} times "
                "their noise: the image may reach further; give "
                f"network=UNet(limits=(0, {2 * high:.3g}))."
            )
        elif float(image.max() - image.min()) <= _FLAT * float(problem.input.std()):
            yield (
                "The network shows the same everywhere: its sigmoid is stuck, and has "
                "no derivatives; give a smaller learning_rate, or another seed."
            )
        else:
            yield (
                f"A x misses the data by {missed:.2g} (root mean square), "
                f"{missed / problem.noise:.1f} times their noise: allow more "
                "iterations, or give a smaller tv or another network."
            )


class _Keeper(Checkpoint):
    """The file of one fit."""

    kind = FIT_KIND
    work = "reconstruction"

    def find(self, components: dict[str, str], device: torch.device) -> _State | None:
        """Where the fit was, or None if it has not begun.

        Raises:
            CheckpointError: The file is damaged, or of another fit.
        """
        found = self.open(components, device=device)
        if found is None:
            return None
        with self.reading():
            state = found["fit"]
            if not isinstance(state, _State):
                raise TypeError(f"found {type(state).__name__}")
        return state


def _identity(problem: _Problem, settings: _Settings) -> dict[str, str]:
    """What makes two fits the same one, by the names that users know."""
    with torch.no_grad():
        seen = problem.measure.adjoint(problem.like)
    weights = problem.network.state_dict()
    return {
        "data": digest(problem.like),
        "measurement": f"{problem.measurement.shape} {digest(seen)}",
        "input": f"{tuple(problem.input.shape)} {digest(problem.input)}",
        **{f"weights {name}": digest(value) for name, value in weights.items()},
        **structure_of(problem.network),
        **{name: str(value) for name, value in vars(settings).items()},
        "tv": f"{problem.tv:.8g}",
    }


def _table(history: Sequence[FitEntry]) -> Tensor:
    rows = [[e.step, e.loss, e.misfit, e.seconds] for e in history]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, 4)


def _entries(rows: Sequence[Sequence[float]]) -> tuple[FitEntry, ...]:
    return tuple(FitEntry(int(step), *rest) for step, *rest in rows)


def _stored(measurement: Measurement) -> Measurement | None:
    """A measurement that fits into a file; None for one by a function, or too large."""
    tensors: dict[str, Tensor] = {}
    try:
        encode(measurement, "measurement", tensors)
    except NotStorableError:
        return None
    heavy = sum(tensor.nbytes for tensor in tensors.values()) > _HEAVY
    return None if heavy else measurement


@torch.no_grad()
def _misfit(measurement: Measurement, image: Tensor, data: Tensor) -> float:
    """The mean square of A x - y."""
    error = measurement(image.to(data)) - data
    return float(error.double().square().mean())


def _measurement_of(thing: Any, image: Tensor, data: Tensor) -> Measurement:
    """The measurement that a file lacks, from itself or what it was made of.

    Args:
        thing: What ``Measurement.of`` takes.
        image: The reconstruction.
        data: Its data.
    """
    views = None
    if not isinstance(thing, Measurement):
        # A matrix that measures every slice of a volume has views of one slice.
        columns = getattr(thing, "shape", (image.numel(),))[-1]
        views = data.shape[1 if columns == image.numel() else 2 :]
    kind: Any = {"dtype": data.dtype, "device": data.device}
    found = Measurement.of(thing, image.shape, view_shape=views, **kind)
    found.as_data(data, single=True)
    return found


@reads(KIND)
def load_reconstruction(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    network: nn.Module | None = None,
    measurement: Any = None,
) -> Reconstruction:
    """Read a reconstruction; see ``Reconstruction.load``."""
    place = path_of(path)
    if not isinstance(device, str | torch.device):
        raise TypeError(
            f"device: expected one for {place}, a reconstruction, found {device!r}"
        )
    names = [each.name for each in fields(Reconstruction)]
    found = read_values(place, KIND, device)
    with fitting(place, "version"):
        values = {name: found[name] for name in (*names, "misfit")}
        values["history"] = _entries(values["history"].tolist())
    expected, weights = values.pop("misfit"), values["network"]
    image, data = values["image"], values["data"]
    if isinstance(weights, dict):
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network: needed for {place}, which holds the weights of a network "
                f"but not its code; expected a torch.nn.Module, found {network!r}"
            )
        with fitting(place, "network"):
            values["network"] = copy.deepcopy(network).eval()
            values["network"].load_state_dict(weights)
            values["network"].to(device)
    elif network is not None:
        raise TypeError(
            f"network: {place} holds its own, {type(weights).__name__}; expected none, "
            f"found {type(network).__name__}"
        )
    held = values["measurement"]
    if held is not None and measurement is not None:
        raise TypeError(
            f"measurement: {place} holds that of its data, {type(held).__name__}; "
            f"expected none, found {type(measurement).__name__}"
        )
    if held is None:
        if measurement is None:
            raise TypeError(
                f"measurement: needed for {place}, which does not hold that of its data"
            )
        with fitting(place, "measurement"):
            given = _measurement_of(measurement, image, data)
            here = _misfit(given, image, data)
            if not math.isclose(expected, here, rel_tol=1e-3):
                raise StorageError(
                    f"measurement: {place} belongs to another one: the mean square of "
                    f"A x - y is {here:.4g}, expected {expected:.4g}"
                )
        values["measurement"] = given
    return Reconstruction(**values)
