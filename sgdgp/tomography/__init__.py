"""Reconstructions from linear measurements, and their uncertainty."""

from sgdgp.tomography.unet import UNet

__all__ = ["UNet"]
