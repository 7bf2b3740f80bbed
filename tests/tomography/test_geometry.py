"""Projections along rays, against scikit-image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from skimage.transform import iradon, radon

from sgdgp.tomography import FanBeam, ParallelBeam
from sgdgp.tomography import geometry as geometry_module

ANGLES = np.array([0, 33.3, 45, 90, 135, 171, -30, 359])


@pytest.mark.parametrize("size", [1, 2, 7, 16, 31])
def test_parallel_beams_are_those_of_scikit_image(size: int):
    beam = ParallelBeam(size, ANGLES, dtype=torch.float64)
    image = np.random.default_rng(0).random((size, size))
    expected = radon(image, ANGLES, circle=False).T
    found = beam(torch.from_numpy(image))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    back = iradon(expected.T, ANGLES, circle=False, output_size=size)
    np.testing.assert_allclose(beam.back_projection(expected), back, atol=1e-12)


def scanner(fan: FanBeam) -> tuple[np.ndarray, np.ndarray]:
    """Where the source is, and directions to the bins: (2, views, bins), as (x, y)."""
    a = np.deg2rad(fan.angles.numpy())[:, None]
    u = (np.arange(fan.bins) - fan.axis) * fan.spacing
    across, away = np.stack([np.cos(a), -np.sin(a)]), np.stack([np.sin(a), np.cos(a)])
    source = -fan.source_distance * away
    direction = u * across + fan.detector_distance * away - source
    return source, direction / np.linalg.norm(direction, axis=0)


def test_fan_beams_are_sums_along_rays_from_the_source():
    """Another computation of the same: from source to detector, by SciPy's splines."""
    distances = {"source_distance": 40.0, "detector_distance": 20.0, "spacing": 1.3}
    fan = FanBeam(15, 7, **distances, dtype=torch.float64)
    image = np.random.default_rng(0).random((15, 15))
    source, direction = scanner(fan)
    nearest = -(source * direction).sum(0)
    steps = np.arange(22) - 11
    along = (nearest[..., None] + steps)[None] * direction[..., None]
    points = (source[..., None] + along)[::-1] + 7
    expected = map_coordinates(image, points, order=1, mode="grid-constant").sum(-1)
    found = fan(torch.from_numpy(image))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[:, 0] < 0.2).all()  # the default detector sees all of the image


def test_fan_beams_are_line_integrals():
    """Of a disc and of a normal density, whose integrals are known."""
    fan = FanBeam(64, 48, 90.0, 50.0, 90, spacing=1.5, axis=40.5, dtype=torch.float64)
    source, direction = scanner(fan)
    (x0, y0), radius, scale = (7, -5), 12, 6
    distance = (x0 - source[0]) * direction[1] - (y0 - source[1]) * direction[0]
    fine = (np.arange(64 * 8) + 0.5) / 8 - 0.5 - 32
    x, y = np.meshgrid(fine - x0, fine - y0)
    disc = (x**2 + y**2 < radius**2).reshape(64, 8, 64, 8).mean((1, 3))
    chords = 2 * np.sqrt(np.clip(radius**2 - distance**2, 0, None))
    error = np.abs(fan(torch.from_numpy(disc)).numpy() - chords)
    assert error[np.abs(np.abs(distance) - radius) > 1].max() < 0.7  # of 24
    assert error.mean() < 0.06
    centre = np.arange(64) - 32
    x, y = np.meshgrid(centre - x0, centre - y0)
    blob = np.exp(-(x**2 + y**2) / (2 * scale**2))
    integrals = np.sqrt(2 * np.pi) * scale * np.exp(-(distance**2) / (2 * scale**2))
    data = fan(torch.from_numpy(blob))
    np.testing.assert_allclose(data, integrals, atol=0.005 * integrals.max())
    np.testing.assert_allclose(fan.back_projection(data), blob, atol=0.02)


def test_a_fan_from_a_distant_source_is_a_parallel_beam():
    beam = ParallelBeam(12, ANGLES, dtype=torch.float64)
    fan = FanBeam(12, ANGLES, 1e9, dtype=torch.float64)
    x = torch.rand(12, 12, dtype=torch.float64)
    tolerance = {"atol": 1e-5, "rtol": 0.0}
    torch.testing.assert_close(fan(x), beam(x), **tolerance)
    data = beam(x)
    images = fan.back_projection(data), beam.back_projection(data)
    torch.testing.assert_close(*images, **tolerance)


