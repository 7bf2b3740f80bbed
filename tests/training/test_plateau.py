import hypothesis
import pytest
from hypothesis import strategies as st

from sgdgp.training import Plateau

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
