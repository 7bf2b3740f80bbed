"""What a source taught is the target's prior; truths are dense, closed forms."""

from __future__ import annotations

import copy
from dataclasses import replace

import gpytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sgdgp
from sgdgp.core.errors import CheckpointError
from sgdgp.kernels import NeuralTangentKernel
from sgdgp.networks import Categorical, Gaussian, Isotropic, LearnedPrior, linearise
from sgdgp.networks.priors import DiagonalPrior, KroneckerSum
from sgdgp.networks.stream import example_hashes, stream_of
from sgdgp.tangent import Tangent

DIM, HIDDEN = 3, 5


def network(classes: int = 1, seed: int = 0, head: str = "head") -> nn.Sequential:
    torch.manual_seed(seed)
    layers = {
        "body": nn.Linear(DIM, HIDDEN),
        "tanh": nn.Tanh(),
        head: nn.Linear(HIDDEN, classes),
    }
    found = nn.Sequential()
    for name, layer in layers.items():
        found.add_module(name, layer)
    return found.double().eval()


def task(n: int, seed: int, classes: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, DIM, generator=generator, dtype=torch.float64)
    if classes == 1:
        y = x.sin().sum(1, keepdim=True)
        y = y + 0.1 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
        return TensorDataset(x, y)
    return TensorDataset(x, torch.randint(classes, (n,), generator=generator))


GAUSSIAN = Gaussian(noise=0.04)
KEPT = {"precision": 1.0, "steps": 0, "progress": False}
"""Of ``fit``: the prior's scale as it is."""


def dense(prior: LearnedPrior, like: nn.Module) -> Tensor:
    """P of the prior for a network, column by column."""
    operator = linearise(like, GAUSSIAN, prior=prior).prior
    built = operator.build(linearise(like, GAUSSIAN).tangent, lambda count: iter(()))
    eye = torch.eye(built.num_weights, dtype=torch.float64)
    return built.matmul(eye)


