"""Fitted regressors in files: what was learned, beside the posterior.

A file holds a kernel that was given by name or is scikit-learn's. Of one of GPyTorch
it holds the parameters: the kernel itself is code, and is given on loading.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from sklearn.base import clone
from sklearn.gaussian_process import kernels as theirs
from torch import Tensor

from sgdgp.core.codec import Contents, can_be_stored, register_stored_class
from sgdgp.core.errors import warn_user
from sgdgp.core.files import FileKind
from sgdgp.posterior.posterior import posterior_of
from sgdgp.posterior.storage import contents_of, parts_from, without_recycled
from sgdgp.sklearn.arguments import Settings
from sgdgp.sklearn.kernels import known_kernels, translate
from sgdgp.sklearn.model import starting_model

KIND = FileKind("sgdgp.sklearn", 1, "regressor")

for _cls in known_kernels():
    register_stored_class(_cls)

_OWN = ("random_state", "solver", "optimizer")
"""Parameters that may be objects which no file holds."""

_LEARNED = (
    "y_mean_",
    "y_scale_",
    "noise_",
    "_noise",
    "_is_flat",
    "n_iter_",
    "learning_",
    "n_features_in_",
    "target_names_",
)


def values_of(regressor: Any) -> dict[str, Any]:
    """What a file of a fitted regressor holds, by name."""
    settings = Settings.of(regressor.get_params(deep=False))
    parameters = {
        **regressor.get_params(deep=False),
        "steps": settings.steps,
        "num_samples": settings.num_samples,
        "verbose": settings.progress,
        "noise": _stored(settings.noise),
        "kernel": _stored_kernel(regressor.kernel),
        "dtype": str(settings.dtype).removeprefix("torch."),
    }
    del parameters["device"]
    for name in _OWN:
        if not can_be_stored(parameters[name]):
            warn_user(f"{name}: {parameters[name]!r} is not in the file.")
            del parameters[name]
    posterior = regressor.posterior_
    likelihood = posterior.solved[0].problem.prior.model.likelihood
    names = getattr(regressor, "feature_names_in_", None)
    values = {
        "parameters": parameters,
        "kernel_": _stored_kernel(regressor.kernel_),
        "noise_of_rows": isinstance(likelihood, FixedNoiseGaussianLikelihood),
        "feature_names_in_": None if names is None else names.tolist(),
        **{name: _stored(getattr(regressor, name)) for name in _LEARNED},
    }
    for name, value in contents_of(without_recycled(posterior.parts)).items():
        values[f"posterior.{name}"] = value
    return values


def restore(regressor: Any, found: Contents, kernel: Kernel | None) -> None:
    """Make a new regressor what the saved one was.

    Args:
        regressor: It is changed, and knows its device.
        found: What the file holds.
        kernel: A kernel of GPyTorch, where the file holds none.
    """
    parameters = {n: _found(value) for n, value in found["parameters"].items()}
    regressor.set_params(**parameters)
    if kernel is not None:
        regressor.kernel = kernel
    settings = Settings.of(regressor.get_params(deep=False))
    regressor.device_, regressor._dtype = settings.device, settings.dtype
    for name in _LEARNED:
        setattr(regressor, name, _found(found[name]))
    names = found["feature_names_in_"]
    if names is not None:
        regressor.feature_names_in_ = np.array(names, dtype=object)
    contents = found.below("posterior.")
    system = contents["systems"][0]
    x = system["x"][:2]
    start = regressor.kernel
    if isinstance(start, theirs.Kernel):
        start = translate(start, x[0])
    # All parameters come from the file.
    model = starting_model(
        start,
        x,
        x.new_zeros(len(x)),
        None,
        system["noise"][:2] if found["noise_of_rows"] else 1.0,
        with_mean=bool(regressor.normalize_y),
    )
    parts = parts_from(contents, model)
    own, stored = parts[0].problem.prior.model.covar_module, found["kernel_"]
    regressor.kernel_ = own if stored is None else stored
    regressor.posterior_ = posterior_of(parts)
    regressor.solver_ = parts[0].solution.solver
    regressor._likelihood_value = None


def _stored(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _found(value: Any) -> Any:
    return value.cpu().numpy() if isinstance(value, Tensor) else value


def _stored_kernel(kernel: Any) -> Any:
    """A kernel as a file has it; None for one of GPyTorch."""
    if not isinstance(kernel, theirs.Kernel):
        return kernel if isinstance(kernel, str) else None
    plain = clone(kernel)
    for name, value in kernel.get_params().items():
        if isinstance(value, np.ndarray):
            plain.set_params(**{name: value.tolist()})
    return plain
