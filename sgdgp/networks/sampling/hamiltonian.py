"""Hamiltonian Monte Carlo over all weights of a network: the reference posterior.

Draws of exp(-U(theta)), U the potential of ``potential.py``, without linearisation and
without a Gaussian anywhere. All chains advance together: their weights are the rows of
one matrix, and a leapfrog step costs one gradient of all of them in one pass.

A step of a chain draws a velocity u ~ N(0, M^-1), follows Hamilton's equations

    theta <- theta + eps u,    u <- u - eps M^-1 grad U(theta)

for some steps, and accepts where that led with probability exp(-change of energy)
(Neal, "MCMC using Hamiltonian dynamics", Handbook of Markov Chain Monte Carlo, 2011).
M is the precision of the tangent model (``mass_matrix.py``): that of the trained
weights where chains begin about them, else of each chain's own. A matrix for all would
not do: in a copy of the network with its units permuted another M is right.

The step size is learned in warm-up by dual averaging (Hoffman and Gelman, "The
No-U-Turn sampler", JMLR 15, 2014), one for all chains: they have one target, and masses
that fit each place alike, so that each step tells it as many acceptances as there are
chains, and a chain in a place too narrow for it shows by its rejections instead of
hiding behind small steps.

Everything random in step t of a run is a function of the seed and t, so that a run that
goes on from a checkpoint is the run that was never stopped, bit by bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from sgdgp.core.checkpoint import Checkpoint, check_every
from sgdgp.core.checks import (
    check_count,
    check_finite,
    check_followers,
    check_positive,
)
from sgdgp.core.errors import warn_user
from sgdgp.core.files import FileKind
from sgdgp.core.hashes import digest
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import derived_generator, number_of, standard_normal
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.potential import Potential
from sgdgp.networks.priors import WeightPrior
from sgdgp.networks.sampling.chain_storage import InFile, InMemory
from sgdgp.networks.sampling.draws import Draws
from sgdgp.networks.sampling.mass_matrix import (
    MassMatrix,
    curvature_mass,
    given_mass,
    prior_mass,
    tangent_mass,
)
from sgdgp.networks.storage import network_fingerprint

KIND = FileKind("sgdgp.networks.hmc", 1, "checkpoint of a Monte Carlo run")

_ACCEPTANCE = 0.8
"""What warm-up aims at: a trajectory that is often rejected costs more than its last
steps save (Hoffman and Gelman find .6 to .8 about equally good)."""

_DIVERGENCE = 1000.0
"""Change of energy from which a trajectory has lost it, as Stan has it."""

_LENGTH = math.pi / 2
"""Of trajectories: a quarter of the period of directions in which M is right, after
which a Gaussian's draw is independent of the one before."""

_MOST_LEAPFROG, _MOST_IN_WARMUP = 1000, 64
"""Leapfrog steps of a trajectory where they are chosen here: while the step size is
being looked for, it may be a thousandth of what it will be."""

_MOST_DOUBLINGS = 60
"""Of the first step size, up or down: beyond that no step size would do."""

_SHOWN = 256
"""Outputs by which mixing is judged: enough that one of them shows what does not mix,
few enough to keep them for each draw."""

_NOTED = ("energies", "acceptance", "divergent")
"""Of each draw, in memory."""

Start: TypeAlias = Literal["prior"] | Tensor | None


@dataclass(frozen=True)
class HmcProgress:
    """Where a run is; what callbacks get.

    Attributes:
        step: Steps of every chain so far, warm-up included.
        num_draws: Draws of every chain so far.
        acceptance: Mean probability of acceptance in this step.
        step_size: Of this step.
        divergent: Chains whose trajectory diverged in this step.
        num_gradients: Gradients of single networks so far.
        seconds: Wall time so far.
    """

    step: int
    num_draws: int
    acceptance: float
    step_size: float
    divergent: int
    num_gradients: int
    seconds: float


