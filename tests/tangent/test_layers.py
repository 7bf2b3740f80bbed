"""Passes of a network: what layers hide from gradients, threads, and processes."""

from __future__ import annotations

import copy
import faulthandler
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacfwd

from sgdgp.tangent import Tangent
from tests.networks.kinds import inputs_of, network_of


def normal(*shape, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Bag(nn.Module):
    """The sum over embedded tokens, through a nonlinear layer."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4, **settings)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x).sum(1)))


def tokens(*shape, seed=0):
    return torch.randint(9, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(network, x, padding=None):
    """The Jacobian of a ``Bag`` by forward mode, with rows looked up by a product."""
    words = F.one_hot(x, 9).double()

    def outputs(embed, weight, bias):
        if padding is not None:
            is_padding = (torch.arange(9) == padding)[:, None]
            embed = torch.where(is_padding, embed.detach(), embed)
        return torch.tanh((words @ embed).sum(1)) @ weight.mT + bias

    at = (network.embed.weight, network.out.weight, network.out.bias)
    blocks = jacfwd(outputs, (0, 1, 2))(*(p.detach() for p in at))
    return torch.cat([block.flatten(2) for block in blocks], 2)


def check_products(tangent, x, jacobian):
    batch = tangent.at(x)
    w, u = normal(tangent.num_weights, 2), normal(*jacobian.shape[:2], 3)
    assert torch.allclose(batch.jvp(w), jacobian @ w, rtol=0, atol=1e-10)
    pulled = torch.einsum("bcd,bck->dk", jacobian, u)
    assert torch.allclose(batch.vjp(u), pulled, rtol=0, atol=1e-10)
    assert torch.allclose(batch.jacobian(), jacobian, rtol=0, atol=1e-10)
    assert torch.allclose(batch._reverse_twice(w), jacobian @ w, rtol=0, atol=1e-10)
    assert tangent._obstacle is None


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_idx": 0},
        {"padding_idx": -2},
        {"sparse": True},
        {"scale_grad_by_freq": True},
        {"padding_idx": 3, "sparse": True, "scale_grad_by_freq": True},
    ],
    ids=str,
)
def test_embeddings_have_their_own_derivatives(settings):
    network = Bag(**settings).double().eval()
    x = tokens(5, 6)
    jacobian = by_hand(network, x, network.embed.padding_idx)
    check_products(Tangent(network), x, jacobian)


def test_rows_that_are_too_long_are_cut_and_the_network_stays_as_it_is():
    network = Bag(max_norm=1.0).double().eval()
    x = tokens(5, 6)
    cut = copy.deepcopy(network)
    expected = cut(x).detach()  # torch cuts the weight itself
    before = network.embed.weight.detach().clone()
    tangent = Tangent(network)
    assert torch.allclose(tangent.outputs(x), expected, rtol=0, atol=1e-10)
    check_products(tangent, x, by_hand(cut, x))
    assert torch.equal(network.embed.weight, before)
    assert not torch.equal(cut.embed.weight, before)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("form", ["rows", "offsets", "last offset"])
def test_bags_of_embeddings_are_theirs(mode, padding, form):
    bag = nn.EmbeddingBag(
        9, 4, mode=mode, padding_idx=padding, include_last_offset=form == "last offset"
    )
    network = bag.double().eval()
    x = (tokens(3, 4),)
    if form != "rows":
        x = (tokens(8), torch.tensor([0, 3, 3, 7] + [8] * (form == "last offset")))
    tangent = Tangent(network)
    batch = tangent.at(x)
    assert torch.allclose(batch.outputs, network(*x), rtol=0, atol=1e-12)
    expected = torch.stack(
        [
            torch.autograd.grad(value, network.weight, retain_graph=True)[0].flatten()
            for value in network(*x).flatten()
        ]
    ).reshape(*batch.outputs.shape, -1)
    check_products(tangent, x, expected)


def test_weights_of_the_words_in_a_bag_count():
    network = nn.EmbeddingBag(9, 4, mode="sum").double().eval()
    words, sizes = tokens(3, 4), normal(3, 4)
    tangent = Tangent(network)
    x = {"input": words, "per_sample_weights": sizes}
    w = normal(36, 2)
    expected = torch.einsum("bl,bldk->bdk", sizes, w.reshape(9, 4, 2)[words])
    assert torch.allclose(tangent.at(x).jvp(w), expected)


class Reversed(torch.autograd.Function):
    """Turns gradients around, as adversarial training does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Hidden(torch.autograd.Function):
    """Keeps gradients to itself."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class Between(nn.Module):
    """Something between two linear layers."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.between = between

    def forward(self, x):
        return self.second(torch.tanh(self.between(self.first(x))))


def halves_gradients(h):
    if h.requires_grad:
        h.register_hook(lambda grad: grad / 2)
    return h


def halves_inputs(module, grad_input, grad_output):
    return (grad_input[0] / 2,)


@pytest.mark.parametrize("use", ["jvp", "vjp", "jacobian"])
@pytest.mark.parametrize(
    "between", [Reversed.apply, Hidden.apply, halves_gradients, "module hook"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_not_those_of_the_values_are_refused(between, use, dtype):
    network = Between(nn.Identity() if between == "module hook" else between)
    if between == "module hook":
        network.second.register_full_backward_hook(halves_inputs)
    batch = Tangent(network.to(dtype).eval()).at(normal(6, 3).to(dtype))
    uses = {
        "jvp": lambda: batch.jvp(normal(32, 1).to(dtype)),
        "vjp": lambda: batch.vjp(normal(6, 2, 1).to(dtype)),
        "jacobian": batch.jacobian,
    }
    with pytest.raises(NotImplementedError, match="gradients are not the derivatives"):
        uses[use]()


class Two(nn.Module):
    """A head that these outputs do not use, and one behind detach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.aux = nn.Linear(3, 8), nn.Linear(8, 5)
        self.frozen, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.first(x) + self.frozen(x).detach()))


def test_weights_without_effect_have_zero_derivatives():
    network = Two().double().eval()
    x = normal(5, 3)
    tangent = Tangent(network)
    batch = tangent.at(x)
    jacobian = batch.jacobian()
    used = torch.zeros(tangent.num_weights, dtype=torch.bool)
    for name, columns in tangent.slices.items():
        used[columns] = name.startswith(("first", "out"))
    assert not jacobian[..., ~used].any()
    assert (jacobian[..., used].abs().sum((0, 1)) > 0).all()
    check_products(tangent, x, jacobian)
    loose = Tangent(network, weights=["aux.*", "frozen.*"])
    with pytest.raises(ValueError, match="none of the chosen weights"):
        loose.at(x).jvp(normal(loose.num_weights, 1))


class Noisy(nn.Module):
    """Functions of more than the example."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.change = nn.Linear(3, 2), change

    def forward(self, x):
        return self.linear(self.change(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: F.dropout(x, 0.3, training=True), "two passes .* random"),
        (lambda x: x + 0.1 * torch.randn_like(x), "two passes .* random"),
        (lambda x: x - x.mean(0), "without the other examples"),
        (lambda x: x / x.norm(), "without the other examples"),
        (lambda x: F.batch_norm(x, None, None, training=True), "the other examples"),
    ],
)
def test_outputs_that_are_no_function_of_an_example_are_refused(change, words):
    x = 3 + normal(6, 3)
    tangent = Tangent(Noisy(change).double().eval())
    for use in (tangent.outputs, tangent.at):
        with pytest.raises(ValueError, match=words):
            use(x)


def test_inputs_that_examples_share_are_no_dependence():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, mask):
            return self.linear((mask @ x)[:, 0])

    x, mask = normal(4, 4, 4), torch.tril(torch.ones(4, 4, dtype=torch.float64))
    network = Masked().double().eval()
    found = Tangent(network).outputs((x, mask))
    assert torch.allclose(found, network(x, mask))


def calls(work, count=24):
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(work, range(count)))


