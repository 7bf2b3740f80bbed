"""The marginal likelihood object of GPyTorch's training loop, by stochastic solves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.mlls import MarginalLogLikelihood
from gpytorch.models import ExactGP
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.codec import register_stored_class
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.core.seeds import generator_of, seed_of
from sgdgp.gpytorch_adapter import TracedProblem, prior_at, training_problems
from sgdgp.operators.choose import operator_by_name
from sgdgp.solvers.auto import check_solver_name
from sgdgp.solvers.base import Solution, Solver
from sgdgp.training.evidence import estimate_log_likelihood
from sgdgp.training.gradient import EXACT_ROWS, exact_log_likelihood, surrogate
from sgdgp.training.parameters import like_all
from sgdgp.training.probes import Probes
from sgdgp.training.warm_solves import SolveSettings, WarmSolves

_TOLERANCE = 1e-2
"""Of solvers given by name: a step's gradient has more noise from its probes."""


class StochasticMarginalLogLikelihood(MarginalLogLikelihood):
    """The log marginal likelihood over n, with a stochastic gradient.

    Takes the place of ``gpytorch.mlls.ExactMarginalLogLikelihood`` in GPyTorch's
    training loop; everything around it stays. The gradient comes from solves with the
    targets and a few probe vectors (``gradient.py``, ``probes.py``), which go on from
    the weights of the evaluation before: the probes' randomness stays the same for the
    life of the object. Up to 1,000 rows one factorisation gives value and gradient
    exactly.

    The *value* of a large system is integrated along the path of the parameters from
    an estimate at the first evaluation (``PathIntegral``), so it is good for
    looking at, not for a line search; ``log_marginal_likelihood`` estimates it afresh.

    Like GPyTorch's it is divided by the number of observations, and so are the log
    densities of the parameters' priors that are added to it.

    Attributes:
        solution: The last solve (None for exact evaluations).
        passes: Passes over K of all solves so far.
        evaluations: Number of evaluations so far.
        deadline: When by ``time.perf_counter()`` solves have to end, if at all.

    Args:
        likelihood: A Gaussian likelihood.
        model: The model whose parameters are learned.
        solver: A solver, its name, or "auto".
        probes: ``PathwiseProbes``, ``StandardProbes``, or "auto": exact up to 1,000
            rows, else standard.
        tolerance: Relative residual that ends a solve. Default: 0.01, or that of the
            solver where ``solver`` is not a name.
        passes_per_evaluation: Budget of each solve in passes over K.
        warm_start: Start each solve at the last solution.
        initial_value: log p at the first evaluation. Default: estimated there.
        seed: Seed or generator of the probes.
        operator: "auto", "dense", "tiled", "triton", "triton_medium", "keops",
            "row_blocks", "features" or "sharded" (see ``sgdgp.distribute``).
        memory_budget: Bytes that operator and solver may use. Default: half of what
            is free.

    References:
        Lin, Padhy, Mlodozeniec, Antoran and Hernandez-Lobato, *Improving Linear System
        Solvers for Hyperparameter Optimisation in Iterative Gaussian Processes*,
        NeurIPS 2024 (arXiv:2405.18457).

    Example:
        >>> mll = sgdgp.StochasticMarginalLogLikelihood(likelihood, model)
        >>> loss = -mll(model(train_x), train_y)
        >>> loss.backward()
    """

    def __init__(
        self,
        likelihood: Likelihood,
        model: ExactGP,
        *,
        solver: Solver | str = "auto",
        probes: Probes | str = "auto",
        tolerance: float | None = None,
        passes_per_evaluation: float = 10.0,
        warm_start: bool = True,
        initial_value: float | None = None,
        seed: int | torch.Generator = 0,
        operator: str = "auto",
        memory_budget: int | None = None,
    ) -> None:
        if not isinstance(model, ExactGP):
            raise TypeError(
                f"model: expected a gpytorch.models.ExactGP, found {type(model)}"
            )
        check_solver_name(solver)
        if not isinstance(probes, Probes) and probes != "auto":
            raise TypeError(
                f"probes: expected PathwiseProbes(), StandardProbes() or 'auto', found "
                f"{probes!r}"
            )
        if tolerance is not None:
            check_positive("tolerance", tolerance)
            if isinstance(solver, Solver):
                limits = replace(solver.limits, tolerance=tolerance)
                solver = solver.with_limits(limits)
        check_positive("passes_per_evaluation", passes_per_evaluation)
        if memory_budget is not None:
            check_count("memory_budget", memory_budget, 1)
        super().__init__(likelihood, model)
        self.solution: Solution | None = None
        self.passes = 0.0
        self.evaluations = 0
        self.deadline: float | None = None
        self._settings = SolveSettings(
            solver=solver,
            probes=probes,
            tolerance=_TOLERANCE if tolerance is None else tolerance,
            passes=passes_per_evaluation,
            warm_start=warm_start,
            seed=seed_of(generator_of(seed)),
            memory_budget=memory_budget,
        )
        self._initial_value = initial_value
        self._operator = operator
        self._solves: list[WarmSolves] = []
        self._path: PathIntegral | None = None

    def forward(
        self, function_dist: MultivariateNormal, target: Tensor, *params: Any
    ) -> Tensor:
        """The value of log p(target) / n, with the stochastic gradient.

        Args:
            function_dist: What ``model(train_x)`` returns in train mode.
            target: Observations (n,) or, for several outputs, (n, t); NaN where
                there is none.
            *params: The training inputs, where the noise depends on inputs other than
                the model's own. Default: the model's training inputs.

        Raises:
            UnsupportedModelError: The prior is not a function of two points.
            ValueError: The targets do not fit the distribution, or are not finite.
        """
        x = params[0] if params else self.model.train_inputs
        try:
            problems = training_problems(function_dist, self.likelihood, x, target)
        except UnsupportedModelError:
            # GPyTorch evaluates some products as soon as forward forms them.
            problems = training_problems(
                prior_at(self.model, x), self.likelihood, x, target
            )
        if len(self._solves) != len(problems):
            self._solves = self._fresh(len(problems))
        terms = [self._term(i, problem) for i, problem in enumerate(problems)]
        self.evaluations += 1
        total = torch.stack([scalar for scalar, _ in terms]).sum()
        values = [value for _, value in terms if value is not None]
        if len(values) == len(terms):
            value = sum(values)
        else:
            value = self._integrated(problems, total)
        # The number is the value, the graph is the surrogate's.
        scalar = total - total.detach() + value
        count = sum(problem.targets.numel() for problem in problems)
        return (scalar + self._log_priors(scalar)) / count

    def forget(self) -> None:
        """Start the next solves from zero, with a new preconditioner."""
        self._solves = []

    @property
    def settings(self) -> str:
        """What decides which gradients are found, as text."""
        return repr(replace(self._settings, memory_budget=None))

    def state(self) -> dict[str, Any]:
        """Where the object is: numbers, and tensors that solves go on from."""
        return {
            "passes": self.passes,
            "evaluations": self.evaluations,
            "weights": [solves.weights for solves in self._solves],
            "path": self._path,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state`` was."""
        self.passes = float(state["passes"])
        self.evaluations = int(state["evaluations"])
        self._solves = self._fresh(len(state["weights"]))
        for solves, weights in zip(self._solves, state["weights"], strict=True):
            solves.weights = weights
        if not isinstance(state["path"], PathIntegral | None):
            raise TypeError(f"expected a PathIntegral, found {state['path']!r}")
        self._path = state["path"]
        if self._path is not None and self._path.point:
            learned = [p for p in self.parameters() if p.requires_grad]
            self._path.point = like_all(self._path.point, learned)
            self._path.gradient = like_all(self._path.gradient, learned)

    def _fresh(self, count: int) -> list[WarmSolves]:
        """Solves of ``count`` systems that carry nothing yet."""
        return [
            WarmSolves(replace(self._settings, seed=self._settings.seed + i))
            for i in range(count)
        ]

    def _term(self, i: int, problem: TracedProblem) -> tuple[Tensor, float | None]:
        """One system's part: a scalar with the gradient, and its value if known."""
        if self._settings.probes == "auto" and len(problem.targets) <= EXACT_ROWS:
            return exact_log_likelihood(problem)
        operator = operator_by_name(
            self._operator,
            problem.kernel,
            problem.inputs.detach(),
            memory_budget=self._settings.memory_budget,
        )
        v, a, b, solution = self._solves[i](
            problem, operator, self.evaluations, self.deadline
        )
        self.solution = solution
        self.passes += solution.passes
        # What the solve stored of K is not needed any more.
        return surrogate(problem, operator.unfilled(), v, a, b), None

    def _integrated(self, problems: tuple[TracedProblem, ...], scalar: Tensor) -> float:
        """The value at these parameters, integrated from the first evaluation's."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self._path is None:
            start = self._initial_value
            if start is None:
                start = sum(
                    estimate_log_likelihood(problem, seed=self._settings.seed).value
                    for problem in problems
                )
            self._path = PathIntegral(start)
        gradient = torch.autograd.grad(
            scalar, parameters, retain_graph=True, materialize_grads=True
        )
        return self._path.move(parameters, gradient)

    def _log_priors(self, like: Tensor) -> Tensor:
        """Log densities of the parameters' priors, and losses that modules add."""
        total = like.new_zeros(())
        for term in self.model.added_loss_terms():
            total = total + term.loss()
        # The model's: they include the likelihood's, which are under self twice.
        for _, module, prior, closure, _ in self.model.named_priors():
            total = total + prior.log_prob(closure(module)).sum()
        return total


@register_stored_class
@dataclass
class PathIntegral:
    """Adds up what a function gains along a path, from its gradient alone.

    The log determinant of a large matrix is dear, its gradient is not. Along the steps
    of an optimiser

        L(t + 1) - L(t) ~ (g_t + g_{t+1})^T (p_{t+1} - p_t) / 2,

    the trapezoid rule, which is exact for quadratics and of third order in the step.

    Attributes:
        value: At the last point; counted from its first value.
        point: The last point.
        gradient: The gradient there.
    """

    value: float = 0.0
    point: list[Tensor] = field(default_factory=list, repr=False)
    gradient: list[Tensor] = field(default_factory=list, repr=False)

    def move(self, point: Sequence[Tensor], gradient: Sequence[Tensor]) -> float:
        """Go on to a point with the gradient there; the value at it.

        Where the gradient is not finite there is no value (NaN), and the path does
        not lead there.

        Args:
            point: Parameters, in the same order every time.
            gradient: Gradients of the function with respect to them.
        """
        parameters = [p.detach().clone() for p in point]
        slopes = [g.detach().clone() for g in gradient]
        if not all(bool(torch.isfinite(g).all()) for g in slopes):
            return math.nan
        if self.point:
            self.value += 0.5 * sum(
                float(((before + now) * _step(p, q)).double().sum())
                for before, now, p, q in zip(
                    self.gradient, slopes, parameters, self.point, strict=True
                )
            )
        self.point, self.gradient = parameters, slopes
        return self.value


def _step(p: Tensor, q: Tensor) -> Tensor:
    """The way from q to p; zero also where both are infinite, as on a bound."""
    return torch.where(p == q, torch.zeros_like(p), p - q)
