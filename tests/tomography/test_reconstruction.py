"""Reconstructions by the deep image prior: the fit, its files, and what it refuses."""

from __future__ import annotations

import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sgdgp
from sgdgp.core.errors import CheckpointError, StorageError
from sgdgp.solvers.base import Progress
from sgdgp.tomography import Measurement, ParallelBeam, Reconstruction, UNet
from sgdgp.tomography import reconstruct as reconstruct_aloud

BEAM = ParallelBeam(8, 4)

# Fits of a few steps, as most are here, are far from the data.
pytestmark = pytest.mark.filterwarnings("ignore:A x misses the data")


def phantom(n: int = 8) -> Tensor:
    """A disc with a hole."""
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    radius = ((i - n / 2) ** 2 + (j - n / 2 + 0.5) ** 2).sqrt() / n
    return ((radius < 0.4) & (radius > 0.12)).float()


def sinogram(beam: Any = BEAM, noise: float = 0.05) -> Tensor:
    return beam.simulate(phantom(), noise)


def small(**settings: Any) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(**{"channels": (4, 4), "skips": (0, 2), **settings})


def reconstruct(*args: Any, **settings: Any) -> Reconstruction:
    return reconstruct_aloud(*args, progress=False, **settings)


def reconstruct_quietly(*args: Any, **settings: Any) -> Reconstruction:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reconstruct(*args, **settings)


SHORT: dict[str, Any] = {"iterations": 30, "early_stopping": False}


@pytest.fixture(scope="module")
def found() -> Reconstruction:
    """With everything by default but the size of the network."""
    return reconstruct(sinogram(), BEAM, small(), iterations=100, learning_rate=3e-2)


def test_the_image_is_near_the_truth_and_what_the_network_shows(found: Reconstruction):
    error = (found.image - phantom()).square().mean()
    first = BEAM.back_projection(found.data)
    assert error < 0.7 * (first - phantom()).square().mean()
    assert found.image.shape == BEAM.image_shape
    assert found.input.shape == (1, 1, 8, 8)
    assert not found.network.training
    assert all(p.requires_grad for p in found.network.parameters())
    with torch.no_grad():
        assert torch.equal(found.network(found.input)[0, 0], found.image)
    assert found.reason in ("finished", "stopped early")
    assert found.history[-1].step <= 100
    assert repr(found).startswith("Reconstruction(image_shape=(8, 8), network='UNet', ")


def test_its_posterior_is_about_the_image(found: Reconstruction):
    posterior = found.linearise(noise=0.1).fit(final_samples=2)
    torch.testing.assert_close(posterior.mean.to(found.image), found.image)
    assert posterior.noise == pytest.approx(0.1)


def test_the_weights_are_those_of_the_least_loss():
    images: list[Tensor] = []

    def look(progress: Progress) -> None:
        images.append(progress.weights())

    data = sinogram()
    found = reconstruct(data, BEAM, small(), tv=1e-3, callback=look, **SHORT)

    def loss(x: Tensor) -> float:
        variation = x.diff(dim=0).abs().sum() + x.diff(dim=1).abs().sum()
        return float((BEAM(x) - data).square().mean() + 1e-3 * variation)

    assert [entry.step for entry in found.history] == [10, 20, 30]
    for entry, image in zip(found.history, images, strict=True):
        assert entry.loss == pytest.approx(loss(image), rel=1e-5)
    assert loss(found.image) <= min(entry.loss for entry in found.history) * 1.00001


def test_a_callback_is_told_of_the_relative_misfit():
    told: list[Progress] = []
    data = sinogram()
    reconstruct(data, BEAM, small(), callback=told.append, iterations=20)
    assert [progress.passes for progress in told] == [10, 20]
    error = BEAM(told[0].weights()) - data
    # Of the data that are not held out, so about the same.
    expected = float(error.norm() / data.norm())
    assert float(told[0].residuals) == pytest.approx(expected, rel=0.2)