@pytest.mark.parametrize("kind", ["mlp", "transformer", "lstm"])
def test_threads_that_share_a_network_find_what_one_finds(kind):
    network, _ = network_of(kind)
    x = inputs_of(kind, 4)
    tangent = Tangent(network)
    w, u = normal(tangent.num_weights, 2), normal(4, 3, 2)
    switches = (
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )
    with torch.no_grad():
        plain = network(x)
    expected = (tangent.at(x).jvp(w), tangent.at(x).vjp(u), tangent.at(x).jacobian())

    def work(i):
        if i % 4 == 3:
            with torch.no_grad():
                return torch.allclose(network(x), plain, rtol=0, atol=1e-10)
        # Some threads meet the network for the first time.
        batch = (tangent if i % 3 else Tangent(network)).at(x)
        found = (batch.jvp(w), batch.vjp(u), batch.jacobian())
        return all(map(torch.allclose, found, expected))

    assert all(calls(work))
    assert switches == (
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )
    assert all(type(p) is nn.Parameter for p in network.parameters())
    assert not torch.nn.modules.module._global_forward_hooks


def _in_a_child(tangent, x, w, queue):
    # OpenMP's threads are not in a fork, and torch would wait for them.
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(50, exit=True)
    queue.put(tangent.at(x).jvp(w).numpy())


