"""Products with the Jacobian of a network, forward and back, and its feature map."""

from sgdgp.tangent.features import IdentityRoot, TangentFeatures, WeightRoot
from sgdgp.tangent.jacobian import Tangent, TangentBatch
from sgdgp.tangent.network import NORMS, Weights

__all__ = [
    "NORMS",
    "IdentityRoot",
    "Tangent",
    "TangentBatch",
    "TangentFeatures",
    "WeightRoot",
    "Weights",
]
