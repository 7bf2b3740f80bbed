"""References of posteriors: chains, their alignment, Gaussians of weights."""

from sgdgp.networks.sampling.alignment import (
    Alignment,
    align,
    barrier,
    match_weights,
)
from sgdgp.networks.sampling.compact import CompactGaussian
from sgdgp.networks.sampling.comparison import PosteriorComparison, compare
from sgdgp.networks.sampling.draws import Draws
from sgdgp.networks.sampling.hamiltonian import HmcProgress, hmc
from sgdgp.networks.sampling.pruning import prune, pruning_masks, sparsity_curve
from sgdgp.networks.sampling.symmetry import Symmetry, SymmetryGroup
from sgdgp.networks.sampling.variational import ensemble, mean_field

__all__ = [
    "Alignment",
    "CompactGaussian",
    "Draws",
    "HmcProgress",
    "PosteriorComparison",
    "Symmetry",
    "SymmetryGroup",
    "align",
    "barrier",
    "compare",
    "ensemble",
    "hmc",
    "match_weights",
    "mean_field",
    "prune",
    "pruning_masks",
    "sparsity_curve",
]
