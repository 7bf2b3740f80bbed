"""The demo: its problem, its exact posterior, its scores and its verdict."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import benchmarks.demo.__main__ as demo
from benchmarks.demo.problem import (
    GAP,
    NOISE_SCALE,
    in_gap,
    make_problem,
    true_function,
)
from benchmarks.demo.reference import Reference, exact_posterior
from benchmarks.demo.scores import Check, compare, score


def test_nothing_is_observed_in_the_gap_and_both_sides_of_it_are():
    problem = make_problem(2000)
    assert not in_gap(problem.x).any()
    assert in_gap(problem.x_test).any()
    near = 0.1
    for edge, side in ((GAP[0], -1), (GAP[1], 1)):
        distance = side * (problem.x[:, 0] - edge)
        assert ((distance >= 0) & (distance < near)).any()


def test_the_noise_of_the_data_is_what_the_model_assumes():
    problem = make_problem(20_000)
    assert problem.model.likelihood.noise.item() == pytest.approx(NOISE_SCALE**2)
    noise = problem.y - true_function(problem.x)
    # The standard error of a standard deviation is 1 / sqrt(2 n) of it.
    assert float(noise.std()) == pytest.approx(NOISE_SCALE, rel=5 / math.sqrt(40_000))


def test_the_reference_is_the_closed_form():
    problem = make_problem(80, num_test=11)
    exact = exact_posterior(problem.model, problem.x_test)
    with torch.no_grad():
        x = torch.cat([problem.x, problem.x_test]).double()
        joint = problem.model.covar_module.double()(x).to_dense()
    prior, cross = joint[80:, 80:], joint[80:, :80]
    matrix = joint[:80, :80] + NOISE_SCALE**2 * torch.eye(80).double()
    gain = torch.linalg.solve(matrix, cross.mT).mT
    mean = gain @ problem.y.double()
    variance = (prior - gain @ cross.mT).diagonal()
    # The noise passed through float32, which has seven digits.
    assert torch.allclose(exact.mean, mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(exact.variance, variance, rtol=1e-5, atol=1e-6)
    assert exact.residual < 1e-10


def test_scores_tell_the_gap_from_the_rest():
    problem = make_problem(50, num_test=200)
    inside = in_gap(problem.x_test)
    mean = problem.f_test + torch.where(inside, 0.5, 0.1)
    variance = torch.full((200,), 0.04)
    scores = score(mean, variance, problem)
    assert scores.rmse == pytest.approx((0.1, 0.5), rel=1e-5)
    assert scores.deviation == pytest.approx((0.2, 0.2))
    # 1.96 standard deviations are 0.39: enough outside, too little inside.
    assert scores.coverage == (1.0, 0.0)


def test_differences_are_those_from_the_exact_posterior():
    exact = Reference(torch.zeros(4).double(), torch.full((4,), 0.25).double(), 0, 0)
    mean = torch.tensor([0.1, 0.0, 0.0, -0.1])
    variance = torch.full((4,), 0.2)
    found = compare(mean, variance, exact, num_samples=50)
    assert found.mean_max == pytest.approx(0.1)
    assert found.mean_rms == pytest.approx(0.1 / math.sqrt(2))
    assert found.mean_in_deviations == pytest.approx(0.2)
    assert found.variance_max == pytest.approx(0.05)
    assert found.variance_relative == pytest.approx(0.2)
    assert found.sampling_error == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("value", "holds"), [(0.0, True), (1.0, True), (1.1, False), (math.nan, False)]
)
def test_a_check_holds_inside_its_bounds_only(value: float, holds: bool):
    assert Check("a number", value, 0.0, 1.0).holds is holds


def test_the_demo_draws_its_figure_and_passes_its_checks(tmp_path: Path, capsys):
    path = tmp_path / "figures" / "demo.png"
    assert demo.main(["--n", "400", "--figure", str(path)]) == 0
    printed = capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in printed
    for text in ("RMSE to f, inside the gap", "against Cholesky", "sdd", "cholesky"):
        assert text in printed
    assert "FAIL" not in printed


def test_the_demo_fails_where_the_posterior_is_overconfident(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    def wrong_noise(n: int, seed: int):
        problem = make_problem(n, seed=seed)
        problem.model.likelihood.noise = 1e-3
        return problem

    monkeypatch.setattr(demo, "make_problem", wrong_noise)
    monkeypatch.setattr(demo, "_SOLVERS", demo._SOLVERS[:1])
    assert demo.main(["--n", "300", "--figure", str(tmp_path / "demo.png")]) == 1
    assert "FAIL RMSE outside the gap" in capsys.readouterr().out


def test_without_memory_for_the_factor_the_comparison_is_left_out(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo, "available_bytes", lambda: 1e8)
    monkeypatch.setattr(demo, "_SOLVERS", demo._SOLVERS[:1])
    assert demo.main(["--n", "300", "--figure", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out
    assert "no comparison with Cholesky" in printed
    assert "closed form" not in printed
