import sys

import pytest

from sgdgp.training import FitEntry, fit
from sgdgp.training.fit_progress import describe, fit_bar
from tests.training.problems import rbf_model


def test_one_value_is_shown_as_it_is_and_several_by_their_range():
    parameters = {
        "likelihood.noise_covar.noise": (0.012345,),
        "covar_module.base_kernel.lengthscale": (0.5, 12.0, 0.031),
    }
    assert describe(parameters) == "noise 0.0123, lengthscale 0.031..12"


def test_no_more_than_four_are_shown():
    many = {f"kernel.part{i}": (float(i),) for i in range(9)}
    assert describe(many) == "part0 0, part1 1, part2 2, part3 3"


def test_nothing_to_show_is_shown_as_nothing():
    assert describe({}) == ""


def entry(step):
    return FitEntry(step, 3.0, 0.1, -1.0, 0.02, {"likelihood.noise": (0.25,)})


def test_the_bar_counts_steps_and_shows_parameters_and_residual(capsys):
    with fit_bar(True, 7, None) as moved:
        assert moved(entry(0)) is None
        assert moved(entry(4)) is None
    shown = capsys.readouterr().err
    assert "5/7" in shown
    assert "noise 0.25, residual 2e-02" in shown


def test_the_callback_behind_the_bar_decides():
    with fit_bar(True, 7, lambda found: found.step == 2) as moved:
        assert not moved(entry(1))
        assert moved(entry(2))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_by_default_there_is_a_bar_on_a_terminal_only(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    fit(rbf_model(20), steps=2)
    assert ("lengthscale" in capsys.readouterr().err) is is_terminal


def test_without_a_bar_the_callback_is_handed_through():
    def callback(found):
        return None

    with fit_bar(False, 7, callback) as moved:
        assert moved is callback
