"""Reads a prior and a noise model out of a GPyTorch model definition.

The only room that takes models apart, and that knows how GPyTorch and linear_operator
keep what they have not evaluated yet. A model is a *specification* here: its
``forward`` is called to learn mean and covariance, its inference engine never is.
Whatever ``forward`` does (a plain kernel, a sum of kernels, a network in front of a
kernel, several tasks) becomes one GPyTorch kernel over one matrix of kernel inputs,
which is all that the rest of the package sees.

``prior_of`` reads a finished model, frozen; ``prior_at``, ``traced_prior`` and
``training_problems`` one that is being trained, with the graph to its parameters.
"""

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter.data import (
    InputLayout,
    Inputs,
    Observed,
    layout_of,
    observed_rows,
    raw_training_data,
    training_data,
)
from sgdgp.gpytorch_adapter.noise import (
    has_fixed_noise,
    noise_of,
    noise_of_rows,
    noise_variances,
)
from sgdgp.gpytorch_adapter.outcome_scale import OutcomeScale, to_model_units
from sgdgp.gpytorch_adapter.prior import (
    MultitaskPrior,
    Prior,
    multitask_inputs,
    prior_at,
    prior_of,
)
from sgdgp.gpytorch_adapter.training import (
    TracedPrior,
    TracedProblem,
    traced_prior,
    training_problems,
)

__all__ = [
    "InputLayout",
    "Inputs",
    "MultitaskPrior",
    "Observed",
    "OutcomeScale",
    "Prior",
    "TracedPrior",
    "TracedProblem",
    "UnsupportedModelError",
    "has_fixed_noise",
    "layout_of",
    "multitask_inputs",
    "noise_of",
    "noise_of_rows",
    "noise_variances",
    "observed_rows",
    "prior_at",
    "prior_of",
    "raw_training_data",
    "to_model_units",
    "traced_prior",
    "training_data",
    "training_problems",
]
