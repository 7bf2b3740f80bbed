"""Generators from seeds, and streams of their own for what comes later."""

from __future__ import annotations

import hashlib
import operator
from numbers import Integral

import torch


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """The generator itself, or a new one with that seed.

    Raises:
        TypeError: Neither an integer nor a generator.
        ValueError: An integer of more than 64 bits.
    """
    if isinstance(seed, torch.Generator):
        return seed
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(
            f"seed: expected an int or a torch.Generator, found {type(seed).__name__}"
        )
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, found {seed}")
    return torch.Generator().manual_seed(operator.index(seed))


def generator_of_draws(seed: int | torch.Generator) -> torch.Generator:
    """A stream of its own: draw(seed=s) is independent of condition(seed=s)."""
    generator = generator_of(seed)
    if isinstance(seed, torch.Generator):
        return generator
    _, other = torch.randint(
        2**62, (2,), generator=generator, device=generator.device
    ).tolist()
    return generator.manual_seed(other)


def seed_of(generator: torch.Generator) -> int:
    """A seed that is a function of the generator's state; the state stays as it is."""
    state = generator.get_state().cpu().numpy().tobytes()
    return _number(hashlib.sha256(state))


def number_of(seed: int | torch.Generator) -> int:
    """The seed itself, or that of a generator; what streams are derived from.

    Raises:
        TypeError: Neither an integer nor a generator.
        ValueError: An integer of more than 64 bits.
    """
    generator = generator_of(seed)
    if isinstance(seed, torch.Generator):
        return seed_of(generator)
    return operator.index(seed)


STREAMS = {
    "candidates": "starting points of one step of Thompson sampling",
    "chains": "where chains of Hamiltonian Monte Carlo begin",
    "draw": "functions that a BoTorch model draws for base samples",
    "dropout of a reconstruction": "what one step of a fit drops",
    "evidence": "probes of a network's evidence",
    "fantasies": "the solves behind fantasies",
    "first rows": "rows that a fit makes its first steps on",
    "functions": "prior functions of one step of Thompson sampling",
    "hamiltonian": "velocities and decisions of one step of all chains",
    "hashes of examples": "multipliers of the hashes of a learned prior's examples",
    "held-out data of a reconstruction": "data that tell when a fit is to end",
    "initial": "first points of Thompson sampling",
    "learned from": "rows that Thompson sampling learns parameters from",
    "noise of fantasies": "imagined observations",
    "noise of measurements": "simulated data of images",
    "observation noise": "observation noise of a BoTorch posterior's samples",
    "output": "later data of one of several outputs",
    "precisions": "probes of a long sum of precisions",
    "prior weights": "prior weights of one sample of a network",
    "restart": "one of the starts of a fit",
    "risk of a certificate": "draws that the Gibbs risk is by",
    "search of a certificate": "draws that tell posteriors apart",
    "signs of outputs": "one probe of Hessian-free variances",
    "system": "a further solve of a posterior, of rows of its own",
    "update": "noise of new data",
    "weights of a certificate": "samples of the certified posterior",
}
"""Streams that are derived from a seed, and what they are for.

The name is part of what is hashed: another name gives other numbers to everyone who has
saved or seeded anything.
"""


def derived_generator(seed: int, *what: object) -> torch.Generator:
    """A generator that is a function of a seed and of what it is for.

    Args:
        seed: The seed.
        *what: A name in ``STREAMS``, or the hash of some data, and which of several.
    """
    text = " ".join(str(part) for part in (seed, *what))
    return torch.Generator().manual_seed(_number(hashlib.sha256(text.encode())))


def standard_normal(
    *shape: int, like: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Standard normal numbers in the dtype and on the device of another tensor.

    They are drawn on the generator's own device, so that a seed means the same on all.
    """
    draws = torch.randn(
        *shape, generator=generator, device=generator.device, dtype=like.dtype
    )
    return draws.to(like.device)


def _number(found: hashlib._Hash) -> int:
    return int.from_bytes(found.digest()[:7])
