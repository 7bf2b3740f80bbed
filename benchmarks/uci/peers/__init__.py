"""Other packages on the same split: name of the run -> the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.uci.data import Split
from benchmarks.uci.peers.exact_gp import gpytorch_cg, gpytorch_exact
from benchmarks.uci.peers.iterative_gp import iterative_gp
from benchmarks.uci.peers.outcome import PeerOutcome
from benchmarks.uci.peers.sklearn_gp import sklearn_subset
from benchmarks.uci.peers.svgp import gpytorch_svgp
from benchmarks.uci.request import PEERS, RunRequest

_WORK: Mapping[str, Callable[[RunRequest, Split], PeerOutcome]] = {
    PEERS["exact"]: gpytorch_exact,
    PEERS["cg"]: gpytorch_cg,
    PEERS["svgp"]: gpytorch_svgp,
    PEERS["sklearn"]: sklearn_subset,
    PEERS["iterative-gp"]: iterative_gp,
}


def run_peer(request: RunRequest, split: Split) -> PeerOutcome:
    """Train and predict as ``request.solver`` says.

    Raises:
        DoesNotFitError: It needs more memory than there is.
        ValueError: It is a published code of which no checkout is named.
        RuntimeError: That failed; with what it said.
    """
    return _WORK[request.solver](request, split)