def test_a_seed_is_all_that_is_random_and_the_network_given_stays_as_it_is():
    state = torch.get_rng_state()
    network = small(dropout=0.1)
    before = {n: w.clone() for n, w in network.state_dict().items()}

    def image(seed: int, network: nn.Module | None = None) -> Tensor:
        return reconstruct(sinogram(), BEAM, network, iterations=4, seed=seed).image

    assert torch.equal(image(1, network), image(1, network))
    assert not torch.equal(image(1, network), image(2, network))
    assert not torch.equal(image(1), image(2))
    assert network.training
    assert all(torch.equal(w, before[n]) for n, w in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fit_is_the_same_in_other_units():
    """Of images and of data: the network is scaled, and so is its input."""
    data = sinogram()
    found = reconstruct(data, BEAM, iterations=2)
    for unit in (1e-3, 200.0):
        scaled = reconstruct_quietly(unit * data, BEAM, iterations=2)
        other = reconstruct_quietly(7 * unit * data, BEAM, iterations=2)
        torch.testing.assert_close(other.image, 7 * scaled.image, rtol=1e-3, atol=0)
        assert other.network.limits[1] > 7 * unit
        assert any("other units than [0, 1]" in word for word in scaled.warnings)
    assert found.network.limits == (0.0, 1.0)
    assert not any("units" in sentence for sentence in found.warnings)


def test_images_with_negative_values_have_no_sigmoid():
    image = phantom() - 0.5
    data = BEAM.simulate(image, 0.01)
    with pytest.warns(UserWarning, match="not bounded"):
        found = reconstruct(data, BEAM, iterations=4)
    assert not found.network.sigmoid


def test_volumes_have_networks_in_three_dimensions():
    beam = ParallelBeam(8, 3, slices=5)
    data = beam.simulate(phantom().expand(5, 8, 8))
    found = reconstruct(data, beam, iterations=4)
    assert found.network.dimensions == 3
    assert found.image.shape == (5, 8, 8)
    slices = UNet((4,), (0,), in_channels=5, out_channels=5)
    assert reconstruct(data, beam, slices, iterations=4).input.shape == (1, 5, 8, 8)


def test_any_linear_measurement_and_any_network_do():
    """Half of the pixels of an image that is no square, by a network of its own."""
    seen = torch.eye(12).double()[::2]
    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 12), nn.Unflatten(1, (1, 3, 4)))
    z = torch.linspace(-1, 1, 5)[None]
    data = seen @ torch.linspace(0, 1, 12).double()
    found = reconstruct(
        data, seen, network.double(), (3, 4), input=z, learning_rate=0.1, **SHORT
    )
    assert found.image.shape == (3, 4)
    assert found.image.dtype == torch.float64
    error = Measurement.of(seen, (3, 4))(found.image) - data
    assert error.square().mean() < 0.1 * data.square().mean()


def test_a_fit_to_noise_ends_early(monkeypatch: pytest.MonkeyPatch):
    """What is fitted to some of it does not predict the rest."""
    monkeypatch.setattr("sgdgp.tomography.reconstruction._PATIENCE", 20)
    monkeypatch.setattr("sgdgp.tomography.reconstruction._SMOOTHING", 0.5)
    beam = ParallelBeam(8, 12)
    data = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    network = small(sigmoid=False)
    settings = {"iterations": 120, "learning_rate": 3e-2, "tv": 0.0}
    found = reconstruct(data, beam, network, **settings)
    assert found.reason == "stopped early"
    # Steps until the held-out misfit has not fallen, and a quarter of all.
    assert 20 + 30 < found.history[-1].step < 120
    reason = reconstruct(data, beam, network, **SHORT).reason
    assert reason == "finished"


def test_a_loss_that_explodes_is_brought_back():
    with pytest.warns(UserWarning, match=r"diverged .* give a smaller learning_rate"):
        found = reconstruct(
            sinogram(),
            BEAM,
            small(sigmoid=False),
            learning_rate=3.0,
            iterations=40,
            early_stopping=False,
        )
    least = min(entry.loss for entry in found.history)
    assert torch.isfinite(found.image).all()
    assert (BEAM(found.image) - found.data).square().mean() <= least


def test_images_that_reach_beyond_the_network_are_noticed():
    network = small(limits=(0.0, 0.2))
    with pytest.warns(UserWarning, match=r"end of the network's range, 0.2, .*0.4"):
        reconstruct(sinogram(), BEAM, network, iterations=40, learning_rate=0.1)


