"""Variances of a network's outputs from optima of its own loss, without a Hessian.

U is the negative log posterior of the weights (``potential.py``), theta_0 its minimum
and f one output at one input. The optimum of the loss with a little of the output,

    theta(lam) = argmin U(theta) - lam f(theta),

moves by d theta / d lam = H^-1 J^T at lam = 0, H the Hessian of U and J the gradient of
f, by the implicit function theorem. So the Laplace approximation's variance is how fast
the output moves, and its covariances with other outputs how fast those do,

    J H^-1 J^T = d f(theta(lam)) / d lam,

of which finite differences are taken: one-sided ones are wrong by O(lam), symmetric
ones by O(lam^2). lam is such that f moves by a given part of its own deviation. Every
output of every input is a row of one batched minimisation. See "Hessian-free Laplace
in Bayesian deep learning", 2024, and its second version "Variation due to
regularization tractably recovers Bayesian deep learning", AISTATS 2025.

H is the Hessian itself. The linear model of the network in its weights has the
Gauss-Newton matrix in its place: there U is quadratic, the optima are solutions of
(phi^T phi + I) V = R^T J^T by conjugate gradients, and the differences are exact.

Deviations from the papers, and why:

1. The network is first brought to the optimum of U (``control``): what an optimiser has
   left to gain would else be taken for variance.
2. Weights are whitened by the prior, and by the Gauss-Newton matrix too where it is
   cheap to form (``precondition``): minimisers need few steps, and the norm of a
   gradient says what they leave of a difference. What they find is the same.
3. Signs of probes make one optimum serve all inputs without bias (``probes``). The
   papers' own amortisation computes something else (``training_covariance``).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_map

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.errors import warn_user
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import derived_generator, number_of
from sgdgp.core.slices import slices
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.lbfgs import Pairs, minimise
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.potential import Potential, check_potential
from sgdgp.networks.weight_solvers import WeightCG
from sgdgp.tangent import Tangent
from sgdgp.tangent.network import arguments

Mode: TypeAlias = Literal["tangent", "nonlinear"]
"""Whose loss is minimised: the linear model's, or the network's own."""

_PILOT_TOLERANCE = 0.2
"""Of the first guess of a variance, which only says how large lam is to be."""

_MOST_ROWS = 256
"""Problems minimised together: enough to hide the overhead of calls."""

_CONTROL_STEPS = 10
"""Times the steps of a variance that the network itself may take to its optimum: one
problem costs little beside those of all outputs."""

_SMALLER, _MOST_SMALLER = 0.25, 3
"""What a shift is multiplied by where moves are asymmetric, and how often."""

_MOST_FACTORED = 3000
"""Weights, or rows of phi, up to which eigenvectors of its Gram matrix whiten weights:
they cost what the steps of many networks cost that they save."""

_FRESH, _FAR = 50, 0.3
"""Steps of a network on its way after which the Gauss-Newton matrix is formed anew, and
deviations from where it was formed after which it is in the end."""

_LARGE_DROP, _LARGE_DRIFT = 0.1, 0.3
"""Nats that the network was above its optimum, and deviations that an output moved on
the way there, from which on the user is told: variances are those of another network.
"""

_KINKED, _ASYMMETRIC, _FEW_CONVERGED = 0.15, 0.3, 0.95
"""Range of the curvature over small displacements, asymmetry of the moves (95th
percentile), and the share of optima that must be found."""

_SMOOTH = 1 / 8
"""Of the curvature's change from one displacement to a fourth of it, the next such
change: a sixteenth in a smooth loss, as much again where there are kinks."""

_PROBED_ROWS, _PARTS = 16, (1 / 4, 1 / 16, 1 / 64)
"""Displacements along which the curvature is looked at, and parts of them over which it
stays the same where there are no kinks."""


@dataclass(frozen=True)
class OutputVariance:
    """Variances of outputs, and what is known of how right they are.

    Attributes:
        variance: (b, C).
        standard_error: Of the probes' mean (b, C); None where every output had an
            optimum of its own.
        drift: How far each output moved from the network to the optimum of the loss,
            in deviations (b, C); NaN where there is no positive variance.
        drop: By how many nats that lowered the loss.
        asymmetry: What the symmetric form cancels, relative to what it leaves: 95th
            percentile over the optima. None in one-sided form.
        kinks: Relative change of the curvature over ever smaller displacements; next
            to nothing in a smooth network.
        converged: Share of the minimisations that reached their tolerance.
        steps: Of the minimisation that took most.
        warnings: What a user may want to do, in sentences.
    """

    variance: Float[Tensor, "b C"]
    standard_error: Float[Tensor, "b C"] | None
    drift: Float[Tensor, "b C"]
    drop: float
    asymmetry: float | None
    kinks: float
    converged: float
    steps: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class HessianFree:
    """Variances by optima of a regularised loss; see the module's text.

    ``posterior.variance(x, method=HessianFree())`` are those of a linearised network
    under its learned prior, ``HessianFree().variance(potential, x)`` of any network.

    Attributes:
        mode: "nonlinear", the loss of the network, whose variances have its Hessian; or
            "tangent", that of its linear model, with the Gauss-Newton matrix.
        symmetric: Differences to both sides, twice the work and errors of second order.
        shift: By how many of its deviations an output is moved.
        max_asymmetry: How much more to one side an output may move than to the other,
            relative to both: where it is more the shift is made smaller, by a factor of
            four and three times at most. In symmetric form.
        control: Whether the network is brought to the optimum of its loss first.
        probes: Optima with random signs for all outputs together, in place of one for
            each output: an unbiased estimate with its standard error.
        steps: Most steps of a minimisation, or passes of conjugate gradients.
        tolerance: Relative error that optimisation leaves in a difference, by its
            gradient in whitened weights. In tangent mode at most its square is left.
        memory: Pairs of steps and gradients that a minimisation keeps.
        precondition: Whether minimisers may use the Gauss-Newton matrix where it is
            cheap to form; else they have gradients alone, and take more steps to the
            same optima.
    """

    mode: Mode = "nonlinear"
    symmetric: bool = True
    shift: float = 0.1
    max_asymmetry: float = 0.03
    control: bool = True
    probes: int | None = None
    steps: int = 500
    tolerance: float = 1e-2
    memory: int = 20
    precondition: bool = True

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(
                f'mode: expected "tangent" or "nonlinear", found {self.mode!r}'
            )
        check_positive("shift", self.shift)
        check_positive("max_asymmetry", self.max_asymmetry)
        check_positive("tolerance", self.tolerance)
        check_count("steps", self.steps, 1)
        check_count("memory", self.memory, 1)
        if self.probes is not None:
            check_count("probes", self.probes, 2)

    def variance(
        self,
        potential: Potential,
        x: Any,
        *,
        weight_mean: Float[Tensor, "D 1"] | None = None,
        seed: int | torch.Generator = 0,
    ) -> OutputVariance:
        """Variances of all outputs at x; warns of what could be wrong with them.

        Args:
            potential: The loss, of a network at or near its optimum.
            x: Inputs as the network takes them.
            weight_mean: The linear model's optimum, where tangent mode is to take the
                likelihood's curvature. Default: at the network's own outputs.
            seed: Of the signs of probes.

        Raises:
            ValueError: Tangent mode with a loss that is no ``Likelihood``.
        """
        check_potential(potential)
        model = self._model(potential, weight_mean)
        outputs = model.outputs(x)
        shape, error = outputs.shape, None
        if self.probes is None:
            parts = model.responses(_Each(potential, x, *shape))
            variance = torch.cat([part.own for part in parts]).view(shape)
        else:
            signs = _signs(self.probes, outputs, number_of(seed))
            total, squares = torch.zeros_like(outputs), torch.zeros_like(outputs)
            for part in model.responses(_Probes(potential, x, signs)):
                products = signs[part.rows] * part.read(x)
                total += products.sum(0)
                squares += products.square().sum(0)
            variance = total / self.probes
            spread = (squares / self.probes - variance.square()).clamp_min(0.0)
            error = (spread / (self.probes - 1)).sqrt()
        drift = _drift(model, potential, x, variance)
        cautions = _told(model, drift)
        return OutputVariance(
            variance,
            error,
            drift,
            model.drop,
            model.asymmetry,
            model.kinks,
            model.converged,
            model.steps,
            cautions,
        )

    def covariance(
        self,
        potential: Potential,
        x: Any,
        at: Any = None,
        *,
        weight_mean: Float[Tensor, "D 1"] | None = None,
    ) -> Float[Tensor, "b C b2 C2"]:
        """Covariances of all outputs at x with those at other inputs.

        The optima are those of ``variance``, read elsewhere: as many minimisations as x
        has outputs, and a pass through the network at ``at`` for each.

        Args:
            potential: The loss, of a network at or near its optimum.
            x: Inputs as the network takes them.
            at: Other inputs. Default: x itself, where the matrix is made symmetric.
            weight_mean: As of ``variance``, whose warnings are given.
        """
        model = self._model(potential, weight_mean)
        shape = model.outputs(x).shape
        own, read = [], []
        for part in model.responses(_Each(potential, x, *shape)):
            own.append(part.own)
            read.append(part.read(x if at is None else at))
        found = torch.cat(read).unflatten(0, shape)
        _told(model, _drift(model, potential, x, torch.cat(own).view(shape)))
        if at is not None:
            return found
        return 0.5 * (found + found.permute(2, 3, 0, 1))

    def training_covariance(
        self,
        potential: Potential,
        x: Any,
        *,
        weight_mean: Float[Tensor, "D 1"] | None = None,
    ) -> Float[Tensor, "b C"]:
        """How strongly outputs at x vary together with those at the training inputs.

        This is what fine-tuning a network with the regulariser lam mean|f| and reading
        |f_lam(x) - f_0(x)| / lam computes, the papers' way to have one optimum for all
        inputs: |mean_j s_j Cov(f(x), f(x_j))| with the signs s_j of the trained
        outputs. It is a score to rank inputs by at most. It is no variance: inputs far
        from all data have a large variance and little of this.

        Args:
            potential: The loss, of a network at or near its optimum.
            x: Inputs as the network takes them.
            weight_mean: As of ``variance``, whose warnings are given.
        """
        model = self._model(potential, weight_mean)
        (response,) = model.responses(_TrainingMean(potential))
        found = response.read(x)[0].abs()
        # No variances of these outputs are known, hence no drift.
        _told(model, torch.full_like(found, torch.nan))
        return found

    def _model(
        self, potential: Potential, weight_mean: Tensor | None
    ) -> _TangentModel | _NonlinearModel:
        if self.mode == "tangent":
            return _TangentModel(self, potential, weight_mean)
        return _NonlinearModel(self, potential)


@dataclass(frozen=True)
class _Response:
    """How outputs move with lam, where some functionals F of them are added to.

    Attributes:
        rows: Numbers of the functionals (k,).
        own: dF / d lam (k,).
        read: From inputs (b, ...) to how all outputs there move (k, b, C).
    """

    rows: Tensor
    own: Float[Tensor, " k"]
    read: Callable[[Any], Tensor]


class _Functional(ABC):
    """Several numbers that outputs make."""

    count: int

    @abstractmethod
    def __call__(
        self, rows: Tensor, weights: Float[Tensor, "k D"]
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, "k D"]]:
        """Some of them and their gradients, each at weights of its own."""


class _Each(_Functional):
    """Every output at every input, example by example."""

    def __init__(self, potential: Potential, x: Any, examples: int, outputs: int):
        self.count = examples * outputs
        self._tangent, self._x = potential.tangent, arguments(x)
        self._units = torch.eye(outputs).to(potential.theta)
        # Inputs that all examples share stay as they are.
        self._axes = tree_map(
            lambda leaf: 0 if getattr(leaf, "shape", ())[:1] == (examples,) else None,
            self._x,
        )
        self._each = vmap(grad_and_value(self._output), in_dims=(0, self._axes, 0))

    def __call__(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        examples, outputs = rows // len(self._units), rows % len(self._units)
        x = tree_map(
            lambda leaf, axis: leaf if axis is None else leaf[examples],
            self._x,
            self._axes,
        )
        gradients, values = self._each(
            self._tangent.weights_of(weights), x, self._units[outputs]
        )
        return values, _flat(self._tangent, gradients)

    def _output(self, weights: dict[str, Tensor], x: Any, unit: Tensor) -> Tensor:
        """One output of one example."""
        some = tree_map(
            lambda leaf, axis: leaf if axis is None else leaf[None], x, self._axes
        )
        return self._tangent.function(some)(weights)[0] @ unit


class _Probes(_Functional):
    """Sums of all outputs with signs (p, b, C)."""

    def __init__(self, potential: Potential, x: Any, signs: Tensor) -> None:
        self.count = len(signs)
        self._potential, self._x, self._signs = potential, x, signs

    def __call__(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return _summed(self._potential, self._x, self._signs[rows], weights)


class _TrainingMean(_Functional):
    """Minus the mean of |f| over all training inputs and outputs, signs as trained."""

    count = 1

    def __init__(self, potential: Potential) -> None:
        self._potential = potential

    def __call__(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        potential = self._potential
        values, gradients = weights.new_zeros(len(weights)), torch.zeros_like(weights)
        for batch in potential.stream:
            signs = -potential.tangent.outputs(batch.x).sign()
            scale = potential.stream.num_examples * signs.shape[1]
            some = (signs / scale).expand(len(weights), -1, -1)
            value, gradient = _summed(potential, batch.x, some, weights)
            values += value
            gradients += gradient
        potential.stream.processes.sum_(values, gradients)
        return values, gradients


class _TangentModel:
    """The linear model: conjugate gradients, and no difference at all."""

    drop, kinks, asymmetry = 0.0, 0.0, None

    def __init__(
        self, settings: HessianFree, potential: Potential, weights: Tensor | None
    ) -> None:
        likelihood, tangent = potential.likelihood, potential.tangent
        if not isinstance(likelihood, Likelihood):
            raise ValueError(
                "mode: the linear model's loss has a curvature in the outputs, which a "
                'loss function does not tell; use mode="nonlinear", or a likelihood'
            )
        mean = potential.mean
        centre = None if mean is None else mean[:, None] - tangent.theta
        data = TangentData(tangent, potential.stream, likelihood, centre)
        at = data.network_outputs if weights is None else data.outputs_of(weights)
        self._system = WeightSystem(data, potential.prior, likelihood, at)
        self._solver = WeightCG(settings.tolerance, float(settings.steps))
        self._potential, self._memory = potential, settings.memory
        self._errors: list[Tensor] = []
        self._tolerance = settings.tolerance
        self.steps = 0

    def outputs(self, x: Any) -> Float[Tensor, "b C"]:
        """Those of the network, which none of this moves."""
        return self._potential.tangent.outputs(x)

    def responses(self, functional: _Functional) -> Iterator[_Response]:
        """Those of all functionals, in order."""
        prior, theta = self._potential.prior, self._potential.theta
        for rows in _rows_of(functional, self._potential, self._memory):
            _, gradients = functional(rows, theta.expand(len(rows), -1))
            rhs = prior.root_adjoint(gradients.mT)
            found = self._solver.solve(self._system, rhs, torch.zeros_like(rhs))
            self._errors.append(found.errors)
            self.steps = max(self.steps, int(found.passes))
            # With the residual errors are of second order, and none is positive.
            own = torch.linalg.vecdot(rhs + found.residuals, found.weights, dim=0)
            moves = prior.root(found.weights)
            yield _Response(rows, own, functools.partial(self._read, moves))

    def _read(self, moves: Float[Tensor, "D k"], x: Any) -> Float[Tensor, "k b C"]:
        return self._potential.tangent.at(x).jvp(moves).permute(2, 0, 1)

    @property
    def converged(self) -> float:
        """Share of the solves that reached their tolerance."""
        return float((torch.cat(self._errors) <= self._tolerance).double().mean())

    def cautions(self) -> Iterator[str]:
        """What a user may want to do."""
        if self.converged < 1.0:
            worst = float(torch.cat(self._errors).max())
            yield (
                f"{1 - self.converged:.0%} of the solves have not converged after "
                f"{self.steps} passes (error {worst:.2g} for {self._tolerance:.2g}): "
                "these variances are too small by up to its square; raise steps"
            )


class _Whitening:
    """Coordinates of the weights in which the loss has about the same curvature 1.

    The tangent model's precision there is one, where it is cheap to form: R A^-1/2 with
    A = phi^T phi + I by the eigenvectors of A that are not one. Else the prior's.
    """

    def __init__(
        self, potential: Potential, base: Float[Tensor, " D"], precondition: bool
    ) -> None:
        self._prior = potential.prior
        self._vectors: Tensor | None = None
        if not precondition or not isinstance(potential.likelihood, Likelihood):
            return
        tangent = potential.tangent.moved(base)
        data = TangentData(tangent, potential.stream, potential.likelihood)
        rank = min(data.num_rows, tangent.num_weights)
        budget = resolve_budget(tangent.memory_budget, tangent.device)
        # Directions, the matrix whose eigenvectors they are, and as much beside.
        needed = 8 * rank * (2 * tangent.num_weights + 4 * rank)
        if rank > _MOST_FACTORED or needed > budget:
            return
        system = WeightSystem(
            data, potential.prior, potential.likelihood, data.network_outputs
        )
        values, vectors = torch.linalg.eigh(system.smaller_gram)
        above = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
        values, vectors = values[above], vectors[:, above]
        if system.is_wide:
            vectors = system.pull(vectors.to(potential.theta)).double() / values.sqrt()
        self._vectors = vectors.to(potential.theta)
        self._factors = ((1 + values).rsqrt() - 1).to(potential.theta)

    @property
    def knows_data(self) -> bool:
        """Whether they are the tangent model's, not the prior's."""
        return self._vectors is not None

    def root(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        """Changes of the weights."""
        return self._prior.root(self._shrunk(z).mT).mT

    def adjoint(self, gradients: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        """Gradients in the weights as those in these coordinates."""
        return self._shrunk(self._prior.root_adjoint(gradients.mT).mT)

    def _shrunk(self, rows: Tensor) -> Tensor:
        if self._vectors is None:
            return rows
        return rows + ((rows @ self._vectors) * self._factors) @ self._vectors.mT


class _NonlinearModel:
    """The network itself: minima of its own loss, and differences between them."""

    def __init__(self, settings: HessianFree, potential: Potential) -> None:
        self._settings, self._potential = settings, potential
        self._base = potential.theta
        self._refresh()
        self.drop = 0.0
        self.steps = 0
        self._reached: list[Tensor] = []
        self._asymmetries: list[Tensor] = []
        self._curvatures: Tensor | None = None
        self._has_negative = False
        self._bring_to_optimum(_CONTROL_STEPS * settings.steps * settings.control)

    def _refresh(self) -> None:
        """Coordinates about the base, with nothing known yet of curvatures there."""
        settings = self._settings
        self._whitening = _Whitening(
            self._potential, self._base, precondition=settings.precondition
        )
        self._pairs = Pairs(1, settings.memory, self._base)

    def _bring_to_optimum(self, steps: int) -> None:
        settings, potential = self._settings, self._potential
        allowed = self._base.new_tensor([0.1 * settings.tolerance * settings.shift])

        def objective(rows: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            values, gradients = potential.value_and_gradient(self._weights(z))
            return values, self._whitening.adjoint(gradients), allowed

        start = torch.zeros_like(self._base)[None]
        before = float(potential(self._weights(start)))
        while True:
            some = min(steps, _FRESH) if self._whitening.knows_data else steps
            found = minimise(objective, start, steps=some, pairs=self._pairs)
            steps -= found.steps
            self._left = float(found.gradients.norm())
            self._base = self._weights(found.points)[0]
            if self._whitening.knows_data and float(found.points.norm()) > _FAR:
                self._refresh()
            if bool(found.converged) or found.steps < some or steps <= 0:
                break
        self.drop = before - float(found.values)

    def _weights(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "k D"]:
        return self._base + self._whitening.root(z)

    def outputs(self, x: Any) -> Float[Tensor, "b C"]:
        """Those at the optimum."""
        return self._potential.outputs(self._base[None], x)[0]

    def responses(self, functional: _Functional) -> Iterator[_Response]:
        """Those of all functionals, in order."""
        settings = self._settings
        for rows in _rows_of(functional, self._potential, settings.memory):
            before, gradients = functional(rows, self._base.expand(len(rows), -1))
            # Deviations of the linear model, or the prior's, which are no smaller.
            widths = self._whitening.adjoint(gradients).norm(dim=1)
            lam = torch.where(widths > 0, settings.shift / widths, 0.0)
            pairs = self._pairs.repeated(len(rows))
            minimum = functools.partial(self._minimum, functional, rows, before, pairs)
            z, gain, _ = minimum(torch.zeros_like(gradients), lam, _PILOT_TOLERANCE)
            shift = (lam * gain).sqrt()
            factor = torch.where(shift > 0, settings.shift / shift, 1.0)
            lam = lam * factor
            up = z * factor.unsqueeze(1)
            down = torch.zeros_like(up)
            for attempt in range(1 + _MOST_SMALLER):
                up, gain, reached = minimum(up, lam, settings.tolerance)
                steps = lam
                if not settings.symmetric:
                    break
                down = -up if attempt == 0 else down
                down, loss, also = minimum(down, -lam, settings.tolerance)
                asymmetry = ((gain + loss) / (gain - loss)).abs()
                gain, steps = gain - loss, 2 * lam
                curved = (asymmetry > settings.max_asymmetry) & reached & also
                reached = torch.cat([reached, also])
                if attempt == _MOST_SMALLER or not bool(curved.any()):
                    self._asymmetries.append(asymmetry)
                    break
                # These begin anew: from another optimum's valley no step leads back.
                # All others are where they belong, and take none.
                pairs.forget(curved.nonzero()[:, 0])
                lam = torch.where(curved, _SMALLER * lam, lam)
                up, down = (torch.where(curved[:, None], 0.0, z) for z in (up, down))
            self._reached.append(reached)
            if self._curvatures is None:
                self._curvatures = self._curvatures_along(up)
            inverse = torch.where(steps > 0, 1.0 / steps, 0.0)
            own = gain * inverse
            self._has_negative |= bool((own < 0).any())
            ends = self._weights(up), self._weights(down)
            yield _Response(rows, own, functools.partial(self._read, ends, inverse))

    def _minimum(
        self,
        functional: _Functional,
        rows: Tensor,
        before: Float[Tensor, " k"],
        pairs: Pairs,
        start: Float[Tensor, "k D"],
        lam: Float[Tensor, " k"],
        tolerance: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Minima of U - lam F, what F has gained there, and which were reached.

        Args:
            functional: F.
            rows: Its numbers (k,).
            before: F at the optimum of U (k,).
            pairs: Of the minimisations, which are added to.
            start: (k, D), in coordinates about the optimum.
            lam: (k,).
            tolerance: Relative error that may be left in the gain.
        """

        def objective(some: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            weights = self._weights(z)
            loss, slopes = self._potential.value_and_gradient(weights)
            value, pull = functional(rows[some], weights)
            gain = lam[some] * (value - before[some])
            slopes -= lam[some].unsqueeze(1) * pull
            # lam^2 times a variance is the square of a shift.
            allowed = tolerance * gain.clamp_min(0.0).sqrt()
            # Outputs without a gradient are where they will be.
            allowed = allowed.masked_fill(lam[some] == 0, torch.inf)
            return loss - gain, self._whitening.adjoint(slopes), allowed

        steps = self._settings.steps
        found = minimise(objective, start, steps=steps, pairs=pairs)
        self.steps = max(self.steps, found.steps)
        value, _ = functional(rows, self._weights(found.points))
        return found.points, value - before, found.converged

    def _read(
        self, ends: tuple[Tensor, Tensor], inverse: Float[Tensor, " k"], x: Any
    ) -> Float[Tensor, "k b C"]:
        one, two = (self._potential.outputs(weights, x) for weights in ends)
        return (one - two) * inverse[:, None, None]

    def _curvatures_along(self, z: Float[Tensor, "k D"]) -> Float[Tensor, "s m"]:
        """z^T H z / z^T z by differences over a shift along z and smaller ones."""
        z = z[:: max(1, len(z) // _PROBED_ROWS)]
        z = self._settings.shift * nn.functional.normalize(z[z.norm(dim=1) > 0])
        found = []
        for part in (1.0, *_PARTS):
            one, two = (
                self._whitening.adjoint(
                    self._potential.value_and_gradient(self._weights(sign * part * z))[
                        1
                    ]
                )
                for sign in (1, -1)
            )
            slopes = torch.linalg.vecdot(one - two, z) / (2 * part)
            found.append(slopes / z.square().sum(1))
        return torch.stack(found, 1)

    @property
    def kinks(self) -> float:
        """Range of the curvature over small displacements, in the upper quartile."""
        assert self._curvatures is not None
        if not len(self._curvatures):  # no output moved: all is flat, or a kink holds
            return 0.0 if self.converged == 1.0 else math.inf
        small = self._curvatures[:, 1:]
        # In these coordinates curvatures are about one, or above it.
        level = small.median(1).values.abs().clamp_min(0.1)
        ranges = (small.amax(1) - small.amin(1)) / level
        return float(ranges.quantile(0.75))

    @property
    def _is_smooth(self) -> bool:
        """Whether changes of the curvature fall as they do where nothing has kinks."""
        assert self._curvatures is not None
        if not len(self._curvatures):
            return False
        changes = self._curvatures[:, 1:].diff(dim=1).abs()
        first, last = changes.quantile(0.75, dim=0)
        return bool(last < _SMOOTH * first)

    @property
    def asymmetry(self) -> float | None:
        """The 95th percentile over all optima."""
        if not self._asymmetries:
            return None
        return float(torch.cat(self._asymmetries).nanquantile(0.95))

    @property
    def converged(self) -> float:
        """Share of the minimisations that reached their tolerance."""
        return float(torch.cat(self._reached).double().mean())

    def cautions(self) -> Iterator[str]:
        """What a user may want to do."""
        settings, curvatures = self._settings, self._curvatures
        assert curvatures is not None
        if self._left > settings.shift * settings.tolerance:
            # In these coordinates half of its square are nats.
            nats = 0.5 * self._left**2
            yield (
                f"The network is not at an optimum of this loss: about {nats:.2g} nats "
                "are left to gain, which "
                + (
                    "cancel in the difference of both sides if these end at the same "
                    "optimum. "
                    if settings.symmetric
                    else "one-sided differences take for variance. "
                )
                + (
                    "Train the network longer, or give more steps"
                    if settings.control
                    else "Use control=True, or train the network longer"
                )
            )
        if self.kinks > _KINKED and not self._is_smooth:
            yield (
                "The loss has kinks where the network is, such as those of ReLU: its "
                f"curvature changes by {self.kinks:.0%} between a small displacement "
                "and a smaller one, so that there is no Hessian and these variances "
                "mean nothing. Use a smooth activation (tanh, SiLU, GELU), or "
                'mode="tangent"'
            )
        if bool((curvatures < 0).any()) or self._has_negative:
            yield (
                "The Hessian is not positive definite where the network is, so that "
                "there is no Laplace approximation: train the network to an optimum of "
                'this loss, give the prior a larger precision, or use mode="tangent"'
            )
        if self.converged < _FEW_CONVERGED:
            yield (
                f"{1 - self.converged:.0%} of the minimisations have not converged "
                f"after {self.steps} steps: their variances are too small. Give more "
                "steps, or a larger tolerance"
            )
        asymmetry = self.asymmetry
        if asymmetry is not None and asymmetry > _ASYMMETRIC:
            yield (
                f"Outputs move by {asymmetry:.0%} more to one side than to the other "
                "(95th percentile): make shift smaller"
            )


def _drift(
    model: _TangentModel | _NonlinearModel,
    potential: Potential,
    x: Any,
    variance: Float[Tensor, "b C"],
) -> Float[Tensor, "b C"]:
    """How far outputs are from the network's, in deviations."""
    moved = (model.outputs(x) - potential.tangent.outputs(x)).abs()
    return torch.where(variance > 0, moved / variance.abs().sqrt(), torch.nan)


def _told(
    model: _TangentModel | _NonlinearModel, drift: Float[Tensor, "b C"]
) -> tuple[str, ...]:
    """What a user may want to do, after a warning of each."""
    cautions = (*_cautions_of_drift(drift, model.drop), *model.cautions())
    for message in cautions:
        warn_user(message)
    return cautions


def _cautions_of_drift(drift: Tensor, drop: float) -> Iterator[str]:
    """What to say of a network that was brought to another optimum."""
    farthest = float(drift.nan_to_num(0.0).max())
    if drop > _LARGE_DROP or farthest > _LARGE_DRIFT:
        moves = f", which moves outputs by up to {farthest:.2g} of their deviations"
        yield (
            f"The network was not at the optimum of this loss: {drop:.2g} nats were "
            f"left to gain{moves if farthest > 0 else ''}. These are the variances at "
            "the optimum. Train the network on with this prior and noise, or use "
            'mode="tangent", which needs no optimum'
        )


def _rows_of(
    functional: _Functional, potential: Potential, memory: int
) -> Iterator[Tensor]:
    """Numbers of functionals whose minimisations fit into memory together."""
    tangent = potential.tangent
    budget = resolve_budget(tangent.memory_budget, tangent.device)
    each = (2 * memory + 12) * tangent.num_weights * tangent.dtype.itemsize
    every = torch.arange(functional.count, device=tangent.device)
    yield from every.split(max(1, min(_MOST_ROWS, budget // each)))


def _flat(tangent: Tangent, gradients: dict[str, Tensor]) -> Float[Tensor, "k D"]:
    return torch.cat([gradients[name].flatten(1) for name in tangent.names], 1)


def _summed(
    potential: Potential,
    x: Any,
    signs: Float[Tensor, "k b C"],
    weights: Float[Tensor, "k D"],
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k D"]]:
    """Sums of outputs with weights of their own, and their gradients."""
    function = potential.tangent.function(x)
    values, gradients = [], []
    for some in slices(len(weights), potential.networks_at_once(signs.shape[1])):
        leaf = weights[some].detach().requires_grad_()
        with torch.enable_grad():
            sums = (potential.tangent.batched(function, leaf) * signs[some]).sum((1, 2))
            gradients.append(torch.autograd.grad(sums.sum(), leaf)[0])
        values.append(sums.detach())
    return torch.cat(values), torch.cat(gradients)


def _signs(count: int, outputs: Float[Tensor, "b C"], seed: int) -> Tensor:
    """Independent random signs (p, b, C), of each probe a stream of its own."""
    drawn = [
        torch.randint(
            2,
            outputs.shape,
            generator=derived_generator(seed, "signs of outputs", i),
            device="cpu",
        )
        for i in range(count)
    ]
    return (2 * torch.stack(drawn) - 1).to(outputs)
