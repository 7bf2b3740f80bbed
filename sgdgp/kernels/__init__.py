"""Kernels: what is known of each family, and the GPyTorch kernels that we add."""

# What is known of GPyTorch's kernels registers on import.
from sgdgp.kernels import compose as _compose  # noqa: F401
from sgdgp.kernels import dot_product as _dot_product  # noqa: F401
from sgdgp.kernels import gradient_rules as _gradient_rules  # noqa: F401
from sgdgp.kernels import index as _index  # noqa: F401
from sgdgp.kernels import stationary as _stationary  # noqa: F401
from sgdgp.kernels.neural_tangent import NeuralTangentKernel
from sgdgp.kernels.tanimoto import TanimotoKernel

__all__ = ["NeuralTangentKernel", "TanimotoKernel"]
