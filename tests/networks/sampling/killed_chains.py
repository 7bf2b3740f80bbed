"""Runs a small chain that is killed in the middle: killed_chains.py CHECKPOINT STEP."""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import nn

from sgdgp.networks import Gaussian
from sgdgp.networks.potential import Potential
from sgdgp.networks.sampling import Draws, hmc


def potential() -> Potential:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    net = net.double().eval()
    return Potential.from_network(net, Gaussian(noise=0.1), [(x, x.sin()[:, :1])])


def run(**settings) -> Draws:
    common = {"chains": 2, "draws": 6, "warmup": 6, "seed": 3, "leapfrog": 2}
    return hmc(potential(), progress=False, **{**common, **settings})


if __name__ == "__main__":
    torch.set_num_threads(1)

    def kill(progress) -> None:
        if progress.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    run(checkpoint=sys.argv[1], checkpoint_every=1e-9, callback=kill)