@dataclass
class DualAveraging:
    """A step size that is moved until the mean acceptance is ``_ACCEPTANCE``.

    Attributes:
        centre: Logarithm of the step size that it is drawn towards.
        error: Mean of what acceptances lacked.
        log_average: Logarithm of the mean step size, weighted towards the latest.
        count: Acceptances seen.
    """

    centre: float
    error: float = 0.0
    log_average: float = 0.0
    count: int = 0

    def update(self, acceptance: float) -> float:
        """The next step size, from the acceptance of the last.

        Constants are those of the paper: shrinkage .05, delay 10, decay .75.
        """
        self.count += 1
        t = self.count
        share = 1 / (t + 10)
        self.error += share * (_ACCEPTANCE - acceptance - self.error)
        log_step = self.centre - t**0.5 / 0.05 * self.error
        weight = t**-0.75
        self.log_average += weight * (log_step - self.log_average)
        return math.exp(log_step)


@dataclass
class _ChainState:
    """All that a run knows between two steps, but for its draws.

    Attributes:
        theta: Where the chains are (c, D).
        energy: U there (c,).
        gradient: Of U there (c, D).
        places: Where the mass matrices were taken in warm-up (c, D); None: not there.
        step: Steps so far, warm-up included.
        step_size: Of the next step.
        adaptation: How it is learned; None where it is given.
        num_gradients: Gradients of single networks so far.
        seconds: Wall time so far.
        energies: U of each draw (n, c).
        acceptance: Probability of acceptance of each (n, c).
        divergent: Whether its trajectory diverged (n, c).
    """

    theta: Float[Tensor, "c D"]
    energy: Float[Tensor, " c"]
    gradient: Float[Tensor, "c D"]
    places: Float[Tensor, "c D"] | None
    step: int
    step_size: float
    adaptation: DualAveraging | None
    num_gradients: int
    seconds: float
    energies: Float[Tensor, "n c"]
    acceptance: Float[Tensor, "n c"]
    divergent: Bool[Tensor, "n c"]

    def with_room(self, draws: int) -> _ChainState:
        """With room for what is noted of so many draws."""
        noted = {}
        for name in _NOTED:
            old = getattr(self, name)
            new = old.new_zeros(max(draws, len(old)), old.shape[1])
            new[: len(old)] = old
            noted[name] = new
        return replace(self, **noted)


class _HmcKeeper(Checkpoint):
    """The file of one run, and that of its draws beside it.

    Attributes:
        state: Where the run was; None if it has not begun.
        storage: Its draws.
    """

    kind = KIND
    work = "run"

    state: _ChainState | None
    storage: InFile

    def find(
        self,
        settings: Mapping[str, object],
        network: nn.Module,
        like: Float[Tensor, "c D"],
    ) -> None:
        """See what there is of the run.

        Args:
            settings: What makes two runs the same one; compared as text.
            network: The network.
            like: The weights of all chains.

        Raises:
            CheckpointError: A file is damaged or of another run.
        """
        words = {f"setting {name}": str(value) for name, value in settings.items()}
        found = self.open({**network_fingerprint(network), **words}, device=like.device)
        parts: list[tuple[int, str]] = []
        self.state = None
        if found is not None:
            with self.reading():
                values, parts = found["state"], found["parts"]
                adaptation = values.pop("adaptation")
                if adaptation is not None:
                    adaptation = DualAveraging(**adaptation)
                values |= {name: values[name].cpu() for name in _NOTED}
                self.state = _ChainState(**values, adaptation=adaptation)
        path = self.path.with_name(f"{self.path.name}.draws")
        self.storage = InFile(path, like, parts)

    def check(self, potential: Potential) -> None:
        """Refuse a potential that is not the run's, in what settings do not tell.

        Raises:
            CheckpointError: It has other values where the chains were.
        """
        if self.state is None:
            return
        near = torch.finfo(self.state.energy.dtype).eps ** 0.5
        found = potential(self.state.theta)
        if not torch.allclose(found, self.state.energy, rtol=near, atol=near):
            self.refuse(
                [
                    f"the potential where the chains were is {float(found[0]):.6g}, "
                    f"expected {float(self.state.energy[0]):.6g} (other data, loss or "
                    "output)"
                ]
            )

    def keep(self, state: _ChainState, count: int) -> None:
        """Write where the run is, after so many draws."""
        self.storage.close_part(count)
        self.write(state=asdict(state), parts=self.storage.parts)

    def finish(self) -> None:
        """Leave no draws behind that no checkpoint knows."""
        if not self.path.exists():
            self.storage.path.unlink(missing_ok=True)


