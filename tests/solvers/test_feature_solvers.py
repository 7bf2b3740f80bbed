"""Solvers on exact features: the same solutions, and a step costs its block alone."""

from __future__ import annotations

import pytest
import torch

from sgdgp.features import FeatureMap
from sgdgp.operators import DenseOperator, FeatureOperator
from sgdgp.solvers import (
    ADASAP,
    CG,
    SDD,
    SGD,
    AlternatingProjections,
    Auto,
    Cholesky,
    ExactBlocks,
    RandomOrder,
)
from sgdgp.solvers.step_size import leading_eigenvalues, scale_diagonal
from sgdgp.solvers.system import as_system, rounding_level

N, M = 120, 40
NOISE = 5.0


class Counting(FeatureMap):
    """M tanh features, with C rows for each input; counts rows forward and back."""

    exact = True
    num_features = M

    def __init__(self, outputs=1, dtype=torch.float64):
        generator = torch.Generator().manual_seed(4)
        weights = torch.randn(outputs, 3, M, generator=generator, dtype=torch.float64)
        self.weights = 0.3 * weights.to(dtype)
        self.forwards = self.adjoints = 0

    def features(self, x):
        self.forwards += len(x) * len(self.weights)
        return torch.einsum("nd,cdm->ncm", x, self.weights).tanh().flatten(0, 1)

    def forward(self, x, w):
        return self.features(x) @ w

    def adjoint(self, x, v):
        self.adjoints += len(x) * len(self.weights)
        self.forwards -= len(x) * len(self.weights)
        return self.features(x).mT @ v


