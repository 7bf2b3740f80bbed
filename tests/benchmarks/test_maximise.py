"""The measurement of ``maximise`` on a small problem."""

from __future__ import annotations

import json

import torch

from benchmarks.thompson_sampling import maximise as benchmark


def test_the_report_compares_maxima_with_a_random_search(tmp_path):
    posterior = benchmark.posterior_of(200, 3, 0.3, 5, 5.0, tmp_path / "posterior")
    again = benchmark.posterior_of(200, 3, 0.3, 5, 5.0, tmp_path / "posterior")
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.samples(x), posterior.samples(x))
    report = benchmark.measured(again, 10**6, 3, num_candidates=20, rounds=4, steps=10)
    assert report["checked_functions"] == 3
    assert report["random_search_candidates"] == 10 * report["candidates"] == 800
    assert report["mean_maximum"] > report["mean_of_best_candidates"]
    assert json.dumps(report)
