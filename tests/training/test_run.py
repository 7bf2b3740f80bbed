import math
from itertools import pairwise

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from sgdgp.training import Plateau, StochasticMarginalLogLikelihood
from sgdgp.training.run import FitEntry, FitLimits, Fitted, Run
from tests.training.problems import assert_same, parameters, rbf_model

NONE = FitLimits(steps=100, max_passes=None, max_seconds=None, plateau=None)


def run(model, lr=0.1, kind=torch.optim.Adam):
    mll = StochasticMarginalLogLikelihood(model.likelihood, model.train())
    learned = list(model.parameters())
    return Run(model, mll, kind(learned, lr=lr), learned)


def go(found, steps, callback=None, keep=lambda run: None):
    x, y = found.model.train_inputs[0], found.model.train_targets
    limits = FitLimits(steps, None, None, None)
    return found.go(x, y, limits, callback, keep)


def entries(values):
    return [FitEntry(i, 0.0, 0.0, value, 0.0, {}) for i, value in enumerate(values)]


def test_a_step_that_would_not_end_in_time_is_not_begun():
    found = run(rbf_model())
    limits = FitLimits(100, None, found.seconds + 1e4, None)
    assert limits.reason(found, 0.0) is None
    assert limits.reason(found, 1e4) == "budget"


def test_earlier_fits_draw_on_the_budgets_but_not_on_the_steps():
    limits = FitLimits(50, 100.0, 20.0, Plateau())
    earlier = [Fitted("steps", 9, 30.0, 15.0, ()), Fitted("steps", 9, 80.0, 2.0, ())]
    left = limits.after(earlier)
    assert left == FitLimits(50, 0.0, 3.0, Plateau())
    assert limits.after([]) == limits
    assert NONE.after(earlier) == NONE


def test_a_fit_says_in_a_line_how_it_went():
    entries = [
        FitEntry(i, 1.0, 1.0, -2.0 + i, 0.1 * i, {"noise": (1.0,)}) for i in (1, 2)
    ]
    assert repr(Fitted("plateau", 2, 30.5, 1.25, tuple(entries), ("Look.",))) == (
        "Fitted(steps=2, passes=30.5, seconds=1.25, gain=1, residual=0.2, warnings=1, "
        "reason='plateau')"
    )
    none = Fitted("interrupted", 0, 0.0, 0.0, ())
    assert repr(none) == "Fitted(steps=0, passes=0, seconds=0, reason='interrupted')"


def test_each_limit_has_its_reason():
    found = run(rbf_model())
    assert NONE.reason(found) is None
    found.history = entries([0.0] * 20)
    assert FitLimits(20, None, None, None).reason(found) == "steps"
    assert FitLimits(21, None, None, None).reason(found) is None
    assert FitLimits(21, None, None, Plateau()).reason(found) == "plateau"
    found.mll.passes = 7.0
    assert FitLimits(21, 7.0, None, None).reason(found) == "budget"
    assert FitLimits(21, 7.5, None, None).reason(found) is None
    found.earlier_seconds = 60.0
    assert FitLimits(21, None, 60.0, None).reason(found) == "budget"
    assert FitLimits(21, None, 90.0, None).reason(found) is None


def test_an_entry_tells_of_the_parameters_before_its_step():
    model = rbf_model()
    before = float(model.covar_module.outputscale.detach())
    found = run(model)
    assert go(found, 1) == "steps"
    told = found.history[0].parameters["covar_module.outputscale"]
    assert told == pytest.approx((before,))
    assert float(model.covar_module.outputscale.detach()) != pytest.approx(before)
    mll = StochasticMarginalLogLikelihood(model.likelihood, rbf_model().train())
    x, y = mll.model.train_inputs[0], mll.model.train_targets
    mll.likelihood = mll.model.likelihood
    assert found.history[0].value == pytest.approx(float(mll(mll.model(x), y).detach()))


def test_keep_and_callback_come_after_every_step():
    model, seen = rbf_model(), []
    found = run(model)

    def keep(run):
        seen.append(("keep", len(run.history), parameters(model)))

    def callback(entry):
        seen.append(("callback", entry.step + 1, parameters(model)))

    go(found, 3, callback, keep)
    assert [(what, steps) for what, steps, _ in seen] == [
        (what, steps) for steps in (1, 2, 3) for what in ("keep", "callback")
    ]
    for (_, _, kept), (_, _, shown) in zip(seen[::2], seen[1::2], strict=True):
        assert_same(kept, shown, rtol=0.0, atol=0.0)
    assert_same(seen[-1][2], parameters(model), rtol=0.0, atol=0.0)


class Thrown(torch.optim.SGD):
    """SGD whose second step ends far away."""

    calls = 0
    to = math.nan

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        if self.calls == 2:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(self.to)


# At -40 the kernel and the noise all but vanish: finite, and no fit at all.
@pytest.mark.parametrize("to", [math.nan, math.inf, -40.0])
def test_a_step_that_diverged_is_made_again_with_half_the_learning_rate(to):
    model, truth = rbf_model(), rbf_model()
    found = run(model, kind=Thrown)
    found.optimiser.to = to
    assert go(found, 3) == "steps"
    assert found.recoveries == 1
    assert found.optimiser.param_groups[0]["lr"] == pytest.approx(0.05)
    wanted = run(truth, kind=torch.optim.SGD)
    go(wanted, 1)
    wanted.optimiser.param_groups[0]["lr"] = 0.05
    go(wanted, 3)
    assert_same(parameters(model), parameters(truth), rtol=1e-12, atol=1e-12)
    assert [entry.step for entry in found.history] == [0, 1, 2]


def test_a_start_that_is_nowhere_is_the_callers_error():
    model = rbf_model()
    model.mean_module.raw_constant.data.fill_(1e200)
    with pytest.raises(ValueError, match="not finite at the initial parameters"):
        go(run(model), 3)


def test_a_small_loss_is_no_divergence():
    found = run(rbf_model(), lr=0.4)
    go(found, 25)
    values = [entry.value for entry in found.history]
    assert any(later < earlier for earlier, later in pairwise(values))
    assert found.recoveries == 0


values = st.lists(st.floats(-10, 10), max_size=30)


@hypothesis.given(values, st.integers(1, 8))
def test_a_short_series_has_no_plateau(series, patience):
    assert not Plateau(patience=patience).is_reached(series[:patience])


@hypothesis.given(values, st.integers(1, 8), st.floats(1e-6, 1.0))
def test_a_new_best_by_more_than_the_gain_is_no_plateau(series, patience, gain):
    best = max(series, default=0.0)
    rising = [*series, 0.0, best + gain * (1.0 + 1e-6) + 1e-9]
    if len(rising) > patience and max(rising[:-patience]) <= best:
        assert not Plateau(patience, gain).is_reached(rising)


@hypothesis.given(values, st.integers(1, 8), st.floats(1e-6, 1.0))
def test_patience_steps_below_the_best_are_a_plateau(series, patience, gain):
    best = max(series, default=0.0)
    resting = [*series, best] + [best - 0.1, best - 0.3] * patience
    assert Plateau(patience, gain).is_reached(resting)


@pytest.mark.parametrize(
    ("last", "is_reached"), [(1.09, True), (1.11, False)], ids=["less", "more"]
)
def test_what_counts_is_the_gain_over_all_the_last_steps(last, is_reached):
    slow = [0.5, 1.0, 1.03, 1.06, last]
    assert Plateau(patience=3, gain=0.1).is_reached(slow) is is_reached


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"patience": 0}, "patience"), ({"gain": 0.0}, "gain"), ({"gain": -1.0}, "gain")],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Plateau(**settings)
