"""Linear measurements: one matrix, every derivative, every kind of operator."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import linear_operator
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor, nn
from torch.func import jacrev, jvp, vjp, vmap

from sgdgp.core.codec import decode, encode
from sgdgp.tangent import Tangent
from sgdgp.tomography import Measurement, ParallelBeam

KERNEL = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.2, 0.1], [0.0, 0.1, 0.0]])


def blur(images: Tensor) -> Tensor:
    """A convolution, which is not its own adjoint."""
    kernel = KERNEL.to(images)[None, None]
    return F.conv2d(images[:, None], kernel, padding=1)[:, 0]


def unblur(data: Tensor) -> Tensor:
    kernel = KERNEL.to(data)[None, None]
    return F.conv_transpose2d(data[:, None], kernel, padding=1)[:, 0]


def matrix(m: int = 6, d: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, d)) * (rng.random((m, d)) < 0.6)


def things() -> dict[str, Any]:
    a = matrix()
    return {
        "numpy": a,
        "torch": torch.from_numpy(a),
        "torch COO": torch.from_numpy(a).to_sparse(),
        "scipy CSR": sp.csr_matrix(a),
        "scipy COO array": sp.coo_array(a),
        "scipy operator": aslinearoperator(sp.csr_array(a)),
        "linear_operator": linear_operator.to_linear_operator(torch.from_numpy(a)),
    }


def measurements() -> dict[str, Measurement]:
    of = {name: Measurement.of(a, (3, 4)) for name, a in things().items()}
    double = {"dtype": torch.float64}
    return {
        **of,
        "slices": Measurement.of(sp.csr_array(matrix()), (2, 3, 4), view_shape=(3,)),
        "convolution": Measurement.of(blur, (3, 4), **double),
        "convolution and its adjoint": Measurement.of(blur, (3, 4), unblur, **double),
        "beam": ParallelBeam(4, 3, dtype=torch.float64),
        "beam of slices": ParallelBeam(3, 2, slices=2, dtype=torch.float64),
        "views of it": ParallelBeam(3, 3, slices=2, dtype=torch.float64).views([2, 0]),
        "views of a convolution": Measurement.of(blur, (3, 4), **double).views([1, 1]),
    }


MEASUREMENTS = measurements()


def dense(a: Measurement) -> Tensor:
    """The matrix, from products with unit vectors."""
    eye = torch.eye(a.shape[1], dtype=a.dtype)
    return a(eye.reshape(-1, *a.image_shape)).reshape(a.shape[1], -1).mT


@pytest.mark.parametrize("name", things())
def test_any_matrix_or_operator_is_a_measurement(name: str):
    a = MEASUREMENTS[name]
    assert (a.shape, a.num_views, a.view_shape) == ((6, 12), 6, ())
    torch.testing.assert_close(dense(a), torch.from_numpy(matrix()))
    assert Measurement.of(a) is a
    assert Measurement.of(things()[name], (3, 4), dtype=torch.float32).dtype == (
        torch.float32
    )


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_shapes_batches_and_the_adjoint(name: str):
    a = MEASUREMENTS[name]
    matrix = dense(a)
    x = torch.randn(2, 3, *a.image_shape, dtype=torch.float64)
    y = torch.randn(2, 3, a.num_views, *a.view_shape, dtype=torch.float64)
    assert a.shape == tuple(matrix.shape)
    expected = x.flatten(2) @ matrix.mT
    torch.testing.assert_close(a(x), expected.reshape(y.shape))
    torch.testing.assert_close(a(x)[0, 1], a(x[0, 1]))
    back = y.flatten(2) @ matrix
    torch.testing.assert_close(a.adjoint(y), back.reshape(x.shape))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_transform_of_torch_passes_through(name: str):
    a = MEASUREMENTS[name]
    matrix = dense(a)
    x, t = torch.randn(2, *a.image_shape, dtype=torch.float64)
    u = torch.randn(a.num_views, *a.view_shape, dtype=torch.float64)
    jacobian = jacrev(a)(x).reshape(a.shape)
    torch.testing.assert_close(jacobian, matrix)
    torch.testing.assert_close(torch.func.jacfwd(a)(x).reshape(a.shape), matrix)
    torch.testing.assert_close(jvp(a, (x,), (t,))[1], a(t))
    torch.testing.assert_close(vjp(a, x)[1](u)[0], a.adjoint(u))
    stack = torch.stack([x, t, x], -1)
    torch.testing.assert_close(vmap(a, -1)(stack)[1], a(t))
    hessian = torch.func.hessian(lambda x: a(x).square().sum() / 2)(x)
    torch.testing.assert_close(hessian.reshape(2 * a.shape[1:]), matrix.mT @ matrix)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: a(x).pow(3), (x,))
    u.requires_grad_()
    assert torch.autograd.gradcheck(a.adjoint, (u,))


@pytest.mark.parametrize("name", ["beam", "convolution", "scipy CSR", "beam of slices"])
def test_behind_a_network_it_is_one_more_layer_of_it(name: str):
    a = MEASUREMENTS[name]
    torch.manual_seed(0)
    channels = len(a.image_shape) - 2
    conv = nn.Conv3d if channels else nn.Conv2d
    layers = conv(1, 2, 3, padding=1), nn.Tanh(), conv(2, 1, 3, padding=1)
    network = nn.Sequential(*layers, a).double().eval()
    tangent = Tangent(network)
    x = torch.randn(2, 1, *a.image_shape, dtype=torch.float64)
    batch = tangent.at(x)

    def outputs(*weights: Tensor) -> Tensor:
        named = dict(zip(tangent.names, weights, strict=True))
        return torch.func.functional_call(network, named, (x,)).flatten(1)

    blocks = torch.autograd.functional.jacobian(outputs, tuple(network.parameters()))
    expected = torch.cat([block.flatten(2) for block in blocks], -1)
    torch.testing.assert_close(batch.jacobian(), expected)
    w = torch.randn(tangent.num_weights, 3, dtype=torch.float64)
    torch.testing.assert_close(batch.jvp(w), expected @ w)
    u = torch.randn(*expected.shape[:2], 3, dtype=torch.float64)
    found = torch.einsum("bcd,bck->dk", expected, u)
    torch.testing.assert_close(batch.vjp(u), found)
    # In forward mode, not by differentiating gradients.
    assert tangent._obstacle is None


@pytest.mark.parametrize("name", ["beam of slices", "slices", "convolution", "torch"])
def test_views_are_rows_of_the_matrix(name: str):
    a = MEASUREMENTS[name]
    rows = dense(a).reshape(a.num_views, -1, a.shape[1])
    last = torch.arange(a.num_views) == a.num_views - 1
    for index in (1, slice(0, 2), [1, 0, 1], last, np.array([-1])):
        some = a.views(index)
        chosen = torch.arange(a.num_views)[index].reshape(-1)
        assert (some.num_views, some.view_shape) == (len(chosen), a.view_shape)
        assert type(some) is type(a)
        torch.testing.assert_close(dense(some), rows[chosen].flatten(0, 1))
        y = torch.randn(some.data_shape, dtype=torch.float64)
        expected = y.flatten() @ dense(some)
        torch.testing.assert_close(some.adjoint(y).flatten(), expected)


def test_it_is_converted_copied_pickled_and_stored():
    a = ParallelBeam(5, 4, slices=2)
    single = a.to(torch.float64)
    assert (single.dtype, a.dtype) == (torch.float64, torch.float32)
    assert nn.Sequential(nn.Linear(1, 1), a.views([0, 1])).double()[1].dtype == (
        torch.float64
    )
    x = torch.randn(2, 5, 5)
    a.adjoint(a(x))
    assert copy.deepcopy(a).linear is a.linear
    tensors: dict[str, Tensor] = {}
    state = encode({"a": a, "m": MEASUREMENTS["slices"]}, "", tensors)
    stored = decode(state, tensors, torch.device("cpu"))
    for other in (pickle.loads(pickle.dumps(a)), stored["a"]):
        assert torch.equal(other(x), a(x))
    assert torch.equal(dense(stored["m"]), dense(MEASUREMENTS["slices"]))
    assert repr(a) == (
        "ParallelBeam(bins=8, image_shape=(2, 5, 5), num_views=4, view_shape=(2, 8), "
        "dtype=torch.float32)"
    )


def test_simulated_noise_is_a_share_of_the_mean_signal():
    a = ParallelBeam(32, 30)
    x = torch.ones(32, 32)
    y = a.simulate(x, noise=0.1, seed=1)
    error = (y - a(x)).std()
    assert error == pytest.approx(0.1 * float(a(x).abs().mean()), rel=0.05)
    assert torch.equal(a.simulate(x.numpy(), noise=0.1, seed=1), y)
    fixed = a.simulate(x, standard_deviation=2.0, seed=torch.Generator())
    assert (fixed - a(x)).std() == pytest.approx(2.0, rel=0.05)


def test_a_first_image_is_a_few_steps_of_least_squares():
    mask = torch.arange(12) % 3 > 0
    inpainting = Measurement.of(torch.eye(12)[mask], (3, 4))
    x = torch.randn(2, 3, 4)
    expected = (x.flatten(1) * mask).reshape(2, 3, 4)
    torch.testing.assert_close(inpainting.back_projection(inpainting(x)), expected)
    both = torch.stack([inpainting(x[0]), torch.zeros(8)])
    assert (inpainting.back_projection(both)[1] == 0).all()


def test_complex_data_are_measured_as_pairs_of_numbers():
    def sampled(images: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft2(images)[:, ::2])

    a = Measurement.of(sampled, (4, 4), dtype=torch.float64)
    assert a.data_shape == (2, 4, 2)
    x = torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        a.adjoint(a(x)), (dense(a).mT @ dense(a) @ x.flatten()).view(4, 4)
    )


def test_a_wrong_adjoint_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"<A x, y> = <x, A\^T y>, found \S+ and \S+ "):
        Measurement.of(blur, (8, 8), adjoint=blur)
    with pytest.raises(ValueError, match="not the adjoint"):
        Measurement.of(blur, (8, 8), adjoint=lambda y: 1.01 * unblur(y))
    with pytest.raises(ValueError, match=r"linear function, found .* = \S+ where"):
        Measurement.of(lambda x: blur(x) + 1, (8, 8))


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (
            ValueError,
            "of 10 pixels, which is no square",
            lambda: Measurement.of(np.ones((2, 10))),
        ),
        (
            ValueError,
            "expected 12 pixels, or slices",
            lambda: Measurement.of(matrix(), (3, 5)),
        ),
        (
            ValueError,
            "divisor of the 6 rows",
            lambda: Measurement.of(matrix(), (3, 4), view_shape=(4,)),
        ),
        (
            ValueError,
            "A: expected finite",
            lambda: Measurement.of(np.full((2, 4), np.nan)),
        ),
        (
            ValueError,
            "A: expected finite",
            lambda: Measurement.of(sp.csr_array([[np.inf]])),
        ),
        (TypeError, "expected a matrix, a linear operator", lambda: Measurement.of(3)),
        (
            TypeError,
            "A: expected real numbers",
            lambda: Measurement.of(np.ones((1, 1), complex)),
        ),
        (
            TypeError,
            "A: expected real numbers",
            lambda: Measurement.of(sp.csr_array([[1j]])),
        ),
        (
            ValueError,
            "image_shape: expected that of a function",
            lambda: Measurement.of(blur),
        ),
        (
            ValueError,
            "torch.func.vmap makes",
            lambda: Measurement.of(lambda x: x[0], (2, 2)),
        ),
        (TypeError, "view_as_real", lambda: Measurement.of(torch.fft.fft2, (2, 2))),
        (
            ValueError,
            "fails for images",
            lambda: Measurement.of(nn.Linear(2, 2).double(), (2,)),
        ),
        (
            ValueError,
            "adjoint: expected None",
            lambda: Measurement.of(matrix(), (3, 4), unblur),
        ),
        (
            ValueError,
            "image_shape: expected",
            lambda: Measurement.of(ParallelBeam(4, 2), (5, 5)),
        ),
        (ValueError, "at least one view", lambda: ParallelBeam(4, 2).views([])),
        (IndexError, "out of bounds", lambda: ParallelBeam(4, 2).views(2)),
        (
            ValueError,
            "noise: expected at least 0",
            lambda: ParallelBeam(4, 2).simulate(torch.ones(4, 4), -1.0),
        ),
        (
            ValueError,
            "images: expected shape",
            lambda: ParallelBeam(4, 2)(torch.ones(5, 5)),
        ),
        (
            TypeError,
            "images: expected torch.float32",
            lambda: ParallelBeam(4, 2)(torch.ones(4, 4).double()),
        ),
        (
            ValueError,
            r"data: expected shape \(..., 2, 6\), found \(6, 2\); give the transpose",
            lambda: ParallelBeam(4, 2).as_data(np.ones((6, 2))),
        ),
        (
            ValueError,
            "data: expected finite values, found 1 NaN",
            lambda: ParallelBeam(4, 1).back_projection([[1, 2, 3, 4, 5, torch.nan]]),
        ),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, make: Any):
    with pytest.raises(error, match=words):
        make()
