"""Projections along rays, against scikit-image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from skimage.transform import iradon, radon

from sgdgp.tomography import ParallelBeam
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


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "angles: expected at least one angle", {"angles": []}),
        (ValueError, "angles: expected at least 1, found 0", {"angles": 0}),
        (ValueError, "angles: expected finite", {"angles": [0.0, torch.nan]}),
        (TypeError, "angles: expected their number, or", {"angles": "all"}),
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
    beam = ParallelBeam(16, 10)
    monkeypatch.setattr(geometry_module, "free_memory", lambda device: 10**5)
    with pytest.raises(MemoryError, match=r"needs about [\d,]+ bytes .* 100,000 are"):
        ParallelBeam(16, 10)
    # What is said to be needed is enough, and not twice as much.
    held = 2 * beam.linear.values.numel() * 8
    points = 2 * 2.5 * 16**2 * 10 * 8
    assert held < points < 2 * held
