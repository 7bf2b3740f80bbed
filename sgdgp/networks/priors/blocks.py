"""Precisions over the weights of one matrix, and their roots: the algebra of priors.

A block is a precision P (n, n) over the n entries of a matrix (out, rest), row by row;
a Kronecker product A (x) B takes X to A X B^T. Three products say all of it: P x, R x
and R^T x, with any root R R^T = P^-1. Then

    P^-1 = R R^T,    R^-1 = R^T P,    R^-T = P R.

What is not a matrix has out or rest = 1, and a full precision of n weights is a block
(1, n) of one product.

``MatrixRoot`` has R in closed form, R = (L (x) Q) diag(inner), and with it everything
else. ``KroneckerSum`` is P = sum_k A_k (x) B_k + diag(d), and has

- P x by its terms, always: the identity is never folded into factors. A product that
  is close to all of P may be far off where P is small, and there P^-1 is large;
- a ``MatrixRoot`` of A (x) B + d I by the eigenvectors of A and B, of two products by
  those of both in the inner product of their sum (neither needs to be regular), of
  anything with out = 1, rest = 1 or few weights by that of the whole matrix;
- of longer sums a root R_2 of P_2 = (sum_k A_k) (x) (sum_k B_k) + d I with balanced
  factors, which is above P but for a d that is no number. (Of 24 random sums this had
  the smallest condition number in 10, and none of the others a much smaller one: the
  nearest product, and the first term, are far off where other terms have their own
  directions.) R = R_2 M^-1/2 with M = R_2^T P R_2: M^-1/2 x by Lanczos runs, P^-1 x by
  conjugate gradients that R_2 preconditions, and traces as those of P_2, in closed
  form, plus an estimate of the difference with its standard error. In float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite
from sgdgp.core.codec import register_stored_class
from sgdgp.core.seeds import derived_generator
from sgdgp.networks.lanczos import Lanczos, inverse_root, random_signs
from sgdgp.networks.priors.factors import (
    Term,
    as_matrix,
    bound_of,
    check_factor,
    eigen,
    gram,
    in_float64,
    log_abs_det,
    multiple,
    nearest_product,
    quadratic,
    reciprocal,
    root_and_inverse,
    times,
    trace_of,
    upper_product,
)
from sgdgp.solvers.conjugate_gradients import BlockRecurrence
from sgdgp.solvers.preconditioners import Inverse

EXACT_WEIGHTS = 512
"""A sum over so few weights is a dense matrix: its root is a Cholesky factor."""

_PROBES = 64
"""Of the difference between a long sum and its stand-in of two terms."""

_MOST_STEPS = 60
"""Lanczos steps of a log determinant; a matrix near the identity takes a few."""

_SETTLED = 1e-6
"""Change of a log determinant over n that ends them."""

_MOST_ITERATIONS = 2000
"""Of conjugate gradients."""


_INVERSE = 1e-3
"""Relative error of R^T P R z beyond which R is no root; rounding leaves 1e-8 of a
condition number of 1e8."""


@dataclass(frozen=True)
class Estimate:
    """A number that is exact or an average over probes.

    Attributes:
        value: The number.
        standard_error: From the scatter over the probes; 0 if exact.
    """

    value: float
    standard_error: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        """The sum of two independent ones."""
        error = math.hypot(self.standard_error, other.standard_error)
        return Estimate(self.value + other.value, error)

    def times(self, factor: float) -> Estimate:
        """A multiple."""
        return Estimate(factor * self.value, abs(factor) * self.standard_error)


class Block(ABC):
    """A precision P over the weights of one matrix, and a root of its inverse."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed from the rest, which is the larger part."""
        computed = cached_property | property
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(getattr(type(self), name, None), computed)
        }

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, rest)."""

    @property
    def num_weights(self) -> int:
        """Their product n."""
        return math.prod(self.shape)

    @abstractmethod
    def apply(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R x for each of k matrices."""

    @abstractmethod
    def adjoint(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R^T x for each of k matrices."""

    @abstractmethod
    def matmul(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """P x for each of k matrices."""

    def whiten(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R^-1 x for each of k matrices."""
        return self.adjoint(self.matmul(x))

    def solve(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """P^-1 x for each of k matrices."""
        return self.apply(self.adjoint(x))

    @abstractmethod
    def logdet(self) -> Estimate:
        """Log det P."""

    @abstractmethod
    def variances(self) -> Float[Tensor, "out rest"]:
        """The diagonal of P^-1."""

    @abstractmethod
    def trace_solve(self, other: Block) -> Estimate:
        """tr(P^-1 Q) for the precision Q of another block of that shape."""

    @abstractmethod
    def trace_within(self, root: MatrixRoot) -> float:
        """tr(R^T P R) for a root R of another precision."""

    @abstractmethod
    def scaled(self, factor: float) -> Block:
        """Precision times a positive number."""

    @abstractmethod
    def to(self, like: Tensor) -> Block:
        """The same in the dtype and on the device of a tensor."""

    @abstractmethod
    def as_sum(self) -> KroneckerSum:
        """The precision by its terms.

        Raises:
            ValueError: It has none.
        """


@register_stored_class
@dataclass(frozen=True)
class MatrixRoot(Block):
    """Root over one weight matrix: X -> left (inner * X) right^T.

    The inverse of a Kronecker product, when there is no ``inner``; with it also that
    of the sum of two, or any other covariance with Kronecker-factored eigenvectors.
    With diagonal sides the weights are independent.

    Attributes:
        left: (out, out), or the diagonal of one (out,).
        right: (rest, rest), or the diagonal of one (rest,).
        inner: Entrywise factors (out, rest), or none.
    """

    left: Tensor
    right: Tensor
    inner: Tensor | None = None

    @classmethod
    def independent(cls, scales: Float[Tensor, " n"]) -> MatrixRoot:
        """Of weights with these standard deviations."""
        return cls(scales, scales.new_ones(1))

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    @property
    def is_diagonal(self) -> bool:
        """Whether the weights are independent."""
        return self.left.ndim == self.right.ndim == 1

    def apply(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        x = x if self.inner is None else self.inner * x
        return times(self.left, x, self.right)

    def adjoint(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        x = times(self.left.mT if self.left.ndim == 2 else self.left, x, None)
        x = x * self.right if self.right.ndim == 1 else x @ self.right
        return x if self.inner is None else self.inner * x

    @cached_property
    def inverse(self) -> MatrixRoot:
        """The root whose adjoint is the pseudo-inverse of this one."""
        left, right = (
            reciprocal(side) if side.ndim == 1 else torch.linalg.pinv(side).mT
            for side in (self.left, self.right)
        )
        inner = None if self.inner is None else reciprocal(self.inner)
        return MatrixRoot(left, right, inner)

    def matmul(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        return self.inverse.apply(self.inverse.adjoint(x))

    def whiten(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R^-1 x for each of k matrices; none in directions that R lacks."""
        return self.inverse.adjoint(x)

    def logdet(self) -> Estimate:
        out, rest = self.shape
        sides = rest * log_abs_det(self.left) + out * log_abs_det(self.right)
        inner = 0.0 if self.inner is None else log_abs_det(self.inner.flatten())
        return Estimate(-2.0 * (sides + inner))

    def variances(self) -> Float[Tensor, "out rest"]:
        return times(self.left.square(), self._inner_squares, self.right.square())

    def trace_solve(self, other: Block) -> Estimate:
        return Estimate(other.trace_within(self))

    def trace_within(self, root: MatrixRoot) -> float:
        # |R_P^-1 R|^2 by the entries of both sides.
        inverse = self.inverse
        left = gram(inverse.left, root.left).square()
        right = gram(inverse.right, root.right).square()
        squares = times(left, root._inner_squares, right)
        return float((inverse._inner_squares * squares).sum(dtype=torch.float64))

    def scaled(self, factor: float) -> MatrixRoot:
        return MatrixRoot(self.left / math.sqrt(factor), self.right, self.inner)

    def to(self, like: Tensor) -> MatrixRoot:
        inner = None if self.inner is None else self.inner.to(like)
        return MatrixRoot(self.left.to(like), self.right.to(like), inner)

    def as_sum(self) -> KroneckerSum:
        if self.is_diagonal:
            return KroneckerSum((), self.variances().reciprocal())
        if self.inner is not None:
            raise ValueError(
                "prior: a covariance that is a sum has no precision of few terms; give "
                "its precision as KroneckerSum(terms)"
            )
        left, right = (
            side.square() if side.ndim == 1 else side @ side.mT
            for side in (self.inverse.left, self.inverse.right)
        )
        return KroneckerSum([(left, right)])

    @property
    def _inner_squares(self) -> Tensor:
        if self.inner is None:
            return self.left.new_ones(()).expand(self.shape)
        return self.inner.square()


@register_stored_class
@dataclass(frozen=True)
class KroneckerSum(Block):
    """P = sum_k A_k (x) B_k + diag(d) over one weight matrix.

    Attributes:
        terms: Positive semi-definite factors A_k (out, out) and B_k (rest, rest), or
            diagonals of such.
        diagonal: d: a number (), or one for each weight (out, rest), which beside terms
            is a number again if all are the same. Default: 0.

    Raises:
        ValueError: Factors of different shapes, not symmetric or not finite, or
            something negative.
    """

    terms: Sequence[Term]
    diagonal: Tensor | float = 0.0

    def __post_init__(self) -> None:
        terms = tuple((left, right) for left, right in self.terms)
        like = terms[0][0] if terms else torch.as_tensor(self.diagonal)
        diagonal = torch.as_tensor(self.diagonal, dtype=like.dtype, device=like.device)
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "diagonal", diagonal)
        if not terms and diagonal.ndim != 2:
            raise ValueError("terms: expected at least one, or a diagonal (out, rest)")
        check_finite("diagonal", diagonal)
        if bool((diagonal < 0).any()):
            raise ValueError(
                f"diagonal: expected no negative precision, found {diagonal.min():.3g}"
            )
        if diagonal.ndim and diagonal.shape != self.shape:
            raise ValueError(
                f"diagonal: expected shape () or {self.shape}, found "
                f"{tuple(diagonal.shape)}"
            )
        if terms and diagonal.ndim and bool((diagonal == diagonal[0, 0]).all()):
            # Beside a number is a root in closed form, and it is no matrix in files.
            object.__setattr__(self, "diagonal", diagonal[0, 0].clone())
        for k, term in enumerate(terms):
            for side, n in zip(term, self.shape, strict=True):
                check_factor(f"terms[{k}]", side, n)

    @property
    def shape(self) -> tuple[int, int]:
        if not self.terms:
            assert isinstance(self.diagonal, Tensor)
            return self.diagonal.shape[0], self.diagonal.shape[1]
        left, right = self.terms[0]
        return left.shape[0], right.shape[0]

    def matmul(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        found = self.diagonal * x
        for left, right in self.terms:
            found = found + times(left, x, right)
        return found

    def apply(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        if self.is_exact:
            return self._by_near(x, adjoint=False)
        wide = self._wide
        return wide._by_near(wide._corrected(x), adjoint=False).to(x)

    def adjoint(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        if self.is_exact:
            return self._by_near(x, adjoint=True)
        wide = self._wide
        back = wide._by_near(x.double(), adjoint=True)
        return wide._corrected(back.to(x)).to(x)

    def whiten(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        if not self.is_exact:
            return super().whiten(x)
        # R^T P would multiply R's rounding by the condition number of P.
        near = self._near
        return near.whiten(x.reshape(-1, *near.shape)).reshape(x.shape)

    def solve(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """P^-1 x, refined by products with P until its residual falls no more.

        Raises:
            ValueError: It does not fall.
        """
        if x.dtype != torch.float64:
            return self._wide.solve(x.double()).to(x)
        rhs = x.flatten(1).mT
        run = BlockRecurrence(
            self._product,
            torch.zeros_like(rhs),
            rhs.clone(),
            _Near(self),
            torch.ones(len(x), dtype=torch.bool, device=x.device),
        )
        every = torch.arange(len(x), device=x.device)
        smallest = torch.finfo(x.dtype).eps ** 0.75 * rhs.norm(dim=0)
        best, weights = rhs.norm(dim=0), run.weights
        for _ in range(_MOST_ITERATIONS):
            run.release(run.norms > smallest)
            if not run.is_done:
                run.step()
                continue
            residual = rhs - self._product(run.weights)
            norms = residual.norm(dim=0)
            better = norms < best
            weights = torch.where(better, run.weights, weights)
            unsolved = (norms > smallest) & (norms < 0.5 * best)
            best = torch.where(better, norms, best)
            if not bool(unsolved.any()):
                break
            run.adopt(every, residual)
            run.resume(unsolved)
        # A residual of the rounding of P x is all that a large P lets one reach.
        rounding = math.sqrt(torch.finfo(x.dtype).eps)
        bound = rounding * (self._largest * weights.norm(dim=0) + rhs.norm(dim=0))
        if not bool((best <= bound).all()):
            raise ValueError(
                "precision: conjugate gradients left a residual of "
                f"{float((best / rhs.norm(dim=0)).max()):.2e}; add a larger multiple "
                "of the identity"
            )
        return weights.mT.reshape(x.shape)

    @torch.no_grad()
    def logdet(self) -> Estimate:
        """Log det P; of a long sum by stochastic Lanczos quadrature beside P_2's."""
        if self._like.dtype != torch.float64:
            return self._wide.logdet()
        known = self._near.logdet()
        if self.is_exact:
            return known
        signs = self._signs()
        run, last = Lanczos(self._whitened, signs / math.sqrt(len(signs))), math.inf
        while True:
            run.step()
            nodes, weights = run.quadrature()
            tiny = torch.finfo(nodes.dtype).tiny
            logs = (weights * nodes.clamp_min(tiny).log()).sum(1)
            settled = abs(float(logs.mean()) - last) <= _SETTLED * len(signs)
            if settled or run.steps == _MOST_STEPS or run.has_ended:
                return known + _mean(logs)
            last = float(logs.mean())

    @torch.no_grad()
    def variances(self) -> Float[Tensor, "out rest"]:
        """The diagonal of P^-1; of a long sum P_2's, with differences of probes."""
        known = self._near.variances().reshape(self.shape)
        if self.is_exact:
            return known
        near, own = self._probes()
        difference = (own.square() - near.square()).mean(0)
        # An estimate may leave what is possible where the variance is smallest.
        return torch.where(known + difference > 0, known + difference, known)

    @torch.no_grad()
    def trace_solve(self, other: Block) -> Estimate:
        """tr(P^-1 Q); of a long sum P_2's, with differences of probes."""
        if self._near.shape != self.shape:
            eye = torch.eye(self.num_weights).to(self._like)
            roots = self.apply(eye.view(-1, *self.shape))
            value = (roots * other.matmul(roots)).sum(dtype=torch.float64)
            return Estimate(float(value))
        known = Estimate(other.trace_within(self._near))
        if self.is_exact:
            return known
        each = [(x * other.matmul(x)).double().sum((1, 2)) for x in self._probes()]
        return known + _mean(each[1] - each[0])

    def trace_within(self, root: MatrixRoot) -> float:
        found = (root.variances() * self.diagonal).sum(dtype=torch.float64)
        for left, right in self.terms:
            a, b = quadratic(left, root.left), quadratic(right, root.right)
            found = found + (a @ root._inner_squares @ b).double()
        return float(found)

    def scaled(self, factor: float) -> KroneckerSum:
        if factor == 1.0:
            return self
        terms = [(multiple(left, factor), right) for left, right in self.terms]
        return KroneckerSum(terms, self.diagonal * factor)

    def to(self, like: Tensor) -> KroneckerSum:
        if (like.dtype, like.device) == (self._like.dtype, self._like.device):
            return self
        terms = [(left.to(like), right.to(like)) for left, right in self.terms]
        return KroneckerSum(terms, self._like.to(like))

    def as_sum(self) -> KroneckerSum:
        return self

    def trace(self) -> float:
        """The trace of P."""
        found = self._like.double().expand(self.shape).sum()
        for left, right in self.terms:
            found = found + trace_of(left) * trace_of(right)
        return float(found)

    def grown(self, out: int, level: float) -> KroneckerSum:
        """The same for a matrix with more rows, independent of those it has.

        Args:
            out: Rows.
            level: Precision of new weights; a curvature knows nothing of them, 0.
        """
        have, rest = self.shape
        more = out - have
        terms = [
            (torch.block_diag(left, left.new_zeros(more, more)), right)
            if left.ndim == 2
            else (torch.cat([left, left.new_zeros(more)]), right)
            for left, right in self.terms
        ]
        own = self._like.expand(self.shape)
        diagonal = torch.cat([own, own.new_full((more, rest), level)])
        return KroneckerSum(terms, diagonal)

    def plus(self, other: KroneckerSum) -> KroneckerSum:
        """The sum of two precisions."""
        return KroneckerSum([*self.terms, *other.terms], self.diagonal + other.diagonal)

    def compressed(self) -> KroneckerSum:
        """The best single Kronecker product in place of all, and the diagonal as is."""
        if len(self.terms) < 2:
            return self
        left, right = nearest_product([in_float64(term) for term in self.terms])
        like = self.terms[0][0]
        return KroneckerSum([(left.to(like), right.to(like))], self.diagonal)

    @cached_property
    def is_exact(self) -> bool:
        """Whether there is a root in closed form."""
        return self._reduced()[2] or self.num_weights <= EXACT_WEIGHTS

    @property
    def _wide(self) -> KroneckerSum:
        """The same in float64, with the same root: its eigenvectors are the work.

        M in float32 has errors of rounding times the condition number of P, not of M;
        what has a root in closed form needs it too rarely to be kept.
        """
        if self._like.dtype == torch.float64:
            return self
        wide: KroneckerSum | None = vars(self).get("_wide")
        if wide is None:
            wide = self.to(self._like.double())
            near = self._near.to(wide._like)
            vars(wide).update(_near=near, is_exact=self.is_exact)
            if not self.is_exact:
                vars(self)["_wide"] = wide
        return wide

    @property
    def _like(self) -> Tensor:
        assert isinstance(self.diagonal, Tensor)
        return self.diagonal

    @cached_property
    def _largest(self) -> float:
        """A bound on the norm of P."""
        bounds = [bound_of(left) * bound_of(right) for left, right in self.terms]
        return sum(bounds) + float(self._like.max())

    def _reduced(self) -> tuple[list[Term], Tensor, bool]:
        """Terms and diagonal, as few as there are; whether two at most."""
        # A layer that the data never reach says nothing.
        heard = [term for term in self.terms if all(bool(side.any()) for side in term)]
        terms = heard or list(self.terms[:1])
        diagonal = self._like.double()
        if min(self.shape) == 1 and len(terms) > (0 if diagonal.ndim else 1):
            # One side is a number: all is one matrix.
            side, terms = int(self.shape[0] == 1), [in_float64(term) for term in terms]
            sides = [term[side] * term[1 - side].sum() for term in terms]
            if any(own.ndim == 2 for own in sides):
                sides = [as_matrix(own) for own in sides]
            full = torch.stack(sides).sum(0)
            own = diagonal.expand(self.shape).flatten()
            full = full + (torch.diag(own) if full.ndim == 2 else own)
            pair = (full, full.new_ones(1)) if side == 0 else (full.new_ones(1), full)
            return [pair], torch.zeros_like(full[..., 0].sum()), True
        if diagonal.ndim:
            return terms, diagonal, not terms
        return terms, diagonal, len(terms) + int(bool(diagonal > 0)) <= 2

    @cached_property
    def _near(self) -> MatrixRoot:
        """R, or R_2 where R is not in closed form.

        Raises:
            ValueError: P is singular, or has a negative eigenvalue.
        """
        terms, diagonal, few = self._reduced()
        if not terms:
            _check_regular(diagonal)
            out, rest = self.shape
            found = MatrixRoot(
                diagonal.new_ones(out), diagonal.new_ones(rest), diagonal.rsqrt()
            )
        elif few and len(terms) == 1:
            found = _root_beside_identity(*terms[0], diagonal)
        else:
            found = self._root_of_many(
                [in_float64(term) for term in terms], diagonal, few
            )
        root = found.to(self._like)
        if few and len(terms) == 1 and root.inner is not None:
            # Its sides are orthogonal.
            inverse = MatrixRoot(root.left, root.right, reciprocal(root.inner))
            vars(root)["inverse"] = inverse
        return root

    def _root_of_many(
        self, terms: Sequence[Term], diagonal: Tensor, few: bool
    ) -> MatrixRoot:
        if few:
            found = root_of_sum(*terms).inverse
            _check_root(found, terms)
            return found
        if self.is_exact:
            return _dense_root(terms, diagonal, self.shape)
        return _root_beside_identity(*upper_product(terms), diagonal.mean())

    def _by_near(self, x: Tensor, adjoint: bool) -> Tensor:
        near = self._near
        y = x.reshape(-1, *near.shape)
        return (near.adjoint(y) if adjoint else near.apply(y)).reshape(x.shape)

    def _product(self, w: Tensor) -> Tensor:
        """P w for columns (n, k)."""
        return self.matmul(w.mT.reshape(-1, *self.shape)).flatten(1).mT

    def _whitened(self, w: Tensor) -> Tensor:
        """M w = R_2^T P R_2 w for columns (n, k)."""
        x = self._by_near(w.mT.reshape(-1, *self.shape), adjoint=False)
        return self._by_near(self.matmul(x), adjoint=True).flatten(1).mT

    def _corrected(self, x: Tensor) -> Tensor:
        """M^-1/2 x in float64 for each of k matrices, to what the dtype of x needs."""
        tolerance = torch.finfo(x.dtype).eps ** 0.75
        found = inverse_root(self._whitened, x.double().flatten(1).mT, tolerance)
        return found.mT.reshape(x.shape)

    def _signs(self) -> Tensor:
        streams = [derived_generator(0, "precisions", i) for i in range(_PROBES)]
        return random_signs(self.num_weights, streams, self._like)

    def _probes(self) -> tuple[Tensor, Tensor]:
        """R_2 z and R z for the same signs z."""
        z = self._signs().mT.reshape(-1, *self.shape)
        return self._by_near(z, adjoint=False), self.apply(z)


class _Near(Inverse):
    """P_2^-1 on columns."""

    passes, settings = 0.0, {}

    def __init__(self, block: KroneckerSum) -> None:
        self._near = block._near

    def __call__(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        near = self._near
        return near.solve(r.mT.reshape(-1, *near.shape)).flatten(1).mT


def root_of_sum(one: Term, two: Term) -> MatrixRoot:
    """A root C of one (x) one' + two (x) two', the sum itself: C C^T.

    On each side, with S the sum of both factors at unit size, S = F F^T, and
    F^-1 one F^-T = U diag(a) U^T, the second factor is I - a in the basis F U: the sum
    is (F U (x) F' U') diag(c a a' + d (1 - a)(1 - a')) (F U (x) F' U')^T.
    """
    sides, sizes = [], [1.0, 1.0]
    for pair in zip(one, two, strict=True):
        full = any(factor.ndim == 2 for factor in pair)
        factors = []
        for i, factor in enumerate(pair):
            size = float(factor.norm())
            sizes[i] *= size
            unit = factor / (size or 1.0)
            factors.append(as_matrix(unit) if full else unit)
        if not full:
            total = factors[0] + factors[1]
            sides.append((total.sqrt(), factors[0] * reciprocal(total)))
            continue
        factor, inverse = root_and_inverse(factors[0] + factors[1])
        values, vectors = torch.linalg.eigh(inverse @ factors[0] @ inverse)
        sides.append((factor @ vectors, values.clamp(0, 1)))
    (left, a), (right, b) = sides
    inner = sizes[0] * torch.outer(a, b) + sizes[1] * torch.outer(1 - a, 1 - b)
    return MatrixRoot(left, right, inner.sqrt())


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _root_beside_identity(left: Tensor, right: Tensor, delta: Tensor) -> MatrixRoot:
    """R of left (x) right + delta I, by the eigenvectors of both."""
    (a, u), (b, v) = eigen(left), eigen(right)
    precisions = torch.outer(a, b) + delta
    _check_regular(precisions)
    return MatrixRoot(u, v, precisions.rsqrt())


def _check_root(root: MatrixRoot, terms: Sequence[Term]) -> None:
    """Refuse a root of a sum that is singular: R^T P R z would not be z.

    Raises:
        ValueError: It is, or a factor has a negative eigenvalue.
    """
    z = torch.ones(1, *root.shape, dtype=root.left.dtype, device=root.left.device)
    z.view(-1)[::2] *= -1
    x = root.apply(z)
    back = root.adjoint(sum(times(a, x, b) for a, b in terms) + torch.zeros_like(x))
    if not float((back - z).norm()) <= _INVERSE * float(z.norm()):
        raise ValueError(
            "precision: singular, or with a negative eigenvalue; add a multiple of "
            "the identity"
        )


def _dense_root(
    terms: Sequence[Term], diagonal: Tensor, shape: tuple[int, int]
) -> MatrixRoot:
    """R = C^-T with the Cholesky factor C of the whole precision, as one row."""
    own = diagonal.expand(shape).flatten()
    matrix = torch.diag(own)
    for left, right in terms:
        matrix = matrix + torch.kron(*(as_matrix(side) for side in (left, right)))
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(torch.isfinite(factor).all()):
        _check_regular(torch.linalg.eigvalsh(matrix))
        raise ValueError("precision: singular; add a multiple of the identity")
    eye = torch.eye(len(own), dtype=own.dtype, device=own.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return MatrixRoot(own.new_ones(1), inverse.mT.contiguous())


def _check_regular(values: Tensor) -> None:
    smallest, largest = float(values.min()), float(values.max())
    if not smallest > torch.finfo(torch.float64).eps * largest:
        raise ValueError(
            f"precision: singular, its eigenvalues go from {smallest:.3g} to "
            f"{largest:.3g}; add a multiple of the identity"
        )
