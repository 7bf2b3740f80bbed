"""The problems are what their names promise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.solvers.problem import KernelValues, Problem
from benchmarks.solvers.problems import RACES, make_problem, parse_problem
from benchmarks.uci.data import load_split

if TYPE_CHECKING:
    from tests.benchmarks.conftest import TinyData


def dense(problem: Problem) -> torch.Tensor:
    """H in float64, from GPyTorch's kernel on the problem's own inputs."""
    x = problem.x.double()
    matrix = problem.kernel.build(x)(x).to_dense().clone()
    matrix.diagonal().add_(problem.noise)
    return matrix


@pytest.mark.parametrize("kappa", ["1e3", "1e6", "1e8"])
def test_the_condition_number_is_the_one_asked_for(kappa: str) -> None:
    problem = make_problem(parse_problem(f"synthetic:{kappa}", n=300, columns=2))
    eigenvalues = torch.linalg.eigvalsh(dense(problem))
    achieved = float(eigenvalues[-1] / eigenvalues[0])
    assert achieved == pytest.approx(float(kappa), rel=0.05)
    assert problem.facts["condition_number"] == pytest.approx(float(kappa), rel=1e-6)


def test_a_matrix_that_is_better_conditioned_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="better conditioned"):
        make_problem(parse_problem("synthetic:1e300", n=50))


def test_a_size_whose_eigenvalues_take_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="n: found 100000"):
        make_problem(parse_problem("synthetic:1e4", n=100_000))


@pytest.mark.parametrize("name", ["1", "2", "3"])
def test_a_race_has_the_spectrum_of_its_kernel_and_targets_of_its_law(
    name: str,
) -> None:
    problem = make_problem(parse_problem(f"race:{name}", n=500))
    lengthscale, noise = RACES[name]
    assert problem.x.shape == (500, 9)
    assert problem.rhs.shape == (500, 1)
    assert problem.noise == noise
    assert problem.kernel == KernelValues("matern32", 1.0, (lengthscale,) * 9)
    # y^T H^-1 y is chi-squared with n degrees: mean n, standard deviation sqrt(2 n).
    y = problem.rhs[:, 0].double()
    square = float(y @ torch.linalg.solve(dense(problem), y))
    assert abs(square - 500) < 4 * math.sqrt(2 * 500)


def test_samples_are_draws_from_the_prior_with_noise() -> None:
    spec = parse_problem("synthetic:1e3", n=200, columns=401, dtype="float64")
    problem = make_problem(spec)
    draws = problem.rhs[:, 1:]
    expected = dense(problem)
    # The mean over the points of the variance: 64 functions share a feature map of
    # 2,048 features, the rest is 400 samples of strongly correlated values.
    variance = float(draws.square().mean())
    assert variance == pytest.approx(float(expected.diagonal().mean()), rel=0.15)
    near, far = expected[0].topk(2).indices[1], expected[0].argmin()
    for other in (near, far):
        covariance = float((draws[0] * draws[other]).mean())
        assert abs(covariance - float(expected[0, other])) < 0.25
    noise = problem.noise_draws
    assert torch.count_nonzero(noise[:, 0]) == 0
    # 80,000 independent draws: the variance is known to 0.5 %.
    assert float(noise[:, 1:].square().mean()) == pytest.approx(problem.noise, rel=0.03)


def test_a_data_set_has_the_published_noise_and_its_own_targets(
    tiny: TinyData,
) -> None:
    problem = make_problem(parse_problem("tiny:1", columns=3))
    split = load_split("tiny", 1)
    assert problem.noise == pytest.approx(tiny.noise_scale**2)
    assert problem.kernel.variance == pytest.approx(tiny.signal_scale**2)
    assert problem.kernel.lengthscale == pytest.approx(tiny.lengthscale)
    torch.testing.assert_close(problem.rhs[:, 0], split.y.float())
    assert problem.rhs.shape == (81, 3)
    low = make_problem(parse_problem("tiny:1", columns=1, n=40, noise_scale=0.001))
    assert low.noise == pytest.approx(1e-6)
    assert low.rhs.shape == (40, 1)


def test_a_problem_survives_its_file(tmp_path: Path) -> None:
    problem = make_problem(parse_problem("synthetic:1e3", n=60, columns=2))
    path = tmp_path / "problem.pt"
    problem.save(path)
    found = Problem.load(path)
    assert found.kernel == problem.kernel
    assert (found.name, found.noise, found.facts) == (
        problem.name,
        problem.noise,
        problem.facts,
    )
    for name in ("x", "rhs", "noise_draws"):
        assert torch.equal(getattr(found, name), getattr(problem, name))


def test_the_same_seed_gives_the_same_problem_and_another_seed_another() -> None:
    spec = parse_problem("race:1", n=100, columns=3)
    first, again = make_problem(spec), make_problem(spec)
    other = make_problem(replace(spec, seed=1))
    assert torch.equal(first.rhs, again.rhs)
    assert not torch.equal(first.x, other.x)


def test_true_residuals_are_those_of_the_dense_matrix() -> None:
    problem = make_problem(parse_problem("race:2", n=150, columns=3))
    weights = torch.randn(150, 3, generator=torch.Generator().manual_seed(5))
    b = problem.rhs.double()
    expected = (b - dense(problem) @ weights.double()).norm(dim=0) / b.norm(dim=0)
    # GPyTorch rounds the lengthscale to float32 here and not there.
    torch.testing.assert_close(
        problem.true_residuals(weights), expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("race:4", {}, "race:1, race:2 or race:3"),
        ("synthetic:much", {}, "condition number"),
        ("synthetic:0.5", {}, "above 1"),
        ("tiny", {}, "NAME:SPLIT"),
        ("tiny:11", {}, "0 to 9"),
        ("nothing:0", {}, "expected one of pol"),
        ("race:1", {"noise_scale": 0.1}, "noise_scale"),
        ("tiny:0", {"noise_scale": -1.0}, "noise_scale"),
        ("race:1", {"columns": 0}, "columns"),
        ("race:1", {"n": 0}, "n: found 0"),
    ],
)
def test_a_problem_that_does_not_exist_is_refused(
    tiny: TinyData, text: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_problem(text, **options)
