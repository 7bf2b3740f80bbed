"""Feature maps of kernels, and prior functions drawn with them."""

from sgdgp.features.base import FeatureMap
from sgdgp.features.compose import add, multiply, restrict, scale
from sgdgp.features.dispatch import (
    FeatureRequest,
    NoRandomFeatures,
    has_features,
    random_features,
    register_features,
)
from sgdgp.features.fingerprints import TanimotoFeatures
from sgdgp.features.finite import ConstantFeatures, LinearFeatures, PolynomialFeatures
from sgdgp.features.fourier import FourierFeatures
from sgdgp.features.prior_draws import (
    DrawGroup,
    Draws,
    ExactDraws,
    PriorDraws,
    SelectedDraws,
    draw_prior,
)
from sgdgp.features.tasks import IndexFeatures, TaskFeatures

__all__ = [
    "ConstantFeatures",
    "DrawGroup",
    "Draws",
    "ExactDraws",
    "FeatureMap",
    "FeatureRequest",
    "FourierFeatures",
    "IndexFeatures",
    "LinearFeatures",
    "NoRandomFeatures",
    "PolynomialFeatures",
    "PriorDraws",
    "SelectedDraws",
    "TanimotoFeatures",
    "TaskFeatures",
    "add",
    "draw_prior",
    "has_features",
    "multiply",
    "random_features",
    "register_features",
    "restrict",
    "scale",
]