def hmc(
    model: LinearisedPosterior | Potential,
    *,
    chains: int = 4,
    draws: int = 500,
    warmup: int = 200,
    leapfrog: int | None = None,
    step_size: float | None = None,
    start: Start = None,
    mass: WeightPrior | Tensor | None = None,
    seed: int | torch.Generator = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | float = 60,
    progress: bool | None = None,
    callback: Callable[[HmcProgress], bool | None] | None = None,
) -> Draws:
    """Draw weights of a network from its posterior, no Gaussian assumed.

    Args:
        model: A posterior of ``linearise``, whose prior and noise are those that were
            learned, or a ``Potential``.
        chains: How many advance together.
        draws: Of each chain, after warm-up.
        warmup: Steps that are thrown away, in which the step size is learned.
        leapfrog: Leapfrog steps of a trajectory on average: the number is uniform
            between half and three halves of it, so that no period of the dynamics
            resonates. Default: as many as make a trajectory of length pi / 2, a quarter
            of the period where the mass matrix is right, on average at most 1,000, in
            warm-up 64.
        step_size: In posterior standard deviations of the mass matrix. Default: learned
            so that four of five proposals are accepted.
        start: Where chains begin. None: about the trained weights, in draws of the
            tangent model's posterior, or with ``mass`` of N(theta, mass^-1); at the
            trained weights where there is no such model, as of a loss function.
            "prior": draws of the prior. Or weights, as rows (chains, D): of networks
            trained apart, or of one with its units permuted,
            ``SymmetryGroup.of(model).sample(count=chains).apply(theta)``.
        mass: Another mass matrix, as a Gaussian over the weights of
            ``sgdgp.networks.priors``, a diagonal (D,) or a matrix (D, D). Default: the
            precision of the tangent model: where ``start`` is None of the trained
            weights; where it is weights of each row, so that they had better be
            trained; from the prior its own, then that of where each chain is half
            through warm-up. See ``mass_matrix.py``.
        seed: Seed or generator of everything random.
        checkpoint: File that keeps the run, the draws in another one beside it,
            ``.draws``, as they come. Calling again after the process was killed goes on
            from there, and gives what it would have given; calling again with more
            ``draws`` adds to them.
        checkpoint_every: Seconds between two writes of the checkpoint, at least.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called with a ``HmcProgress`` after every step; returning True stops.

    Returns:
        The draws; ``print`` them for a summary. What speaks against their use is in
        ``warnings`` there, and is warned of.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: One does not fit, or the potential where a chain begins is not
            finite; says which and why.
        CheckpointError: The checkpoint is of another run, or damaged.

    Example:
        >>> draws = sgdgp.networks.hmc(posterior)
        >>> print(draws)
        >>> draws.predict(posterior, x)
    """
    check_followers(progress, callback)
    check_every(checkpoint_every)
    check_count("chains", chains, 1)
    check_count("draws", draws, 1)
    check_count("warmup", warmup, 0)
    if leapfrog is not None:
        check_count("leapfrog", leapfrog, 1)
    if step_size is not None:
        check_positive("step_size", step_size)
    elif warmup == 0:
        raise ValueError("step_size: needed where there is no warmup to learn it in")
    if not isinstance(model, Potential):
        if not isinstance(model, LinearisedPosterior):
            raise TypeError(
                "model: expected a LinearisedPosterior or a Potential, found "
                f"{type(model).__name__}"
            )
        model = Potential.of(model)
    number = number_of(seed)
    if checkpoint is None:
        _check_memory(draws * chains, model.theta)
    elif model.stream.processes.size > 1:
        raise ValueError("checkpoint: not supported in a group of processes")
    theta, matrix = _starts(model, mass, start, chains, number)
    keeper = _HmcKeeper.at(checkpoint, checkpoint_every)
    if keeper is not None:
        own = {
            "chains": chains,
            "warmup": warmup,
            "leapfrog": leapfrog,
            "step_size": step_size,
            "start": digest(start),
            "mass": mass.identity() if isinstance(mass, WeightPrior) else digest(mass),
            "seed": number,
        }
        keeper.find({**_identity(model), **own}, model.tangent.network, theta)
        keeper.check(model)
    moves = mass is None and isinstance(start, str)
    sampler = _Sampler(model, matrix, number, warmup, leapfrog, moves)
    state = None if keeper is None else keeper.state
    if state is None:
        state = sampler.begun(theta, step_size)
    elif state.places is not None:
        sampler.mass = tangent_mass(model, state.places)
    state = state.with_room(draws)
    storage = InMemory(draws, theta) if keeper is None else keeper.storage
    origin = time.perf_counter() - state.seconds
    reason = "finished"
    hidden = None if progress is None else not progress
    with tqdm(desc="hmc", total=warmup + draws, unit="step", disable=hidden) as bar:
        try:
            while state.step < warmup + draws:
                after, told = sampler.step(state)
                if after.step > warmup:
                    storage.put(after.step - warmup - 1, after.theta)
                after.seconds = time.perf_counter() - origin
                state = after
                bar.n = state.step
                bar.set_postfix_str(
                    f"accepted {told.acceptance:.2f}, step size {told.step_size:.2g}",
                    refresh=False,
                )
                bar.update(0)
                if keeper is not None and keeper.is_due:
                    keeper.keep(state, max(0, state.step - warmup))
                told = replace(told, seconds=state.seconds)
                if callback is not None and callback(told):
                    reason = "stopped"
                    break
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            if keeper is not None:
                keeper.keep(state, max(0, state.step - warmup))
    count = min(draws, max(0, state.step - warmup))
    warnings = []
    if count < draws:
        warnings.append(
            f"The run was {reason} after {count} of {draws} draws"
            + (", in warm-up." if state.step < warmup else ".")
        )
    if keeper is not None and keeper.problem is not None:
        warnings.append(keeper.problem)
    found = _result(model, state, storage.draws(count), tuple(warnings))
    if keeper is not None:
        keeper.finish()
    for sentence in found.warnings:
        warn_user(sentence)
    return found


