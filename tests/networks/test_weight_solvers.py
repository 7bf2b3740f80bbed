"""Solvers of the posterior precision against dense solutions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sgdgp.networks import Dual, WeightCG, WeightCholesky, WeightSGD, curvature
from sgdgp.networks.weight_solvers import largest_batch_eigenvalue, relative_errors
from tests.networks.dense import columns, tiny_system

SOLVERS = {
    "cholesky": WeightCholesky(tolerance=1e-9),
    "cg": WeightCG(tolerance=1e-5),
    "sgd": WeightSGD(tolerance=0.1, max_passes=500.0),
    "dual": Dual(tolerance=1e-2),
}
"""One of each; a new one gets all the statements below."""

STEPS_TOO_LONG = WeightSGD(tolerance=0.2, max_passes=500.0, step_size=0.1)


def exact(features, rhs):
    matrix = features.T @ features
    matrix.diagonal().add_(1.0)
    return torch.linalg.solve(matrix, rhs)


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS.values(), STEPS_TOO_LONG],
    ids=[*SOLVERS, "sgd, steps too long"],
)
def test_solutions_are_as_near_as_they_claim(solver):
    system, features, _, _ = tiny_system()
    prior = columns(system.num_weights, 4)
    rhs = system.noise(range(4), seed=0) + prior
    found = solver.solve(system, rhs, prior, seed=1)
    assert found.reason == "converged"
    truth = exact(features, rhs)
    wrong = (found.weights - truth).norm(dim=0)
    rounding = 1e-13 * truth.norm(dim=0)
    assert bool((wrong <= 1.001 * found.residuals.norm(dim=0) + rounding).all())
    assert bool((wrong <= solver.tolerance * found.weights.norm(dim=0)).all())
    outputs = (features @ (found.weights - truth)).norm(dim=0)
    scale = (features @ found.weights).norm(dim=0)
    assert bool((outputs <= 0.5 * solver.tolerance * scale * 1.001).all())
    torch.testing.assert_close(found.residuals, system.residual(rhs, found.weights))
    torch.testing.assert_close(found.images(), features.T @ (features @ found.weights))


def test_errors_are_measured_against_the_smaller_of_weights_and_outputs():
    system, features, _, _ = tiny_system()
    v = columns(system.num_weights, 2)
    rhs = columns(system.num_weights, 2, seed=8)
    residuals = rhs - v - features.T @ (features @ v)
    expected = residuals.norm(dim=0) / torch.minimum(
        v.norm(dim=0), (features @ v).norm(dim=0)
    )
    torch.testing.assert_close(relative_errors(rhs, v, residuals), expected)


def test_a_solution_costs_nothing_more(solver):
    system, features, _, _ = tiny_system()
    rhs = columns(system.num_weights, 2)
    found = solver.solve(system, rhs, exact(features, rhs))
    # But for the batches that SGD takes its step size from.
    more = 0.0 if not isinstance(solver, WeightSGD) else 24 / 4
    assert found.passes == 1.0 + more
    assert found.reason == "converged"


def test_budgets_are_kept_and_reported(solver):
    system, _, _, _ = tiny_system()
    rhs = columns(system.num_weights, 2)
    hard = replace(solver, tolerance=1e-12, max_passes=9.0)
    found = hard.solve(system, rhs, torch.zeros_like(rhs))
    # A factorisation needs one pass and no more.
    direct = isinstance(solver, WeightCholesky)
    assert found.reason == ("converged" if direct else "budget")
    # Solvers of the dual finish the step that they are in.
    assert found.passes <= 9.0 + (2.0 if isinstance(solver, Dual) else 0.0)


def test_a_callback_can_stop_a_solve(solver):
    system, _, _, _ = tiny_system()
    rhs = columns(system.num_weights, 2)
    seen = []

    def stop(progress):
        seen.append((progress.residuals.shape, progress.weights().shape))
        return True

    hard = replace(solver, tolerance=1e-9)
    found = hard.solve(system, rhs, torch.zeros_like(rhs), callback=stop)
    assert found.reason == "interrupted"
    assert seen == [((2,), rhs.shape)]


@pytest.mark.parametrize("kept", [0, 2**20], ids=["batches", "kept"])
def test_the_gram_matrix_is_that_of_the_features(monkeypatch, kept):
    monkeypatch.setattr(curvature, "_KEPT_NUMBERS", kept)
    system, features, _, _ = tiny_system()
    assert (system.data._kept is None) == (kept == 0)
    torch.testing.assert_close(system.gram, features.T @ features)
    v = columns(system.num_weights, 3)
    torch.testing.assert_close(system.product(v), features.T @ (features @ v))
    for batch in system.data.stream:
        rows = features.view(-1, 3, features.shape[1])[batch.rows].flatten(0, 1)
        expected = rows.T @ (rows @ v)
        torch.testing.assert_close(system.batch_product(batch, v), expected)


def test_a_factorisation_draws_the_samples_of_others_and_knows_the_dimension():
    system, features, _, _ = tiny_system()
    start = torch.zeros(system.num_weights, 4, dtype=torch.float64)
    one, other = (
        solver.draw(system, range(4), start, seed=3)
        for solver in (WeightCholesky(), WeightCG(tolerance=1e-12))
    )
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-9, atol=1e-9)
    spectrum = torch.linalg.svdvals(features).square()
    found = one.dimension()
    assert found.total == pytest.approx(float((spectrum / (1 + spectrum)).sum()))
    assert found.standard_error == 0.0
    assert other.dimension().total == pytest.approx(found.total, rel=0.2)


def test_the_step_size_is_safe_for_every_batch():
    system, features, _, _ = tiny_system(batch=23)
    largest = largest_batch_eigenvalue(system, torch.Generator().manual_seed(0))
    truth = float(torch.linalg.matrix_norm(features, 2) ** 2)
    assert 0.9 * truth < largest <= truth * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_passes": -1.0}, "max_passes"),
        ({"momentum": 1.0}, "momentum"),
        ({"step_size": 0.0}, "step_size"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightSGD(**arguments)
