"""Inducing-point SGD: the closed form of its own problem, and honesty about ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgdgp.operators import DenseOperator
from sgdgp.solvers import Solution
from sgdgp.solvers.blocks import shuffle
from sgdgp.solvers.driver import Task
from sgdgp.solvers.inducing_sgd import InducingSGD, choose_inducing
from sgdgp.solvers.system import as_system
from tests.solvers.problems import OPERATORS, Problem, problem, relative_error

TIGHT = {"gradient_tolerance": 1e-9, "momentum": 0.97, "max_passes": 3000.0}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _descent(p: Problem, m: int):
    """The algorithm at work with m inducing points, and their rows."""
    task = Task(as_system(p.operator, p.noise, p.rhs), None, None, _generator())
    descent = InducingSGD(inducing=m, block_size=40).begin(task)
    return descent, descent.data.order[descent.points]


def closed_form(p: Problem, rows: Tensor) -> Tensor:
    """E_Z (K_ZX Sigma^-1 K_XZ + K_ZZ)^-1 K_ZX Sigma^-1 B, (n, k)."""
    noise = p.noise.expand(len(p.rhs))
    kernel = p.matrix - torch.diag(noise)
    weighted = kernel[rows] / noise
    own = weighted @ kernel[:, rows] + kernel[rows][:, rows]
    answer = torch.zeros_like(p.rhs)
    answer[rows] = torch.linalg.solve(own, weighted @ p.rhs)
    return answer


def _fit_error(p: Problem, found: Solution, answer: Tensor) -> float:
    kernel = p.matrix - torch.diag(p.noise.expand(len(p.rhs)))
    return relative_error(kernel @ found.weights, kernel @ answer)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", ["matern12", "matern32"])
def test_it_reaches_the_closed_form(kernel, operator):
    p = problem(kernel, 120, noise=1.0, operator=operator)
    rows = torch.arange(0, 120, 6)
    found = p.solve(InducingSGD(inducing=rows, **TIGHT))
    assert found.reason == "stagnated"
    assert relative_error(found.weights, closed_form(p, rows)) < 1e-6
    assert torch.equal(found.settings["rows"], rows)
    off = torch.ones(120, dtype=torch.bool)
    off[rows] = False
    assert not found.weights[off].any()
    torch.testing.assert_close(found.residuals, p.residuals(found.weights))
    assert f"{found.settings['own_gradient']:.2e}" in found.warnings[0]
    assert f"{float(found.residuals.max()):.2e}" in found.warnings[0]


def test_noise_per_row_is_the_diagonal_of_sigma():
    p = problem("matern12", 120, noise=torch.logspace(-0.5, 0.5, 120).double())
    rows = torch.arange(0, 120, 5)
    found = p.solve(InducingSGD(inducing=rows, block_size=30, **TIGHT))
    assert relative_error(found.weights, closed_form(p, rows)) < 1e-5


def test_the_defaults_reach_the_fit_of_the_closed_form():
    p = problem("matern32", 600, noise=0.1)
    found = p.solve(InducingSGD(inducing=60))
    assert found.reason == "stagnated"
    assert found.settings["restarts"] == 0
    assert _fit_error(p, found, closed_form(p, found.settings["rows"])) < 2e-3


def test_every_row_an_inducing_point_solves_the_full_system():
    p = problem("matern12", 80, noise=1.0)
    found = p.solve(InducingSGD(inducing=80, tolerance=1e-6, **TIGHT))
    assert found.reason == "converged"
    assert not found.warnings
    assert relative_error(found.weights, p.answer) < 1e-5


def test_the_stochastic_gradient_is_unbiased_and_quiet_at_its_anchor():
    p = problem("matern32", 200, noise=torch.logspace(-1, 0, 200).double())
    own, rows = _descent(p, 30)
    at = torch.randn(30, 2, generator=_generator(1), dtype=torch.float64)
    anchor = torch.randn(30, 2, generator=_generator(2), dtype=torch.float64)
    scale = p.matrix.diagonal()[rows].unsqueeze(1)
    noise = p.noise
    kernel = p.matrix - torch.diag(noise)
    rhs = p.rhs / p.rhs.norm(dim=0)
    for center, quiet in ((anchor, False), (at, True)):
        own.center(center)
        found = torch.stack([own.gradient(block, at) for block in own.blocks()])
        true = kernel[rows] @ ((kernel[:, rows] @ at - rhs) / noise.unsqueeze(1))
        true = (true + kernel[rows][:, rows] @ at) / scale
        torch.testing.assert_close(found.mean(0), true)
        spread = float((found - true).norm() / true.norm())
        assert (spread < 1e-9) == quiet


def test_the_estimated_spectrum_is_that_of_the_scaled_hessian():
    noise = torch.logspace(-2, 0, 150).double()
    p = problem("matern32", 150, noise=noise)
    descent, rows = _descent(p, 30)
    largest, level = descent.spectrum()
    kernel = p.matrix - torch.diag(noise)
    scale = p.matrix.diagonal()[rows].rsqrt()
    data_part = (kernel[rows] / noise) @ kernel[:, rows]
    hessian = (data_part + kernel[rows][:, rows]) * scale * scale.unsqueeze(1)
    true = float(torch.linalg.eigvalsh(hessian)[-1])
    assert true * (1 - 1e-6) <= largest <= 1.05 * true
    scaled = data_part * scale * scale.unsqueeze(1)
    assert level == pytest.approx(float(scaled.diagonal().sum()) / 150)


def test_near_duplicates_are_left_out():
    x = torch.randn(50, 3, generator=_generator(), dtype=torch.float64)
    twice = torch.cat([x, x + 1e-3])
    p = problem("rbf", 100)
    operator = DenseOperator(p.operator.kernel, twice)
    data = shuffle(as_system(operator, 0.1, p.rhs), 40, _generator())
    points, passes = choose_inducing(data, 100)
    assert len(points) == 100
    points, passes = choose_inducing(data, 99)
    rows = data.order[points]
    entries = operator.block(rows, rows) - torch.eye(len(rows)).double()
    assert float(entries.max()) <= 0.99
    assert len((rows % 50).unique()) == len(rows)
    assert passes <= 1.0


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("kernel", ["rbf", "matern12", "scale", "linear"])
def test_the_step_rule_is_stable_in_single_precision(kernel, noise):
    p = problem(kernel, 300, noise=noise, dtype=torch.float32)
    found = p.solve(InducingSGD(inducing=50, max_passes=20.0))
    assert torch.isfinite(found.weights).all()
    assert found.settings["restarts"] == 0
    true = p.residuals(found.weights)
    assert float(true.max()) <= 1.0 + 1e-6
    slack = p.rounding(found.weights)
    assert bool(((true - found.residuals.double()).abs() <= slack + 1e-6 * true).all())


def test_a_step_size_far_too_large_is_halved_until_it_works():
    p = problem("matern12", 120, noise=1.0)
    solver = InducingSGD(inducing=20)
    own = p.solve(solver).settings["step_size"]
    found = p.solve(InducingSGD(inducing=20, step_size=40.0 * own))
    assert found.reason == "stagnated"
    assert found.settings["own_gradient"] <= 1e-4
    assert found.settings["restarts"] >= 2
    lost = p.solve(InducingSGD(inducing=20, step_size=1e30))
    assert lost.reason in ("diverged", "budget")
    assert torch.isfinite(lost.weights).all()
    assert float(lost.residuals.max()) <= 1.0 + 1e-9


def test_what_is_worse_than_the_start_is_not_returned():
    p = problem("matern12", 120, noise=0.1)
    start = 0.9 * p.answer
    found = p.solve(InducingSGD(inducing=5), initial=start)
    torch.testing.assert_close(found.weights, start)
    torch.testing.assert_close(found.residuals, p.residuals(start))
    assert "start" in found.warnings[1]


def test_a_start_near_its_answer_saves_passes():
    p = problem("matern12", 200, noise=0.5)
    rows = torch.arange(0, 200, 5)
    cold = p.solve(InducingSGD(inducing=rows))
    warm = p.solve(InducingSGD(inducing=rows), initial=closed_form(p, rows))
    assert warm.reason == cold.reason == "stagnated"
    assert warm.passes < 0.5 * cold.passes


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([0, 50]),
        torch.tensor([-1, 2]),
        torch.tensor([1, 1]),
        torch.tensor([0.5]),
        torch.zeros(0, dtype=torch.long),
    ],
)
def test_inducing_rows_that_do_not_fit_are_named(rows):
    p = problem("matern32", 50)
    with pytest.raises(ValueError, match="inducing"):
        p.solve(InducingSGD(inducing=rows))