def test_a_callback_or_the_keyboard_stops_the_fit_with_what_was_reached():
    def press(progress: Progress) -> None:
        if progress.passes == 20:
            signal.raise_signal(signal.SIGINT)

    for callback in (lambda progress: progress.passes >= 20, press):
        with pytest.warns(UserWarning, match="interrupted after 20 of 30 steps"):
            found = reconstruct(sinogram(), BEAM, small(), callback=callback, **SHORT)
        assert found.reason == "interrupted"
        assert len(found.history) == 2
        assert torch.isfinite(found.image).all()


def test_a_killed_fit_goes_on_bit_by_bit(tmp_path: Path):
    """With dropout, from a search with held-out data into the last steps."""
    settings: dict[str, Any] = {"iterations": 40, "seed": 3}
    whole = reconstruct(sinogram(), BEAM, small(dropout=0.1), **settings)
    settings |= {"checkpoint": tmp_path / "fit", "checkpoint_every": 1e-6}

    def run(step: int) -> Reconstruction:
        def kill(progress: Progress) -> None:
            if progress.passes == step:
                os.kill(os.getpid(), signal.SIGKILL)

        return reconstruct(
            sinogram(), BEAM, small(dropout=0.1), callback=kill, **settings
        )

    for step in (20, 30):
        if (child := os.fork()) == 0:
            run(step)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = run(0)
    assert torch.equal(found.image, whole.image)
    assert [e.loss for e in found.history] == [e.loss for e in whole.history]
    # What is finished is read.
    again = run(0)
    assert torch.equal(again.image, whole.image)
    assert again.reason == whole.reason
    with pytest.raises(CheckpointError, match=r"another reconstruction.*seed is 4"):
        reconstruct(sinogram(), BEAM, small(dropout=0.1), **{**settings, "seed": 4})


def test_what_a_file_does_not_hold_is_given_on_loading(tmp_path: Path):
    place = tmp_path / "file"
    matrix = torch.eye(4).double()[:3]
    measurement = Measurement.of(
        lambda x: x.flatten(1) @ matrix.mT, (2, 2), dtype=torch.float64
    )
    network = nn.Conv2d(1, 1, 1).double()
    data = torch.tensor([1.0, 2.0, 3.0]).double()
    found = reconstruct(data, measurement, network, **SHORT)
    found.save(place)
    given: dict[str, Any] = {"network": network, "measurement": measurement}
    again = sgdgp.load(place, **{**given, "network": nn.Conv2d(1, 1, 1).double()})
    assert torch.equal(again.image, found.image)
    assert torch.equal(again.network(again.input)[0, 0], found.image)
    assert again.history == found.history
    other = Measurement.of(torch.eye(4).double()[1:], (2, 2))
    for changed, error, words in (
        ({"network": None}, TypeError, "network: needed for"),
        ({"network": nn.Conv2d(1, 2, 1)}, StorageError, "does not fit this network"),
        ({"measurement": None}, TypeError, "measurement: needed for"),
        ({"measurement": other}, StorageError, "belongs to another one: the mean"),
    ):
        with pytest.raises(error, match=words):
            sgdgp.load(place, **{**given, **changed})


def test_what_a_measurement_was_made_of_is_given_on_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sgdgp.tomography.reconstruction._HEAVY", 0)
    matrix = torch.eye(4).double()

    def halved(x: Tensor) -> Tensor:
        return x.flatten(1) / 2

    for thing, shape, views in (
        (matrix, (2, 2), (2,)),
        (matrix, (3, 2, 2), (2,)),
        (halved, (2, 2), (4,)),
    ):
        a = Measurement.of(thing, shape, view_shape=views, dtype=torch.float64)
        network = UNet((2,), (0,), len(shape))
        found = reconstruct(torch.ones(a.data_shape), a, network, iterations=1)
        found.save(tmp_path / "file")
        again = sgdgp.load(tmp_path / "file", measurement=thing)
        assert again.measurement.data_shape == a.data_shape
        # The network is of float32.
        assert torch.equal(again.measurement(again.image), a(found.image))
        assert again.image.dtype == torch.float64
    with pytest.raises(StorageError, match="does not fit this measurement: "):
        sgdgp.load(tmp_path / "file", measurement=torch.eye(4)[:3])
    with pytest.raises(TypeError, match=r"network: .* holds its own, UNet; expected n"):
        sgdgp.load(tmp_path / "file", measurement=halved, network=network)