def gauss_newton(like: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """J^T J / noise, and J (n, D), of a network with one output."""
    jacobian = linearise(like, GAUSSIAN).tangent.at(data.tensors[0]).jacobian()[:, 0]
    return jacobian.mT @ jacobian / 0.04, jacobian


def linear(seed: int = 0) -> nn.Linear:
    """A model whose Kronecker factors are all of its curvature."""
    torch.manual_seed(seed)
    return nn.Linear(DIM, 1, bias=False).double().eval()


class TestTransfer:
    def test_target_posterior_is_that_of_source_and_target_together(self):
        """C3: a linear model, all of the source's curvature, and its mean."""
        one, two, model = task(20, 1), task(15, 2), linear()
        start = replace(
            LearnedPrior.from_data(model, GAUSSIAN, one, strength=0.0),
            mean=torch.zeros(DIM, dtype=torch.float64),
        )
        source = linearise(model, GAUSSIAN, prior=start).fit(one, **KEPT)
        prior = start.updated(source)
        target = linearise(model, GAUSSIAN, prior=prior).fit(
            two, solver="cholesky", **KEPT
        )
        x = torch.cat([one.tensors[0], two.tensors[0]])
        y = torch.cat([one.tensors[1], two.tensors[1]])
        precision = torch.eye(DIM, dtype=torch.float64) + x.mT @ x / 0.04
        mean = torch.linalg.solve(precision, x.mT @ y / 0.04)
        found = model.weight.detach().mT + target.centre + target.weight_mean
        torch.testing.assert_close(found, mean, rtol=1e-8, atol=1e-8)
        both = dense(prior, model) + gauss_newton(model, two)[0]
        torch.testing.assert_close(both, precision, rtol=1e-8, atol=1e-8)

    def test_mean_and_variance_are_those_of_the_gaussian_process(self):
        """Kernel J P^-1 J^T and mean f(x) + J(x) c at source weights."""
        model, data = network(), task(12, 3)
        prior = LearnedPrior.from_data(model, GAUSSIAN, task(30, 1), strength=0.5)
        moved = replace(prior, mean=prior.mean + 0.1)
        posterior = linearise(model, GAUSSIAN, prior=moved).fit(
            data, final_samples=4096, **KEPT
        )
        x, y = task(6, 4).tensors[0], data.tensors[1]
        tangent = posterior.tangent
        rows = [tangent.at(part).jacobian()[:, 0] for part in (x, data.tensors[0])]
        covariance = torch.linalg.inv(dense(moved, model))
        k = [[a @ covariance @ b.mT for b in rows] for a in rows]
        noisy = k[1][1] + 0.04 * torch.eye(12, dtype=torch.float64)
        centre = torch.full((tangent.num_weights, 1), 0.1, dtype=torch.float64)
        offset = [
            model(part) + row @ centre
            for part, row in zip((x, data.tensors[0]), rows, strict=True)
        ]
        mean = offset[0] + k[0][1] @ torch.linalg.solve(noisy, y - offset[1])
        variance = k[0][0] - k[0][1] @ torch.linalg.solve(noisy, k[1][0])
        found = posterior.predict(x)
        torch.testing.assert_close(found.mean, mean.detach(), rtol=2e-3, atol=2e-3)
        # Four standard errors of 4,096 samples.
        torch.testing.assert_close(
            found.variance[:, 0], variance.diagonal(), rtol=4 * 2**0.5 / 64, atol=1e-12
        )

    def test_the_largest_strength_that_the_evidence_allows_is_taken(self):
        model, data = network(), task(15, 3)
        prior = LearnedPrior.from_data(model, GAUSSIAN, task(40, 1))
        chosen = linearise(model, GAUSSIAN, prior=prior).fit(data, progress=False)
        evidence = {}
        for candidate in prior.candidates():
            posterior = linearise(model, GAUSSIAN, prior=candidate).fit(
                data, progress=False
            )
            value = posterior.log_marginal_likelihood(data).value
            evidence[candidate.strength] = value
        best = max(evidence.values())
        allowed = [s for s, value in evidence.items() if value >= best - 1.0]
        assert chosen.settings.strength == max(allowed)
        assert 0 < chosen.settings.strength < max(evidence)
        assert list(chosen.settings.tried) == list(evidence)

    def test_a_strong_prior_has_the_same_evidence_in_float32(self):
        """R^-1 w of the mean is where rounding would show: P's eigenvalues span 1e9."""
        found = []
        for dtype in (torch.float64, torch.float32):
            model = network().to(dtype)
            source, data = (
                TensorDataset(*(t.to(dtype) for t in task(n, n).tensors))
                for n in (40, 8)
            )
            prior = LearnedPrior.from_data(model, GAUSSIAN, source)
            strong = replace(prior, strength=1e6 / prior._mean_curvature())
            posterior = linearise(model, GAUSSIAN, prior=strong).fit(
                data, steps=0, precision=1e-3, progress=False
            )
            found.append(posterior.log_marginal_likelihood(data).value)
        assert found[1] == pytest.approx(found[0], abs=0.02)

    def test_strength_zero_is_isotropic_about_the_source(self):
        model = network()
        prior = LearnedPrior.from_data(model, GAUSSIAN, task(40, 1), strength=0.0)
        posterior = linearise(model, GAUSSIAN, prior=prior).fit(
            task(15, 3), progress=False
        )
        assert posterior.mean_of == "linear"
        assert not posterior.centre.any()
        assert posterior.prior.is_diagonal
        assert posterior.prior.marginal_variance().unique().numel() == 1

    def test_pathwise_conditioning_on_the_tangent_kernel_is_the_same(self):
        """Acceptance F: ``sgdgp.condition`` with SDD, within the samples' errors."""
        model, data = network(), task(60, 3)
        prior = LearnedPrior.from_data(model, GAUSSIAN, task(40, 1), strength=1.0)
        posterior = linearise(model, GAUSSIAN, prior=prior).fit(
            data, final_samples=1024, **KEPT
        )
        x, y = data.tensors
        offset = model(x).detach()[:, 0]

        class Model(gpytorch.models.ExactGP):
            def __init__(self) -> None:
                likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
                super().__init__(x, y[:, 0] - offset, likelihood)
                self.mean_module = gpytorch.means.ZeroMean()
                self.covar_module = NeuralTangentKernel(model, prior=posterior.prior)

            def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
                return gpytorch.distributions.MultivariateNormal(
                    self.mean_module(x), self.covar_module(x)
                )

        gp = Model()
        gp.likelihood.noise = 0.04
        found = sgdgp.condition(
            gp, solver=sgdgp.SDD(tolerance=1e-4), num_samples=1024, seed=1
        )
        test = task(20, 5).tensors[0]
        want = posterior.predict(test)
        mean = found.mean(test) + model(test).detach()[:, 0]
        torch.testing.assert_close(mean, want.mean[:, 0], rtol=0, atol=2e-3)
        # Each has a relative error of (2 / 1024)^1/2: four of their difference's.
        variance = found.variance(test, from_samples=True)
        torch.testing.assert_close(
            variance, want.variance[:, 0], rtol=4 * (4 / 1024) ** 0.5, atol=0
        )


class TestTasksInARow:
    def test_precisions_add_up_and_means_are_carried(self):
        model = network()
        tasks = [task(12, seed) for seed in (1, 2, 3)]
        prior = LearnedPrior.from_data(model, GAUSSIAN, tasks[0], strength=1.0)
        want = dense(prior, model)
        for data in tasks[1:]:
            posterior = linearise(model, GAUSSIAN, prior=prior).fit(data, **KEPT)
            # The Jacobian is that at the source's weights, the Hessian a constant.
            alone = LearnedPrior.from_data(model, GAUSSIAN, data, strength=1.0)
            want = want + dense(alone, model) - torch.eye(len(want)).to(want)
            torch.testing.assert_close(dense(LearnedPrior.of(posterior), model), want)
            prior = prior.updated(posterior, compress=False)
            torch.testing.assert_close(dense(prior, model), want)
            shift = posterior.centre + posterior.weight_mean
            mean = posterior.tangent.theta + shift
            torch.testing.assert_close(prior.mean, mean[:, 0])
        assert prior.num_examples == 36
        assert [len(b.terms) for b in prior.curvature.blocks] == [3] * 4

    def test_memory_is_the_same_after_every_task(self):
        model = network(3)
        prior = LearnedPrior.from_data(
            model, Categorical(), task(12, 0, 3), strength=1.0
        )
        for seed in range(1, 4):
            posterior = linearise(model, Categorical(), prior=prior).fit(
                task(12, seed, 3), **KEPT
            )
            prior = prior.updated(posterior)
            assert {len(b.terms) for b in prior.curvature.blocks} == {1}

    def test_terms_of_several_tasks_are_a_sum(self):
        model = network()
        one, two = (
            LearnedPrior.from_data(model, GAUSSIAN, task(12, s), strength=1.0)
            for s in (1, 2)
        )
        both = dense(one.plus(two), model)
        eye = torch.eye(len(both), dtype=torch.float64)
        torch.testing.assert_close(both, dense(one, model) + dense(two, model) - eye)

    def test_what_a_sum_would_lose_is_refused(self):
        model = network()
        one = LearnedPrior.from_data(model, GAUSSIAN, task(12, 1), strength=1.0)
        with pytest.raises(ValueError, match=r"strength 1\.0, found 2\.0"):
            one.plus(replace(one, strength=2.0))
        posterior = linearise(model, GAUSSIAN, prior=one).fit(task(9, 2), **KEPT)
        later = replace(one.updated(posterior), mean=one.mean)
        with pytest.raises(ValueError, match="tasks before its own"):
            one.plus(later)

    def test_what_is_not_known_stays_so(self):
        """A prior that does not say what it has seen is followed by such."""
        model = network()
        one = LearnedPrior.from_data(model, GAUSSIAN, task(12, 1), strength=1.0)
        unknown = replace(one, about={})
        posterior = linearise(model, GAUSSIAN, prior=unknown).fit(task(9, 2), **KEPT)
        after = (
            unknown.updated(posterior),
            LearnedPrior.of(posterior),
            one.plus(unknown),
        )
        assert [prior.about for prior in after] == [{}] * 3

    def test_curvature_in_inference_mode_is_the_same(self):
        model = network()
        want = LearnedPrior.from_data(model, GAUSSIAN, task(12, 1)).curvature
        with torch.inference_mode():
            found = LearnedPrior.from_data(model, GAUSSIAN, task(12, 1)).curvature
        for one, other in zip(want.blocks, found.blocks, strict=True):
            assert other.trace() == pytest.approx(one.trace()) != 0

    def test_a_grown_head_keeps_its_closed_form_at_every_precision(self):
        old, new = (nn.Linear(60, outputs, bias=False) for outputs in (9, 10))
        x = torch.randn(12, 60, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, torch.arange(12) % 9)
        prior = LearnedPrior.from_data(old.eval(), Categorical(), data, strength=2.0)
        ones = torch.ones(1)
        for precision in (0.37, 0.1, 3.3):
            base = DiagonalPrior(540, precision * ones)
            grown = replace(prior, base=base).extended(grown="weight")
            operator = grown.build(Tangent(new.eval()), lambda count: iter(()))
            (block,) = operator.blocks
            assert block.num_weights > 512
            assert block.is_exact
            assert float(block.diagonal) == pytest.approx(precision, rel=1e-6)

    def test_outputs_that_arrive_later_know_nothing(self):
        old, new = network(2), network(4)
        state = {k: v.clone() for k, v in new.state_dict().items()}
        for name, value in old.state_dict().items():
            state[name][: len(value)] = value
        new.load_state_dict(state)
        prior = LearnedPrior.from_data(old, Categorical(), task(9, 0, 2), strength=2.0)
        grown = prior.extended(grown="head.*")
        precision, before = dense(grown, new), dense(prior, old)
        kept = torch.cat(
            [
                s[: v.numel()]
                for s, v in zip(
                    torch.arange(len(precision)).split(
                        [v.numel() for v in new.parameters()]
                    ),
                    old.parameters(),
                    strict=True,
                )
            ]
        )
        torch.testing.assert_close(precision[kept][:, kept], before)
        added = [i for i in range(len(precision)) if i not in kept.tolist()]
        eye = torch.eye(len(added), dtype=torch.float64)
        torch.testing.assert_close(precision[added][:, added], eye)
        assert not precision[added][:, kept].any()
        posterior = linearise(new, Categorical(), prior=grown).fit(
            task(9, 1, 4), **KEPT
        )
        assert not posterior.centre.any()
        assert grown.updated(posterior).shapes[-1] == (4,)

    def test_a_new_head_has_a_precision_of_its_own(self):
        prior = LearnedPrior.from_data(network(2), Categorical(), task(9, 0, 2))
        other = network(3, head="other")
        posterior = linearise(
            other, Categorical(), prior=prior.extended(new=("head.*", "other.*"))
        ).fit(task(12, 1, 3), progress=False)
        assert len(posterior.precisions) == 2
        assert posterior.prior.group_sizes == (DIM * 5 + 5, 5 * 3 + 3)

    def test_all_may_be_new(self):
        prior = LearnedPrior.from_data(network(2), Categorical(), task(9, 0, 2))
        posterior = linearise(
            network(2), Categorical(), prior=prior.extended(new="*")
        ).fit(task(12, 1, 2), progress=False, final_samples=2)
        assert posterior.settings.strength == 0.0
        assert len(posterior.precisions) == 1


class TestInterruption:
    def fit(self, prior: LearnedPrior, callback=None, path=None):
        return linearise(network(), GAUSSIAN, prior=prior).fit(
            task(15, 3),
            steps=2,
            num_samples=2,
            final_samples=2,
            solver="cg",
            progress=False,
            callback=callback,
            checkpoint=path,
        )

    @pytest.mark.filterwarnings("ignore:Learning has not settled")
    def test_once_is_enough_and_a_checkpoint_goes_on(self, tmp_path):
        """In the middle of the candidates or of the fit after them."""
        prior = LearnedPrior.from_data(network(), GAUSSIAN, task(30, 1))
        calls: list[object] = []
        whole = self.fit(prior, calls.append)
        for at in (len(calls) // 2, len(calls) - 1):
            count = iter(range(len(calls)))
            path = tmp_path / str(at)
            half = self.fit(prior, lambda _, at=at, n=count: next(n) == at, path)
            assert half.reason == "interrupted"
            again = self.fit(prior, path=path)
            assert again.settings.strength == whole.settings.strength
            torch.testing.assert_close(
                again.weight_mean, whole.weight_mean, rtol=0.02, atol=1e-3
            )
        with pytest.raises(CheckpointError, match="setting prior is LearnedPrior") as e:
            self.fit(replace(prior, strength=2.0), path=path)
        assert len(str(e.value)) < 500


@pytest.fixture(scope="module")
def prior() -> LearnedPrior:
    return LearnedPrior.from_data(network(2), Categorical(), task(9, 0, 2))


class TestBadInput:
    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (network(3), r"'head.weight' have shape \(2, 5\), here \(3, 5\).*grown"),
            (network(1), r"'head.weight' have shape \(2, 5\), here \(1, 5\).*new"),
            (network(2, head="fc"), r"without weights 'fc.weight' of shape \(2, 5\)"),
            (nn.Sequential(network(2)), "without weights '0.body.weight'"),
        ],
    )
    def test_another_architecture_is_named_by_its_first_tensor(
        self, prior: LearnedPrior, other: nn.Module, words: str
    ):
        with pytest.raises(ValueError, match=words):
            linearise(other.eval(), Categorical(), prior=prior).fit(task(9, 1, 2))

    def test_weights_that_the_target_lacks_are_named(self, prior: LearnedPrior):
        with pytest.raises(ValueError, match=r"which has weights 'body\.weight'"):
            linearise(network(2), Categorical(), prior=prior, weights="head.*").fit(
                task(9, 1, 2)
            )

    @pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
    def test_a_negative_strength_is_refused(self, strength: float):
        with pytest.raises(ValueError, match="strength: expected"):
            LearnedPrior.from_data(
                network(2), Categorical(), task(9, 0, 2), strength=strength
            )

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda p: replace(p, strength="a"), "strength: expected a number"),
            (lambda p: p.extended(new=3), "new: expected a pattern of names"),
            (lambda p: p.extended(grown=["head.*", None]), "grown: expected"),
            (lambda p: p.plus(3), "other: expected a LearnedPrior, found int"),
            (lambda p: p.updated(p), "posterior: expected what linearise"),
            (lambda p: LearnedPrior.of(network(2)), "found Sequential"),
        ],
    )
    def test_arguments_of_another_kind_are_named(self, prior, call, words: str):
        with pytest.raises(TypeError, match=words):
            call(prior)

    def test_a_mean_that_is_none_is_refused(self, prior):
        with pytest.raises(ValueError, match="mean: expected 32 weights, found 5"):
            replace(prior, mean=prior.mean[:5])
        lost = replace(prior, mean=prior.mean * float("nan"))
        with pytest.raises(ValueError, match="prior: expected finite values"):
            linearise(network(2), Categorical(), prior=lost).fit(task(9, 1, 2))

    def test_settings_are_no_operator_for_a_kernel(self, prior):
        with pytest.raises(TypeError, match=r"posterior\.prior.* found LearnedPrior"):
            NeuralTangentKernel(network(2), prior=prior)

    def test_an_empty_task_is_refused(self):
        with pytest.raises(ValueError, match="the data set is empty"):
            LearnedPrior.from_data(network(2), Categorical(), task(0, 0, 2))

    def test_a_posterior_of_another_prior_updates_nothing(self, prior: LearnedPrior):
        posterior = linearise(network(2), Categorical(), Isotropic()).fit(
            task(9, 1, 2), progress=False
        )
        with pytest.raises(ValueError, match="fitted with this prior"):
            prior.updated(posterior)
        other = LearnedPrior.from_data(network(2), Categorical(), task(9, 5, 2))
        posterior = linearise(network(2), Categorical(), prior=other).fit(
            task(9, 1, 2), **KEPT
        )
        with pytest.raises(ValueError, match="saw other data"):
            prior.updated(posterior)
        with pytest.raises(ValueError, match="pickle or a copy"):
            other.updated(copy.deepcopy(posterior))

    def test_another_reading_of_the_same_prior_is_the_same(self, prior, tmp_path):
        prior.save(tmp_path / "p")
        posterior = linearise(
            network(2), Categorical(), prior=LearnedPrior.load(tmp_path / "p")
        ).fit(task(9, 1, 2), **KEPT)
        assert prior.updated(posterior).num_examples == 18

    def test_a_posterior_of_a_file_needs_its_data(self, tmp_path):
        posterior = linearise(network(2), Categorical(), Isotropic()).fit(
            task(9, 1, 2), progress=False
        )
        posterior.save(tmp_path / "p")
        same = sgdgp.networks.load(tmp_path / "p", network(2))
        with pytest.raises(ValueError, match="loader: a posterior from a file"):
            LearnedPrior.of(same)
        with pytest.raises(ValueError, match="9 examples, found 5"):
            LearnedPrior.of(same, task(5, 1, 2))
        assert LearnedPrior.of(same, task(9, 1, 2)).num_examples == 9

    def test_curvature_of_nothing_is_refused(self, prior: LearnedPrior):
        zeros = [
            KroneckerSum([(0 * a, 0 * b) for a, b in block.terms])
            for block in prior.curvature.blocks
        ]
        silent = replace(prior, curvature=replace(prior.curvature, blocks=zeros))
        with pytest.raises(ValueError, match="it taught nothing"):
            linearise(network(2), Categorical(), prior=silent).fit(task(9, 1, 2))