def test_a_forked_process_goes_on_whatever_other_threads_do():
    network, _ = network_of("mlp")
    x = inputs_of("mlp", 4)
    tangent = Tangent(network)
    w = normal(tangent.num_weights, 2)
    expected = tangent.at(x).jvp(w)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with ThreadPoolExecutor(1) as thread:
        busy = [thread.submit(lambda: tangent.at(x).jvp(w)) for _ in range(50)]
        child = context.Process(target=_in_a_child, args=(tangent, x, w, queue))
        child.start()
        # A child that dies puts nothing into the queue.
        child.join(60)
        assert child.exitcode == 0
        assert all(torch.allclose(one.result(), expected) for one in busy)
    assert torch.allclose(torch.from_numpy(queue.get()), expected)


def test_a_thread_that_forks_amid_a_pass_goes_on_in_both_processes():
    class Forking(nn.Linear):
        def forward(self, x):
            nonlocal child
            if child is None:
                child = context.Process(target=_in_a_child, args=(tangent, x, w, queue))
                child.start()
            return super().forward(x)

    child = None
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    tangent = Tangent(Forking(3, 2).double().eval())
    x, w = normal(4, 3), normal(tangent.num_weights, 2)
    found = tangent.at(x).jvp(w)
    child.join(60)
    assert child.exitcode == 0
    assert torch.allclose(torch.from_numpy(queue.get()), found)
    with ThreadPoolExecutor(1) as thread:
        again = thread.submit(lambda: tangent.at(x).jvp(w)).result(60)
    assert torch.allclose(again, found)


def test_a_network_that_was_moved_is_noticed():
    network = nn.Linear(3, 2).double().eval()
    tangent = Tangent(network)
    tangent.outputs(normal(4, 3))
    network.float()  # as a move to another device does, other storage
    with pytest.raises(RuntimeError, match="changed since it was linearised"):
        tangent.outputs(normal(4, 3))


def test_inputs_of_another_dtype_are_refused_by_name():
    network = nn.Linear(3, 2).eval()
    for use in (Tangent(network).outputs, Tangent(network).at):
        with pytest.raises(TypeError, match=r"x: found torch\.float64 .*float32"):
            use(normal(4, 3))


class HeadFirst(nn.Module):
    """Registers its layers in another order than it uses them."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_a_last_layer_that_is_not_used_last_is_refused():
    network = HeadFirst().double().eval()
    with pytest.raises(ValueError, match=r"weights=\"head\*\""):
        Tangent(network, weights="last_layer").at(normal(4, 3))
    found = Tangent(network, weights="head*").at(normal(4, 3)).outputs
    assert found.shape == (4, 2)
