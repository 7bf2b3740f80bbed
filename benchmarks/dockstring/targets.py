"""The five regression targets of DOCKSTRING, and the hyperparameters of the papers.

Garcia-Ortegon et al., J. Chem. Inf. Model. 2022, for the targets; the values are those
in the code of Lin et al., ICLR 2024. The noise is a variance. The amplitude, which that
code never uses, is read as a variance too: see docs/molecules.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A protein, and the Gaussian process for docking scores to it.

    Attributes:
        name: Column of the data set.
        mean: Constant prior mean.
        amplitude: Prior variance of the scores, without noise.
        noise: Noise variance.
    """

    name: str
    mean: float
    amplitude: float
    noise: float


TARGETS = {
    target.name: target
    for target in (
        Target("ESR2", -6.73, 0.706, 0.261),
        Target("F2", -6.14, 0.356, 0.0899),
        Target("KIT", -6.39, 0.679, 0.112),
        Target("PARP1", -6.95, 0.56, 0.0238),
        Target("PGR", -7.08, 0.63, 0.332),
    )
}
"""By name."""


def target_named(name: str) -> Target:
    """The target of that name, in capitals or not.

    Raises:
        ValueError: There is none.
    """
    if name.upper() not in TARGETS:
        raise ValueError(
            f"target: found {name!r}, expected one of {', '.join(TARGETS)}"
        )
    return TARGETS[name.upper()]
