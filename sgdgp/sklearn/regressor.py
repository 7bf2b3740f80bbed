"""A scikit-learn regressor."""

from __future__ import annotations

import copy
import os
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
from sklearn.gaussian_process import kernels as theirs
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from sgdgp.core.codec import fitting, read_values, write_values
from sgdgp.core.files import path_of, place_of, reads
from sgdgp.core.inference import outside_inference_mode
from sgdgp.features.storage import given_by_kernel
from sgdgp.posterior import condition
from sgdgp.sklearn import arguments
from sgdgp.sklearn.kernels import Hyperparameter, Translated, free_of, translate
from sgdgp.sklearn.model import (
    conditioned_model,
    data_of,
    hyperparameters_of,
    learn,
    log_likelihood,
    make_kernel,
    mean_and_spread,
    starting_model,
)
from sgdgp.sklearn.storage import KIND, restore, values_of
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
            or a sum of names such as "linear + matern32"; or a kernel of GPyTorch or
            scikit-learn. Named kernels have a lengthscale for every column (ARD), which
            starts at the spread of the column, and a learned variance. A kernel object
            starts as it is and is never changed: a copy is learned. Of scikit-learn's,
            what is "fixed" stays, other bounds do not count, and a ``WhiteKernel`` in a
            sum is the noise, instead of the argument ``noise``.
        noise: Noise variance to start from, in units of the standardised targets if
            ``normalize_y``, else of the targets. Or those of all rows (n,), which are
            not learned, as ``alpha`` in scikit-learn; ``partial_fit`` then takes those
            of its rows from here (``set_params``).
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
        kernel_: Learned kernel, in units of the standardised targets; scikit-learn's if
            one was given, else GPyTorch's.
        noise_: Learned noise variance in units of the targets; (T,) for y (n, T). Of
            given variances (n,), or (n, T).
        log_marginal_likelihood_value_: Log marginal likelihood of the standardised
            targets, of all outputs together; found when it is asked for.
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
        target_names_: Names of the targets, if y was a Series or DataFrame, else None.

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

    _likelihood_value: float | None

    @arguments.checked_later
    def __init__(
        self,
        kernel: Kernel | theirs.Kernel | str = "matern32",
        *,
        noise: float | np.ndarray = 0.1,
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
            y: Targets (n,) or (n, 1), or (n, T) for T outputs that share kernel and
                noise.
            sample_weight: Weights (n,). An observation of weight w counts w times: its
                noise variance is divided by w. Rows of weight zero are left out.

        Returns:
            Itself.

        Raises:
            ValueError: Data or parameters do not fit; says which and why.
        """
        settings = arguments.Settings.of(self.get_params(deep=False))
        self.target_names_ = _names_of(y)
        X, y = self._validated(X, y, reset=True)
        weights, rows = arguments.check_weights(sample_weight, X)
        self.device_, self._dtype = settings.device, settings.dtype
        kernel, noise = self._start(self._tensor(X[0]), settings)
        X, targets = X[rows], y[rows].reshape(-1, 1 if y.ndim == 1 else y.shape[1])
        self._is_flat = targets.shape[1] == 1
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
        start: float | Tensor
        if isinstance(noise, np.ndarray):
            given = arguments.noise_of_rows(noise, len(y))[rows]
            start, w = self._tensor(given if weights is None else given / weights), None
        else:
            given, start = None, noise
        random = check_random_state(self.random_state)
        model = starting_model(kernel, x, z, w, start, with_mean=bool(self.normalize_y))
        seed = arguments.draw_seed(random)
        with _in_other_words():
            self.learning_ = learn(model, x, z, w, settings, seed)
        self.n_iter_ = 0 if self.learning_ is None else self.learning_.steps
        self._noise: float | None = None
        if given is None:
            self._noise = model.likelihood.noise.item()
        self.kernel_ = model.covar_module.eval().requires_grad_(False)
        if isinstance(kernel, Translated):
            self.kernel_ = kernel.learned(self.kernel, self._noise)
        self.noise_ = self._variances_of_targets(
            self._noise if given is None else given
        )
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
        if y.size != len(y) * len(self.y_mean_):
            known = "(n,)" if self._is_flat else f"(n, {len(self.y_mean_)})"
            raise ValueError(f"y: expected shape {known} as before, found {y.shape}")
        given = (
            arguments.check_noise(self.noise) if self._noise is None else self._noise
        )
        variances = arguments.noise_of_rows(given, len(y))[rows]
        x = self._tensor(X[rows])
        z = self._model_targets(y[rows].reshape(-1, len(self.y_mean_)))
        noise = self._tensor(variances if weights is None else variances / weights)
        with _in_other_words():
            posterior = self.posterior_.update(
                x, z, noise=noise, progress=bool(self.verbose)
            )
        if self._noise is None:
            more = self._variances_of_targets(variances)
            self.noise_ = np.concatenate([self.noise_, more])
        return self._keep(posterior)

    def predict(
        self,
        X: Any,
        return_std: bool = False,
        return_cov: bool = False,
        *,
        observation_noise: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Posterior mean at X, and how sure it is; before ``fit`` those of the prior.

        The prior of a named kernel is that of columns with spread one.

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
            RuntimeError: Both were asked for.
            ValueError: X does not fit, there are no samples, or only the noise of the
                training rows is known.
        """
        if return_std and return_cov:
            raise RuntimeError(
                "At most one of return_std or return_cov can be requested."
            )
        if not hasattr(self, "posterior_"):
            covariance = self._prior_covariance(X, observation_noise)
            zero = np.zeros(len(covariance))
            if return_cov:
                return zero, covariance
            return (zero, np.sqrt(np.diag(covariance))) if return_std else zero
        x = self._new_inputs(X)
        noise = self._new_noise(self._noise) if observation_noise else 0.0
        if return_std:
            # Both in one pass over the kernel.
            found = self.posterior_.predict(
                x, batch_size=_ROWS, progress=bool(self.verbose)
            )
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
        """Values at X of functions drawn from the posterior; before ``fit`` the prior.

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
        if not hasattr(self, "posterior_"):
            mean, covariance = self.predict(X, return_cov=True)
            random = check_random_state(random_state)
            return random.multivariate_normal(mean, covariance, count).T
        x = self._new_inputs(X)
        functions = self.posterior_.draw(count, seed=arguments.draw_seed(random_state))
        values = function_values(functions, x)
        values = self.y_mean_[:, None] + self.y_scale_[:, None] * values
        return values[:, 0] if self._is_flat else values

    def log_marginal_likelihood(
        self, theta: Any = None, eval_gradient: bool = False, clone_kernel: bool = True
    ) -> float | tuple[float, np.ndarray]:
        """Log marginal likelihood of the standardised targets, of all outputs together.

        Exact up to 1,000 rows, as in scikit-learn. With more it and its gradient are
        stochastic estimates; ``sgdgp.log_marginal_likelihood`` tells their error.

        Args:
            theta: Logarithms of the hyperparameters of ``kernel_``: scikit-learn's
                ``kernel_.theta``, or of a GPyTorch kernel all positive parameters in
                their order. Default: the learned ones.
            eval_gradient: Return the gradient with respect to theta as well.
            clone_kernel: As in scikit-learn, where False saves a copy; ``kernel_`` is
                never changed here.

        Returns:
            The value; or with the gradient (len(theta),).

        Raises:
            NotFittedError: There are no targets yet.
            ValueError: theta does not fit, or a gradient is asked for without it.
        """
        if theta is None:
            if eval_gradient:
                raise ValueError("Gradient can only be evaluated for theta!=None")
            return self.log_marginal_likelihood_value_
        check_is_fitted(self, "posterior_")
        value, gradient = self._likelihood(theta, eval_gradient)
        return (value, gradient) if eval_gradient else value

    @property
    def log_marginal_likelihood_value_(self) -> float:
        """Log marginal likelihood of what was learned."""
        check_is_fitted(self, "posterior_")
        if self._likelihood_value is None:
            theta = None if isinstance(self.kernel_, Kernel) else self.kernel_.theta
            self._likelihood_value = self._likelihood(theta, False)[0]
        return self._likelihood_value

    def _likelihood(self, theta: Any, with_gradient: bool) -> tuple[float, np.ndarray]:
        """Its value, and its gradient if wanted; theta None is what was learned."""
        x, y, noise = data_of(self.posterior_)
        found: list[Hyperparameter | None]
        if isinstance(self.kernel_, Kernel):
            kernel = copy.deepcopy(self.kernel_).double()
            found = [*hyperparameters_of(kernel)]
        else:
            translated = translate(self.kernel_, x[0])
            kernel, known = translated.kernel, translated.hyperparameters
            # None stands for the noise.
            found = [known.get(each.name) for each in free_of(self.kernel_)]
        sizes = [1 if each is None else each.raw.numel() for each in found]
        if theta is not None:
            theta = torch.from_numpy(np.array(theta, dtype=np.float64))
            if theta.shape != (sum(sizes),):
                raise ValueError(
                    "theta has not the correct number of entries. Should be "
                    f"{sum(sizes)}; given are {theta.numel()}"
                )
            for each, part in zip(found, theta.split(sizes), strict=True):
                if each is not None:
                    each.assign(part)
                elif self._noise is not None:
                    noise = noise * (float(part.exp()) / self._noise)
        variables = [noise if each is None else each.raw for each in found]
        if not with_gradient:
            return log_likelihood(kernel, x, y, noise)[0], np.zeros(0)
        for variable in variables:
            variable.requires_grad_()
        value, gradients = log_likelihood(kernel, x, y, noise, variables)
        slopes = [
            (noise * slope).sum().reshape(1) if each is None else each.slope(slope)
            for each, slope in zip(found, gradients, strict=True)
        ]
        return value, torch.cat([x.new_zeros(0), *slopes]).detach().cpu().numpy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted regressor into a file; ``load`` or ``sgdgp.load`` reads it.

        The file (safetensors, with a checksum, no code) holds data, hyperparameters
        and posterior. Not in it are a kernel of GPyTorch, which is given on loading,
        and a solver, an optimiser or a random state of another class than the
        package's own, with a warning.

        Args:
            path: The file; its directory must exist.

        Raises:
            NotFittedError: There is nothing to save yet.
            OSError: The file could not be written; an old one is untouched.
            StorageError: There is no such directory, or the path is one.
        """
        check_is_fitted(self, "posterior_")
        write_values(place_of(path), KIND, values_of(self), given_by_kernel)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "auto",
        *,
        kernel: Kernel | None = None,
    ) -> SGDGPRegressor:
        """Read a regressor that was saved; it predicts the same numbers.

        Args:
            path: The file.
            device: Where it computes.
            kernel: One of GPyTorch like that which was given, where it was one.

        Raises:
            StorageError: The file is missing, damaged, no regressor, or of a newer
                format; or the kernel is built otherwise.
            TypeError: A kernel is needed and not given, or the file holds its own.
        """
        return load_regressor(path, device, kernel=kernel)

    def __sklearn_tags__(self) -> Any:
        """Without ``fit`` there is the prior, as in ``GaussianProcessRegressor``."""
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags

    def _start(
        self, like: Tensor, settings: arguments.Settings
    ) -> tuple[Kernel | Translated | str, float | np.ndarray]:
        """Kernel and noise to start from, for inputs like this one (d,)."""
        if not isinstance(self.kernel, theirs.Kernel):
            return self.kernel, settings.noise
        kernel = translate(self.kernel, like)
        if kernel.noise is None:
            return kernel, settings.noise
        if isinstance(settings.noise, np.ndarray):
            raise ValueError(
                "noise: expected a number beside a WhiteKernel, found one for each row"
            )
        return kernel, kernel.noise

    def _prior_covariance(self, X: Any, observation_noise: bool) -> np.ndarray:
        """Prior covariance (n', n') at X, with noise if wanted."""
        settings = arguments.Settings.of(self.get_params(deep=False))
        x = torch.from_numpy(np.array(self._checked(X), dtype=np.float64))
        start, noise = self._start(x[0], settings)
        kernel = make_kernel(start, torch.ones_like(x[0]), 1.0)
        with torch.no_grad():
            covariance = kernel(x).to_dense().numpy().copy()
        if observation_noise:
            covariance += self._new_noise(noise) * np.eye(len(covariance))
        return covariance

    def _new_noise(self, noise: float | np.ndarray | None) -> float:
        """The noise variance of new observations."""
        if not isinstance(noise, float):
            raise ValueError(
                "observation_noise: of noise that was given for each row only that of "
                "the training rows is known; expected False"
            )
        return noise

    def _variances_of_targets(self, noise: Any) -> float | np.ndarray:
        """A noise variance, or those of rows (n,), in the units of the targets."""
        found = self._shaped(np.multiply.outer(noise, self.y_scale_**2))
        return found if found.ndim else float(found)

    def _validated(
        self, X: Any, y: Any, *, reset: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        x, y = validate_data(
            self, X, y, reset=reset, dtype="numeric", multi_output=True, y_numeric=True
        )
        return x, y.astype(np.float64)

    def _checked(self, X: Any) -> np.ndarray:
        return validate_data(self, X, reset=False, dtype="numeric")

    def _new_inputs(self, X: Any) -> Tensor:
        return self._tensor(self._checked(X))

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
        found = [part.solution for part in posterior.solved]
        told = [sentence for solution in found for sentence in solution.warnings]
        for sentence in dict.fromkeys((*earlier_warnings, *told)):
            warnings.warn(sentence, ConvergenceWarning, stacklevel=3)
        self.posterior_ = posterior
        self._likelihood_value = None
        self.solver_ = found[0].solver
        return self


@reads(KIND)
@outside_inference_mode
def load_regressor(
    path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    kernel: Kernel | None = None,
) -> SGDGPRegressor:
    """Read a regressor; see ``SGDGPRegressor.load``."""
    place = path_of(path)
    if not isinstance(device, str | torch.device):
        raise TypeError(
            f"device: expected one for {place}, a regressor, found {device!r}"
        )
    found = read_values(place, KIND, arguments.check_device(device))
    regressor = SGDGPRegressor(device=device)
    with fitting(place, "version"):
        holds = found["parameters"]["kernel"] is not None
    if holds and kernel is not None:
        raise TypeError(
            f"kernel: {place} holds its own; expected none, found {kernel!r}"
        )
    if not holds and not isinstance(kernel, Kernel):
        raise TypeError(
            f"kernel: needed for {place}, which holds the parameters of a kernel of "
            f"GPyTorch but not its code; expected one built alike, found {kernel!r}"
        )
    with fitting(place, "kernel" if kernel else "version"):
        restore(regressor, found, kernel)
    return regressor


def _names_of(y: Any) -> list[str] | None:
    """Names of the columns of targets, where they have some."""
    names = [getattr(y, "name", None)] if getattr(y, "ndim", 0) == 1 else None
    names = list(getattr(y, "columns", names or [None]))
    return None if any(name is None for name in names) else [str(n) for n in names]


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
