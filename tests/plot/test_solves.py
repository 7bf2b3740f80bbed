"""Residuals are drawn as the history has them, the mean's apart."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

import sgdgp
from tests.models import gp, toy_data


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


SOLVER = sgdgp.CG(tolerance=1e-3, preconditioner=None)


@pytest.fixture(scope="module")
def posterior():
    return sgdgp.condition(gp(n=60, noise=0.01), num_samples=5, solver=SOLVER)


def labelled(ax, label):
    handles, labels = ax.get_legend_handles_labels()
    return handles[labels.index(label)]


def lines(ax, colour):
    """Residuals (k, entries) of the lines, not the dots, of one colour."""
    return [
        tuple(line.get_ydata().tolist())
        for line in ax.get_lines()
        if line.get_color() == colour and line.get_marker() == "None"
    ]


def test_lines_are_the_columns_and_dots_the_true_residuals(posterior):
    ax = sgdgp.plot.convergence(posterior)
    history = posterior.solution.history
    residuals = torch.tensor(
        [entry.residuals for entry in history], dtype=torch.float64
    )
    mean = labelled(ax, "mean")
    assert mean.get_xdata().tolist() == pytest.approx([e.passes for e in history])
    assert torch.equal(torch.tensor(mean.get_ydata()), residuals[:, 0])
    samples = lines(ax, labelled(ax, "5 samples").get_color())
    assert samples == [tuple(column.tolist()) for column in residuals[:, 1:].mT]
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    exact = sum(entry.exact for entry in history)
    assert 0 < exact < len(history)
    assert [len(line.get_xdata()) for line in dots] == [exact] * 6
    assert labelled(ax, "tolerance 0.001").get_ydata() == [1e-3, 1e-3]
    assert ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("passes over K", "relative residual")
    assert ax.get_title().endswith(posterior.solution.reason)


def test_a_bare_solution_does_not_know_its_tolerance(posterior):
    ax = sgdgp.plot.convergence(posterior.solution)
    assert ax.get_legend_handles_labels()[1] == [
        "mean",
        "true residuals",
        "5 samples",
    ]
    ax = sgdgp.plot.convergence(posterior.solution, tolerance=0.5)
    assert labelled(ax, "tolerance 0.5").get_ydata() == [0.5, 0.5]


def test_functions_drawn_later_have_no_mean(posterior):
    ax = sgdgp.plot.convergence(posterior.draw(3))
    assert ax.get_legend_handles_labels()[1] == ["3 samples", "true residuals"]


def test_every_output_has_a_mean_also_of_solves_one_after_another():
    x, y = toy_data(40)
    y = torch.stack([y, -y, 2 * y], 1)
    y[:10, 2] = torch.nan
    found = sgdgp.condition(gp(), x, y, num_samples=2, solver=SOLVER)
    history = found.solution.history
    assert {len(entry.residuals) for entry in history} == {6, 3}
    ax = sgdgp.plot.convergence(found)
    assert ax.get_legend_handles_labels()[1][:5] == [
        "2 means",
        "true residuals",
        "4 samples",
        "mean",
        "2 samples",
    ]
    means = lines(ax, labelled(ax, "mean").get_color())
    both = [entry.residuals for entry in history if len(entry.residuals) == 6]
    assert means[0] == pytest.approx([residuals[0] for residuals in both])
    assert means[1] == pytest.approx([residuals[3] for residuals in both])


def test_without_a_history_the_end_is_drawn(posterior):
    ax = sgdgp.plot.convergence(replace(posterior.solution, history=()))
    mean = labelled(ax, "mean")
    assert mean.get_xdata().tolist() == [posterior.solution.passes]
    assert mean.get_ydata().tolist() == [float(posterior.solution.residuals[0])]


def test_all_else_is_refused():
    with pytest.raises(TypeError, match=r"solution: expected a Solution.*found int"):
        sgdgp.plot.convergence(3)
