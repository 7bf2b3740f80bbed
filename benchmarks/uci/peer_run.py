"""The result of a peer on a split, in the same words as the library's own runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.uci.against import exact_at
from benchmarks.uci.data import Split
from benchmarks.uci.memory import peak_rss_mb
from benchmarks.uci.peers import run_peer
from benchmarks.uci.request import RunRequest
from benchmarks.uci.scores import NAMES, scores
from sgdgp import metrics


def peer_result(request: RunRequest, folder: Path, split: Split) -> dict[str, Any]:
    """Train a peer on the training rows and score the test rows.

    Args:
        request: Which peer, and how.
        folder: Of the results; not used.
        split: The data.

    Raises:
        DoesNotFitError: It needs more memory than there is.
        ValueError: It is a published code of which no checkout is named.
        RuntimeError: That failed; with what it said.
    """
    outcome = run_peer(request, split)
    memory = outcome.peak_rss_mb or peak_rss_mb()
    mean, variance = outcome.mean, outcome.variance
    if variance is None:
        figures: dict[str, Any] = dict.fromkeys(NAMES)
        if torch.isfinite(mean).all():
            figures["rmse"] = metrics.rmse(mean, split.y_test)
    else:
        figures = dict(scores(mean, variance, split.y_test.to(mean)))
    return {
        "noise_scale": outcome.learnt.values.noise_scale,
        **figures,
        "seconds": dict(outcome.seconds),
        "cpu_seconds": sum(outcome.cpu_seconds.values()),
        "peak_rss_mb": memory,
        "reason": outcome.reason,
        "warnings": list(outcome.warnings),
        "settings": outcome.settings,
        "rows": outcome.rows,
        "fit": {
            "steps": outcome.steps,
            "reason": outcome.reason,
            "parameters": outcome.learnt.to_dict(),
            "history": list(outcome.history),
        },
        "exact": exact_at(request, outcome.learnt, mean, variance),
    }
