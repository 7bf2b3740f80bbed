"""Reconstructions from linear measurements, and their uncertainty."""

from sgdgp.tomography.geometry import ParallelBeam
from sgdgp.tomography.measurement import Measurement
from sgdgp.tomography.unet import UNet

__all__ = ["Measurement", "ParallelBeam", "UNet"]
