"""A scikit-learn regressor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel
from scipy.special import ndtri
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from sgdgp.posterior import condition
from sgdgp.sklearn import arguments
from sgdgp.sklearn.model import (
    conditioned_model,
    learn,
    mean_and_spread,
    starting_model,
)
from sgdgp.solvers import Solver

_ROWS = 4096
"""Points at a time: enough to use all cores, few beside data that want a solver."""


class SGDGPRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Gaussian process regression for many observations.

    ``fit`` learns the hyperparameters by maximising the marginal likelihood and solves
    for the posterior; see ``sgdgp.fit`` and ``sgdgp.condition``. Standard deviations
    and covariances are exact up to 2,000 rows, and then off by some per cent, see
    ``PathwisePosterior.variance``; means carry no such error.

    Args:
        kernel: A name, "matern12", "matern32", "matern52", "rbf", "rq" or "linear",
            or a sum of names such as "linear + matern32"; or a GPyTorch kernel. Named
            kernels have a lengthscale for every column (ARD), which starts at the
            spread of the column, and a learned variance. A kernel object starts as it
            is and is never changed: a copy is learned.
        noise: Noise variance to start from, in units of the standardised targets if
            ``normalize_y``, else of the targets.
        normalize_y: Standardise the targets, each output for itself, and learn a
            constant prior mean of them. Else the prior mean of the targets is zero.
        optimizer: "adam", None to keep the hyperparameters as they start, or a
            callable that makes a ``torch.optim.Optimizer`` from parameters.
        steps: Optimiser steps at most.
        num_samples: Posterior samples; 0 for means alone.
        solver: A solver such as ``sgdgp.SDD()``, its name, or "auto".
        device: "auto" for a GPU if there is one, or a device.
        dtype: "float64" or "float32" of the computation. Predictions are float64.
        random_state: Seed of everything random: an int, a ``RandomState`` or None.
        verbose: Show progress bars.

    Attributes:
        kernel_: Learned kernel, in units of the standardised targets.
        noise_: Learned noise variance in units of the targets; (T,) for y (n, T).
        posterior_: The posterior, of the standardised targets
            (y - y_mean_) / y_scale_ and of tensors.
        solver_: Name of the solver that found it.
        n_iter_: Optimiser steps made.
        learning_: What ``sgdgp.fit`` returned, None without optimiser.
        y_mean_: Mean subtracted from the targets, (T,).
        y_scale_: Scale the targets were divided by, (T,).
        device_: Device of the posterior.
        n_features_in_: Number of input columns.
        feature_names_in_: Names of input columns, if X was a DataFrame.

    Example:
        >>> import numpy as np
        >>> from sgdgp.sklearn import SGDGPRegressor
        >>> X = np.linspace(0, 1, 40)[:, None]
        >>> y = np.sin(6 * X[:, 0])
        >>> model = SGDGPRegressor(random_state=0).fit(X, y)
        >>> mean, std = model.predict([[0.25], [0.5]], return_std=True)
        >>> print(mean.round(2))
        [1.   0.14]
        >>> model.sample_y([[0.25], [0.5]], n_samples=3).shape
        (2, 3)
        >>> round(model.score(X, y), 2)
        1.0
    """

    @arguments.checked_later
    def __init__(
        self,
        kernel: Kernel | str = "matern32",
        *,
        noise: float = 0.1,
        normalize_y: bool = True,
        optimizer: str | arguments.Optimiser | None = "adam",
        steps: int = 100,
        num_samples: int = 64,
        solver: Solver | str = "auto",
        device: str | torch.device = "auto",
        dtype: Any = "float64",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.kernel = kernel
        self.noise = noise
        self.normalize_y = normalize_y
        self.optimizer = optimizer
        self.steps = steps
        self.num_samples = num_samples
        self.solver = solver
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SGDGPRegressor:
        """Learn the hyperparameters and solve for the posterior.

        Args:
            X: Inputs (n, d).
            y: Targets (n,), or (n, T) for T outputs that share kernel and noise.
            sample_weight: Weights (n,). An observation of weight w counts w times: its
                noise variance is divided by w. Rows of weight zero are left out.

        Returns:
            Itself.

        Raises:
            ValueError: Data or parameters do not fit; says which and why.
        """
        settings = arguments.Settings.of(self.get_params(deep=False))
        X, y = self._validated(X, y, reset=True)
        weights, rows = arguments.check_weights(sample_weight, X)
        X, targets = X[rows], y[rows].reshape(-1, 1 if y.ndim == 1 else y.shape[1])
        self.device_, self._dtype = settings.device, settings.dtype
        self._is_flat = y.ndim == 1
        self.y_mean_ = np.zeros(targets.shape[1])
        self.y_scale_ = np.ones(targets.shape[1])
        if self.normalize_y:
            self.y_mean_, self.y_scale_ = (
                found.numpy()
                for found in mean_and_spread(
                    torch.from_numpy(targets),
                    None if weights is None else torch.from_numpy(weights),
                )
            )

        x, z = self._tensor(X), self._model_targets(targets)
        w = None if weights is None else self._tensor(weights)
        random = check_random_state(self.random_state)
        model = starting_model(
            self.kernel, x, z, w, settings.noise, with_mean=bool(self.normalize_y)
        )
        seed = arguments.draw_seed(random)
        with _in_other_words():
            self.learning_ = learn(model, x, z, w, settings, seed)
        self.n_iter_ = 0 if self.learning_ is None else self.learning_.steps
        self.kernel_ = model.covar_module.eval().requires_grad_(False)
        self._noise = model.likelihood.noise.item()
        noises = self._noise * self.y_scale_**2
        self.noise_ = float(noises[0]) if self._is_flat else noises
        with _in_other_words():
            posterior = condition(
                conditioned_model(model, w),
                x,
                z,
                solver=settings.solver,
                num_samples=settings.num_samples,
                seed=arguments.draw_seed(random),
                progress=settings.progress,
            )
        learned = () if self.learning_ is None else self.learning_.warnings
        return self._keep(posterior, learned)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> SGDGPRegressor:
        """Take in more observations; the hyperparameters stay as they are.

        The solve starts from the present one and keeps its sample functions, see
        ``posterior.update``. The first call on an unfitted regressor is ``fit``.

        Args:
            X: New inputs (m, d).
            y: New targets (m,) or (m, T).
            sample_weight: Weights of the new rows (m,).

        Returns:
            Itself.

        Raises:
            ValueError: The data do not fit those seen before.
        """
        if not hasattr(self, "posterior_"):
            return self.fit(X, y, sample_weight)
        X, y = self._validated(X, y, reset=False)
        weights, rows = arguments.check_weights(sample_weight, X)
        if y.shape[1:] != (() if self._is_flat else self.y_mean_.shape):
            known = "(n,)" if self._is_flat else f"(n, {len(self.y_mean_)})"
            raise ValueError(f"y: expected shape {known} as before, found {y.shape}")
        x = self._tensor(X[rows])
        z = self._model_targets(y[rows].reshape(-1, len(self.y_mean_)))
        noise = x.new_full((len(x),), self._noise)
        if weights is not None:
            noise /= self._tensor(weights)
        with _in_other_words():
            posterior = self.posterior_.update(
                x, z, noise=noise, progress=bool(self.verbose)
            )
        return self._keep(posterior)

    def predict(
        self,
        X: Any,
        return_std: bool = False,
        return_cov: bool = False,
        *,
        observation_noise: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Posterior mean at X, and how sure it is.

        Args:
            X: Inputs (n', d).
            return_std: Return standard deviations as well.
            return_cov: Return the joint covariance as well.
            observation_noise: Standard deviations and covariance of new observations
                instead of the function.

        Returns:
            The mean (n',) or (n', T); or with the standard deviation of the same shape;
            or with the covariance (n', n') or (n', n', T).

        Raises:
            ValueError: Both were asked for, X does not fit, or there are no samples.
        """
        if return_std and return_cov:
            raise ValueError(
                "return_std, return_cov: expected at most one, found both; the "
                "variances are the diagonal of the covariance"
            )
        x = self._new_inputs(X)
        noise = self._noise if observation_noise else 0.0
        if return_std:
            # Both in one pass over the kernel.
            found = self.posterior_.predict(x, batch_size=_ROWS, progress=False)
            mean, variance = (_with_outputs(values, axes=1) for values in found)
            std = self.y_scale_ * np.sqrt(variance + noise)
            return self._user_units(mean), self._shaped(std)
        with torch.no_grad():
            mean = _with_outputs(self.posterior_.mean(x), axes=1)
        if not return_cov:
            return self._user_units(mean)
        with torch.no_grad():
            joint = self.posterior_.predict(x).covariance_matrix.cpu().numpy()
        n, outputs = mean.shape
        blocks = joint.reshape(n, outputs, n, outputs).astype(np.float64)
        covariance = np.einsum("itjt->ijt", blocks).copy()
        covariance += noise * np.eye(len(mean))[..., None]
        return self._user_units(mean), self._shaped(self.y_scale_**2 * covariance)

    def predict_quantiles(
        self,
        X: Any,
        quantiles: Any = (0.025, 0.5, 0.975),
        *,
        observation_noise: bool = True,
    ) -> np.ndarray:
        """Quantiles of new observations at X.

        Args:
            X: Inputs (n', d).
            quantiles: Probabilities (q,) between 0 and 1.
            observation_noise: Whether of new observations, or of the function.

        Returns:
            Quantiles (n', q), or (n', T, q).

        Raises:
            ValueError: A probability or X does not fit, or there are no samples.
        """
        levels = arguments.check_quantiles(quantiles)
        mean, std = self.predict(
            X, return_std=True, observation_noise=observation_noise
        )
        return mean[..., None] + std[..., None] * ndtri(levels)

    def sample_y(
        self,
        X: Any,
        n_samples: int = 1,
        random_state: int | np.random.RandomState | None = 0,
    ) -> np.ndarray:
        """Values at X of functions drawn from the posterior.

        Every call draws new functions, which costs a solve with ``n_samples`` columns;
        the same ``random_state`` draws the same functions. The ``num_samples``
        functions behind the standard deviations are at hand without one, as
        ``posterior_.samples``.

        Args:
            X: Inputs (n', d).
            n_samples: Number of functions s.
            random_state: Seed of the functions.

        Returns:
            Values (n', s), or (n', T, s).

        Raises:
            ValueError: ``n_samples`` or X does not fit.
        """
        count = arguments.check_whole("n_samples", n_samples, 1)
        x = self._new_inputs(X)
        functions = self.posterior_.draw(count, seed=arguments.draw_seed(random_state))
        values = function_values(functions, x)
        values = self.y_mean_[:, None] + self.y_scale_[:, None] * values
        return values[:, 0] if self._is_flat else values

    def _validated(
        self, X: Any, y: Any, *, reset: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        x, y = validate_data(
            self, X, y, reset=reset, dtype=np.float64, multi_output=True, y_numeric=True
        )
        return x, y.astype(np.float64)

    def _new_inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return self._tensor(validate_data(self, X, reset=False, dtype=np.float64))

    def _tensor(self, array: np.ndarray) -> Tensor:
        # A copy: PyTorch does not know arrays that must not be written to.
        return torch.tensor(array, dtype=self._dtype, device=self.device_)

    def _model_targets(self, targets: np.ndarray) -> Tensor:
        """Standardised targets (n, T), or (n,) of a single output."""
        z = self._tensor((targets - self.y_mean_) / self.y_scale_)
        return z[:, 0] if z.shape[1] == 1 else z

    def _user_units(self, mean: np.ndarray) -> np.ndarray:
        return self._shaped(self.y_mean_ + self.y_scale_ * mean)

    def _shaped(self, array: np.ndarray) -> np.ndarray:
        return array[..., 0] if self._is_flat else array

    def _keep(
        self, posterior: Any, earlier_warnings: tuple[str, ...] = ()
    ) -> SGDGPRegressor:
        for sentence in earlier_warnings + tuple(posterior.solution.warnings):
            warnings.warn(sentence, ConvergenceWarning, stacklevel=3)
        self.posterior_ = posterior
        self.solver_ = posterior.solution.solver
        return self


@contextmanager
def _in_other_words() -> Iterator[None]:
    """What solves and fits warn of goes out as a ``ConvergenceWarning`` instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"sgdgp\.\w+: (?!The mean)")
        yield


def function_values(functions: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    """Values of s functions (n', T, s)."""
    with torch.no_grad():
        return _with_outputs(functions(x).movedim(0, -1), axes=2)


def _with_outputs(values: Tensor, axes: int) -> np.ndarray:
    """An axis for the only output, behind that of the points, if there is none."""
    array = values.double().cpu().numpy()
    return array if array.ndim > axes else np.expand_dims(array, 1)
