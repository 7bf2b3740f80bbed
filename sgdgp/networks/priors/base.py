"""Gaussian priors over the weights of a network: what one is, and what sets it.

Sigma_0 = R R^T (D, D) is never formed: a prior is the operator R (``WeightPrior``). A
root is diagonal, or Kronecker-factored within each weight matrix; on top of either,
every group of weights has a precision alpha that learning moves: R = R_1 alpha^-1/2.
Vectors are the columns of (D, k) matrices that lie in memory as the transposes of
contiguous (k, D) ones.

Users give settings (``PriorSettings``), from which the operator is built when network
and data are known. A family of priors is a file with both.

With one variance for all weights the posterior depends on how the network happens to
be parametrised: where a normalisation layer follows, weights times ten give the same
network and a Jacobian column a tenth as long. The g-prior scales every weight by the
inverse length of its Jacobian column, the Kronecker prior every matrix by the inverse
of its second moments, and both undo that. See Antoran et al., "Adapting the linearised
Laplace model evidence for modern deep learning", 2022.

What both scale by are second moments of probes. A probe J_b^T L_b e of a batch b, e of
independent random signs, has mean zero and covariance sum_{n in b} J_n^T H_n J_n,
because signs of different examples and outputs are uncorrelated. So squares of probes,
added up over the batches, estimate the diagonal of G = sum_n J_n^T H_n J_n without
per-example gradients; and for one weight matrix M M^T and M^T M estimate the factors of
a Kronecker product.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import NoReturn, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.codec import encode
from sgdgp.core.hashes import digest
from sgdgp.core.seeds import standard_normal
from sgdgp.core.slices import check_product
from sgdgp.networks.priors.blocks import Block, Estimate, MatrixRoot
from sgdgp.tangent import NORMS, Tangent

Probes: TypeAlias = Callable[[int], Iterator[Tensor]]
"""From p to J_b^T L_b e (D, p) for each batch b of this process, e of random signs."""


def no_probes(count: int) -> NoReturn:
    """Of a prior that is built without."""
    raise AssertionError("this prior needs no probes")


PROBE_MEMORY = 2**30
"""Bytes of the probes of a batch: a GiB is what a few samples of a network take."""

Grouping: TypeAlias = str | Callable[[str], str]
"""Which weights share a precision: "all", "tensors", "layers", or name -> label."""


class PriorSettings(ABC):
    """What ``linearise(prior=...)`` takes."""

    @abstractmethod
    def build(self, tangent: Tangent, probes: Probes) -> WeightPrior:
        """The operator for a network and its data, at precision one.

        In a group of processes all of them must call this; they get the same prior.

        Args:
            tangent: The tangent model.
            probes: Passes over this process's share of the data, see ``Probes``.
        """

    def centre(self, tangent: Tangent) -> Float[Tensor, "D 1"] | None:
        """The prior's mean minus the network's weights; None: no mean but zero."""
        return None

    def candidates(self) -> Sequence[PriorSettings]:
        """Settings to choose from by the evidence, what to prefer last."""
        return (self,)

    def identity(self) -> str:
        """Text that is the same for the same settings, tensors included."""
        return repr(self)


@dataclass(eq=False, repr=False)
class WeightPrior(PriorSettings):
    """N(0, P^-1) over the weights, P^-1 = R R^T, R = R_1 with group g by alpha_g^-1/2.

    P is block-diagonal (``blocks.py``). Scaled precisions are ``with_precisions``, sums
    ``precision_sum``. As settings for ``linearise`` it stands for itself: learning
    then moves precisions that begin at one on top of its own.

    A subclass has the product with R and its transpose (``_apply``), and keeps the
    arguments of its constructor as attributes of their names; by those it is stored.

    Attributes:
        num_weights: D.
        precisions: alpha (G,), positive.
        groups: Slices that partition 0..D in order. Default: one.
        group_of: Which precision each slice has; slices may share one. Default: each
            slice its own.
        root_at_one: The same for priors that differ in their precisions only.

    Raises:
        ValueError: The slices are no partition, or the precisions do not fit them.
    """

    num_weights: int
    precisions: Float[Tensor, " G"]
    groups: Sequence[slice] = ()
    group_of: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.groups = tuple(self.groups or (slice(0, self.num_weights),))
        self.group_of = tuple(self.group_of or range(len(self.groups)))
        at = 0
        for s in self.groups:
            if s.start != at or s.stop <= at or s.step not in (None, 1):
                raise ValueError(
                    f"groups: expected slices that partition 0..{self.num_weights} in "
                    f"order, found {s} where {at} should start"
                )
            at = s.stop
        if at != self.num_weights:
            raise ValueError(
                f"groups: expected to end at {self.num_weights}, found {at}"
            )
        if len(self.group_of) != len(self.groups) or sorted(set(self.group_of)) != list(
            range(self.num_groups)
        ):
            raise ValueError(
                f"group_of: expected the numbers 0..G-1 for {len(self.groups)} slices, "
                f"found {self.group_of}"
            )
        self.root_at_one = object()
        self._set_precisions(self.precisions)

    @property
    def num_groups(self) -> int:
        """G, the number of precisions."""
        return max(self.group_of) + 1

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many weights each group has."""
        sizes = [0] * self.num_groups
        for s, g in zip(self.groups, self.group_of, strict=True):
            sizes[g] += s.stop - s.start
        return tuple(sizes)

    def root(self, z: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """R z: whitened coordinates to weights."""
        return self._apply(self._rows(z), adjoint=False).mT

    def root_adjoint(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """R^T w."""
        return self._apply(self._rows(w), adjoint=True).mT

    def covariance(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """Sigma_0 w = R R^T w."""
        return self.root(self.root_adjoint(w))

    def matmul(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """P w."""
        rows = self._rows(w)
        return self._by_pieces(rows, lambda b, a, x: b.matmul(x).mul_(a)).mT

    def solve(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """P^-1 w; where R is not in closed form by conjugate gradients."""
        rows = self._rows(w)
        return self._by_pieces(rows, lambda b, a, x: b.solve(x).div_(a)).mT

    def sample(self, k: int, generator: torch.Generator) -> Float[Tensor, "D k"]:
        """Weights w ~ N(0, P^-1)."""
        like = self.precisions
        z = standard_normal(k, self.num_weights, like=like, generator=generator)
        return self.root(z.mT)

    def logdet(self) -> Estimate:
        """Log det P, an estimate where a block's sum is long."""
        parts = [
            b.logdet() + Estimate(b.num_weights * math.log(a)) for b, a in self.pieces()
        ]
        return sum(parts, Estimate(0.0))

    def trace_solve(self, other: WeightPrior) -> Estimate:
        """tr(P^-1 Q) for the precision Q of another prior over the same weights.

        Raises:
            ValueError: Its blocks are others.
        """
        shapes = other.shapes if self.is_diagonal else self.shapes
        pairs = zip(self.pieces_of(shapes), other.pieces_of(shapes), strict=True)
        parts = [p.trace_solve(q).times(b / a) for (p, a), (q, b) in pairs]
        return sum(parts, Estimate(0.0))

    def marginal_variance(self) -> Float[Tensor, " D"]:
        """The diagonal of P^-1."""
        return torch.cat([b.variances().flatten() / a for b, a in self.pieces()])

    @abstractmethod
    def pieces(self) -> list[tuple[Block, float]]:
        """Blocks in order, and the precision that each is multiplied by."""

    @abstractmethod
    def folded(self) -> WeightPrior:
        """The same prior at precisions of one: what they were is in the blocks."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, rest) of each block."""
        return [b.shape for b, _ in self.pieces()]

    @property
    def is_diagonal(self) -> bool:
        """Whether all weights are independent."""
        return all(_is_diagonal(b) for b, _ in self.pieces())

    def pieces_of(self, shapes: Sequence[tuple[int, int]]) -> list[tuple[Block, float]]:
        """The prior in blocks of these shapes; one of independent weights has any.

        Raises:
            ValueError: It has others; names the first that differs.
        """
        left = self.pieces()[::-1]
        found: list[tuple[Block, float]] = []
        # Variances of independent weights, which are cut as is asked for.
        cut = self.precisions.new_empty(0)
        for i, shape in enumerate(shapes):
            if left and left[-1][0].shape == shape and not len(cut):
                found.append(left.pop())
                continue
            while left and _is_diagonal(left[-1][0]) and len(cut) < math.prod(shape):
                block, alpha = left.pop()
                cut = torch.cat([cut, block.variances().flatten() / alpha])
            if len(cut) < math.prod(shape):
                raise ValueError(
                    f"prior: expected blocks of shapes {list(shapes)[i : i + 3]} from "
                    f"number {i} on, found {[b.shape for b, _ in left[:-4:-1]]}"
                )
            own, cut = cut.tensor_split([math.prod(shape)])
            left_side, right_side = (own.new_ones(n) for n in shape)
            inner = own.sqrt().view(shape)
            # One number for all needs no matrix, in memory and in files.
            if bool((inner == inner[0, 0]).all()):
                root = MatrixRoot(left_side * inner[0, 0], right_side)
            else:
                root = MatrixRoot(left_side, right_side, inner)
            found.append((root, 1.0))
        if left or len(cut):
            raise ValueError(
                f"prior: expected {sum(map(math.prod, shapes))} weights, found "
                f"{self.num_weights}"
            )
        return found

    def build(self, tangent: Tangent, probes: Probes) -> WeightPrior:
        """Itself, for a network that it fits.

        Raises:
            ValueError: It is over other weights; names the first that differs.
        """
        if tangent.num_weights != self.num_weights:
            raise ValueError(
                f"prior: expected one of {tangent.num_weights} weights, found one of "
                f"{self.num_weights}"
            )
        like = self.precisions
        if like.dtype != tangent.dtype or like.device != tangent.device:
            raise ValueError(
                f"prior: expected {tangent.dtype} on {tangent.device} as the network's "
                f"weights, found {like.dtype} on {like.device}"
            )
        return self.folded()

    def identity(self) -> str:
        tensors: dict[str, Tensor] = {}
        state = encode(self, "prior", tensors)
        return f"{state} {[digest(tensor) for tensor in tensors.values()]}"

    def group_sums(
        self, a: Float[Tensor, "D k"], b: Float[Tensor, "D k"]
    ) -> Float[Tensor, "G k"]:
        """Inner products of the columns of a and b, group by group.

        Summed over the groups they are ``(a * b).sum(0)``; nothing of that size is
        kept.
        """
        found = a.new_zeros(self.num_groups, a.shape[1])
        for s, g in zip(self.groups, self.group_of, strict=True):
            found[g] += torch.linalg.vecdot(a.mT[:, s], b.mT[:, s])
        return found

    def with_precisions(self, precisions: Float[Tensor, " G"]) -> WeightPrior:
        """The same prior with other precisions; R scales by alpha^-1/2.

        Raises:
            ValueError: Not one positive finite number for each group.
        """
        other = copy.copy(self)
        other._set_precisions(precisions.to(self.precisions))
        return other

    def rewhiten(
        self, v: Float[Tensor, "D k"], old: WeightPrior
    ) -> Float[Tensor, "D k"]:
        """R^-1 R_old v, the same weights as v under a prior of other precisions."""
        factors = (self.precisions / old.precisions).sqrt()
        out = v.mT.clone()
        for group, number in zip(self.groups, self.group_of, strict=True):
            out[:, group] *= factors[number]
        return out.mT

    @abstractmethod
    def whiten(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """R^-1 w: weights in whitened coordinates; none in directions that R lacks."""

    @abstractmethod
    def _apply(self, rows: Tensor, adjoint: bool) -> Tensor:
        """Product of R or R^T with each of the rows (k, D), as rows."""

    def _set_precisions(self, precisions: Tensor) -> None:
        """Take over alpha, and alpha^-1/2 as one number or one for each weight (D,)."""
        if precisions.shape != (self.num_groups,):
            raise ValueError(
                f"precisions: expected shape ({self.num_groups},), one for each group, "
                f"found {tuple(precisions.shape)}"
            )
        if not (torch.isfinite(precisions) & (precisions > 0)).all():
            raise ValueError(
                "precisions: expected positive finite numbers, found "
                f"{precisions.tolist()[:8]}"
            )
        self.precisions = precisions
        self._alphas: list[float] = precisions.tolist()
        self._factor = precisions.rsqrt()
        if self.num_groups == 1:
            self._factor = self._factor[0]
        else:
            lengths = torch.tensor(
                [s.stop - s.start for s in self.groups], device="cpu"
            )
            index = torch.tensor(self.group_of, device="cpu").repeat_interleave(lengths)
            self._factor = self._factor[index.to(precisions.device)]

    def _by_pieces(
        self, rows: Tensor, product: Callable[[Block, float, Tensor], Tensor]
    ) -> Tensor:
        """A product with each block's part of the rows (k, D), as rows."""
        found = torch.empty_like(rows, memory_format=torch.contiguous_format)
        at = 0
        for block, alpha in self.pieces():
            s = slice(at, at := at + block.num_weights)
            x = rows[:, s].reshape(-1, *block.shape)
            found[:, s] = product(block, alpha, x).flatten(1)
        return found

    def _rows(self, w: Tensor) -> Tensor:
        check_product("weights", w, self.num_weights)
        return w.mT


@dataclass(frozen=True)
class ProbedPrior(PriorSettings):
    """Settings that priors estimated from probes have in common.

    Attributes:
        probes: Probes per batch; fewer where they would fill more than 1 GiB.
        floor: Smallest scale, relative to its parameter tensor's.
        layerwise: False: one precision. True: one for each parameter tensor; or any
            grouping of ``Layerwise``.
    """

    probes: int = 32
    floor: float = 0.1
    layerwise: bool | Grouping = False

    def __post_init__(self) -> None:
        check_count("probes", self.probes, 1)
        check_positive("floor", self.floor)
        check_grouping(self.grouping)

    @property
    def grouping(self) -> Grouping:
        """Which weights share a precision."""
        if isinstance(self.layerwise, bool):
            return "tensors" if self.layerwise else "all"
        return self.layerwise

    def affordable(self, tangent: Tangent) -> int:
        """Probes per batch that fit into memory."""
        each = tangent.num_weights * tangent.dtype.itemsize
        return max(1, min(self.probes, PROBE_MEMORY // each))


def median_of(squares: Tensor) -> float:
    """Median of the entries that are not zero; zero if all are."""
    positive = squares[squares > 0]
    return float(positive.median()) if len(positive) else 0.0


def own_levels(levels: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Levels of parameter tensors, or that of all where one is but rounding error.

    A bias that attention's softmax cancels has a Jacobian that is zero in theory and
    1e-8 in float32; scaled to unit size it would be noise.

    Raises:
        ValueError: All levels are zero.
    """
    positive = [level for level in levels if level > 0]
    if not positive:
        raise ValueError(
            "prior: all probes of the curvature are zero, so on these data the outputs "
            "do not depend on the chosen weights, or the loss is flat in the outputs; "
            "use Isotropic() or other weights"
        )
    whole = median_low(positive)
    rounding = 100 * torch.finfo(dtype).eps
    return [level if level > rounding**2 * whole else whole for level in levels]


def grouped(
    tangent: Tangent, grouping: Grouping
) -> tuple[int, Tensor, tuple[slice, ...], tuple[int, ...]]:
    """How a prior's constructor begins: weights in groups, all at precision one."""
    groups: list[slice] = []
    group_of: list[int] = []
    numbers: dict[str, int] = {}
    for name, s in tangent.slices.items():
        label = _label(tangent, grouping, name)
        number = numbers.setdefault(label, len(numbers))
        if group_of and group_of[-1] == number:
            groups[-1] = slice(groups[-1].start, s.stop)
        else:
            groups.append(s)
            group_of.append(number)
    ones = torch.ones(len(numbers), dtype=tangent.dtype, device=tangent.device)
    return tangent.num_weights, ones, tuple(groups), tuple(group_of)


def check_grouping(grouping: Grouping) -> None:
    """Refuse what is no grouping.

    Raises:
        ValueError: Says what there is.
    """
    if not callable(grouping) and grouping not in ("all", "tensors", "layers"):
        raise ValueError(
            'groups: expected "all", "tensors", "layers" or a function from a '
            f"parameter's name to the label of its group, found {grouping!r}"
        )


def _is_diagonal(block: Block) -> bool:
    return isinstance(block, MatrixRoot) and block.is_diagonal


def _label(tangent: Tangent, grouping: Grouping, name: str) -> str:
    if callable(grouping):
        return str(grouping(name))
    if grouping == "all":
        return ""
    if grouping == "tensors":
        return name
    owner = name.rpartition(".")[0]
    norm = isinstance(tangent.network.get_submodule(owner), NORMS)
    # A module's name has no colon.
    return ":normalisation" if norm else owner
