"""The rows of compact posteriors and of pruning in the reference study."""

from __future__ import annotations

from benchmarks.reference_posteriors import pruning, weights


def test_what_alignment_has_to_do_is_held_against_its_thresholds():
    def side(nll: float, log_density: float) -> dict:
        return {"mean_network": {"nll": nll}, "held_out_log_density": log_density}

    def pair(correlation: float, divergence: float) -> dict:
        return {"mean_correlation": correlation, "divergence": divergence}

    good = {
        "raw": side(1.2, -870.0),
        "aligned": side(0.3, -800.0),
        "mean_field_and_hmc": {"raw": pair(0.0, 500.0), "aligned": pair(0.6, 300.0)},
    }
    poor = {
        "raw": side(1.2, -870.0),
        "aligned": side(0.6, -850.0),
        "mean_field_and_hmc": {"raw": pair(0.2, 500.0), "aligned": pair(0.5, 400.0)},
    }
    held = [c.holds for c in weights.checks([{"tanh": good, "ReLU": poor}])]
    assert held == [True] * 4 + [False] * 4


def test_the_best_criterion_comes_first():
    size = len(pruning.SPARSITIES)
    records = [
        {
            "curves": {"random": [0.1 + d] * size, "magnitude": [0.8 + d] * size},
            "caveats": {"HMC": said},
        }
        for d, said in ((0.0, ["The chains have not mixed: wait."]), (0.1, []))
    ]
    found = list(pruning.checks(records))
    assert found[-1].figure == "1 of 2"
    assert found[0].figure == "magnitude 0.850 ± 0.050; random 0.150 ± 0.050"