def test_every_slice_of_a_volume_is_projected_alike():
    beam, volume = ParallelBeam(6, 5), torch.rand(2, 3, 6, 6)
    stacked = ParallelBeam(6, 5, slices=3)
    assert stacked.shape == (5 * 3 * 9, 3 * 36)
    data = stacked(volume)
    torch.testing.assert_close(data, beam(volume).transpose(-2, -3))
    expected = beam.back_projection(beam(volume))
    torch.testing.assert_close(stacked.back_projection(data), expected)


def test_angles_are_equidistant_given_or_chosen():
    beam = ParallelBeam(8, 4)
    assert beam.angles.tolist() == [0, 45, 90, 135]
    some = beam.views([3, 1])
    assert some.angles.tolist() == [135, 45]
    x = torch.rand(8, 8)
    torch.testing.assert_close(some(x), beam.at([135.0, 45.0])(x))
    given = some.back_projection(some(x))
    torch.testing.assert_close(given, beam.at(some.angles).back_projection(some(x)))
    assert torch.equal(beam.at(4)(x), beam(x))


def test_bins_are_spaced_and_shifted():
    beam = ParallelBeam(9, ANGLES)
    half = ParallelBeam(9, ANGLES, bins=27, spacing=0.5, axis=13.0)
    every = half(torch.rand(9, 9, generator=torch.Generator().manual_seed(0)))
    x = torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    # Bin 6 of 13 is on the axis, as bin 12 of the shifted ones is.
    torch.testing.assert_close(every[:, 1::2], beam(x))
    smooth = torch.exp(-((torch.arange(33.0) - 16) ** 2) / 40)
    image = smooth[:, None] * smooth
    fine = ParallelBeam(33, 40, spacing=0.7)
    assert (fine.back_projection(fine(image)) - image).abs().max() < 0.02


def test_distances_of_a_fan_are_refused_in_which_there_is_none():
    with pytest.raises(ValueError, match=r"outside of the image, more than 5\.65"):
        FanBeam(8, 3, source_distance=5.0)
    with pytest.raises(ValueError, match="detector_distance: expected at least 0"):
        FanBeam(8, 3, source_distance=9.0, detector_distance=-1.0)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "angles: expected at least one angle", {"angles": []}),
        (ValueError, "angles: expected at least 1, found 0", {"angles": 0}),
        (ValueError, "angles: expected finite", {"angles": [0.0, torch.nan]}),
        (TypeError, "angles: expected their number as an int, or", {"angles": "all"}),
        (TypeError, r"sequence of degrees, found 60\.0", {"angles": 60.0}),
        (TypeError, r"found tensor\(3\)", {"angles": torch.tensor(3)}),
        (TypeError, "found True", {"angles": True}),
        (ValueError, "size: expected at least 1", {"size": 0}),
        (ValueError, "slices: expected at least 1", {"slices": 0}),
        (ValueError, "spacing: expected a positive", {"spacing": 0.0}),
        (TypeError, "dtype: expected float32 or", {"dtype": torch.float16}),
    ],
)
def test_bad_geometries_are_refused(
    error: type[Exception], words: str, arguments: dict[str, Any]
):
    with pytest.raises(error, match=words):
        ParallelBeam(**{"size": 8, "angles": 3, **arguments})


def test_what_does_not_fit_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(geometry_module, "free_memory", lambda device: 10**5)
    with pytest.raises(MemoryError, match=r"needs about [\d,]+ bytes, 100,000 are"):
        ParallelBeam(16, 10)
    monkeypatch.undo()
    with pytest.raises(MemoryError, match=r"of 5000 x 5000 x 5000 pixels at 10 angles"):
        ParallelBeam(5000, 10, slices=5000)


def test_a_stack_of_one_slice_is_a_volume():
    beam = ParallelBeam(4, 2, slices=1)
    assert beam(torch.ones(1, 4, 4)).shape == (2, 1, 6)
    assert (beam.image_shape, beam.view_shape) == ((1, 4, 4), (1, 6))
