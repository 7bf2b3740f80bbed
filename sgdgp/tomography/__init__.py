"""Reconstructions from linear measurements, and their uncertainty."""

from sgdgp.tomography.geometry import FanBeam, ParallelBeam
from sgdgp.tomography.measurement import Measurement
from sgdgp.tomography.unet import UNet

__all__ = ["FanBeam", "Measurement", "ParallelBeam", "UNet"]
