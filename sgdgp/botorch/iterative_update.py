"""Matheron updates of unmodified BoTorch models by an iterative solver."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from botorch.sampling.pathwise.features import KernelEvaluationMap
from botorch.sampling.pathwise.paths import GeneralizedLinearPath
from botorch.sampling.pathwise.utils import (
    get_input_transform,
    get_train_inputs,
    get_train_targets,
)
from botorch.utils.transforms import is_ensemble
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.models import GP, ExactGP
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor

from sgdgp.botorch.kernel_features import kernel_element
from sgdgp.core.checks import check_count, check_variances
from sgdgp.core.errors import warn_user
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import generator_of, standard_normal
from sgdgp.operators.choose import operator_by_name
from sgdgp.solvers.auto import check_solver_name, choose_solver
from sgdgp.solvers.base import Solution, Solver


@dataclass(eq=False)
class IterativeUpdate:
    """Makes update paths of posterior samples; see :func:`iterative_update`.

    Attributes:
        solutions: What the solver reported in the last call, one for each element of
            the model's batch (its outputs, or members of an ensemble).
    """

    solver: Solver | str
    _generator: torch.Generator
    operator: str
    memory_budget: int | None
    solutions: tuple[Solution, ...] = ()

    @torch.no_grad()
    def __call__(
        self,
        model: GP,
        sample_values: Float[Tensor, "*samples n"],
        *,
        target_values: Float[Tensor, "*batch n"] | None = None,
        points: Float[Tensor, "*batch n d"] | None = None,
        noise_covariance: LinearOperator | None = None,
    ) -> GeneralizedLinearPath:
        """The paths K(., X) (K + Sigma)^-1 (y - f(X) - eps).

        Args:
            model: An exact GP, also a batch of them (several outputs, an ensemble).
            sample_values: Prior functions at the training inputs f(X), of shape
                (*sample_shape, *batch_shape, n), in the model's units.
            target_values: Targets y (*batch_shape, n) in the model's units. Default:
                the model's.
            points: Training inputs (*batch_shape, n, d) after the model's input
                transform. Default: the model's.
            noise_covariance: Diagonal covariance of the noise. Default: what the
                model's likelihood adds.

        Raises:
            TypeError: The model is no exact GP.
            ValueError: The kernel or the noise cannot be used; says why.
        """
        if not isinstance(model, ExactGP):
            raise TypeError(
                f"model: expected an exact GP, found {type(model).__name__}; sparse "
                "models have few equations, so use BoTorch's gaussian_update"
            )
        if points is None:
            (points,) = get_train_inputs(model, transformed=True)
        if target_values is None:
            target_values = get_train_targets(model, transformed=True)
        if noise_covariance is None:
            noise_covariance = likelihood_noise(model, points)
        noise = noise_covariance.diagonal(dim1=-1, dim2=-2)
        check_variances("likelihood noise", noise)
        weight = self._weights(
            model.covar_module, points, noise, target_values, sample_values
        )
        return GeneralizedLinearPath(
            feature_map=KernelEvaluationMap(
                kernel=model.covar_module,
                points=points,
                input_transform=get_input_transform(model),
            ),
            weight=weight,
            is_ensemble=is_ensemble(model),
        )

    def _weights(
        self,
        kernel: Kernel,
        points: Tensor,
        noise: Tensor,
        targets: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Representer weights, of the shape of ``values``."""
        n = points.shape[-2]
        batch = torch.broadcast_shapes(
            points.shape[:-2], targets.shape[:-1], kernel.batch_shape
        )
        samples = values.shape[: values.ndim - len(batch) - 1]
        points = points.expand(*batch, *points.shape[-2:])
        noise = noise.expand(*batch, n)
        draws = standard_normal(*values.shape, like=values, generator=self._generator)
        draws = draws * noise.sqrt()
        rhs = (targets - values - draws).reshape(math.prod(samples), *batch, n)
        draws = draws.reshape(rhs.shape)
        weight, solutions = torch.empty_like(rhs), []
        for index in itertools.product(*map(range, batch)):
            columns: tuple[slice | int, ...] = (slice(None), *index)
            solution = self._solve(
                kernel_element(kernel, index),
                points[index],
                noise[index],
                rhs[columns].mT.contiguous(),
                -draws[columns].mT,
            )
            weight[columns] = solution.weights.mT
            solutions.append(solution)
        self.solutions = tuple(solutions)
        return weight.reshape(values.shape)

    def _solve(
        self, kernel: Kernel, x: Tensor, noise: Tensor, rhs: Tensor, noise_draws: Tensor
    ) -> Solution:
        budget = resolve_budget(self.memory_budget, x.device)
        operator = operator_by_name(self.operator, kernel, x, memory_budget=budget)
        solution = choose_solver(self.solver, operator, budget).solve(
            operator, noise, rhs, noise_draws=noise_draws, generator=self._generator
        )
        if solution.reason != "converged":
            advice = " ".join(solution.warnings)
            warn_user(
                f"the solver {solution.solver} ended with a relative residual of "
                f"{float(solution.residuals.max()):.1e} ({solution.reason}). {advice}"
            )
        return solution


def iterative_update(
    solver: Solver | str = "auto",
    *,
    seed: int | torch.Generator = 0,
    operator: str = "auto",
    memory_budget: int | None = None,
) -> IterativeUpdate:
    """An ``update_strategy`` for BoTorch's ``draw_matheron_paths``.

    BoTorch's own strategy, ``gaussian_update``, factorises K + Sigma, which takes
    n^3 / 3 operations and n^2 numbers of memory. This one solves for all samples at
    once with any solver of sgdgp, within a memory budget, and works with unmodified
    models: input and outcome transforms, fixed noise, several independent outputs,
    ensembles, and each model of a ``ModelListGP``. Hyperparameters get no gradient
    through it.

    Args:
        solver: A solver such as ``SDD(tolerance=1e-2)``, its name, or "auto".
        seed: Seed or generator of the noise draws and of the solver. Further calls
            draw further noise.
        operator: "auto", "dense", "tiled", "triton", "triton_medium", "keops",
            "row_blocks", "features" or "sharded" (see ``sgdgp.distribute``).
        memory_budget: Bytes that operator and solver may use. Default: half of what
            is free.

    Returns:
        A callable; its ``solutions`` tell how the last solve ended.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Unknown solver, or a budget that is not positive.

    Example:
        >>> paths = draw_matheron_paths(
        ...     model, torch.Size([64]), update_strategy=iterative_update()
        ... )
    """
    check_solver_name(solver)
    if memory_budget is not None:
        check_count("memory_budget", memory_budget, 1)
    return IterativeUpdate(solver, generator_of(seed), operator, memory_budget)


def likelihood_noise(model: ExactGP, points: Tensor) -> LinearOperator:
    """What a likelihood, of any batch shape, adds to a distribution at the points."""
    zeros = points.new_zeros(points.shape[:-1])
    nothing = MultivariateNormal(zeros, DiagLinearOperator(zeros))
    return model.likelihood(nothing, [points]).lazy_covariance_matrix
