"""GPyTorch kernels that this package adds."""

from sgdgp.kernels.neural_tangent import NeuralTangentKernel

__all__ = ["NeuralTangentKernel"]
