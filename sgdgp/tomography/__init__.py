"""Reconstructions from linear measurements, and their uncertainty."""

from sgdgp.tomography.geometry import Beam, FanBeam, ParallelBeam
from sgdgp.tomography.measurement import Measurement
from sgdgp.tomography.posterior import (
    ImagePosterior,
    LinearisedImage,
    block,
    linearise,
    linearize,
)
from sgdgp.tomography.reconstruction import Reconstruction, reconstruct
from sgdgp.tomography.unet import UNet

__all__ = [
    "Beam",
    "FanBeam",
    "ImagePosterior",
    "LinearisedImage",
    "Measurement",
    "ParallelBeam",
    "Reconstruction",
    "UNet",
    "block",
    "linearise",
    "linearize",
    "reconstruct",
]
