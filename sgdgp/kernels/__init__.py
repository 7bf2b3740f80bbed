"""GPyTorch kernels that this package adds."""

from sgdgp.kernels.neural_tangent import NeuralTangentKernel
from sgdgp.kernels.tanimoto import TanimotoKernel

__all__ = ["NeuralTangentKernel", "TanimotoKernel"]
