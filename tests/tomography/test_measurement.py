"""Linear measurements: one matrix, every derivative, every kind of operator."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_operator
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.io import savemat
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.func import jacrev, jvp, vjp, vmap

from sgdgp.core.codec import decode, encode
from sgdgp.core.errors import StorageError
from sgdgp.tangent import Tangent
from sgdgp.tomography import FanBeam, Measurement, ParallelBeam

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
        "fan": FanBeam(4, 2, 9.0, 3.0, dtype=torch.float64),
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
    cubes = a(x).pow(3).sum() / 6
    (gradient,) = torch.autograd.grad(cubes, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient, x, t)
    torch.testing.assert_close(second, a.adjoint(a(x) * a(t)))


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


def test_matrices_are_loaded_from_files(tmp_path: Path):
    a = matrix()
    sp.save_npz(tmp_path / "scipy.npz", sp.csr_array(a))
    np.savez(tmp_path / "numpy.npz", a=a, angles=np.ones(6))
    np.save(tmp_path / "dense.npy", a)
    savemat(tmp_path / "one.mat", {"A": sp.csc_array(a), "angle": 3.0})
    for name in ("scipy.npz", "numpy.npz", "dense.npy", "one.mat"):
        found = Measurement.load(tmp_path / name, (3, 4))
        torch.testing.assert_close(dense(found), torch.from_numpy(a))
    savemat(tmp_path / "two.mat", {"A": sp.csc_array(a), "B": a[:3]})
    found = Measurement.load(tmp_path / "two.mat", (3, 4), name="B", view_shape=(3,))
    assert (found.num_views, found.view_shape) == (1, (3,))


def test_files_without_one_matrix_are_refused(tmp_path: Path):
    two, text = tmp_path / "two.mat", tmp_path / "text.npz"
    savemat(two, {"A": np.ones((2, 4)), "B": np.ones((3, 4))})
    text.write_text("1 2 3")
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{}]), allow_pickle=True)
    with pytest.raises(StorageError, match=r"one matrix, or its .* A \(2, 4\), B \(3"):
        Measurement.load(two)
    with pytest.raises(StorageError, match="expected a matrix 'C' in"):
        Measurement.load(two, name="C")
    with pytest.raises(StorageError, match="cannot be read"):
        Measurement.load(text)
    with pytest.raises(StorageError, match=r"cannot be read: .*allow_pickle=False"):
        Measurement.load(pickled)
    whole = {"a.npz": sp.save_npz, "b.npy": np.save, "c.mat": savemat}
    for name, save in whole.items():
        place, a = tmp_path / name, np.arange(900.0).reshape(30, 30)
        save(place, {"A": a} if save is savemat else sp.csr_array(a))
        if save is np.save:
            np.save(place, a)
        content = place.read_bytes()
        damaged = bytes(b ^ 85 * (i > 150) for i, b in enumerate(content[:-99]))
        for bad in (b"", content[:60], content[:-99], damaged):
            place.write_bytes(bad)
            with pytest.raises(StorageError, match=f"{name} cannot be read"):
                Measurement.load(place)
    with pytest.raises(StorageError, match=r"expected \.npz, \.npy or \.mat"):
        Measurement.load(Path(__file__))
    with pytest.raises(FileNotFoundError, match="path: expected a file"):
        Measurement.load(tmp_path / "none.npz")


def test_a_matrix_that_is_changed_later_is_another_one():
    for make in (np.array, torch.tensor, sp.csr_matrix):
        given = make(matrix())
        a = Measurement.of(given, (3, 4))
        given *= 2
        torch.testing.assert_close(dense(a), torch.from_numpy(matrix()))


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
    names = ("slices", "fan", "torch")
    values = {"a": a, **{name: MEASUREMENTS[name] for name in names}}
    state = encode(values, "", tensors)
    stored = decode(state, tensors, torch.device("cpu"))
    for other in (pickle.loads(pickle.dumps(a)), stored["a"]):
        assert torch.equal(other(x), a(x))
    for name in names:
        assert repr(stored[name]) == repr(MEASUREMENTS[name])
        assert torch.equal(dense(stored[name]), dense(MEASUREMENTS[name]))
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
    each = a.simulate(x, standard_deviation=torch.arange(30.0)[:, None])
    assert (each - a(x))[0].abs().max() == 0
    counted = a.simulate(x / 100, photons=1e4)
    # By the delta method the variance is one by the expected count.
    scores = (counted - a(x / 100)) * (1e4 * torch.exp(-a(x / 100))).sqrt()
    assert scores.std() == pytest.approx(1.0, rel=0.05)


def test_noise_of_a_batch_is_by_each_image():
    a = ParallelBeam(4, 2)
    x = torch.ones(4, 4) * torch.tensor([0.0, 1.0, 100.0])[:, None, None]
    noise = a.simulate(x, seed=1) - a(x)
    assert (noise[0] == 0).all()
    sizes = noise.abs().amax((-2, -1)) / a(x).abs().mean((-2, -1))
    assert (sizes[1:] < 0.25).all()
    assert (sizes[1:] > 0.02).all()


def test_data_carry_no_graph():
    data = torch.ones(2, 6, requires_grad=True)
    assert not BEAM.as_data(data).requires_grad
    assert not BEAM.as_data(2 * data, single=True).requires_grad


def test_a_function_that_cannot_be_converted_says_so():
    def halved(images: Tensor) -> Tensor:
        return F.conv2d(images[:, None], KERNEL[None, None])[:, 0]

    a = Measurement.of(halved, (4, 4), dtype=torch.float32)
    for some in (a, a.views([0])):
        with pytest.raises(
            TypeError, match=r"takes torch\.float32 on cpu only, found torch\.float64"
        ):
            some.to(torch.float64)
    assert a.to(torch.float32).dtype == torch.float32
    always = Measurement.of(blur, (4, 4), lambda y: unblur(y).float())
    with pytest.raises(TypeError, match=r"images of torch\.float32"):
        always.to(torch.float64)


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
    with pytest.raises(ValueError, match="expected 64 numbers of an image, found 32"):
        Measurement.of(blur, (8, 8), adjoint=lambda y: unblur(y)[:, :4])
    halved = LinearOperator((6, 12), matrix().dot, lambda y: matrix().T @ y / 2)
    with pytest.raises(ValueError, match="not the adjoint"):
        Measurement.of(halved, (3, 4))
    with pytest.raises(ValueError, match=r"linear function, found .* = \S+ where"):
        Measurement.of(lambda x: blur(x) + 1, (8, 8))


BEAM = ParallelBeam(4, 2)

VALUE_ERRORS: dict[str, Callable[[], Any]] = {
    "of 10 pixels, which is no square": lambda: Measurement.of(np.ones((2, 10))),
    "expected 12 pixels, or slices": lambda: Measurement.of(matrix(), (3, 5)),
    "of the 6 rows": lambda: Measurement.of(matrix(), (3, 4), view_shape=(4,)),
    "A: expected finite values": lambda: Measurement.of(np.full((2, 4), np.nan)),
    "A: expected finite val": lambda: Measurement.of(sp.csr_array([[np.inf]])),
    "A: expected two axes": lambda: Measurement.of(np.ones(4)),
    "image_shape: expected that of a function": lambda: Measurement.of(blur),
    "torch.func.vmap makes": lambda: Measurement.of(lambda x: x[0], (2, 2)),
    "fails for images": lambda: Measurement.of(nn.Linear(2, 2).double(), (2,)),
    "adjoint: expected None": lambda: Measurement.of(matrix(), (3, 4), unblur),
    "image_shape: expected": lambda: Measurement.of(BEAM, (5, 5)),
    "view_shape: expected": lambda: Measurement.of(BEAM, view_shape=(2,)),
    "view_shape: expected at least 1": lambda: Measurement.of(
        matrix(), (3, 4), view_shape=(-1,)
    ),
    "image_shape: expected at least 1": lambda: Measurement.of(matrix(), (-3, -4)),
    "at least one view": lambda: BEAM.views([]),
    "expected one of them, found noise and photons": lambda: BEAM.simulate(
        np.ones((4, 4)), 0.1, photons=9.0
    ),
    "found standard_deviation and": lambda: BEAM.simulate(
        np.ones((4, 4)), standard_deviation=0.1, photons=9.0
    ),
    "data: expected those of one image": lambda: BEAM.as_data(
        np.ones((3, 2, 6)), single=True
    ),
    "noise: expected at least 0": lambda: BEAM.simulate(np.ones((4, 4)), -1.0),
    "photons: expected a pos": lambda: BEAM.simulate(np.ones((4, 4)), photons=0.0),
    "images: expected shape": lambda: BEAM(torch.ones(5, 5)),
    "found 1 NaN": lambda: BEAM.back_projection([[np.nan, *range(5)], [*range(6)]]),
    r"data: expected shape \(..., 2, 6\) for ParallelBeam\(.*\), found \(6, 2\); give "
    "the transpose": lambda: BEAM.as_data(np.ones((6, 2))),
}

TYPE_ERRORS: dict[str, Callable[[], Any]] = {
    "expected a matrix, a linear operator or": lambda: Measurement.of(3),
    "A: expected real numbers": lambda: Measurement.of(np.ones((1, 1), complex)),
    "A: expected real": lambda: Measurement.of(sp.csr_array([[1j]])),
    "view_as_real": lambda: Measurement.of(torch.fft.fft2, (2, 2)),
    "images: expected torch.float32": lambda: BEAM(torch.ones(4, 4).double()),
    "image_shape: expected a sequence of": lambda: Measurement.of(matrix(), 12),
    r"views: expected a number, .* found \[1\.5\]": lambda: BEAM.views([1.5]),
    "mask or a sequence of numbers of views, found 'all'": lambda: BEAM.views("all"),
    "images: expected a torch.Tensor": lambda: BEAM(np.ones((4, 4))),
}


@pytest.mark.parametrize("words", VALUE_ERRORS)
def test_bad_values_are_named(words: str):
    with pytest.raises(ValueError, match=words):
        VALUE_ERRORS[words]()


@pytest.mark.parametrize("words", TYPE_ERRORS)
def test_bad_types_are_named(words: str):
    with pytest.raises(TypeError, match=words):
        TYPE_ERRORS[words]()


def test_no_such_view_is_an_index_error():
    with pytest.raises(IndexError):
        BEAM.views(2)