def test_the_same_inputs_have_the_same_hash_and_others_another():
    model, data = network(), task(30, 1)
    seen = LearnedPrior.from_data(model, GAUSSIAN, data).seen
    turned = TensorDataset(*(t.flip(0) for t in data.tensors))
    assert torch.equal(LearnedPrior.from_data(model, GAUSSIAN, turned).seen, seen)
    other = LearnedPrior.from_data(model, GAUSSIAN, task(30, 2)).seen
    assert not torch.isin(other, seen).any()
    assert len(seen.unique()) == 30


def test_hashes_know_neither_the_sign_of_zero_nor_the_order_of_keys():
    x, y = task(6, 1).tensors
    x = x.round()
    pairs = [
        [({"a": x, "b": 2 * x, "scale": x.new_ones(())}, y)],
        [({"scale": x.new_ones(()), "b": 2 * x, "a": x}, y)],
        [({"a": x.where(x != 0, -0.0), "b": 2 * x}, y)],
    ]
    assert bool((x == 0).any())
    one, two, three = (example_hashes(stream_of(pair, x.device)) for pair in pairs)
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    wide = torch.randint(2, (400, 9), generator=torch.Generator().manual_seed(0))
    hashes = example_hashes(stream_of([(wide.float(), wide[:, 0])], x.device))
    assert len(hashes.unique()) == len(wide.unique(dim=0))
