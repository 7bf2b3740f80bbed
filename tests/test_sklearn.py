"""SGDGPRegressor: scikit-learn's habits, and the posterior behind them."""

from __future__ import annotations

import doctest
import pickle
import warnings
from typing import Any

import gpytorch
import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from gpytorch.kernels import MaternKernel, PeriodicKernel, RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from scipy.stats import norm
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import sgdgp
from sgdgp.sklearn import KERNEL_NAMES, SGDGPRegressor


# A few steps learn what the checks ask for, as scikit-learn's own ensembles are checked
# with a few trees.
@parametrize_with_checks([SGDGPRegressor(steps=15)])
def test_scikit_learn_checks_pass(estimator: SGDGPRegressor, check: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def some_data(n: int = 60, d: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    X = random.rand(n, d)
    return X, np.sin(5 * X[:, 0]) + X[:, -1] + 0.1 * random.randn(n)


def a_kernel() -> ScaleKernel:
    kernel = ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=2)).double()
    kernel.outputscale = 1.3
    kernel.base_kernel.lengthscale = torch.tensor([0.4, 0.9])
    return kernel


def dense(kernel: gpytorch.kernels.Kernel, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return kernel(torch.tensor(a), torch.tensor(b)).to_dense().numpy()


def closed_form(
    kernel: gpytorch.kernels.Kernel,
    noise: float | np.ndarray,
    X: np.ndarray,
    z: np.ndarray,
    new: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and covariance of a zero-mean Gaussian process."""
    H = dense(kernel, X, X) + np.diag(np.broadcast_to(noise, len(X)))
    cross = dense(kernel, new, X)
    mean = cross @ np.linalg.solve(H, z)
    return mean, dense(kernel, new, new) - cross @ np.linalg.solve(H, cross.T)


def fixed(**parameters: Any) -> SGDGPRegressor:
    """A regressor that learns nothing."""
    settings = {"kernel": a_kernel(), "noise": 0.05, "optimizer": None}
    return SGDGPRegressor(**{**settings, "random_state": 0, **parameters})


def test_without_normalisation_the_mean_is_zero_and_outputs_do_not_move_each_other():
    X, y = some_data()
    new, far = some_data(9, seed=1)[0], np.full((1, 2), 1e3)
    model = fixed(normalize_y=False).fit(X, y + 5.0)
    mean, _ = closed_form(a_kernel(), 0.05, X, y + 5.0, new)
    np.testing.assert_allclose(model.predict(new), mean, rtol=1e-5)
    assert abs(model.predict(far)[0]) < 1e-12
    both = fixed(normalize_y=False).fit(X, np.stack([y + 5.0, 1e3 * y], 1))
    np.testing.assert_allclose(both.predict(new)[:, 0], mean, rtol=1e-5)


class TestPredict:
    def test_mean_is_the_closed_form_in_the_units_of_the_targets(self):
        X, y = some_data()
        y = 300.0 + 20.0 * y
        new = some_data(seed=1)[0]
        z = (y - y.mean()) / y.std()
        expected = y.mean() + y.std() * closed_form(a_kernel(), 0.05, X, z, new)[0]
        np.testing.assert_allclose(fixed().fit(X, y).predict(new), expected, rtol=1e-10)

    def test_std_and_covariance_are_the_closed_form_within_sampling_error(self):
        X, y = some_data()
        new = some_data(n=12, seed=1)[0]
        model = fixed(num_samples=2000).fit(X, y)
        covariance = y.var() * closed_form(a_kernel(), 0.05, X, y, new)[1]
        std = np.sqrt(np.diag(covariance))
        # sqrt(1 / 4000) = 1.6 %, and random features beside it
        _, found = model.predict(new, return_std=True)
        np.testing.assert_allclose(found, std, rtol=0.06)
        _, found = model.predict(new, return_cov=True)
        np.testing.assert_allclose(found, covariance, atol=0.06 * std.max() ** 2)

    def test_variances_are_the_diagonal_of_the_covariance(self):
        X, y = some_data()
        for noisy in (False, True):
            model = fixed().fit(X, y)
            mean, std = model.predict(X, return_std=True, observation_noise=noisy)
            again, covariance = model.predict(
                X, return_cov=True, observation_noise=noisy
            )
            np.testing.assert_allclose(mean, again, rtol=1e-9)
            np.testing.assert_allclose(std**2, np.diag(covariance), rtol=1e-9)

    def test_observation_noise_adds_the_noise_variance(self):
        X, y = some_data()
        model = fixed().fit(X, 7 * y)
        _, std = model.predict(X, return_std=True)
        _, noisy = model.predict(X, return_std=True, observation_noise=True)
        assert model.noise_ == pytest.approx(0.05 * np.var(7 * y))
        np.testing.assert_allclose(noisy**2 - std**2, model.noise_, rtol=1e-9)

    def test_both_std_and_covariance_are_refused_as_by_scikit_learn(self):
        X, y = some_data()
        for model in (fixed(), fixed().fit(X, y), GaussianProcessRegressor()):
            with pytest.raises(RuntimeError, match=r"^At most one of return_std or"):
                model.predict(X, return_std=True, return_cov=True)

    def test_without_samples_there_are_means_but_no_variances(self):
        X, y = some_data()
        model = fixed(num_samples=0).fit(X, y)
        np.testing.assert_allclose(model.predict(X), fixed().fit(X, y).predict(X))
        with pytest.raises(ValueError, match="num_samples"):
            model.predict(X, return_std=True)

    def test_before_fit_there_is_the_prior_as_in_scikit_learn(self):
        X, _ = some_data()
        for kernel in (2.0 * kernels.RBF([0.3, 0.9]), kernels.Matern(nu=0.5)):
            ours, own = SGDGPRegressor(kernel), GaussianProcessRegressor(kernel)
            np.testing.assert_array_equal(ours.predict(X), own.predict(X))
            for wanted in ("return_std", "return_cov"):
                for found, expected in zip(
                    ours.predict(X, **{wanted: True}),
                    own.predict(X, **{wanted: True}),
                    strict=True,
                ):
                    np.testing.assert_allclose(found, expected, atol=1e-12)
            np.testing.assert_allclose(
                ours.sample_y(X[:9], 4, random_state=3),
                own.sample_y(X[:9], 4, random_state=3),
                atol=1e-6,
            )
            noisy = ours.predict(X, return_std=True, observation_noise=True)[1]
            np.testing.assert_allclose(noisy**2, ours.predict(X, True)[1] ** 2 + 0.1)
        _, std = SGDGPRegressor("linear + rbf").predict(X, return_std=True)
        np.testing.assert_allclose(std**2, 1 + 0.25 * (X**2).sum(1))
        low, high = SGDGPRegressor().predict_quantiles(X, [0.1, 0.9]).T
        np.testing.assert_allclose(low, -high)

    def test_what_has_no_prior_needs_a_fit(self):
        with pytest.raises(NotFittedError):
            SGDGPRegressor().log_marginal_likelihood()
        assert not hasattr(SGDGPRegressor(), "log_marginal_likelihood_value_")
        with pytest.raises(AttributeError):
            GaussianProcessRegressor().log_marginal_likelihood()


THEIRS = {
    "rbf": 2.0 * kernels.RBF([0.3, 0.7]),
    "matern": kernels.Matern(0.4, nu=2.5) + kernels.RationalQuadratic(0.3, 1.7),
    "nu": 1.3 * kernels.Matern([0.4, 2.0], nu=1.5) * kernels.Matern(0.8, nu=0.5),
    "inf": kernels.Matern(0.4, nu=np.inf) + 0.5,
    "dot": 0.3 * kernels.DotProduct(0.7) + kernels.RBF(0.4, "fixed"),
    "white": kernels.ConstantKernel(2.0, "fixed") * kernels.RBF(0.4)
    + kernels.WhiteKernel(0.1),
    "periodic": 2.0 * kernels.ExpSineSquared(0.7, 1.4) * kernels.RBF(3.0),
}


class TestBesideScikitLearn:
    """The same call on ``GaussianProcessRegressor`` gives the same numbers."""

    @staticmethod
    def both(name: str, Y: np.ndarray, noise: Any, normalize_y: bool) -> Any:
        kernel = THEIRS[name]
        X = some_data(d=1 if name == "periodic" else 2)[0]
        ours = fixed(kernel=kernel, noise=noise, normalize_y=normalize_y)
        own = GaussianProcessRegressor(
            kernel,
            alpha=1e-14 if name == "white" else noise,
            optimizer=None,
            normalize_y=normalize_y,
        )
        return ours.fit(X, Y), own.fit(X, Y), some_data(n=9, d=X.shape[1], seed=1)[0]

    @pytest.mark.parametrize("name", THEIRS)
    @pytest.mark.parametrize("normalize_y", [False, True])
    def test_kernels_mean_what_they_mean_there(self, name: str, normalize_y: bool):
        y = 5 + 3 * some_data()[1]
        ours, own, new = self.both(name, y, 0.05, normalize_y)
        seen = {"observation_noise": name == "white"}
        for wanted in ("return_std", "return_cov"):
            for found, expected in zip(
                ours.predict(new, **{wanted: True}, **seen),
                own.predict(new, **{wanted: True}),
                strict=True,
            ):
                np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("name", THEIRS)
    def test_likelihoods_and_gradients_are_the_same(self, name: str):
        y = 5 + 3 * some_data()[1]
        ours, own, _ = self.both(name, y, 0.05, True)
        value = own.log_marginal_likelihood_value_
        assert ours.log_marginal_likelihood_value_ == pytest.approx(value, rel=1e-9)
        assert ours.log_marginal_likelihood() == ours.log_marginal_likelihood_value_
        np.testing.assert_allclose(ours.kernel_.theta, own.kernel_.theta, atol=1e-14)
        theta = own.kernel_.theta + np.linspace(-0.3, 0.4, len(own.kernel_.theta))
        expected, slopes = own.log_marginal_likelihood(theta, eval_gradient=True)
        again = ours.log_marginal_likelihood(theta, clone_kernel=False)
        assert again == pytest.approx(expected, rel=1e-9)
        found, gradient = ours.log_marginal_likelihood(theta, eval_gradient=True)
        assert found == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-8)
        # Asking changes nothing.
        np.testing.assert_allclose(ours.kernel_.theta, own.kernel_.theta, atol=1e-14)

    @pytest.mark.parametrize("columns", [None, 1, 2])
    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize("normalize_y", [False, True])
    def test_shapes_and_noise_of_rows(
        self, columns: int | None, per_row: bool, normalize_y: bool
    ):
        y = some_data()[1]
        Y = y if columns is None else np.stack([y, 7 - 2 * y**2][:columns], axis=1)
        noise = np.linspace(0.02, 0.6, 60) if per_row else 0.05
        ours, own, new = self.both("rbf", Y, noise, normalize_y)
        for wanted in ({}, {"return_std": True}, {"return_cov": True}):
            found, expected = ours.predict(new, **wanted), own.predict(new, **wanted)
            pairs = zip(found, expected, strict=True) if wanted else [(found, expected)]
            for one, other in pairs:
                assert one.shape == other.shape
                np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)
        for count in (1, 3):
            found, expected = ours.sample_y(new, count), own.sample_y(new, count)
            assert found.shape == expected.shape
        value = own.log_marginal_likelihood_value_
        assert ours.log_marginal_likelihood_value_ == pytest.approx(value, rel=1e-9)
        square = np.square(ours.y_scale_) * (noise[:, None] if per_row else noise)
        np.testing.assert_allclose(np.squeeze(ours.noise_), np.squeeze(square))

    def test_learning_ends_at_their_likelihood(self):
        X, y = some_data()
        kernel = 1.0 * kernels.RBF([1.0, 1.0]) + kernels.WhiteKernel(0.1)
        ours = SGDGPRegressor(kernel, random_state=0, steps=300).fit(X, y)
        own = GaussianProcessRegressor(kernel, normalize_y=True).fit(X, y)
        assert ours.kernel == kernel
        value = own.log_marginal_likelihood_value_
        assert value - 0.5 < ours.log_marginal_likelihood_value_ < value + 0.5
        np.testing.assert_allclose(ours.kernel_.theta, own.kernel_.theta, atol=0.5)

    def test_what_is_fixed_stays(self):
        kernel = kernels.ConstantKernel(2.0, "fixed") * kernels.RBF(0.9)
        kernel += kernels.WhiteKernel(0.03, "fixed")
        model = SGDGPRegressor(kernel, random_state=0, steps=5).fit(*some_data())
        assert model.kernel_.k1.k1.constant_value == 2.0
        assert model.kernel_.k2.noise_level == 0.03
        assert model._noise == pytest.approx(0.03)
        assert model.kernel_.k1.k2.length_scale != 0.9
        kernel = kernels.RBF(0.9, "fixed") + kernels.WhiteKernel(0.03, "fixed")
        model = SGDGPRegressor(kernel, normalize_y=False).fit(*some_data())
        assert model.learning_ is None

    def test_theta_of_other_kernels_is_that_of_the_same_kernel(self):
        X, y = some_data()
        ours = fixed(noise=0.05).fit(X, y)
        own = GaussianProcessRegressor(
            1.3 * kernels.Matern([0.4, 0.9], nu=1.5),
            alpha=0.05,
            optimizer=None,
            normalize_y=True,
        ).fit(X, y)
        value = own.log_marginal_likelihood_value_
        assert ours.log_marginal_likelihood_value_ == pytest.approx(value, rel=1e-6)
        theta = own.kernel_.theta + 0.2
        expected, slopes = own.log_marginal_likelihood(theta, eval_gradient=True)
        found, gradient = ours.log_marginal_likelihood(theta, eval_gradient=True)
        assert found == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-6)

    def test_more_rows_than_are_factorised_are_estimated(self):
        X, y = some_data(n=1200)
        kernel = 2.0 * kernels.RBF(0.5) + kernels.WhiteKernel(0.1)
        ours = fixed(kernel=kernel).fit(X, y)
        own = GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True)
        value = own.fit(X, y).log_marginal_likelihood_value_
        assert ours.log_marginal_likelihood_value_ == pytest.approx(value, abs=3.0)

    def test_refusals_are_in_their_words(self):
        X, y = some_data()
        ours = fixed(kernel=kernels.RBF()).fit(X, y)
        own = GaussianProcessRegressor(kernels.RBF(), alpha=0.05).fit(X, y)
        for call in (
            lambda model: model.predict([["a", "b"]]),
            lambda model: model.predict(X[:, :1]),
            lambda model: model.predict(X[0]),
            lambda model: model.predict(X[None]),
            lambda model: model.predict(np.full((2, 2), np.nan)),
            lambda model: model.predict(X + 1j),
            lambda model: model.fit(X, y[:3]),
            lambda model: model.fit(X, y * np.nan),
            lambda model: model.fit(X, None),
            lambda model: model.log_marginal_likelihood(eval_gradient=True),
        ):
            words = []
            for model in (own, ours):
                with pytest.raises((ValueError, TypeError)) as caught:
                    call(model)
                words.append((type(caught.value), str(caught.value)))
            (kind, theirs), (other, here) = words
            assert kind is other
            assert theirs.replace(type(own).__name__, type(ours).__name__) == here
        with pytest.raises(ValueError, match=r"^noise must be .* \(3 != 60\)$"):
            fixed(noise=np.ones(3)).fit(X, y)
        with pytest.raises(ValueError, match=r"alpha must be .* \(3 != 60\)$"):
            GaussianProcessRegressor(alpha=np.ones(3)).fit(X, y)
        with pytest.raises(ValueError, match="Should be 1; given are 2"):
            ours.log_marginal_likelihood([0.0, 1.0])

    def test_noise_of_rows_goes_on_with_more_rows(self):
        X, y = some_data()
        noise = np.linspace(0.02, 0.6, 60)
        w = np.linspace(0.5, 2.0, 60)
        model = fixed(normalize_y=False, noise=noise[:50])
        model.fit(X[:50], y[:50], sample_weight=w[:50])
        model.set_params(noise=noise[50:])
        model.partial_fit(X[50:], y[50:], sample_weight=w[50:])
        expected = closed_form(a_kernel(), noise / w, X, y, X)[0]
        np.testing.assert_allclose(model.predict(X), expected, atol=1e-7)
        np.testing.assert_allclose(model.noise_, noise)
        for ask in (model.predict_quantiles, fixed(noise=noise).predict_quantiles):
            with pytest.raises(ValueError, match=r"observation_noise: .* expected Fal"):
                ask(X)
        assert model.predict_quantiles(X, observation_noise=False).shape == (60, 3)


class TestQuantiles:
    def test_are_those_of_a_gaussian(self):
        X, y = some_data()
        model = fixed().fit(X, y)
        for noisy in (True, False):
            mean, std = model.predict(X, return_std=True, observation_noise=noisy)
            found = model.predict_quantiles(X, [0.1, 0.5], observation_noise=noisy)
            np.testing.assert_allclose(found[:, 1], mean, rtol=1e-12)
            np.testing.assert_allclose(found[:, 0], norm(mean, std).ppf(0.1))

    def test_cover_new_observations_as_often_as_they_say(self):
        X, y = some_data(n=200)
        new, seen = some_data(n=1000, seed=1)
        low, high = (
            SGDGPRegressor(random_state=0)
            .fit(X, y)
            .predict_quantiles(new, [0.05, 0.95])
            .T
        )
        # three standard errors of 1,000 points, and as much for the learned noise
        assert np.mean((low < seen) & (seen < high)) == pytest.approx(0.9, abs=0.06)

    @pytest.mark.parametrize("wrong", [[0.0], 1.0, [[0.5]], [float("nan")]])
    def test_that_do_not_exist_are_refused(self, wrong: Any):
        model = fixed().fit(*some_data())
        with pytest.raises(ValueError, match="quantiles: expected numbers strictly"):
            model.predict_quantiles(some_data()[0], wrong)


class TestSamples:
    def test_one_state_is_one_set_of_functions(self):
        X, y = some_data()
        model = fixed().fit(X, y)
        values = model.sample_y(X, 3, random_state=5)
        assert values.shape == (60, 3)
        np.testing.assert_allclose(
            model.sample_y(X[10:20], 3, random_state=5), values[10:20], atol=1e-8
        )
        other = model.sample_y(X, 3, random_state=np.random.RandomState(6))
        assert np.abs(other - values).max() > 0.01

    def test_have_the_posterior_moments(self):
        X, y = some_data()
        new = some_data(n=12, seed=1)[0]
        values = fixed().fit(X, y).sample_y(new, 2000)
        z = (y - y.mean()) / y.std()
        mean, covariance = closed_form(a_kernel(), 0.05, X, z, new)
        std = y.std() * np.sqrt(np.diag(covariance))
        error = (values.mean(1) - (y.mean() + y.std() * mean)) / std
        assert np.abs(error).max() < 5 / np.sqrt(2000)
        np.testing.assert_allclose(values.std(1), std, rtol=0.06)


class TestWeights:
    def test_divide_the_noise(self):
        X, y = some_data()
        new = some_data(seed=1)[0]
        w = np.random.RandomState(2).gamma(1.0, size=60)
        model = fixed(normalize_y=False, kernel=a_kernel()).fit(X, y, sample_weight=w)
        expected = closed_form(a_kernel(), 0.05 / w, X, y, new)[0]
        np.testing.assert_allclose(model.predict(new), expected, atol=1e-7)

    def test_of_whole_numbers_teach_what_repeated_rows_teach(self):
        X, y = some_data(n=40)
        w = np.random.RandomState(1).randint(0, 4, size=40)
        weighted = SGDGPRegressor(random_state=0).fit(X, y, sample_weight=w)
        repeated = SGDGPRegressor(random_state=0).fit(X.repeat(w, 0), y.repeat(w))
        assert weighted.n_iter_ == repeated.n_iter_
        assert weighted.noise_ == pytest.approx(repeated.noise_, rel=1e-6)
        np.testing.assert_allclose(
            weighted.predict(X), repeated.predict(X), rtol=1e-6, atol=1e-7
        )

    def test_of_one_half_on_doubled_rows_change_nothing(self):
        X, y = some_data(n=30)
        single = SGDGPRegressor(random_state=0).fit(X, y)
        double = SGDGPRegressor(random_state=0).fit(
            np.tile(X, (2, 1)), np.tile(y, 2), sample_weight=0.5
        )
        assert double.noise_ == pytest.approx(single.noise_, rel=1e-6)
        np.testing.assert_allclose(double.predict(X), single.predict(X), atol=1e-7)

    def test_of_several_outputs_teach_what_repeated_rows_teach(self):
        X, y = some_data(n=30)
        Y = np.column_stack([y, y[::-1]])
        w = np.random.RandomState(1).randint(1, 4, size=30)
        weighted = SGDGPRegressor(random_state=0).fit(X, Y, sample_weight=w)
        repeated = SGDGPRegressor(random_state=0).fit(X.repeat(w, 0), Y.repeat(w, 0))
        np.testing.assert_allclose(weighted.noise_, repeated.noise_, rtol=1e-6)
        np.testing.assert_allclose(
            weighted.predict(X), repeated.predict(X), rtol=1e-6, atol=1e-7
        )

    def test_of_the_wrong_kind_are_refused(self):
        X, y = some_data()
        with pytest.raises(ValueError, match=r"[Nn]egative"):
            fixed().fit(X, y, sample_weight=np.linspace(-1, 1, 60))
        with pytest.raises(ValueError, match="zero"):
            fixed().fit(X, y, sample_weight=np.zeros(60))


class TestOutputs:
    def test_each_is_the_single_output_with_that_kernel(self):
        X, y = some_data()
        Y = np.column_stack([y, 50 - 9 * X[:, 0] ** 2])
        new = some_data(n=9, seed=1)[0]
        model = fixed().fit(X, Y)
        mean = model.predict(new)
        for column in (0, 1):
            single = fixed().fit(X, Y[:, column])
            np.testing.assert_allclose(mean[:, column], single.predict(new), rtol=1e-9)
            assert model.noise_[column] == pytest.approx(single.noise_)

    def test_do_not_move_each_other(self):
        X, y = some_data()
        far = np.concatenate([X[:5], [[1e3, 1e3]]])
        for normalised in (True, False):
            one = fixed(normalize_y=normalised).fit(X, y)
            two = fixed(normalize_y=normalised).fit(X, np.column_stack([y, y**2 + 100]))
            np.testing.assert_allclose(two.predict(far)[:, 0], one.predict(far))
            # Far from the data there is the prior.
            prior = y.mean() if normalised else 0.0
            assert one.predict(far)[-1] == pytest.approx(prior, abs=1e-12)

    def test_have_shapes_as_in_scikit_learn(self):
        X, y = some_data()
        model = fixed().fit(X, np.column_stack([y, -y, 2 * y]))
        new = X[:7]
        mean, std = model.predict(new, return_std=True)
        assert (mean.shape, std.shape) == ((7, 3), (7, 3))
        covariance = model.predict(new, return_cov=True)[1]
        assert covariance.shape == (7, 7, 3)
        np.testing.assert_allclose(np.einsum("iit->it", covariance), std**2, rtol=1e-9)
        assert model.predict_quantiles(new, [0.1, 0.9]).shape == (7, 3, 2)
        assert model.sample_y(new, 5).shape == (7, 3, 5)

    def test_one_column_is_one_output(self):
        X, y = some_data()
        model = fixed().fit(X[:50], y[:50, None])
        np.testing.assert_array_equal(
            model.predict(X), fixed().fit(X[:50], y[:50]).predict(X)
        )
        other = fixed().fit(X[:50], y[:50]).partial_fit(X[50:], y[50:, None])
        np.testing.assert_array_equal(
            model.partial_fit(X[50:], y[50:]).predict(X), other.predict(X)
        )

    def test_learn_together(self):
        X, y = some_data()
        once = SGDGPRegressor(random_state=0).fit(X, y)
        twice = SGDGPRegressor(random_state=0).fit(X, np.column_stack([y, 3 * y]))
        # Twice the same likelihood, averaged over twice as many numbers.
        assert twice.noise_[0] == pytest.approx(once.noise_, rel=1e-6)


class TestPartialFit:
    def test_is_conditioning_on_everything(self):
        X, y = some_data()
        extra, more = some_data(n=15, seed=3)
        new = some_data(n=9, seed=1)[0]
        w = np.random.RandomState(2).gamma(2.0, size=15)
        model = fixed().fit(X, y).partial_fit(extra, more, sample_weight=w)
        z = (np.concatenate([y, more]) - y.mean()) / y.std()
        noise = 0.05 / np.concatenate([np.ones(60), w])
        both = np.concatenate([X, extra])
        expected = closed_form(a_kernel(), noise, both, z, new)[0]
        np.testing.assert_allclose(
            model.predict(new), y.mean() + y.std() * expected, rtol=1e-6
        )

    def test_keeps_the_hyperparameters(self):
        X, y = some_data()
        model = SGDGPRegressor(random_state=0).partial_fit(X, y)
        before = (model.noise_, str(dict(model.kernel_.named_parameters())))
        model.partial_fit(*some_data(n=15, seed=3))
        assert (model.noise_, str(dict(model.kernel_.named_parameters()))) == before

    def test_goes_on_after_weights_and_several_outputs(self):
        X, y = some_data()
        Y = np.column_stack([y, -y])
        model = fixed().fit(X[:50], Y[:50], sample_weight=np.linspace(1, 2, 50))
        model.partial_fit(X[50:55], Y[50:55]).partial_fit(X[55:], Y[55:])
        w = np.concatenate([np.linspace(1, 2, 50), np.ones(10)])
        z = (y - model.y_mean_[0]) / model.y_scale_[0]
        expected = closed_form(a_kernel(), 0.05 / w, X, z, X)[0]
        np.testing.assert_allclose(
            model.predict(X)[:, 0],
            model.y_mean_[0] + model.y_scale_[0] * expected,
            rtol=1e-6,
        )

    def test_refuses_another_number_of_outputs(self):
        X, y = some_data()
        model = fixed().fit(X, y)
        with pytest.raises(ValueError, match=r"expected shape \(n,\) as before"):
            model.partial_fit(X, np.column_stack([y, y]))


class TestKernels:
    @pytest.mark.parametrize("name", [*KERNEL_NAMES, "linear + rbf"])
    def test_named_ones_learn_a_function(self, name: str):
        X, y = some_data(n=80)
        y = X @ [2.0, -1.0] if name == "linear" else y
        new, _ = some_data(n=50, seed=1)
        truth = (
            new @ [2.0, -1.0] if name == "linear" else np.sin(5 * new[:, 0]) + new[:, 1]
        )
        model = SGDGPRegressor(name, random_state=0).fit(X, y)
        assert model.score(new, truth) > 0.97

    def test_named_ones_do_not_care_about_units(self):
        X, y = some_data()
        one = SGDGPRegressor(random_state=0).fit(X, y)
        units = np.array([1e4, 1e-3])
        other = SGDGPRegressor(random_state=0).fit(5 + X * units, 70 + 1e3 * y)
        np.testing.assert_allclose(
            other.predict(5 + X * units), 70 + 1e3 * one.predict(X), rtol=1e-6
        )
        learned = other.kernel_.base_kernel.lengthscale.numpy() / units
        expected = one.kernel_.base_kernel.lengthscale.numpy()
        np.testing.assert_allclose(learned, expected, rtol=1e-5)

    def test_irrelevant_columns_get_long_lengthscales(self):
        X, y = some_data(n=100, d=3)
        y = y - X[:, 2]
        lengthscale = SGDGPRegressor(random_state=0).fit(X, y).kernel_
        relevant, irrelevant, _ = lengthscale.base_kernel.lengthscale[0].tolist()
        assert irrelevant > 5 * relevant

    def test_objects_are_never_changed(self):
        kernel = a_kernel()
        state = {name: p.clone() for name, p in kernel.named_parameters()}
        model = SGDGPRegressor(kernel, random_state=0).fit(*some_data())
        assert model.kernel is kernel
        assert model.kernel_ is not kernel
        for name, p in kernel.named_parameters():
            assert torch.equal(p, state[name])
            assert p.requires_grad
            assert p.grad is None
        assert not torch.equal(model.kernel_.raw_outputscale, kernel.raw_outputscale)

    def test_objects_may_be_of_another_dtype(self):
        kernel = ScaleKernel(PeriodicKernel() + RBFKernel())
        X, y = some_data(d=1)
        model = SGDGPRegressor(kernel, random_state=0).fit(X, y)
        assert model.score(X, y) > 0.8
        assert next(kernel.parameters()).dtype == torch.float32

    def test_objects_that_do_not_fit_the_inputs_are_refused(self):
        for kernel, message in (
            (RBFKernel(ard_num_dims=3), "inputs with 2 columns"),
            (RBFKernel(active_dims=(5,)), "inputs with 2 columns"),
            (RBFKernel(batch_shape=torch.Size([2])), "without batch shape"),
        ):
            with pytest.raises(ValueError, match=message):
                SGDGPRegressor(kernel).fit(*some_data())

    def test_unknown_ones_are_refused(self):
        with pytest.raises(ValueError, match=r"'matern32'.*found 'matern'"):
            SGDGPRegressor("matern").fit(*some_data())
        with pytest.raises(TypeError, match="kernel: expected a kernel of GPyTorch"):
            SGDGPRegressor(3).fit(*some_data())

    @pytest.mark.parametrize(
        ("kernel", "error", "message"),
        [
            (kernels.PairwiseKernel(), TypeError, "scikit-learn's PairwiseKernel has"),
            (kernels.RBF() ** 2, TypeError, "scikit-learn's Exponentiation has"),
            (kernels.WhiteKernel() * 2.0, TypeError, "WhiteKernel has .* of a sum"),
            (kernels.WhiteKernel(), TypeError, "at most one WhiteKernel beside others"),
            (kernels.Matern(nu=0.7), TypeError, "Matern with nu .* found nu 0.7"),
            (kernels.ExpSineSquared(), TypeError, "ExpSineSquared of several columns"),
            (kernels.RBF([1.0] * 3), ValueError, "Anisotropic kernel must .*3!=2"),
        ],
    )
    def test_of_scikit_learn_that_have_no_form_here_are_refused_by_name(
        self, kernel: Any, error: type[Exception], message: str
    ):
        for ask in (
            lambda model: model.fit(*some_data()),
            lambda model: model.predict(some_data()[0]),
        ):
            with pytest.raises(error, match=message):
                ask(SGDGPRegressor(kernel))

    def test_a_white_kernel_and_noise_of_rows_are_refused(self):
        kernel = kernels.RBF() + kernels.WhiteKernel()
        with pytest.raises(ValueError, match=r"noise: .* beside a WhiteKernel"):
            SGDGPRegressor(kernel, noise=np.ones(60)).fit(*some_data())


class TestLearning:
    def test_finds_the_noise(self):
        X, y = some_data(n=300)
        model = SGDGPRegressor(random_state=0).fit(X, y)
        assert model.noise_ == pytest.approx(0.01, rel=0.25)

    def test_stops_at_the_number_of_steps(self):
        model = SGDGPRegressor(random_state=0, steps=np.int64(3)).fit(*some_data())
        assert model.n_iter_ == 3
        model = SGDGPRegressor(random_state=0, steps=0).fit(*some_data())
        assert (model.n_iter_, model.learning_) == (0, None)

    def test_takes_other_optimisers(self):
        model = SGDGPRegressor(optimizer=torch.optim.Rprop, random_state=0)
        assert model.fit(*some_data()).noise_ < 0.05

    def test_can_start_at_little_noise(self):
        X, _ = some_data()
        y = np.sin(X).sum(1)
        model = fixed(noise=1e-8, kernel="rbf").fit(X, y)
        assert model._noise == pytest.approx(1e-8, rel=1e-6)
        np.testing.assert_allclose(model.predict(X), y, atol=1e-3)

    def test_float32_is_close_to_float64(self):
        X, y = some_data()
        double = SGDGPRegressor(random_state=0).fit(X, y)
        single = SGDGPRegressor(random_state=0, dtype="float32").fit(X, y)
        assert single.posterior_.mean(torch.tensor(X).float()).dtype == torch.float32
        found = single.predict(X)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, double.predict(X), atol=1e-2)

    def test_says_that_a_solve_has_not_converged(self):
        solver = sgdgp.SDD(tolerance=1e-8, max_passes=2.0)
        with pytest.warns(ConvergenceWarning):
            fixed(solver=solver).fit(*some_data())

    def test_is_silent(self, capfd: pytest.CaptureFixture[str]):
        SGDGPRegressor(random_state=0).fit(*some_data())
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""

    def test_shows_progress_if_asked(self, capfd: pytest.CaptureFixture[str]):
        SGDGPRegressor(random_state=0, verbose=True).fit(*some_data())
        assert "passes" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"device": "tpu"}, ValueError, "device: expected 'auto'"),
        ({"dtype": "float16"}, ValueError, "dtype: expected 'float64' or 'float32'"),
        ({"dtype": "double precision"}, ValueError, "dtype: expected"),
        ({"noise": -1.0}, ValueError, "noise: expected a positive"),
        ({"noise": "small"}, TypeError, "noise: expected a number"),
        ({"noise": [0.1] * 59 + [0.0]}, ValueError, "noise: .* first at index 59"),
        ({"optimizer": "lbfgs"}, ValueError, "optimizer: expected 'adam'"),
        ({"steps": 1.5}, TypeError, "steps: expected an int"),
        ({"num_samples": -1}, ValueError, "num_samples: expected at least 0"),
        ({"solver": 3}, TypeError, "solver: expected a Solver"),
        ({"solver": "lu"}, ValueError, "solver"),
    ],
)
def test_wrong_parameters_are_named(
    parameters: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        SGDGPRegressor(**parameters).fit(*some_data())


class TestHabits:
    def test_clones_have_kernels_of_their_own(self):
        model = SGDGPRegressor(a_kernel(), noise=0.3).fit(*some_data())
        other = clone(model)
        assert other.kernel is not model.kernel
        assert other.noise == 0.3
        assert not hasattr(other, "posterior_")

    @pytest.mark.parametrize(
        "kernel",
        ["matern32", MaternKernel(nu=1.5, lengthscale_prior=GammaPrior(3.0, 6.0))],
        ids=["name", "object with a prior"],
    )
    def test_fitted_ones_survive_joblib(self, tmp_path: Any, kernel: Any):
        X, y = some_data()
        model = SGDGPRegressor(kernel, random_state=0)
        model.fit(X, y, sample_weight=np.linspace(1, 2, 60))
        joblib.dump(model, tmp_path / "model.joblib")
        other = joblib.load(tmp_path / "model.joblib")
        for one, two in zip(
            model.predict(X, return_std=True),
            other.predict(X, return_std=True),
            strict=True,
        ):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(model.sample_y(X, 2), other.sample_y(X, 2))
        extra = some_data(n=5, seed=3)
        np.testing.assert_array_equal(
            model.partial_fit(*extra).predict(X), other.partial_fit(*extra).predict(X)
        )

    @pytest.mark.parametrize("kernel", ["matern32", THEIRS["white"]])
    def test_pickles_are_small(self, kernel: Any):
        X, y = some_data()
        model = SGDGPRegressor(kernel, random_state=0, steps=5).fit(X, y)
        before = model.predict(X, return_std=True)
        content = pickle.dumps(model)
        assert len(content) < 1e6
        other, x = pickle.loads(content), torch.tensor(X)
        for one, two in zip(before, other.predict(X, return_std=True), strict=True):
            np.testing.assert_array_equal(one, two)
        found, expected = (m.posterior_.samples(x) for m in (other, model))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        ("kernel", "weights", "outputs", "settings"),
        [
            ("linear + matern32", False, 1, {"dtype": np.float32}),
            ("rbf", True, 2, {"solver": sgdgp.CG(tolerance=1e-3)}),
            (a_kernel(), False, 1, {"noise": np.linspace(0.1, 0.2, 60)}),
            (THEIRS["white"], False, 2, {"normalize_y": False}),
            (THEIRS["nu"], False, 1, {"optimizer": None, "random_state": 3}),
        ],
    )
    def test_files_hold_what_predictions_need(
        self, kernel: Any, weights: bool, outputs: int, settings: Any, tmp_path: Any
    ):
        X, y = some_data()
        X = pd.DataFrame(X, columns=["length", "width"])
        y = pd.DataFrame({f"y{i}": y + i for i in range(outputs)})
        model = SGDGPRegressor(kernel, **{"steps": 3, "random_state": 0, **settings})
        model.fit(X, y, sample_weight=np.linspace(1, 2, 60) if weights else None)
        model.save(tmp_path / "model")
        given = {"kernel": a_kernel()} if kernel.__class__ is ScaleKernel else {}
        other = sgdgp.load(tmp_path / "model", **given)
        for one, two in zip(
            model.predict(X, return_std=True),
            other.predict(X, return_std=True),
            strict=True,
        ):
            np.testing.assert_allclose(one, two, rtol=1e-12)
        np.testing.assert_array_equal(model.sample_y(X, 2), other.sample_y(X, 2))
        assert other.target_names_ == list(y.columns)
        assert other.feature_names_in_.tolist() == ["length", "width"]
        assert other.learning_ == model.learning_
        assert str(other.kernel_) == str(model.kernel_)
        before, after = model.get_params(deep=False), other.get_params(deep=False)
        for name in before.keys() - {"kernel", "noise", "dtype"}:
            assert after[name] == before[name]
        np.testing.assert_array_equal(after["noise"], before["noise"])
        value = model.log_marginal_likelihood_value_
        assert other.log_marginal_likelihood_value_ == pytest.approx(value)
        for each in (model, other):
            each.set_params(noise=0.1)
            each.partial_fit(X[:5] + 0.01, y[:5])
        # What a solve leaves for the next is in no file.
        np.testing.assert_allclose(model.predict(X), other.predict(X), rtol=1e-6)
        np.testing.assert_array_equal(model.noise_, other.noise_)

    def test_files_and_kernels_that_do_not_fit_are_told_apart(self, tmp_path: Any):
        place = tmp_path / "model"
        with pytest.raises(NotFittedError):
            fixed().save(place)
        model = fixed(random_state=np.random.RandomState(0)).fit(*some_data())
        with pytest.warns(UserWarning, match="random_state: RandomState.* is not in"):
            model.save(place)
        with pytest.raises(TypeError, match=r"kernel: needed for .*/model"):
            SGDGPRegressor.load(place)
        with pytest.raises(sgdgp.StorageError, match="built otherwise"):
            SGDGPRegressor.load(place, kernel=RBFKernel())
        assert SGDGPRegressor.load(place, kernel=a_kernel()).random_state is None
        fixed(kernel="rbf").fit(*some_data()).save(place)
        with pytest.raises(TypeError, match="model holds its own; expected none"):
            SGDGPRegressor.load(place, kernel=a_kernel())

    def test_data_frames_bring_their_names(self):
        X, y = some_data()
        frame = pd.DataFrame(X, columns=["length", "width"])
        model = fixed().fit(frame, pd.Series(y))
        assert model.feature_names_in_.tolist() == ["length", "width"]
        np.testing.assert_allclose(model.predict(frame), fixed().fit(X, y).predict(X))
        with pytest.raises(ValueError, match="feature names"):
            model.predict(frame[["width", "length"]])

    def test_grid_search_compares_kernels_in_a_pipeline(self):
        X, y = some_data()
        periodic = ScaleKernel(PeriodicKernel()).double()
        search = GridSearchCV(
            make_pipeline(StandardScaler(), SGDGPRegressor(random_state=0, steps=20)),
            {"sgdgpregressor__kernel": ["rbf", "linear", a_kernel(), periodic]},
            cv=3,
            error_score="raise",
        ).fit(X, y)
        scores = search.cv_results_["mean_test_score"]
        assert scores[0] > scores[1]
        assert search.score(X, y) > 0.8

    @pytest.mark.slow  # for the processes' imports
    def test_cross_validation_runs_in_other_processes(self):
        X, y = some_data()
        scores = cross_val_score(
            SGDGPRegressor(random_state=0, steps=20), X, y, cv=2, n_jobs=2
        )
        assert scores.min() > 0.7

    def test_the_same_seed_is_the_same_posterior(self):
        X, y = some_data()
        for state in (3, None):
            one, two = (
                SGDGPRegressor(random_state=state, steps=5)
                .fit(X, y)
                .posterior_.solution.weights
                for _ in range(2)
            )
            assert torch.equal(one, two) == (state == 3)

    def test_example_in_the_docstring_is_true(self):
        tests = doctest.DocTestFinder(recurse=False).find(SGDGPRegressor)
        runner = doctest.DocTestRunner()
        assert sum(runner.run(test).attempted for test in tests) > 5
        assert runner.failures == 0

    def test_device_auto_is_a_gpu_if_there_is_one(self):
        model = fixed().fit(*some_data())
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        assert model.device_.type == wanted
        assert model.posterior_.solution.weights.device.type == wanted
