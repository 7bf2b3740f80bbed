"""Likelihoods of linearised networks: losses and square roots of their Hessians.

The loss of one example is l(f, y) = -log p(y | f) with outputs f (C,). Its Hessian
H (C, C) in the outputs has a square root L in closed form, L L^T = H, which whitens
the tangent features: with z such that L z = -dl/df, one Newton step on the linear
model is ridge regression with unit noise on the targets z. Every product costs O(C)
per example and column; no C x C matrix is formed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sgdgp.core.checks import check_finite, check_variances
from sgdgp.core.codec import register_stored_class

_LARGEST_FALL = 100.0
"""Factor by which a learned noise falls at most in one step: an exact fit has none, and
systems that get there in one go are not solvable."""

_SMALLEST = torch.finfo(torch.float32).tiny
"""Noise variance is never below: its inverse is finite in float32 too."""


class Likelihood(ABC):
    """Distribution of one target given the C outputs of a network.

    Outputs are (b, C) for a batch of b examples; vectors in the space of outputs are
    (b, C, k), one column per sample.
    """

    @property
    def learns_noise(self) -> bool:
        """Whether there is a noise variance to learn from the data."""
        return False

    @property
    def variance(self) -> float | tuple[float, ...] | None:
        """Noise variance in use, one for all outputs or one each; None without any."""
        return None

    @abstractmethod
    def hessian_root(
        self, outputs: Float[Tensor, "b C"], v: Float[Tensor, "b C k"]
    ) -> Float[Tensor, "b C k"]:
        """L v with L L^T the Hessian of the loss at ``outputs``."""

    @abstractmethod
    def hessian_root_transpose(
        self, outputs: Float[Tensor, "b C"], v: Float[Tensor, "b C k"]
    ) -> Float[Tensor, "b C k"]:
        """L^T v with L L^T the Hessian of the loss at ``outputs``."""

    @abstractmethod
    def hessian(
        self, outputs: Float[Tensor, "b C"], v: Float[Tensor, "b C k"]
    ) -> Float[Tensor, "b C k"]:
        """H v with H the Hessian of the loss at ``outputs``."""

    @abstractmethod
    def gradient(self, outputs: Float[Tensor, "b C"], y: Tensor) -> Tensor:
        """Gradient dl/df of the loss in the outputs (b, C)."""

    @abstractmethod
    def residual(self, outputs: Float[Tensor, "b C"], y: Tensor) -> Tensor:
        """Whitened targets z (b, C): L z = -gradient(outputs, y)."""

    @abstractmethod
    def log_prob(
        self, outputs: Float[Tensor, "b C k"], y: Tensor
    ) -> Float[Tensor, "b k"]:
        """Log probability (or density) of each target under each column."""

    def loss(self, outputs: Float[Tensor, "b C"], y: Tensor) -> Float[Tensor, " b"]:
        """Negative log likelihood of each example (b,)."""
        return -self.log_prob(outputs.unsqueeze(-1), y).squeeze(-1)

    def with_targets(self, y: Tensor, num_outputs: int) -> Likelihood:
        """This likelihood with what the shape of targets says about it."""
        return self

    def counted(self, y: Tensor) -> Tensor | None:
        """Which positions of the targets have a likelihood (b, P); None: all."""
        return None

    @abstractmethod
    def check_targets(self, y: Any, num_outputs: int) -> None:
        """Refuse targets that are none for a network with ``num_outputs`` outputs.

        Raises:
            TypeError: Not a tensor, or of a dtype that no target has.
            ValueError: Of a wrong shape, out of range, or not finite.
        """


@register_stored_class
@dataclass(frozen=True, repr=False)
class Categorical(Likelihood):
    """One of C classes with probabilities p = softmax(f), targets are class indices.

    H = diag(p) - p p^T = L L^T with L = diag(sqrt p) - p sqrt(p)^T.

    An example may have several labels, as those of language models and segmentations:
    outputs (b, ..., C) with targets (b, ...), whose P positions are independent given
    the outputs. The axes between are one here: outputs are (b, P C).

    Probabilities are mixed with the uniform distribution at the rounding error of the
    dtype, so that z = (e_y - p) / sqrt(p) stays finite however small p_y is. L, H, z
    and the gradient all use the same p: the identities between them hold exactly.

    Attributes:
        ignore_index: Target of positions without a label, such as padding's -100: they
            have no likelihood. Default: None, every position has a label.
        classes: C where examples have several positions; ``fit`` sets it.
    """

    ignore_index: int | None = None
    classes: int | None = None

    def __repr__(self) -> str:
        """As it is made."""
        ignored = self.ignore_index
        return f"Categorical({'' if ignored is None else f'ignore_index={ignored}'})"

    def with_targets(self, y: Tensor, num_outputs: int) -> Categorical:
        """This likelihood with the number of classes, where positions are several."""
        positions = y[0].numel()
        return (
            self if positions == 1 else replace(self, classes=num_outputs // positions)
        )

    def by_position(self, tensor: Tensor) -> Tensor:
        """Every position of the outputs (b, P C, ...) as an example (b P, C, ...)."""
        if self.classes is None:
            return tensor
        return tensor.unflatten(1, (-1, self.classes)).flatten(0, 1)

    def counted(self, y: Tensor) -> Tensor | None:
        if self.ignore_index is None:
            return None
        return y.reshape(len(y), -1) != self.ignore_index

    def hessian_root(self, outputs: Tensor, v: Tensor) -> Tensor:
        root, flat = self._root(outputs), self.by_position(v)
        along = torch.einsum("bc,bck->bk", root, flat)
        root = root.unsqueeze(-1)
        product = root * (flat - root * along.unsqueeze(1))
        # The columns of L sum to zero. The likeliest class as minus the others keeps
        # its relative accuracy as p tends to one, where the above cancels.
        top = _top(root).expand(-1, -1, v.shape[-1])
        product.scatter_(1, top, 0.0)
        return product.scatter_(1, top, -product.sum(1, keepdim=True)).view(v.shape)

    def hessian_root_transpose(self, outputs: Tensor, v: Tensor) -> Tensor:
        root = self._root(outputs).unsqueeze(-1)
        return (root * _centred(root, self.by_position(v))).view(v.shape)

    def hessian(self, outputs: Tensor, v: Tensor) -> Tensor:
        root = self._root(outputs).unsqueeze(-1)
        return (root.square() * _centred(root, self.by_position(v))).view(v.shape)

    def gradient(self, outputs: Tensor, y: Tensor) -> Tensor:
        score = -_score(self._root(outputs), self._labels(y))
        return self._where_counted(y, score).view(outputs.shape)

    def residual(self, outputs: Tensor, y: Tensor) -> Tensor:
        root = self._root(outputs)
        residual = _score(root, self._labels(y)) / root
        return self._where_counted(y, residual).view(outputs.shape)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        flat = self.by_position(outputs)
        columns = _classes(self._labels(y), flat).expand(-1, flat.shape[-1])
        each = -functional.cross_entropy(flat, columns, reduction="none")
        each = self._where_counted(y, each)
        return each.view(len(outputs), -1, flat.shape[-1]).sum(1)

    def check_targets(self, y: Any, num_outputs: int) -> None:
        _check_tensor(y)
        if num_outputs < 2:
            raise ValueError(
                f"network: Categorical needs an output per class, at least two, found "
                f"{num_outputs}; use Bernoulli() for a network with one logit f, "
                f"which has the two outputs (0, f)"
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(
                f"y: Categorical expects class indices as integers, found {y.dtype}"
            )
        positions = y[0].numel() if y.ndim and len(y) else 0
        classes = num_outputs // positions if positions else 0
        fits = positions * classes == num_outputs and (positions > 1) == (y.ndim > 1)
        if classes < 2 or not fits:
            raise ValueError(
                f"y: Categorical expects one class index per position of outputs "
                f"(b, ..., C), or per example, shape (b,), found {tuple(y.shape)} for "
                f"{num_outputs} outputs"
            )
        counted = self.counted(y.reshape(len(y), -1))
        y = y if counted is None else y.reshape(len(y), -1)[counted]
        low, high = (int(y.min()), int(y.max())) if y.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(
                f"y: expected class indices from 0 to {classes - 1}, one per "
                f"output of the network, found {low if low < 0 else high}"
            )

    def _root(self, outputs: Tensor) -> Tensor:
        return _root_probabilities(self.by_position(outputs))

    def _labels(self, y: Tensor) -> Tensor:
        """The class of each position (b P,); any where it has none."""
        y = y.flatten()
        return y if self.ignore_index is None else y.where(y != self.ignore_index, 0)

    def _where_counted(self, y: Tensor, values: Tensor) -> Tensor:
        """Values of each position (b P, ...), zero where it is ignored."""
        if self.ignore_index is None:
            return values
        ignored = (y.flatten() == self.ignore_index).to(values.device)
        return values.masked_fill(ignored.unsqueeze(1), 0.0)


@register_stored_class
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Labels that are 0 or 1 by themselves, p = sigmoid(f): multilabel, or one logit.

    Targets are (b, C), or (b,) with one output. Probabilities are mixed with a half at
    the rounding error of the dtype, as those of ``Categorical``.
    """

    def hessian_root(self, outputs: Tensor, v: Tensor) -> Tensor:
        off, on = _odds(outputs)
        return (off * on).sqrt().unsqueeze(-1) * v

    hessian_root_transpose = hessian_root

    def hessian(self, outputs: Tensor, v: Tensor) -> Tensor:
        off, on = _odds(outputs)
        return (off * on).unsqueeze(-1) * v

    def gradient(self, outputs: Tensor, y: Tensor) -> Tensor:
        off, on = _odds(outputs)
        return torch.where(_targets(y, outputs) > 0, -off, on)

    def residual(self, outputs: Tensor, y: Tensor) -> Tensor:
        off, on = _odds(outputs)
        return torch.where(
            _targets(y, outputs) > 0, (off / on).sqrt(), -(on / off).sqrt()
        )

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        signs = 2 * _targets(y, outputs[..., 0]).unsqueeze(-1) - 1
        return functional.logsigmoid(signs * outputs).sum(1)

    def check_targets(self, y: Any, num_outputs: int) -> None:
        _check_tensor(y)
        if y.is_complex():
            raise TypeError(f"y: Bernoulli expects labels 0 and 1, found {y.dtype}")
        if y.numel() == 0 or y.ndim == 0 or y[0].numel() != num_outputs:
            raise ValueError(
                f"y: Bernoulli expects one label per output of the network, shape "
                f"(b, {num_outputs}), found {tuple(y.shape)}"
            )
        if not bool(((y == 0) | (y == 1)).all()):
            raise ValueError("y: Bernoulli expects labels 0 and 1, found others")


