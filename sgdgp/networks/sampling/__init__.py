"""Reference posteriors of a network's weights, without the Gaussian assumption."""

from sgdgp.networks.sampling.compact import CompactGaussian

__all__ = ["CompactGaussian"]
