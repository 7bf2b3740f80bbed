"""GPyTorch's own exact GP, by Cholesky and by conjugate gradients.

Both are GPyTorch's tutorial loop: ``ExactMarginalLogLikelihood``, Adam, then
``likelihood(model(x_test))``. Only the settings differ that say how the linear
algebra is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import gpytorch
import torch
from gpytorch.mlls import ExactMarginalLogLikelihood
from jaxtyping import Float
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from benchmarks.uci.data import Split
from benchmarks.uci.memory import check_fits
from benchmarks.uci.peers.outcome import Clock, PeerOutcome, thin
from benchmarks.uci.request import RunRequest
from benchmarks.uci.trainable import TrainableGP, default_model, learnt

_SETTINGS = gpytorch.settings
_ALWAYS_CHOLESKY = 10**9
_TEST_BLOCK = 512
_FAILURES = (NotPSDError, NanError)
# Square matrices alive at the peak of a step; measured at n = 2,000 to 6,000.
_COPIES = {"exact": 12.0, "cg": 10.0}


def gpytorch_exact(request: RunRequest, split: Split) -> PeerOutcome:
    """Train and predict with dense Cholesky factors.

    Raises:
        DoesNotFitError: Its n x n matrices need more memory than there is.
    """
    with ExitStack() as stack:
        stack.enter_context(_SETTINGS.max_cholesky_size(_ALWAYS_CHOLESKY))
        # These alone would still take the conjugate gradients.
        stack.enter_context(_SETTINGS.fast_computations(False, False, False))
        return _train_and_predict("exact", request, split, {"algebra": "Cholesky"})


def gpytorch_cg(request: RunRequest, split: Split) -> PeerOutcome:
    """Train and predict with preconditioned conjugate gradients at every size.

    Raises:
        DoesNotFitError: Its n x n matrices need more memory than there is.
    """
    rank = request.setting("cg_rank")
    with ExitStack() as stack:
        stack.enter_context(_SETTINGS.max_cholesky_size(0))
        stack.enter_context(_SETTINGS.max_preconditioner_size(rank))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(request.seed)  # GPyTorch draws its probes globally
        settings = {
            "algebra": "conjugate gradients",
            "preconditioner": f"pivoted Cholesky, rank {rank}",
            "preconditioner_from_rows": _SETTINGS.min_preconditioning_size.value(),
            "training_tolerance": _SETTINGS.cg_tolerance.value(),
            "prediction_tolerance": _SETTINGS.eval_cg_tolerance.value(),
            "max_iterations": _SETTINGS.max_cg_iterations.value(),
            "probes": _SETTINGS.num_trace_samples.value(),
            "lanczos_iterations": _SETTINGS.max_lanczos_quadrature_iterations.value(),
        }
        return _train_and_predict("cg", request, split, settings)


def _train_and_predict(
    kind: str, request: RunRequest, split: Split, settings: Mapping[str, Any]
) -> PeerOutcome:
    n = len(split.x)
    check_fits(request.solver, n, _COPIES[kind] * split.x.element_size() * n**2)
    model = default_model(split.x, split.y)
    clock = Clock(request.max_seconds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericalWarning)
        with clock.phase("fit"):
            history, reason = _train(model, split, request, clock)
        with clock.phase("prediction"):
            try:
                mean, variance = _predict(model, split.x_test, clock)
            except _FAILURES:  # a figure of its own, and recorded
                mean, variance = torch.full_like(split.y_test, torch.nan), None
    told = list(
        dict.fromkeys(
            str(found.message).split("\n")[0]
            for found in caught
            if issubclass(found.category, NumericalWarning)
        )
    )
    if not torch.isfinite(mean).all():
        told.append("GPyTorch could not predict")
    elif variance is None:
        told.append(f"no variances within --max-seconds {request.max_seconds}")
    return PeerOutcome(
        mean=mean,
        variance=variance,
        learnt=learnt(model.mean_module, model.covar_module, model.likelihood),
        steps=len(history),
        reason=reason,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        settings={
            **settings,
            "optimiser": f"Adam, learning rate {request.setting('fit_learning_rate')}",
        },
        rows=n,
        history=thin(history),
        warnings=told[:8],
    )


def _train(
    model: TrainableGP, split: Split, request: RunRequest, clock: Clock
) -> tuple[list[dict[str, float]], str]:
    """The tutorial's loop; it ends between two steps when the time is up."""
    model.train()
    optimiser = torch.optim.Adam(
        model.parameters(), lr=request.setting("fit_learning_rate")
    )
    objective = ExactMarginalLogLikelihood(model.likelihood, model)
    history: list[dict[str, float]] = []
    for step in range(1, request.setting("fit_steps") + 1):
        optimiser.zero_grad()
        try:
            loss = -objective(model(split.x), split.y)
            loss.backward()
        except _FAILURES as error:
            return history, f"failed at step {step}: {type(error).__name__}"
        optimiser.step()
        history.append({"step": step, "seconds": clock.elapsed, "loss": loss.item()})
        if clock.expired and step < request.setting("fit_steps"):
            return history, f"stopped at step {step}"
    return history, "steps"


def _predict(
    model: TrainableGP, x: Float[Tensor, "m d"], clock: Clock
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"] | None]:
    """Means first, which are cheap; then variances, unless they take too long."""
    model.eval()
    model.likelihood.eval()
    with torch.no_grad():
        with _SETTINGS.skip_posterior_variances():
            mean = torch.cat([model(block).mean for block in x.split(_TEST_BLOCK)])
        variances = []
        for block in x.split(_TEST_BLOCK):
            if clock.expired:
                return mean, None
            variances.append(model.likelihood(model(block)).variance)
    return mean, torch.cat(variances)