def problem(outputs=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N // outputs, 3, generator=generator, dtype=torch.float64)
    rhs = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    features = Counting(outputs, dtype)
    operator = FeatureOperator.of_map(features, x.to(dtype), outputs=outputs)
    system = Counting(outputs).features(x)
    system = system @ system.mT + NOISE * torch.eye(N, dtype=torch.float64)
    return operator, features, rhs.to(dtype), torch.linalg.solve(system, rhs)


SOLVERS = {
    "sdd": SDD(tolerance=1e-5, block_size=24),
    "sdd_plain": SDD(tolerance=1e-3, block_size=24, momentum=0.0),
    "ap": AlternatingProjections(tolerance=1e-5, block_size=24),
    "sgd": SGD(tolerance=1e-4, block_size=24),
    "adasap": ADASAP(tolerance=1e-5, block_size=24),
    "sap": ADASAP(tolerance=1e-5, block_size=24, preconditioner=ExactBlocks()),
    "cg": CG(tolerance=1e-8),
    "cholesky": Cholesky(),
    "auto": Auto(),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_finds_the_solution(name, outputs):
    operator, _, rhs, truth = problem(outputs)
    solver = SOLVERS[name]
    solution = solver.solve(operator, NOISE, rhs)
    assert solution.reason == "converged"
    assert solution.operator == "features"
    tolerance = getattr(solver, "tolerance", None) or 1e-8
    error = (solution.weights - truth).norm(dim=0)
    assert bool((error <= tolerance * rhs.norm(dim=0) / NOISE).all())


@pytest.mark.parametrize("name", ["sdd", "sgd", "ap", "adasap"])
def test_noise_may_differ_and_a_start_is_gone_on_from(name):
    operator, _, rhs, _ = problem()
    noise = torch.linspace(3.0, 20.0, N, dtype=torch.float64)
    everything = slice(0, N)
    system = operator.block(everything, everything) + noise.diag()
    truth = torch.linalg.solve(system, rhs)
    solver = SOLVERS[name]
    near = truth * (1 + 1e-4)
    solution = solver.solve(operator, noise, rhs, initial=near)
    assert solution.reason == "converged"
    error = (solution.weights - truth).norm(dim=0)
    assert bool((error <= solver.tolerance * rhs.norm(dim=0) / 3.0).all())
    cold = solver.solve(operator, noise, rhs)
    assert solution.passes < cold.passes
    there = solver.solve(operator, noise, rhs, initial=truth)
    assert there.passes < 6.0


def test_sdd_takes_the_same_steps_as_in_memory():
    operator, _, rhs, _ = problem()
    dense = DenseOperator.filled_by(operator)
    solver = SDD(tolerance=1e-6, block_size=24)
    ours, other = (solver.solve(k, NOISE, rhs) for k in (operator, dense))
    assert ours.passes == other.passes
    torch.testing.assert_close(ours.weights, other.weights, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["sdd", "sdd_plain", "sgd"])
def test_a_step_evaluates_its_block_forward_and_back(name):
    operator, features, rhs, _ = problem()
    solver = SOLVERS[name]
    counts = []
    for passes in (20.0, 30.0):
        features.forwards = features.adjoints = 0
        limited = type(solver)(
            tolerance=1e-12,
            max_passes=passes,
            block_size=24,
            momentum=solver.momentum,
        )
        solution = limited.solve(operator, NOISE, rhs)
        assert solution.reason == "budget"
        counts.append((solution.passes, features.forwards, features.adjoints))
    (before, *rows_before), (after, *rows_after) = counts
    work = sum(rows_after) - sum(rows_before)
    # Two rows, one forward and one back, are 1 / n passes: nothing else was evaluated.
    assert work / (2 * N) == pytest.approx(after - before, abs=1e-9)
    assert after - before == pytest.approx(10.0, abs=1.0)


@pytest.mark.parametrize("name", ["ap", "adasap"])
def test_block_solvers_evaluate_their_blocks(name):
    operator, features, rhs, _ = problem()
    solver = type(SOLVERS[name])(tolerance=1e-12, max_passes=30.0, block_size=24)
    solution = solver.solve(operator, NOISE, rhs)
    rows = (features.forwards + features.adjoints) / (2 * N)
    assert rows == pytest.approx(solution.passes, abs=1.0)


def test_projections_visit_blocks_in_random_order():
    operator, _, rhs, _ = problem()
    solution = SOLVERS["ap"].solve(operator, NOISE, rhs)
    assert solution.settings["selection"] == repr(RandomOrder())


def test_sgd_recovers_from_a_step_that_is_too_large():
    operator, _, rhs, truth = problem()
    solver = SGD(tolerance=1e-3, block_size=24, step_size=0.1)
    solution = solver.solve(operator, NOISE, rhs)
    assert solution.reason == "converged"
    assert solution.settings["restarts"] > 0
    assert solution.settings["regulariser"] == "exact features"
    assert float((solution.weights - truth).norm() / truth.norm()) < 1e-2
    assert any("halved its step size" in warning for warning in solution.warnings)


@pytest.mark.parametrize("budget", [2**30, 2**10])
def test_leading_eigenvalues_come_from_features_or_from_products(budget, generator):
    operator, _, _, _ = problem(3)
    operator.memory_budget = budget
    scale = torch.linspace(0.5, 1.5, N, dtype=torch.float64).unsqueeze(1)
    everything = slice(0, N)
    dense = scale * operator.block(everything, everything) * scale.mT
    found, passes = leading_eigenvalues(operator, scale, generator)
    torch.testing.assert_close(found[-3:], torch.linalg.eigvalsh(dense)[-3:])
    assert passes <= (0.5 if budget == 2**30 else 30.0)


def test_the_scale_of_many_outputs_is_the_mean_of_a_point(generator):
    features = Counting(outputs=40)
    x = torch.randn(5, 3, dtype=torch.float64)
    operator = FeatureOperator.of_map(features, x, outputs=40)
    truth = operator.diagonal().unflatten(0, (5, 40)).mean(1).repeat_interleave(40)
    features.forwards = 0
    found = scale_diagonal(operator, generator)
    assert features.forwards == 200
    # 16 probes, and 40 outputs that share their weights: a quarter, twice the error of
    # independent outputs.
    assert float((found / truth - 1).abs().max()) < 0.5
    exact = scale_diagonal(problem(3)[0], generator)
    torch.testing.assert_close(exact, problem(3)[0].diagonal())


def test_rounding_is_measured_on_a_few_columns():
    operator, _, rhs, truth = problem(dtype=torch.float32)
    system = as_system(operator, NOISE, rhs)
    # The map has no float64 form: nothing is claimed about its rounding.
    assert not bool(rounding_level(system, truth.float()).any())
