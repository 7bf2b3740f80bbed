"""Probe vectors that turn tr(H^-1 dH) into a few quadratic forms.

A kind of probes says what is solved for, and which pairs (a_s, b_s) with
E[a_s b_s^T] = H^-1 come out of it, H = K + Sigma:

    standard  z ~ N(0, I):           a = H^-1 z,   b = z
    pathwise  xi = f(X) + eps:       a = H^-1 xi,  b = a      (xi ~ N(0, H))

so that tr(H^-1 dH) = E[a_s^T dH b_s] (Lin et al., arXiv:2405.18457, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.features import draw_prior


@dataclass(frozen=True)
class DrawnProbes:
    """Right-hand sides of the probe solves.

    Attributes:
        rhs: What is solved for (n, s).
        noise_draws: The part of ``rhs`` drawn from N(0, Sigma) (n, s).
        is_pathwise: Whether ``rhs`` has the covariance H, not I.
    """

    rhs: Float[Tensor, "n s"]
    noise_draws: Float[Tensor, "n s"]
    is_pathwise: bool

    def right(self, solved: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
        """The vectors b_s beside a_s = ``solved``."""
        return solved if self.is_pathwise else self.rhs


class Probes(ABC):
    """How many probe vectors, and of which kind."""

    count: int

    @abstractmethod
    def draw(
        self,
        kernel: Kernel,
        inputs: Float[Tensor, "n p"],
        noise: Float[Tensor, " n"],
        generator: torch.Generator,
    ) -> DrawnProbes:
        """Draw the right-hand sides; the same generator state gives the same ones.

        Args:
            kernel: The kernel with its present parameters.
            inputs: Kernel inputs (n, p).
            noise: Noise variances (n,).
            generator: Source of all randomness.
        """


@dataclass(frozen=True)
class PathwiseProbes(Probes):
    """Posterior samples as probes: f(X) + eps with a prior function f.

    Their solutions are small (E ||a||^2 = tr H^-1), so that solves which are stopped
    early are less wrong; and they are what posterior samples are made of. Every
    probe has random features of its own: E[xi xi^T] = H then holds over the probes
    for any number of features, whereas one map for all would shift every term alike.

    Attributes:
        count: Probe vectors s.
        num_features: Random features of each probe's prior function.
    """

    count: int = 32
    num_features: int = 1024

    def __post_init__(self) -> None:
        check_count("count", self.count, 1)
        check_count("num_features", self.num_features, 1)

    def draw(
        self, kernel: Kernel, inputs: Tensor, noise: Tensor, generator: torch.Generator
    ) -> DrawnProbes:
        standard = _normal(inputs, self.count, generator)
        functions = draw_prior(
            kernel,
            self.count,
            dim=inputs.shape[1],
            num_features=self.num_features,
            generator=generator,
            dtype=inputs.dtype,
            device=inputs.device,
            group_size=1,
        )
        noise_draws = standard.mul_(noise.sqrt().unsqueeze(1))
        return DrawnProbes(functions(inputs) + noise_draws, noise_draws, True)


@dataclass(frozen=True)
class StandardProbes(Probes):
    """Standard normal vectors (Hutchinson's estimator); need nothing of the kernel.

    The default: with warm starts and a good preconditioner their solves cost no more
    than those of pathwise probes, and no random features add to their noise, which
    does not fall with n (docs/hyperparameters.md has the measurements).

    Attributes:
        count: Probe vectors s.
    """

    count: int = 32

    def __post_init__(self) -> None:
        check_count("count", self.count, 1)

    def draw(
        self, kernel: Kernel, inputs: Tensor, noise: Tensor, generator: torch.Generator
    ) -> DrawnProbes:
        rhs = _normal(inputs, self.count, generator)
        return DrawnProbes(rhs, torch.zeros_like(rhs), False)


def _normal(inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Standard normals (n, s) in float64 on the generator's device, then like x."""
    drawn = torch.randn(
        count,
        inputs.shape[0],
        generator=generator,
        dtype=torch.float64,
        device=generator.device,
    )
    return drawn.mT.to(inputs).contiguous()