@register_stored_class
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Outputs plus Gaussian noise, y ~ N(f, sigma^2), independent across outputs.

    Attributes:
        noise: Noise variance sigma^2, one for all outputs or one each (C,). Default:
            None, learned from the data.
        per_output: Whether to learn one variance per output. Default: False.
        estimate: Current estimate of a noise that is learned; ``with_noise`` sets it.

    Raises:
        ValueError: A variance that is not positive and finite, or ``per_output`` with
            a given noise.
    """

    noise: float | Sequence[float] | Tensor | None = None
    per_output: bool = False
    estimate: float | Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        if self.noise is not None and (self.per_output or self.estimate is not None):
            raise ValueError(
                "per_output: it says how to learn the noise, which is given here; give "
                "one variance per output as noise=tensor of shape (C,), or noise=None"
            )
        # Plain numbers compare, hash and store; tensors do not.
        object.__setattr__(self, "noise", _as_variances("noise", self.noise))
        object.__setattr__(self, "estimate", _as_variances("estimate", self.estimate))

    @property
    def learns_noise(self) -> bool:
        return self.noise is None

    @property
    def variance(self) -> float | tuple[float, ...]:
        """Noise variance in use, one for all outputs or one each.

        Raises:
            ValueError: It is to be learned, and nothing has been so far.
        """
        value = self.estimate if self.noise is None else self.noise
        if value is None:
            raise ValueError(
                "noise: it is learned from data, and there is no estimate yet; fit "
                "first, or set one by with_noise"
            )
        assert not isinstance(value, Tensor)
        return value if isinstance(value, float) else tuple(value)

    def with_noise(self, variance: float | Sequence[float] | Tensor) -> Gaussian:
        """This likelihood with another noise variance, learned or fixed as before."""
        if self.learns_noise:
            return replace(self, estimate=variance)
        return replace(self, noise=variance)

    def squared_error(
        self, outputs: Float[Tensor, "b C"], y: Tensor
    ) -> Float[Tensor, " C"]:
        """Sum over the batch of (y - f)^2 for each output, in float64."""
        return (_targets(y, outputs) - outputs).double().square().sum(0)

    def update_noise(
        self,
        squared_error: Float[Tensor, " C"],
        num_examples: int,
        effective_dimension: float | Float[Tensor, " C"] = 0.0,
    ) -> Gaussian:
        """This likelihood with the noise that fits best, if it is learned.

        sigma_c^2 = |y_c - f_c|^2 / (N - gamma_c) is the fixed point of the evidence in
        the noise (MacKay, Neural Computation 4, 1992). Where the model takes up more
        than half of the targets, gamma from samples is not good enough to divide by
        what it leaves: there it is the step of expectation maximisation,
        (|y_c - f_c|^2 + gamma_c sigma_c^2) / N, with the same fixed point. It is
        positive even where the fit is exact, and no less than a hundredth of the
        current estimate.

        Args:
            squared_error: Sums over the examples of (y - f)^2 (C,), f the outputs of
                the linear model's optimum.
            num_examples: N.
            effective_dimension: gamma, shared evenly by the outputs, or that of each
                (C,), sum_n var(f_nc) / sigma_c^2. Default: 0, the mean squared error.

        Raises:
            ValueError: Negative or non-finite errors or dimensions.
        """
        if not self.learns_noise:
            return self
        error, gamma = _in_float64(squared_error), _in_float64(effective_dimension)
        for name, value in (("squared_error", error), ("effective_dimension", gamma)):
            check_finite(name, value)
            if bool((value < 0).any()):
                raise ValueError(
                    f"{name}: expected no negative value, found "
                    f"{value.min().item():.6g}"
                )
        if not self.per_output:
            gamma = gamma.sum()
        shares = gamma if gamma.ndim else gamma / len(error)
        shares = shares.clamp_max(num_examples)
        before = _in_float64(self.estimate or 0.0)
        noise = torch.where(
            2 * shares <= num_examples,
            error / (num_examples - shares),
            (error + shares * before) / num_examples,
        )
        noise = noise.maximum(before / _LARGEST_FALL).clamp_min(_SMALLEST)
        return self.with_noise(noise if self.per_output else float(noise.mean()))

    def hessian_root(self, outputs: Tensor, v: Tensor) -> Tensor:
        return v / self._deviation(outputs)

    hessian_root_transpose = hessian_root

    def hessian(self, outputs: Tensor, v: Tensor) -> Tensor:
        return v / self._deviation(outputs) ** 2

    def gradient(self, outputs: Tensor, y: Tensor) -> Tensor:
        error = (outputs - _targets(y, outputs)).unsqueeze(-1)
        return self.hessian(outputs, error).squeeze(-1)

    def residual(self, outputs: Tensor, y: Tensor) -> Tensor:
        error = (_targets(y, outputs) - outputs).unsqueeze(-1)
        return self.hessian_root(outputs, error).squeeze(-1)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        first = outputs[..., 0]
        deviation = self._deviation(first)
        z = (_targets(y, first).unsqueeze(-1) - outputs) / deviation
        logs = (outputs.new_ones(outputs.shape[1], 1) * deviation).log().sum()
        constant = logs + 0.5 * outputs.shape[1] * math.log(2 * math.pi)
        return -0.5 * z.square().sum(1) - constant

    def check_targets(self, y: Any, num_outputs: int) -> None:
        _check_tensor(y)
        if not y.is_floating_point():
            raise TypeError(
                f"y: Gaussian expects floating-point targets, found {y.dtype}"
            )
        if y.numel() == 0 or y.ndim == 0 or y[0].numel() != num_outputs:
            raise ValueError(
                f"y: Gaussian expects one target per output of the network, shape "
                f"(b, {num_outputs}), found {tuple(y.shape)}"
            )
        check_finite("y", y)
        variance = self.estimate if self.noise is None else self.noise
        if isinstance(variance, tuple) and len(variance) != num_outputs:
            raise ValueError(
                f"noise: expected one variance per output, {num_outputs}, found "
                f"{len(variance)}"
            )

    def _deviation(self, outputs: Tensor) -> float | Tensor:
        """Sigma, to divide (b, C, k) by."""
        variance = self.variance
        if isinstance(variance, float):
            return math.sqrt(variance)
        return outputs.new_tensor(variance).sqrt().unsqueeze(-1)


def _odds(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of labels 0 and 1, neither of them zero."""
    floor = torch.finfo(outputs.dtype).eps / 2
    off, on = ((f.sigmoid() + floor) / (1 + 2 * floor) for f in (-outputs, outputs))
    return off, on


