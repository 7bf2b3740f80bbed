"""Reconstructions from linear measurements, and their uncertainty."""

from sgdgp.tomography.geometry import FanBeam, ParallelBeam
from sgdgp.tomography.measurement import Measurement
from sgdgp.tomography.posterior import (
    ImagePosterior,
    LinearisedImage,
    block,
    linearise,
    linearize,
)
from sgdgp.tomography.unet import UNet

__all__ = [
    "FanBeam",
    "ImagePosterior",
    "LinearisedImage",
    "Measurement",
    "ParallelBeam",
    "UNet",
    "block",
    "linearise",
    "linearize",
]
