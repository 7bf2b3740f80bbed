"""Made-up molecules and fingerprints, for runs without DOCKSTRING or without RDKit.

Molecules are rings that carry groups or further rings; counts are drawn bin by bin so
that they are as sparse and as uneven as those of drugs. Scores are a function drawn
from the target's own Gaussian process, with its noise, so that its hyperparameters are
the right ones and intervals can be judged.
"""

from __future__ import annotations

import random

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.dockstring.data import LARGEST_SCORE
from benchmarks.dockstring.targets import Target
from sgdgp.features import TanimotoFeatures

_RINGS = (
    "c{a}ccc({s})cc{a}",
    "c{a}ccc({s})c({s})c{a}",
    "c{a}cc({s})cc({s})c{a}",
    "c{a}ccnc({s})c{a}",
    "c{a}cnc({s})nc{a}",
    "c{a}csc({s})n{a}",
    "c{a}cc({s})on{a}",
    "c{a}cc{b}ccc({s})cc{b}n{a}C",
    "c{a}cc{b}cc({s})ccc{b}nc{a}",
    "N{a}CCN({s})CC{a}",
    "N{a}CCC({s})CC{a}",
    "N{a}CCOC({s})C{a}",
    "C{a}CCCC({s})C{a}",
    "C{a}CC{a}",
)
_LINKS = ("", "", "C", "CC", "C(=O)N", "NC(=O)", "C(=O)", "S(=O)(=O)N", "CO", "CNC")
_GROUPS = (
    *("C", "F", "Cl", "OC", "O", "N", "C#N", "CC", "C(C)C", "C(F)(F)F", "Br"),
    *("N(C)C", "C(=O)O", "C(=O)OCC", "C(N)=O", "S(C)(=O)=O", "[N+](=O)[O-]", "OCCO"),
)
_DEEPEST = 3
_FEATURES = 4096
_OCCUPIED = 16.0
_LARGEST_COUNT = 60


def generated_smiles(count: int, seed: int) -> tuple[str, ...]:
    """Different made-up molecules, the same for the same seed."""
    choose = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[choose.choice((*_GROUPS[:3], "")) + _ring(choose, 0)] = None
    return tuple(found)


def _ring(choose: random.Random, depth: int) -> str:
    """A ring with something in each of its places; its ring bonds are numbered."""
    parts = choose.choice(_RINGS).split("{s}")
    text = parts[0]
    for part in parts[1:]:
        text += _rest(choose, depth) + part
    return text.replace("{a}", str(2 * depth + 1)).replace("{b}", str(2 * depth + 2))


def _rest(choose: random.Random, depth: int) -> str:
    if depth + 1 < _DEEPEST and choose.random() < 0.55:
        return choose.choice(_LINKS) + _ring(choose, depth + 1)
    return choose.choice(_GROUPS)


def generated_counts(count: int, bins: int, seed: int) -> Int[Tensor, "n bins"]:
    """Sparse counts (count, bins): few bins are common, and few counts large."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, bins + 1, dtype=torch.float64)
    common = rank.reciprocal()
    common = common[torch.randperm(bins, generator=generator)]
    common = (common * (_OCCUPIED / common.sum())).clamp_max(0.95)
    occupied = torch.rand(count, bins, generator=generator) < common
    excess = torch.empty(count, bins).geometric_(0.5, generator=generator)
    return (occupied * excess).clamp_max(_LARGEST_COUNT).to(torch.int16)


def generated_scores(
    x: Float[Tensor, "n d"], target: Target, seed: int
) -> Float[Tensor, " n"]:
    """Noisy values (n,) of a function from the target's prior, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(_FEATURES, 1, generator=generator, dtype=torch.float64)
    # Another stream of hashes than any posterior's, whose seeds are not negative.
    features = TanimotoFeatures(-1 - seed, x.shape[1], _FEATURES)
    function = features.forward(x.double(), draws).squeeze(1)
    noise = torch.randn(len(x), generator=generator, dtype=torch.float64)
    y = target.mean + target.amplitude**0.5 * function + target.noise**0.5 * noise
    return y.clamp_max(LARGEST_SCORE)
