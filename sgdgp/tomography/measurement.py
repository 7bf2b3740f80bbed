"""Linear measurements of images and volumes, in views.

A measurement is a module: behind a network of images it makes one of data, with every
derivative that the network has.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from linear_operator import LinearOperator
from scipy.sparse.linalg import LinearOperator as SciPyOperator
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from sgdgp.core.checks import (
    check_count,
    check_finite,
    check_number,
    check_positive,
)
from sgdgp.core.codec import register_stored_class
from sgdgp.core.seeds import derived_generator, number_of, standard_normal
from sgdgp.tomography.linear_maps import (
    Columns,
    DenseMatrix,
    LinearMap,
    SparseMatrix,
    TorchFunction,
    as_scipy,
    check_adjoint,
    check_linear,
    is_real,
)
from sgdgp.tomography.matrix_files import read_matrix

_NOISE = 0.05
"""Of the mean of |A x|, where nobody says."""

_STEPS = 10
"""Steps of least squares for a first image: few enough not to fit the noise."""


@register_stored_class
class Measurement(nn.Module):
    """A linear map A of images to data; made by :meth:`of`, or a geometry's.

    Data come in views, such as the projection at one angle.

    Args:
        linear: The map of flat images, or of flat slices.
        image_shape: Shape of an image, or of a volume: slices first.
        view_shape: Shape of one view of what ``linear`` measures.
        stacked: It measures every slice of a volume.

    Attributes:
        image_shape: Shape of an image, such as (n, n), or (slices, n, n).
        view_shape: Shape of one view, such as (bins,), or (slices, bins).
        num_views: How many there are.
        num_slices: Slices of a volume that are measured alike; else None.
        linear: The map of flat images, or of flat slices.
    """

    def __init__(
        self,
        linear: LinearMap,
        image_shape: tuple[int, ...],
        view_shape: tuple[int, ...] = (),
        stacked: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.image_shape = tuple(image_shape)
        m, d = linear.shape
        if math.prod(image_shape[stacked:]) != d:
            raise ValueError(
                f"image_shape: expected {d} pixels, or slices of {d} pixels, as A has "
                f"columns, found {tuple(image_shape)}"
            )
        if m == 0 or m % math.prod(view_shape):
            raise ValueError(
                f"view_shape: expected a divisor of the {m} rows of A, found "
                f"{tuple(view_shape)}"
            )
        self.num_views = m // math.prod(view_shape)
        self.num_slices = self.image_shape[0] if stacked else None
        self._row_shape = tuple(view_shape)
        self.view_shape = (*self.image_shape[:stacked], *self._row_shape)

    @staticmethod
    def of(
        thing: Any,
        image_shape: Sequence[int] | None = None,
        adjoint: Any = None,
        *,
        view_shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Measurement:
        """The measurement by a matrix, an operator or a function.

        Args:
            thing: A measurement (itself); a matrix (m, d) of SciPy, NumPy or torch,
                sparse or dense; a linear operator of SciPy or of ``linear_operator``;
                or a linear function of torch, which takes a batch of images
                (b, *image_shape) to data (b, *data_shape).
            image_shape: Shape of an image with d pixels, or of a volume of slices with
                d pixels each. Default: a square with d pixels.
            adjoint: Of a function: takes data (b, *data_shape) to
                images. Default: derived from the function.
            view_shape: Shape of one view. Default: every row of a matrix is a view;
                those of a function are along its first axis.
            dtype: Default: that of the matrix; for a function, torch's default.
            device: Default: that of the matrix; for a function, the CPU.

        Raises:
            TypeError: Nothing of this kind.
            ValueError: Shapes do not match, entries that are not finite, a function
                that is not linear, or an adjoint that is another map's.
        """
        shape = _shape_of("image_shape", image_shape)
        views = _shape_of("view_shape", view_shape)
        if isinstance(thing, Measurement):
            for name, value, has in (
                ("image_shape", shape, thing.image_shape),
                ("view_shape", views, thing.view_shape),
            ):
                if value is not None and value != has:
                    raise ValueError(
                        f"{name}: expected {has} as the measurement has, found {value}"
                    )
            known = (thing.device, thing.dtype)
            wanted = (torch.device(device or thing.device), dtype or thing.dtype)
            return thing if wanted == known else thing.to(*wanted)
        target = torch.device("cpu" if device is None else device)
        matrix = _matrix_or_operator(thing, dtype, target if device else None)
        if matrix is None:
            if not callable(thing):
                raise TypeError(
                    "A: expected a matrix, a linear operator or a function, found "
                    f"{type(thing).__name__}"
                )
            if shape is None:
                raise ValueError("image_shape: expected that of a function's images")
            kind = dtype or torch.get_default_dtype()
            function = _function(thing, shape, adjoint, kind, target)
            rest = function.data_shape[1:] if views is None else views
            return Measurement(function, shape, rest)
        if adjoint is not None:
            raise ValueError("adjoint: expected None with a matrix or an operator")
        d = matrix.shape[1]
        if shape is None:
            side = math.isqrt(d)
            if side * side != d:
                raise ValueError(
                    f"image_shape: expected that of an image of {d} pixels, which is "
                    "no square, found None"
                )
            shape = (side, side)
        stacked = len(shape) > 1 and math.prod(shape) != d
        found = Measurement(matrix, shape, () if views is None else views, stacked)
        if isinstance(matrix, Columns):
            check_linear(matrix)
            check_adjoint(matrix)
        return found

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        image_shape: Sequence[int] | None = None,
        *,
        name: str | None = None,
        view_shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Measurement:
        """The measurement by a matrix in a file, such as one of ASTRA or ODL.

        Args:
            path: Of ``scipy.sparse.save_npz`` (.npz), ``numpy.save`` (.npy), or MATLAB
                up to version 7 (.mat). Columns go along the rows of an image: where
                they go along its columns, as in MATLAB, images are transposed.
            image_shape: As in :meth:`of`.
            name: Of the variable, where there are several matrices.
            view_shape: As in :meth:`of`.
            dtype: As in :meth:`of`.
            device: As in :meth:`of`.

        Raises:
            FileNotFoundError: There is none.
            StorageError: Another kind of file, or not one matrix; says what is in it.
        """
        matrix = read_matrix(path, name)
        kinds: dict[str, Any] = {"dtype": dtype, "device": device}
        return Measurement.of(matrix, image_shape, view_shape=view_shape, **kinds)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d): how many numbers are measured, and of how many pixels."""
        rows = self.num_views * math.prod(self.view_shape)
        return rows, math.prod(self.image_shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of images and data."""
        return self.linear.dtype

    @property
    def device(self) -> torch.device:
        """Where images and data lie."""
        return self.linear.device

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the data of one image, (num_views, *view_shape)."""
        return (self.num_views, *self.view_shape)

    def forward(self, images: Float[Tensor, "*i"]) -> Float[Tensor, "*o"]:
        """A x.

        Args:
            images: Of shape (*batch, *image_shape).

        Returns:
            Data of shape (*batch, num_views, *view_shape).
        """
        self._check("images", images, self.image_shape)
        return _multiply(images, self, False)

    def adjoint(self, data: Float[Tensor, "*o"]) -> Float[Tensor, "*i"]:
        """A^T y.

        Args:
            data: Of shape (*batch, num_views, *view_shape).

        Returns:
            Images of shape (*batch, *image_shape).
        """
        self._check("data", data, self.data_shape)
        return _multiply(data, self, True)

    def views(self, index: Any) -> Measurement:
        """The measurement of some views only.

        Args:
            index: A number, a slice, a mask or a sequence of numbers; also twice.

        Raises:
            TypeError: Not whole numbers.
            ValueError: None is left.
            IndexError: There is no such view.
        """
        chosen = self._chosen(index)
        size = math.prod(self._row_shape)
        rows = (chosen[:, None] * size + torch.arange(size, device="cpu")).flatten()
        found = copy.copy(self)
        found.linear = self.linear.rows(rows)
        found.num_views = len(chosen)
        return found

    @torch.no_grad()
    def simulate(
        self,
        image: Any,
        noise: float | None = None,
        *,
        standard_deviation: float | Tensor | None = None,
        photons: float | None = None,
        seed: int | torch.Generator = 0,
    ) -> Tensor:
        """A x and noise.

        Args:
            image: x, of shape (*batch, *image_shape).
            noise: Standard deviation of Gaussian noise by the mean of |A x|, of each
                image its own. Default: 0.05.
            standard_deviation: The standard deviation itself, in its place; a number,
                or one of each entry of the data.
            photons: Along a ray through nothing: data are -log of the share of them
                that is counted, where x is what a pixel attenuates. In its place.
            seed: Of the noise.

        Returns:
            Data of shape (*batch, num_views, *view_shape).

        Raises:
            ValueError: Out of range, or several kinds of noise at a time.
        """
        kinds = {
            "noise": noise,
            "standard_deviation": standard_deviation,
            "photons": photons,
        }
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{', '.join(kinds)}: expected one of them, found {' and '.join(given)}"
            )
        clean = self(self._tensor("image", image, self.image_shape))
        generator = (
            seed
            if isinstance(seed, torch.Generator)
            else derived_generator(number_of(seed), "noise of measurements")
        )
        if photons is not None:
            check_positive("photons", photons)
            expected = (photons * torch.exp(-clean)).to(generator.device)
            counts = torch.poisson(expected, generator).to(clean)
            # Where none comes through, half of one: the logarithm is finite.
            return math.log(photons) - counts.clamp_min(0.5).log()
        if standard_deviation is None:
            noise = _NOISE if noise is None else noise
            check_number("noise", noise)
            axes = tuple(range(-len(self.data_shape), 0))
            size = noise * clean.abs().mean(axes, keepdim=True)
        else:
            size = torch.as_tensor(
                standard_deviation, dtype=self.dtype, device=self.device
            )
        if not ((size >= 0) & size.isfinite()).all():
            name = "noise" if standard_deviation is None else "standard_deviation"
            raise ValueError(f"{name}: expected at least 0, found {float(size.min())}")
        return clean + size * standard_normal(
            *clean.shape, like=clean, generator=generator
        )

    def as_data(self, data: Any, *, single: bool = False) -> Tensor:
        """Data as a tensor of this measurement's kind, checked, without a graph.

        Args:
            data: Of shape (*batch, num_views, *view_shape).
            single: Refuse those of a batch.

        Raises:
            ValueError: Another shape, or entries that are not finite.
        """
        found = self._tensor("data", data, self.data_shape).detach()
        if single and tuple(found.shape) != self.data_shape:
            raise ValueError(
                f"data: expected those of one image, {self.data_shape}, found shape "
                f"{tuple(found.shape)}"
            )
        return found

    @torch.no_grad()
    def back_projection(self, data: Any) -> Tensor:
        """A first image of data (*batch, *data_shape), (*batch, *image_shape).

        By a few steps of conjugate gradients on least squares, from zero.
        """
        y = self.as_data(data)
        axes = tuple(range(-len(self.data_shape), 0))
        pixels = tuple(range(-len(self.image_shape), 0))
        residual, x = y, y.new_zeros(*y.shape[: y.ndim - len(axes)], *self.image_shape)
        gradient = direction = self.adjoint(residual)
        size = first = gradient.square().sum(pixels)
        for _ in range(_STEPS):
            if not (size > 1e-8 * first).any():
                break
            image = self(direction)
            # Images that are done divide zero by zero.
            step = (size / image.square().sum(axes)).nan_to_num(0.0, 0.0, 0.0)
            x = x + _over(step, pixels) * direction
            residual = residual - _over(step, axes) * image
            gradient = self.adjoint(residual)
            size, last = gradient.square().sum(pixels), size
            ratio = (size / last).nan_to_num(0.0, 0.0, 0.0)
            direction = gradient + _over(ratio, pixels) * direction
        return x

    def to(self, *args: Any, **kwargs: Any) -> Measurement:
        """The same measurement of another dtype, or on another device; itself stays."""
        found = copy.copy(self)
        return nn.Module.to(found, *args, **kwargs)

    def stored_parts(self) -> dict[str, Any]:
        """What it is made of."""
        return {
            "linear": self.linear,
            "image_shape": self.image_shape,
            "view_shape": self._row_shape,
            "stacked": self.num_slices is not None,
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._words()}image_shape={self.image_shape}, "
            f"num_views={self.num_views}, view_shape={self.view_shape}, "
            f"dtype={self.dtype})"
        )

    def _words(self) -> str:
        return ""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As part of a network that is moved or converted."""
        probe = fn(torch.zeros((), dtype=self.dtype, device=self.device))
        self.linear = self.linear.to(probe.dtype, probe.device)
        return self

    def _chosen(self, index: Any) -> Tensor:
        """Numbers of the chosen views."""
        every = torch.arange(self.num_views, device="cpu")
        if not isinstance(index, slice):
            found = index
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                found = torch.as_tensor(index, device="cpu")
            if not torch.is_tensor(found) or (
                found.numel() and (found.is_floating_point() or found.is_complex())
            ):
                raise TypeError(
                    "views: expected a number, a slice, a mask or a sequence of "
                    f"numbers of views, found {index!r}"
                )
            index = found if found.numel() else found.long()
        chosen = every[index].reshape(-1)
        if not len(chosen):
            raise ValueError("views: expected at least one view, found none")
        return chosen

    def _check(self, name: str, value: Any, shape: tuple[int, ...]) -> None:
        if not torch.is_tensor(value):
            raise TypeError(f"{name}: expected a torch.Tensor, found {type(value)}")
        if (value.dtype, value.device.type) != (self.dtype, self.device.type):
            raise TypeError(
                f"{name}: expected {self.dtype} on {self.device}, found {value.dtype} "
                f"on {value.device}; convert one of them by .to(...)"
            )
        found = tuple(value.shape)
        if found[max(0, len(found) - len(shape)) :] != shape:
            turned = shape[::-1] == found and len(shape) == 2
            raise ValueError(
                f"{name}: expected shape (..., {str(shape)[1:]} for {self}, found "
                f"{found}" + ("; give the transpose" if turned else "")
            )

    def _tensor(self, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value)  # torch has no negative steps
        place = value.device if torch.is_tensor(value) else self.device
        tensor = torch.as_tensor(value, device=place)
        if tensor.is_complex():
            raise TypeError(f"{name}: expected real numbers, found {tensor.dtype}")
        tensor = tensor.to(self.device, self.dtype)
        self._check(name, tensor, shape)
        check_finite(name, tensor)
        return tensor

    def _product(self, vectors: Tensor, transposed: bool) -> Tensor:
        """A x or A^T y of plain tensors, in shapes."""
        into, out = self.data_shape, self.image_shape
        if not transposed:
            into, out = out, into
        batch = vectors.shape[: vectors.ndim - len(into)]
        rows = (self.num_views, *self._row_shape)
        if self.num_slices is None:
            flat = vectors.reshape(math.prod(batch), -1)
            product = self.linear.adjoint_times if transposed else self.linear.times
            return product(flat).reshape(*batch, *out)
        # Slices are rows of the product; views come before slices in data.
        where = len(batch)
        many = math.prod(batch) * self.num_slices
        if transposed:
            flat = vectors.movedim(where + 1, where).reshape(many, -1)
            return self.linear.adjoint_times(flat).reshape(*batch, *out)
        found = self.linear.times(vectors.reshape(many, -1))
        found = found.reshape(*batch, self.num_slices, *rows)
        return found.movedim(where, where + 1)


class _Product(torch.autograd.Function):
    """A x or A^T y with derivatives of any order, in any mode."""

    @staticmethod
    def forward(vectors: Tensor, measurement: Measurement, transposed: bool) -> Tensor:
        return measurement._product(vectors, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.measurement, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Product.apply(gradient, ctx.measurement, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Any:
        return _Product.apply(tangent, ctx.measurement, ctx.transposed)

    @staticmethod
    def vmap(
        info: Any,
        axes: Any,
        vectors: Tensor,
        measurement: Measurement,
        transposed: bool,
    ) -> Any:
        moved = vectors.movedim(axes[0], 0)
        return _Product.apply(moved, measurement, transposed), 0


def _multiply(vectors: Tensor, measurement: Measurement, transposed: bool) -> Tensor:
    """The product as one function, which modes of torch see (forward derivatives)."""
    if has_torch_function_unary(vectors):
        every = (vectors, measurement, transposed)
        return handle_torch_function(_multiply, (vectors,), *every)
    return _Product.apply(vectors, measurement, transposed)


def _matrix_or_operator(
    thing: Any, dtype: torch.dtype | None, device: torch.device | None
) -> LinearMap | None:
    """The map of what is no function of torch."""
    if isinstance(thing, LinearOperator):
        kind, place = dtype or thing.dtype, device or thing.device
        operator = thing.detach().to(place, kind)
        if operator.ndim != 2:
            raise ValueError(f"A: expected two axes, found {tuple(operator.shape)}")
        return Columns(operator, operator.mT, _floating(kind), place)
    place = device or torch.device("cpu")
    if isinstance(thing, SciPyOperator):
        kind = dtype or _floating_of(thing.dtype)
        return Columns(thing, thing.adjoint(), kind, place)
    if isinstance(thing, np.ndarray):
        thing = torch.from_numpy(np.ascontiguousarray(thing))
    if torch.is_tensor(thing):
        place = device or thing.device
        if thing.layout == torch.strided:
            kind = dtype or _floating(thing.dtype)
            matrix = thing.detach().to(place, kind, copy=True)
            if matrix.ndim != 2:
                raise ValueError(f"A: expected two axes, found {tuple(matrix.shape)}")
            check_finite("A", matrix)
            return DenseMatrix(matrix)
        dtype = dtype or _floating(thing.dtype)
        thing = as_scipy(thing)
    if not sp.issparse(thing):
        return None
    if thing.ndim != 2:
        raise ValueError(f"A: expected two axes, found {thing.shape}")
    kind = dtype or _floating_of(thing.dtype)
    found = SparseMatrix.of(sp.csr_array(thing, copy=True), kind, place)
    check_finite("A", found.values)
    return found


def _function(
    function: Any,
    image_shape: tuple[int, ...],
    adjoint: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> TorchFunction:
    if adjoint is not None and not callable(adjoint):
        raise TypeError(f"adjoint: expected a function, found {type(adjoint).__name__}")
    count = 3 if image_shape[0] == 2 else 2  # other than an image's own first axis
    probe = torch.zeros(count, *image_shape, dtype=dtype, device=device)
    try:
        with torch.no_grad():
            data = function(probe)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"A: the function fails for images {tuple(probe.shape)} of {dtype} on "
            f"{device}: {error}"
        ) from error
    if not torch.is_tensor(data) or data.ndim < 2 or len(data) != count:
        what = tuple(data.shape) if torch.is_tensor(data) else type(data).__name__
        raise ValueError(
            "A: expected a function that takes a batch of images (b, *image_shape) to "
            f"data (b, ...), found {what} for b = {count}; torch.func.vmap makes "
            "one of a function of one image"
        )
    if data.dtype != dtype:
        raise TypeError(
            f"A: expected data of {dtype} for images of {dtype}, found {data.dtype}; "
            "torch.view_as_real makes complex numbers real"
        )
    found = TorchFunction(
        function, image_shape, tuple(data.shape[1:]), adjoint, dtype, device
    )
    with torch.no_grad():
        check_linear(found)
        check_adjoint(found)
    return found


def _shape_of(name: str, shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    if not isinstance(shape, Iterable):
        raise TypeError(f"{name}: expected a sequence of ints, found {shape!r}")
    sides = tuple(shape)
    for side in sides:
        check_count(name, side, 1)
    return tuple(int(side) for side in sides)


def _floating(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        raise TypeError(f"A: expected real numbers, found {dtype}")
    known = (torch.float32, torch.float64)
    return dtype if dtype in known else torch.get_default_dtype()


def _floating_of(dtype: Any) -> torch.dtype:
    if not is_real(dtype):
        raise TypeError(f"A: expected real numbers, found {dtype}")
    known = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
    return known.get(np.dtype(dtype), torch.get_default_dtype())


def _over(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    return values.reshape(*values.shape, *(1 for _ in axes))