def test_what_a_file_holds_is_not_given_again(tmp_path: Path, found: Reconstruction):
    found.save(tmp_path / "file")
    with pytest.raises(TypeError, match="holds that of its data, ParallelBeam"):
        sgdgp.load(tmp_path / "file", measurement=BEAM)


def test_only_projections_have_neighbours_and_the_sign_of_images():
    """Not the Fourier coefficients of a disc, which are in [0, 1]."""

    def sampled(images: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft2(images, norm="ortho")[:, ::2])

    a = Measurement.of(sampled, (8, 8))
    found = reconstruct(a.simulate(phantom()), a, iterations=1)
    assert found.network.limits == (0.0, 1.0)
    assert found.noise == pytest.approx(0.05 * float(found.data.abs().mean()))
    with pytest.warns(UserWarning, match="not bounded"):
        reconstruct(a.simulate(2 * phantom() - 1), a, iterations=1)


def test_noise_is_told_from_bins_that_differ():
    data = torch.zeros(4, 12)
    data[:, 4:8] = sinogram()[:, 4:8]  # most differences are none
    assert reconstruct(data, BEAM, small(), iterations=1).noise > 0
    with pytest.warns(UserWarning, match="noise cannot be told from differences of"):
        found = reconstruct(torch.ones(4, 12), BEAM, small(), iterations=1)
    assert found.noise == pytest.approx(0.05)


def test_an_image_of_one_axis_has_a_flat_input():
    found = reconstruct(
        torch.ones(3), torch.eye(4)[:3], nn.Linear(4, 4), (4,), tv=0.1, **SHORT
    )
    assert found.image.shape == (4,)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"iterations": 0}, ValueError, "iterations: expected at least 1, found 0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate: expected a positive"),
        ({"schedule": "step"}, ValueError, 'schedule: expected "cosine" or "constant"'),
        ({"tv": -1.0}, ValueError, "tv: expected a number of at least 0, found -1"),
        ({"tv": "much"}, TypeError, "tv: expected a number"),
        ({"early_stopping": 3}, TypeError, "early_stopping: expected a bool, found 3"),
        ({"callback": 3}, TypeError, "callback: expected a function"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every"),
        ({"data": torch.zeros(4, 12)}, ValueError, "expected some that are not zero"),
        ({"data": torch.full((4, 12), math.nan)}, ValueError, "data: .*48 NaN"),
        ({"data": torch.ones(4, 11)}, ValueError, r"data: .*, found \(4, 11\)"),
        ({"data": torch.ones(2, 4, 12)}, ValueError, "data: expected those of one"),
        ({"image_shape": (4, 16)}, ValueError, r"image_shape: .*\(8, 8\).*\(4, 16\)"),
        ({"network": 3}, TypeError, "network: expected a torch.nn.Module, found int"),
        ({"network": nn.Sigmoid()}, ValueError, "network: expected weights that need"),
        ({"network": nn.Conv2d(2, 1, 1)}, ValueError, "Conv2d does not take the input"),
        ({"network": nn.Conv2d(1, 1, 3)}, ValueError, r"found \(1, 1, 6, 6\)"),
        ({"network": nn.Conv2d(1, 2, 1)}, ValueError, r"found \(1, 2, 8, 8\)"),
        ({"input": 3}, TypeError, "input: expected a torch.Tensor, found int"),
        ({"input": torch.full((1, 1, 8, 8), math.inf)}, ValueError, "input: .*64 NaN"),
        ({"input": torch.ones(1, 2, 8, 8)}, ValueError, "UNet does not take the input"),
        ({"measurement": 3}, TypeError, "A: expected a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, error: type, words: str):
    given = {"data": torch.ones(4, 12), "measurement": BEAM, **settings}
    with pytest.raises(error, match=words):
        reconstruct(**given)


def test_a_network_that_does_not_fit_in_memory_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
):
    place = "sgdgp.tomography.reconstruction.free_memory"
    monkeypatch.setattr(place, lambda device: 10**6)
    monkeypatch.setattr("sgdgp.tomography.reconstruction._SMALL", 0)
    with pytest.raises(
        MemoryError, match=r"needs about \d,\d{3},\d{3} bytes, 1,000,000"
    ):
        reconstruct(sinogram(), BEAM)
