"""Reference posteriors of a network's weights, without the Gaussian assumption."""

from sgdgp.networks.sampling.compact import CompactGaussian
from sgdgp.networks.sampling.draws import Draws

__all__ = ["CompactGaussian", "Draws"]
