"""Projections of images and of stacks of slices along rays, and their inverse.

Lengths are in pixels. Pixel (row i, column j) is at (j - n // 2, i - n // 2); at angle
zero rays go down the rows, as in scikit-image. A ray's entry in a projection is the sum
of bilinear interpolations at points that are one pixel apart, so that parallel beams
are ``skimage.transform.radon(circle=False)`` to rounding.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_finite, check_number, check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.core.memory import check_fits, free_memory
from sgdgp.tomography.linear_maps import SparseMatrix
from sgdgp.tomography.measurement import Measurement

_ENTRIES = 2.5
"""Entries of the matrix by a point on a ray within the image: 2.2 were measured."""

_NOTHING = 1e-12
"""Weights that are rounding errors of zero."""


class Beam(Measurement):
    """Rays through images (n, n), or through every slice of volumes (slices, n, n).

    A scanner is described by its rays on a line through the rotation axis.

    Args:
        size: n.
        angles: In degrees; or how many, equidistant over a half or whole turn.
        bins: Of the detector. Default: as many as see the image's diagonal.
        slices: Of a volume. Default: None, images.
        spacing: Between bins.
        axis: Where the rotation axis is on the detector, in bins. Default: bins // 2.
        dtype: Of images and data.
        device: Where they lie.

    Attributes:
        turn: Degrees over which angles are spread if only their number is given.
        angles: One of each view, in degrees, in float64 on the CPU.
        size: n.
        bins: Of the detector.
        spacing: Between bins.
        axis: Where the rotation axis is on the detector, in bins.
    """

    turn: float
    angles: Tensor
    size: int
    bins: int
    spacing: float
    axis: float

    def __init__(
        self,
        size: int,
        angles: int | Sequence[float] | Tensor | np.ndarray,
        bins: int | None,
        slices: int | None,
        spacing: float,
        axis: float | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        check_count("size", size, 1)
        check_positive("spacing", spacing)
        if slices is not None:
            check_count("slices", slices, 1)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected float32 or float64, found {dtype}")
        degrees = _degrees(angles, self.turn)
        if bins is None:
            bins = self._default_bins(size, spacing)
        check_count("bins", bins, 1)
        if axis is not None:
            check_number("axis", axis)
        self.size, self.bins, self.spacing = size, bins, spacing
        self.axis = float(bins // 2 if axis is None else axis)
        self.angles = degrees
        self._check_memory(slices, dtype, device)
        kind = np.float32 if dtype == torch.float32 else np.float64
        rows = sp.vstack(
            [self._block(a).astype(kind) for a in np.deg2rad(degrees.numpy())],
            format="csr",
        )
        matrix = SparseMatrix.of(rows, dtype, torch.device(device))
        shape = (size, size) if slices is None else (slices, size, size)
        super().__init__(matrix, shape, (bins,), stacked=slices is not None)

    @abstractmethod
    def _default_bins(self, size: int, spacing: float) -> int:
        """As many bins as see the image's diagonal."""

    @abstractmethod
    def _rays(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Points of the rays next to the rotation axis, and directions (bins, 2)."""

    def _across(self) -> np.ndarray:
        """Where the rays of the bins meet a line through the rotation axis (bins)."""
        return (np.arange(self.bins) - self.axis) * self._pitch()

    def _pitch(self) -> float:
        """Distance of rays of neighbouring bins on that line."""
        return self.spacing

    def _density(self) -> float:
        """Rays by pixel across them: the mean over the image."""
        return 1 / self._pitch()

    def _magnified(self, along: Tensor) -> Tensor:
        """How much larger things are seen than on that line.

        Args:
            along: How far they are behind it.
        """
        return torch.ones_like(along)

    def _obliquity(self) -> np.ndarray:
        """Cosines of the angles of rays to the central one (bins)."""
        return np.ones(self.bins)

    def at(self, angles: int | Sequence[float] | Tensor | np.ndarray) -> Beam:
        """The same geometry at other angles, in degrees."""
        return type(self)(**{**self.stored_parts(), "angles": angles})

    def views(self, index: Any) -> Beam:
        found = super().views(index)
        assert isinstance(found, Beam)  # a copy of this
        found.angles = self.angles[self._chosen(index)]
        return found

    @torch.no_grad()
    def back_projection(self, data: Any) -> Tensor:
        """Filtered back-projection of data (*batch, views, [slices,] bins).

        With a ramp filter, as ``skimage.transform.iradon(circle=False)``. Angles count
        alike, wherever they are: those of a fan should go around the whole turn.
        """
        y = self.as_data(data)
        if self.num_slices is not None:
            y = y.movedim(-2, -3)
        batch = y.shape[:-2]
        rows = y.reshape(-1, self.num_views, self.bins)
        filtered = self._filtered(rows)
        centre = torch.arange(self.size, device=y.device) - self.size // 2
        i, j = (c.double() for c in torch.meshgrid(centre, centre, indexing="ij"))
        total = y.new_zeros(len(rows), self.size**2)
        for view, degrees in enumerate(self.angles.tolist()):
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            scale = self._magnified(j * sin + i * cos).flatten()
            seen = (j * cos - i * sin).flatten() * scale
            where = seen / self._pitch() + self.axis
            inside = (where >= 0) & (where <= self.bins - 1)
            first = where.floor().clamp(0, max(0, self.bins - 2)).long()
            second = (first + 1).clamp(max=self.bins - 1)
            part = (where - first).to(y.dtype)
            found = torch.lerp(
                filtered[:, view, first], filtered[:, view, second], part
            )
            weight = scale.square() * inside
            total.addcmul_(found, weight.to(y.dtype))
        total *= math.pi / (2 * self.num_views)
        return total.reshape(*batch, *self.image_shape[-2:])

    def _filtered(self, rows: Tensor) -> Tensor:
        """Projections after the ramp filter."""
        # A power of two of at least twice the bins: no projection meets its own end.
        length = max(64, 2 ** math.ceil(math.log2(2 * self.bins)))
        distance = torch.fft.fftfreq(length, 1 / length, device="cpu").double()
        kernel = -((math.pi * distance) ** -2) * (distance % 2)
        kernel[0] = 0.25
        ramp = (2 * torch.fft.rfft(kernel).real).to(rows)
        weights = torch.from_numpy(self._obliquity()).to(rows)
        spectrum = torch.fft.rfft(rows * weights, length)
        return (
            torch.fft.irfft(spectrum * ramp, length)[..., : self.bins] / self._pitch()
        )

    def stored_parts(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "angles": self.angles,
            "bins": self.bins,
            "slices": self.num_slices,
            "spacing": self.spacing,
            "axis": self.axis,
            "dtype": self.dtype,
            "device": self.device,
        }

    def _words(self) -> str:
        return f"bins={self.bins}, "

    def _points(self, angle: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bins, columns and rows of the points of one view that are in the image."""
        foot, direction = self._rays(angle)
        # As many as the image's diagonal has pixels.
        count = math.ceil(math.sqrt(2) * self.size)
        offsets = np.arange(count) - count // 2
        points = foot[:, None] + offsets[:, None] * direction[:, None] + self.size // 2
        inside = ((points > -1) & (points < self.size)).all(-1)
        x, y = points[inside].T
        return np.nonzero(inside)[0], x, y

    def _block(self, angle: float) -> sp.csr_array:
        """The rows of the matrix that are one view."""
        bins, x, y = self._points(angle)
        left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        right, bottom = x - left, y - top
        entries = []
        for j, a in ((left, 1 - right), (left + 1, right)):
            for i, b in ((top, 1 - bottom), (top + 1, bottom)):
                weight = a * b
                kept = (weight > _NOTHING) & (i >= 0) & (j >= 0)
                kept &= (i < self.size) & (j < self.size)
                entries.append(
                    (weight[kept], bins[kept], i[kept] * self.size + j[kept])
                )
        weights, rows, columns = (np.concatenate(e) for e in zip(*entries, strict=True))
        shape = (self.bins, self.size**2)
        where = (rows.astype(np.int32), columns.astype(np.int32))
        return sp.coo_array((weights, where), shape=shape).tocsr()

    def _check_memory(
        self, slices: int | None, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Refuse what does not fit, before it is made.

        Raises:
            MemoryError: Says how many bytes are needed, and how many there are.
        """
        count, side = len(self.angles), math.ceil(math.sqrt(2) * self.size)
        points = math.ceil(self.size**2 * self._density())
        # The matrix and its transpose, by 32-bit indices, or twice the matrix.
        matrix = 2 * math.ceil(_ENTRIES * points) * count * (dtype.itemsize + 4)
        images = (slices or 1) * (2 * self.size**2 + 2 * self.bins * count)
        # Coordinates and weights of one view, in float64.
        view = 8 * (4 * self.bins * side + 12 * points)
        needed = matrix + images * dtype.itemsize + view
        check_fits(
            f"{type(self).__name__}: the projection of {slices or 1} x {self.size} "
            f"x {self.size} pixels at {count} angles",
            needed,
            free_memory(device),
            "give fewer angles, a smaller size or fewer bins",
        )


@register_stored_class
class ParallelBeam(Beam):
    """Parallel rays: the Radon transform of images (n, n), or of stacks of slices.

    Args:
        size: n.
        angles: In degrees; or how many, equidistant in [0, 180).
        bins: Of the detector. Default: ceil(sqrt(2) n / spacing), all that is seen.
        slices: Of volumes (slices, n, n), each of which is projected by the same
            matrix. Default: None, images.
        spacing: Between bins, in pixels.
        axis: Where the rotation axis is on the detector, in bins. Default: bins // 2.
        dtype: Of images and data.
        device: Where they lie.
    """

    turn = 180.0

    def __init__(
        self,
        size: int = 128,
        angles: int | Sequence[float] | Tensor | np.ndarray = 60,
        bins: int | None = None,
        slices: int | None = None,
        *,
        spacing: float = 1.0,
        axis: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(size, angles, bins, slices, spacing, axis, dtype, device)

    def _default_bins(self, size: int, spacing: float) -> int:
        return math.ceil(math.sqrt(2) * size / spacing)

    def _rays(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        along_detector, away = _axes(angle)
        foot = self._across()[:, None] * along_detector
        return foot, np.broadcast_to(away, foot.shape)


@register_stored_class
class FanBeam(Beam):
    """Rays from a point source to a flat detector, both of which turn about an axis.

    At angle zero rays go down the rows from a source above, and bins lie along the
    columns. From a distant source it is :class:`ParallelBeam`.

    Args:
        size: n of images (n, n).
        angles: In degrees; or how many, equidistant in [0, 360).
        source_distance: From the source to the rotation axis, in pixels.
        detector_distance: From the rotation axis to the detector. Default: 0, a
            detector in the axis, where nothing is magnified.
        bins: Of the detector. Default: as many as see the image's diagonal.
        slices: Of volumes (slices, n, n), each of which is projected by the same
            matrix. Default: None, images.
        spacing: Between bins, on the detector, in pixels.
        axis: Where the rotation axis is on the detector, in bins. Default: bins // 2;
            (bins - 1) / 2 for a detector that is centred.
        dtype: Of images and data.
        device: Where they lie.
    """

    turn = 360.0
    source_distance: float
    detector_distance: float

    def __init__(
        self,
        size: int,
        angles: int | Sequence[float] | Tensor | np.ndarray,
        source_distance: float,
        detector_distance: float = 0.0,
        bins: int | None = None,
        slices: int | None = None,
        *,
        spacing: float = 1.0,
        axis: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_count("size", size, 1)
        check_number("source_distance", source_distance)
        check_number("detector_distance", detector_distance)
        if not size / math.sqrt(2) < source_distance < math.inf:
            raise ValueError(
                "source_distance: expected a source outside of the image, more than "
                f"{size / math.sqrt(2):.6g}, found {source_distance}"
            )
        if not 0 <= detector_distance < math.inf:
            raise ValueError(
                f"detector_distance: expected at least 0, found {detector_distance}"
            )
        self.source_distance = source_distance
        self.detector_distance = detector_distance
        super().__init__(size, angles, bins, slices, spacing, axis, dtype, device)

    def stored_parts(self) -> dict[str, Any]:
        distances = {
            "source_distance": self.source_distance,
            "detector_distance": self.detector_distance,
        }
        return {**super().stored_parts(), **distances}

    def _default_bins(self, size: int, spacing: float) -> int:
        radius, source = size / math.sqrt(2), self.source_distance
        seen = 2 * radius * source / math.sqrt(source**2 - radius**2)
        return math.ceil(seen * (1 + self.detector_distance / source) / spacing)

    def _pitch(self) -> float:
        return self.spacing / (1 + self.detector_distance / self.source_distance)

    def _density(self) -> float:
        # By the mean over all angles, at the middle of an edge.
        slope = self.size / (2 * self.source_distance)
        return super()._density() / math.sqrt(1 - slope**2)

    def _rays(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        along_detector, away = _axes(angle)
        source = -self.source_distance * away
        direction = self._across()[:, None] * along_detector - source
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        return source - (direction @ source)[:, None] * direction, direction

    def _magnified(self, along: Tensor) -> Tensor:
        return self.source_distance / (self.source_distance + along)

    def _obliquity(self) -> np.ndarray:
        return np.cos(np.arctan(self._across() / self.source_distance))


def _axes(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Directions (x, y) along the detector, and of the central ray."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([cos, -sin]), np.array([sin, cos])


def _degrees(
    angles: int | Sequence[float] | Tensor | np.ndarray, turn: float
) -> Float[Tensor, " v"]:
    if isinstance(angles, int | np.integer) and not isinstance(angles, bool):
        check_count("angles", angles, 1)
        return torch.arange(int(angles), device="cpu").double() * turn / int(angles)
    try:
        found = torch.as_tensor(angles, dtype=torch.float64, device="cpu")
        if not found.ndim:
            raise TypeError("one number that is no int may be either")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "angles: expected their number as an int, or a sequence of degrees, found "
            f"{angles!r}"
        ) from error
    found = found.detach().flatten().clone()
    if not len(found):
        raise ValueError("angles: expected at least one angle, found none")
    check_finite("angles", found)
    return found