def _root_probabilities(outputs: Tensor) -> Tensor:
    """Square roots of the probabilities (b, C), none of them zero."""
    classes = outputs.shape[1]
    floor = torch.finfo(outputs.dtype).eps / classes
    return ((outputs.softmax(1) + floor) / (1 + classes * floor)).sqrt()


def _top(root: Tensor) -> Tensor:
    """Index of the likeliest class, as an axis to gather along."""
    return root.argmax(1, keepdim=True)


def _centred(root: Tensor, v: Tensor) -> Tensor:
    """Subtract p^T v from v, with relative accuracy as p tends to a vertex."""
    # Without the likeliest class's entry p^T v is a sum of terms with small p.
    v = v - v.gather(1, _top(root).expand(-1, -1, v.shape[-1]))
    return v - torch.einsum("bc,bck->bk", root.squeeze(-1).square(), v).unsqueeze(1)


def _score(root: Tensor, y: Tensor) -> Tensor:
    """One-hot targets minus probabilities; 1 - p as the sum of the other classes."""
    p, top, y = root.square(), _top(root), _classes(y, root)
    others = p.scatter(1, top, 0.0).sum(1, keepdim=True)
    return (-p).scatter(1, y, torch.where(y == top, others, 1 - p.gather(1, y)))


def _classes(y: Tensor, outputs: Tensor) -> Tensor:
    """Class indices as an axis (b, 1) to gather along, on the outputs' device."""
    return y.to(outputs.device, torch.long).unsqueeze(-1)


def _targets(y: Tensor, outputs: Tensor) -> Tensor:
    """Regression targets as (b, C) in the dtype and on the device of the outputs."""
    return y.reshape(outputs.shape).to(outputs)


def _check_tensor(y: Any) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a torch.Tensor, found {type(y).__name__}")


def _as_variances(
    name: str, value: float | Sequence[float] | Tensor | None
) -> float | tuple[float, ...] | None:
    """One variance, or one per output, as plain numbers: they compare, hash and store.

    Args:
        name: What the caller calls it.
        value: A number, a sequence, a tensor of shape () or (C,), or None.

    Raises:
        ValueError: Of another shape, or a variance that is not positive and finite.
    """
    if value is None:
        return None
    tensor = _in_float64(value)
    if tensor.ndim > 1 or tensor.numel() == 0:
        raise ValueError(
            f"{name}: expected one variance, or one per output as shape (C,), found "
            f"shape {tuple(tensor.shape)}"
        )
    check_variances(name, tensor.reshape(-1))
    return tuple(tensor.tolist()) if tensor.ndim else float(tensor)


def _in_float64(value: float | Sequence[float] | Tensor) -> Tensor:
    """A tensor on the CPU, without gradient; numbers lose no digits."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