def trajectory(
    potential: Potential,
    mass: MassMatrix,
    theta: Float[Tensor, "c D"],
    velocity: Float[Tensor, "c D"],
    gradient: Float[Tensor, "c D"],
    step_size: float,
    count: int,
) -> tuple[
    Float[Tensor, "c D"],
    Float[Tensor, "c D"],
    Float[Tensor, " c"],
    Float[Tensor, "c D"],
]:
    """Weights, velocity, U and its gradient after ``count`` leapfrog steps.

    The map is its own inverse but for the sign of the velocity, and keeps volumes,
    whatever the step size: that makes the draws right, not the accuracy.
    """
    theta, energy = theta.clone(), theta.new_empty(len(theta))
    velocity = velocity - 0.5 * step_size * mass.velocity(gradient)
    for i in range(count):
        theta.add_(velocity, alpha=step_size)
        energy, gradient = potential.value_and_gradient(theta)
        kick = step_size if i < count - 1 else 0.5 * step_size
        velocity.sub_(mass.velocity(gradient), alpha=kick)
    return theta, velocity, energy, gradient


@dataclass
class _Sampler:
    """Steps of all chains.

    Attributes:
        potential: U.
        mass: M.
        seed: Of every step.
        warmup: Steps in which the step size is learned.
        leapfrog: Of a trajectory, on average; None: as many as have its length.
        moves: Whether half through warm-up M becomes that of where each chain is.
    """

    potential: Potential
    mass: MassMatrix
    seed: int
    warmup: int
    leapfrog: int | None
    moves: bool

    def begun(
        self, theta: Float[Tensor, "c D"], step_size: float | None
    ) -> _ChainState:
        """The state before the first step."""
        energy, gradient = _checked(self.potential, theta)
        nothing = energy.new_empty(0, len(theta), device="cpu")
        state = _ChainState(
            theta=theta,
            energy=energy,
            gradient=gradient,
            places=None,
            step=0,
            step_size=step_size or 1.0,
            adaptation=None,
            num_gradients=len(theta),
            seconds=0.0,
            energies=nothing,
            acceptance=nothing,
            divergent=nothing.bool(),
        )
        if step_size is None:
            self._adapt_anew(state)
        return state

    def _adapt_anew(self, state: _ChainState) -> None:
        """Begin to learn the step size, from one accepted about half of the time."""
        self._find_step_size(state)
        # Large ones are tried first: they cost less, and fail at once.
        state.adaptation = DualAveraging(math.log(10 * state.step_size))

    def _find_step_size(self, state: _ChainState) -> None:
        generator = derived_generator(self.seed, "hamiltonian", "step size")
        z = standard_normal(*state.theta.shape, like=state.theta, generator=generator)
        velocity, direction = self.mass.draw(z), 0
        for _ in range(_MOST_DOUBLINGS):
            *_, change = self._proposed(state, velocity, 1)
            state.num_gradients += len(z)
            is_small = bool(_probability(change).mean() > 0.5)
            if direction and is_small != (direction > 0):
                return
            direction = 1 if is_small else -1
            state.step_size *= 2.0**direction
        raise ValueError(
            "model: no step size has half of the steps accepted: U is "
            "not smooth where chains begin, or flat"
        )

    def step(self, state: _ChainState) -> tuple[_ChainState, HmcProgress]:
        """The state after one more step, and what is told of it."""
        chains = len(state.theta)
        generator = derived_generator(self.seed, "hamiltonian", state.step)
        z = standard_normal(*state.theta.shape, like=state.theta, generator=generator)
        uniform = torch.rand(
            chains + 1, generator=generator, dtype=torch.float64, device="cpu"
        )
        count = self._leapfrog_steps(state, float(uniform[-1]))
        theta, energy, gradient, change = self._proposed(
            state, self.mass.draw(z), count
        )
        probability, diverged = _probability(change), change > _DIVERGENCE
        is_taken = uniform[:-1].to(change.device) < probability
        rate, step = float(probability.mean()), state.step + 1
        after = replace(
            state,
            theta=torch.where(is_taken[:, None], theta, state.theta),
            energy=torch.where(is_taken, energy, state.energy),
            gradient=torch.where(is_taken[:, None], gradient, state.gradient),
            step=step,
            num_gradients=state.num_gradients + chains * count,
        )
        if step > self.warmup:
            place = step - self.warmup - 1
            state.energies[place] = after.energy
            state.acceptance[place] = probability
            state.divergent[place] = diverged
        elif state.adaptation is not None:
            after.adaptation = replace(state.adaptation)
            after.step_size = after.adaptation.update(rate)
            if step == self.warmup:
                after.step_size = math.exp(after.adaptation.log_average)
        if self.moves and step == self.warmup // 2:
            after.places = after.theta
            self.mass = tangent_mass(self.potential, after.places)
            if after.adaptation is not None:
                self._adapt_anew(after)
        return after, HmcProgress(
            step=step,
            num_draws=max(0, step - self.warmup),
            acceptance=rate,
            step_size=state.step_size,
            divergent=int(diverged.sum()),
            num_gradients=after.num_gradients,
            seconds=state.seconds,
        )

    def _leapfrog_steps(self, state: _ChainState, uniform: float) -> int:
        most = _MOST_LEAPFROG if state.step >= self.warmup else _MOST_IN_WARMUP
        mean = self.leapfrog or min(most, math.ceil(_LENGTH / state.step_size))
        return max(1, round(mean * (0.5 + uniform)))

    def _proposed(
        self, state: _ChainState, velocity: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights, U and its gradient after a trajectory, and its change of energy.

        The change is infinite where anything is not finite: no such step is taken.
        """
        before = state.energy.double() + self.mass.kinetic(velocity).double()
        theta, velocity, energy, gradient = trajectory(
            self.potential,
            self.mass,
            state.theta,
            velocity,
            state.gradient,
            state.step_size,
            count,
        )
        change = energy.double() + self.mass.kinetic(velocity).double() - before
        is_finite = change.isfinite() & gradient.isfinite().all(1)
        return theta, energy, gradient, change.where(is_finite, math.inf)


def _checked(
    potential: Potential, theta: Float[Tensor, "c D"]
) -> tuple[Float[Tensor, " c"], Float[Tensor, "c D"]]:
    """U and its gradient where chains begin.

    Raises:
        ValueError: They are not finite; names the chain.
    """
    energy, gradient = potential.value_and_gradient(theta)
    is_finite = energy.isfinite() & gradient.isfinite().all(1)
    if not bool(is_finite.all()):
        chain = int((~is_finite).nonzero()[0])
        raise ValueError(
            f"start: the potential where chain {chain} begins is "
            f"{float(energy[chain])}, or its gradient is not finite"
        )
    return energy, gradient


def _probability(change: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    return (-change.clamp_min(0.0)).exp()


def _check_memory(count: int, theta: Tensor) -> None:
    """Refuse more draws than memory holds."""
    needed, budget = count * theta.nbytes, resolve_budget(None, "cpu")
    if needed > budget:
        raise ValueError(
            f"draws: {count} draws of {len(theta)} weights take {needed / 2**30:.1f} "
            f"GiB of memory, of which {budget / 2**30:.1f} are to spare; give "
            "checkpoint=, so that they go to a file, or draw fewer"
        )


def _starts(
    potential: Potential,
    mass: WeightPrior | Tensor | None,
    start: Start,
    chains: int,
    seed: int,
) -> tuple[Float[Tensor, "c D"], MassMatrix]:
    """Where chains begin, and M there.

    Raises:
        TypeError: Neither None, "prior" nor weights.
        ValueError: The weights are not one row for each chain, or not finite.
    """
    like, size = potential.theta, potential.num_weights
    generator = derived_generator(seed, "chains")
    given = None if mass is None else given_mass(potential, mass)
    if start is None:
        matrix = given or curvature_mass(potential, potential.tangent)
        if matrix is None:  # draws of the prior are nowhere near the trained weights
            return like.repeat(chains, 1), prior_mass(potential)
        z = standard_normal(chains, size, like=like, generator=generator)
        return like + matrix.draw(z), matrix
    if isinstance(start, str) and start == "prior":
        found = potential.prior.sample(chains, generator).mT
        mean = potential.mean
        found = (found if mean is None else found + mean).contiguous()
        return found, given or prior_mass(potential)
    if not isinstance(start, Tensor):
        raise TypeError(
            f'start: expected None, "prior" or weights ({chains}, {size}), found '
            f"{start!r}"
        )
    if start.shape != (chains, size):
        raise ValueError(
            f"start: expected weights of {chains} chains ({chains}, {size}), found "
            f"{tuple(start.shape)}"
        )
    check_finite("start", start)
    theta = start.detach().to(like).contiguous().clone()
    _checked(potential, theta)  # before anything is linearised there
    return theta, given or tangent_mass(potential, theta)


def _identity(potential: Potential) -> dict[str, object]:
    """What is sampled, by the names that users know."""
    potential(potential.theta[None])  # after a pass it is known which data these are
    likelihood, mean = potential.likelihood, potential.mean
    name = getattr(likelihood, "__qualname__", type(likelihood).__name__)
    return {
        "weights": list(potential.tangent.names),
        "likelihood": likelihood if isinstance(likelihood, Likelihood) else name,
        "prior": digest(potential.prior.identity()),
        "mean of the prior": digest(mean),
        "number of examples": potential.stream.num_examples,
        "data": f"{potential.stream.mark:.8g}",
    }


def _result(
    potential: Potential,
    state: _ChainState,
    weights: Float[Tensor, "c n D"],
    warnings: tuple[str, ...],
) -> Draws:
    """The draws with what the networks say at the first examples, and caveats."""
    count, tangent = weights.shape[1], potential.tangent
    found = Draws(
        weights,
        tangent.names,
        tangent.shapes,
        energies=state.energies[:count].mT,
        acceptance=state.acceptance[:count].mT,
        divergent=state.divergent[:count].mT,
        step_size=state.step_size,
        num_gradients=state.num_gradients,
        seconds=state.seconds,
    )
    batch = next(iter(potential.stream), None)
    if batch is not None and count:
        each = max(1, tangent.outputs(batch.x).shape[1])
        part = next(batch.parts(max(1, _SHOWN // each)))
        found.outputs = found.function(potential, part.x).flatten(2).cpu()
    found.warnings = (*found.caveats(), *warnings)
    return found
