"""The tangent model of a data set: whitened features, one pass over the data a product.

With J_n the Jacobian of example n, R R^T = Sigma_0 the prior covariance of the weights
and L_n L_n^T = H_n the Hessian of its likelihood, phi_n = L_n^T J_n R (C, D) are the
whitened features. In whitened weights v (prior N(0, I), weights w = R v) the posterior
precision is phi^T phi + I, and every question about the posterior is ridge regression
with unit noise on them. phi is never stored: a product is one Jacobian-vector and one
vector-Jacobian product a batch. The Jacobian itself is kept where it is small, and the
matrix phi^T phi is formed where it is cheap, or phi phi^T where there are fewer rows
than weights: the posterior is the same in either (``WeightSystem.is_wide``).

Only precisions and the likelihood's Hessian change as a fit goes on, so phi phi^T costs
its pass once: with K_g the kernel J R R^T J^T of the weights of group g at precision
one, it is L^T (sum_g K_g / alpha_g) L.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.memory import resolve_budget
from sgdgp.core.slices import slices
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.priors import WeightPrior
from sgdgp.networks.stream import Batch, Stream
from sgdgp.solvers.preconditioners import (
    LowRankInverse,
    damped_inverse,
    nystrom_factor,
)
from sgdgp.tangent import Tangent

_EXAMPLES, _SAMPLES = 32, 8
"""Noise is drawn for blocks of so many examples and samples: one seeding of a generator
for 256 C numbers. Other blocks are other numbers, so files of fits depend on them."""

_KEPT_NUMBERS = 2**23
"""A Jacobian of so many numbers is kept, 32 MiB of float32: reading it takes as long
as the overhead of some hundred calls of layers, which a pass without it has."""

_MOST_WEIGHTS, _MOST_WORK = 2048, 2**31
"""Columns of phi, and products of numbers, up to which phi^T phi is formed for each
linearisation: a factorisation takes a tenth of a second, a Gram matrix three."""

_MOST_ROWS = 2048
"""Rows of phi up to which phi phi^T is formed. A fit of classes to 250, 500, 1250 and
2500 rows of a convolutional network with 27,000 weights takes 1.8, 3.4, 10 and 35
seconds of one busy core, by CG 2.6, 11, 28 and 45; of a small MLP, whose passes cost
next to nothing, to 1200 rows 3 by 1.4, but then without sampling error, and with one
noisy output to 1000 rows 2.3 by 11."""

_MOST_KERNEL_WORK = 2**38
"""Multiplications of a kernel of the rows: half a minute of a core in float64. That is
500 rows of a million weights; products would take the same time for those alone."""

_LINEARISATIONS = 8
"""Of a likelihood that is not Gaussian, for one of a Gaussian: Newton's steps."""

_ROWS = 4096
"""Examples whose losses are evaluated together, for several tables at once: enough to
hide the overhead of a call, few enough for 1,000 classes."""


@runtime_checkable
class Jacobian(Protocol):
    """J of some examples (b, C, D): its products, or all of it."""

    def jvp(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "b C k"]:
        """J w."""

    def vjp(
        self, u: Float[Tensor, "b C k"], out: Float[Tensor, "D k"] | None = None
    ) -> Float[Tensor, "D k"]:
        """J^T u, summed over the examples; added to ``out`` in place if given."""

    def jacobian(self) -> Float[Tensor, "b C D"]:
        """J itself."""


@dataclass(frozen=True)
class KeptJacobian:
    """A Jacobian that is known."""

    matrix: Float[Tensor, "b C D"]

    def take(self, rows: Tensor | slice) -> KeptJacobian:
        """That of some examples."""
        return KeptJacobian(self.matrix[rows])

    def jvp(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "b C k"]:
        """J w."""
        return self.matrix @ w

    def vjp(
        self, u: Float[Tensor, "b C k"], out: Float[Tensor, "D k"] | None = None
    ) -> Float[Tensor, "D k"]:
        """J^T u, summed over the examples; added to ``out`` in place if given."""
        found = (u.flatten(0, 1).mT @ self.matrix.flatten(0, 1)).mT
        return found if out is None else out.add_(found)

    def jacobian(self) -> Float[Tensor, "b C D"]:
        """J itself."""
        return self.matrix


@dataclass(frozen=True)
class LinearJacobian:
    """J in the weight (C, d) of a linear layer that gives the outputs, and its bias.

    Attributes:
        inputs: What the layer gets at each position (b, P, d).
        num_outputs: C at each position.
        has_bias: Whether there is one, after the weight.
    """

    inputs: Float[Tensor, "b P d"]
    num_outputs: int
    has_bias: bool

    def take(self, rows: Tensor | slice) -> LinearJacobian:
        """That of some examples."""
        return replace(self, inputs=self.inputs[rows])

    def jvp(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "b C k"]:
        """J w."""
        rows, size = w.mT, self.num_outputs * self.inputs.shape[2]
        weights = rows[:, :size].unflatten(1, (self.num_outputs, -1))
        found = torch.einsum("bpd,kcd->bpck", self.inputs, weights)
        found = found + rows[:, size:].mT if self.has_bias else found
        return found.flatten(1, 2)

    def vjp(
        self, u: Float[Tensor, "b C k"], out: Float[Tensor, "D k"] | None = None
    ) -> Float[Tensor, "D k"]:
        """J^T u, summed over the examples; added to ``out`` in place if given."""
        u = u.unflatten(1, (-1, self.num_outputs))
        rows = torch.einsum("bpck,bpd->kcd", u, self.inputs).flatten(1)
        if self.has_bias:
            rows = torch.cat([rows, u.sum((0, 1)).mT], 1)
        return rows.mT if out is None else out.add_(rows.mT)

    def jacobian(self) -> Float[Tensor, "b C D"]:
        """J itself."""
        one = torch.eye(
            self.num_outputs, dtype=self.inputs.dtype, device=self.inputs.device
        )
        found = torch.einsum("bpd,ce->bpced", self.inputs, one).flatten(3)
        if self.has_bias:
            bias = one.expand(*found.shape[:2], -1, -1)
            found = torch.cat([found, bias], 3)
        return found.flatten(1, 2)


@dataclass(frozen=True)
class MaskedJacobian:
    """A Jacobian without the rows of some outputs, which are zero.

    Attributes:
        whole: With all of them.
        mask: One where an output counts, else zero (b, C, 1).
    """

    whole: Jacobian
    mask: Float[Tensor, "b C 1"]

    def jvp(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "b C k"]:
        """J w."""
        return self.whole.jvp(w) * self.mask

    def vjp(
        self, u: Float[Tensor, "b C k"], out: Float[Tensor, "D k"] | None = None
    ) -> Float[Tensor, "D k"]:
        """J^T u, summed over the examples; added to ``out`` in place if given."""
        return self.whole.vjp(u * self.mask, out)

    def jacobian(self) -> Float[Tensor, "b C D"]:
        """J itself."""
        return self.whole.jacobian() * self.mask


@dataclass(frozen=True)
class TangentData:
    """A data set seen through a tangent model; its passes are shared by the processes.

    Tables (r, C, ...) hold one row for each example of this process.

    Attributes:
        tangent: The network's Jacobian.
        stream: The examples.
        likelihood: Of their targets, which says what outputs have one. All others have
            neither Hessian nor gradient: here, no Jacobian. Default: all have one.
        centre: The prior's mean minus the network's weights (D, 1), about which the
            model is f(x) + J(x) (centre + w). Default: it is J(x) w, about zero.
    """

    tangent: Tangent
    stream: Stream
    likelihood: Likelihood | None = None
    centre: Float[Tensor, "D 1"] | None = None
    _kernels: dict[object, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _sketches: dict[object, tuple[WeightSystem, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @functools.cached_property
    def targets(self) -> Tensor:
        """Targets of this process's examples (r, ...), a table; one pass at first."""
        return self.table((b, b.y) for b in self.stream)

    @functools.cached_property
    def target_variance(self) -> Float[Tensor, " C"]:
        """Variance of regression targets over all examples, for each output."""
        targets = self.targets.reshape(len(self.targets), -1).double()
        count = self.stream.num_examples
        mean = self.total(targets.sum(0)) / count
        return self.total((targets - mean).square().sum(0)) / count

    @functools.cached_property
    @torch.no_grad()
    def network_outputs(self) -> Float[Tensor, "r C"]:
        """What the network itself says; one pass at first."""
        return self.table((b, self.tangent.outputs(b.x)) for b in self.stream)

    @functools.cached_property
    @torch.no_grad()
    def offset(self) -> Float[Tensor, "r C"] | None:
        """What the model says at the prior's mean; None where that is nothing."""
        if self.centre is None:
            return None
        if not bool(self.centre.any()):
            return self.network_outputs
        return self.network_outputs + self.forward(self.centre)[..., 0]

    def outputs_of(self, w: Float[Tensor, "D 1"]) -> Float[Tensor, "r C"]:
        """What the model says with weights w beyond the prior's mean, one pass."""
        found = self.forward(w)[..., 0]
        return found if self.offset is None else self.offset + found

    def has_cheap_gram(self, likelihood: Likelihood) -> bool:
        """Whether the smaller Gram matrix costs less than a solve by products would."""
        size = self.tangent.num_weights
        if self.is_wide and self.num_rows <= _MOST_ROWS:
            budget = resolve_budget(self.tangent.memory_budget, self.tangent.device)
            needed = [
                # Every parameter tensor may have a precision, and a kernel.
                8 * len(self.tangent.names) * self.num_rows**2,
                # The Jacobian of an example, and its image in float64.
                16 * self.network_outputs.shape[1] * size,
            ]
            is_affordable = self.num_rows**2 * size <= _MOST_KERNEL_WORK
            return is_affordable and max(needed) <= budget
        work = self.stream.num_examples * self.network_outputs.shape[1] * size**2
        if not isinstance(likelihood, Gaussian):
            work *= _LINEARISATIONS
        return size <= _MOST_WEIGHTS and work <= _MOST_WORK

    @property
    def num_rows(self) -> int:
        """Rows of phi that are this process's."""
        return self.network_outputs.numel()

    @property
    def is_wide(self) -> bool:
        """Whether phi has fewer rows than columns, all of them in this process."""
        return self.stream.processes.size == 1 and (
            self.num_rows < self.tangent.num_weights
        )

    def has_kernels(self, prior: WeightPrior) -> bool:
        """Whether those of a prior are at hand, whatever its precisions."""
        return prior.root_at_one in self._kernels

    @torch.no_grad()
    def kernels(self, prior: WeightPrior) -> Float[Tensor, "G N N"]:
        """J R R^T J^T of each group of weights at precision one, float64.

        One pass at first; more where half of the memory budget does not hold J R, which
        is then made again for each part of it that fits.
        """
        if not self.has_kernels(prior):
            self._kernels.clear()
            self._kernels[prior.root_at_one] = self._formed_kernels(
                prior.with_precisions(torch.ones_like(prior.precisions))
            )
        return self._kernels[prior.root_at_one]

    def _formed_kernels(self, prior: WeightPrior) -> Float[Tensor, "G N N"]:
        size, wide = self.num_rows, torch.float64
        budget = resolve_budget(self.tangent.memory_budget, self.tangent.device)
        most = budget // (2 * wide.itemsize * prior.num_weights)
        found = self.network_outputs.new_zeros(prior.num_groups, size, size, dtype=wide)
        done = 0
        while done < size:
            held: list[tuple[slice, Tensor]] = []
            stop, is_full = done, False
            for rows, some in self._rows_from(done, prior):
                is_full = is_full or (bool(held) and rows.stop - done > most)
                if not is_full:
                    held.append((rows, some))
                    stop = rows.stop
                for others, more in held:
                    for s, g in zip(prior.groups, prior.group_of, strict=True):
                        found[g, others, rows].addmm_(more[:, s], some[:, s].mT)
            for rows, _ in held:
                found[:, rows, : rows.start] = found[:, : rows.start, rows].mT
            done = stop
        return found

    def _rows_from(
        self, first: int, prior: WeightPrior
    ) -> Iterator[tuple[slice, Float[Tensor, "m D"]]]:
        """J R in float64 from a row on, some examples at a time."""
        outputs = self.network_outputs.shape[1]
        together = max(1, _KEPT_NUMBERS // (outputs * prior.num_weights))
        for batch in self.stream:
            for part in batch.parts(together):
                start = int(part.rows[0]) * outputs
                if start < first:
                    continue
                rows = self.at(part).jacobian().flatten(0, 1)
                rows = prior.root_adjoint(rows.mT).mT.double()
                yield slice(start, start + len(rows)), rows

    @functools.cached_property
    @torch.no_grad()
    def _kept(self) -> KeptJacobian | LinearJacobian | None:
        """The Jacobian of all examples of this process, where it is small."""
        linear = self._linear()
        if linear is not None:
            return linear
        if not self._is_kept(self._numbers):
            return None
        return KeptJacobian(self.table((b, self._jacobian_of(b)) for b in self.stream))

    def _is_kept(self, numbers: int) -> bool:
        tangent = self.tangent
        budget = resolve_budget(tangent.memory_budget, tangent.device)
        most = min(_KEPT_NUMBERS, budget // (2 * tangent.dtype.itemsize))
        return numbers <= most

    def _jacobian_of(self, batch: Batch) -> Float[Tensor, "b C D"]:
        at = self.tangent.at(batch.x)
        at.jvp(self.zeros(1))  # refuses networks that no prediction could be made for
        return at.jacobian()

    def _linear(self) -> LinearJacobian | None:
        """The inputs of the one linear layer that all of this is about, if it is so."""
        tangent = self.tangent
        direction = torch.randn(
            tangent.num_weights,
            1,
            generator=torch.Generator().manual_seed(0),
            device="cpu",
        ).to(self.network_outputs)
        found = []
        for batch in self.stream:
            x = tangent.linear_inputs(batch.x)
            if x is None or x.ndim < 2 or len(x) != len(batch.rows):
                return None
            x = x.reshape(len(x), -1, x.shape[-1])
            if not self._is_kept(x[0].numel() * self.stream.num_rows):
                return None
            has_bias = len(tangent.names) > 1
            linear = LinearJacobian(x, tangent.shapes[0][0], has_bias)
            # Whatever the network does after the layer shows in a random direction.
            one, two = tangent.at(batch.x).jvp(direction), linear.jvp(direction)
            if one.shape != two.shape or not torch.allclose(
                one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max())
            ):
                return None
            found.append((batch, x))
        return replace(linear, inputs=self.table(iter(found)))

    @property
    def keeps_jacobian(self) -> bool:
        """Whether J is small, and at hand."""
        return self._kept is not None and self._is_kept(self._numbers)

    @property
    def _numbers(self) -> int:
        """Of the Jacobian of this process's examples."""
        return self.network_outputs.numel() * self.tangent.num_weights

    @functools.cached_property
    def _everything(self) -> Batch:
        """All examples of this process as one batch, without inputs."""
        examples = self.table((b, b.examples) for b in self.stream)
        rows = torch.arange(len(examples), device=examples.device)
        return Batch(rows, examples, None, self.targets)

    def batches(self) -> Iterator[tuple[Batch, Jacobian]]:
        """The examples of this process with their Jacobians."""
        if self._kept is None:
            for batch in self.stream:
                yield batch, self.at(batch)
            return
        whole = self._everything
        each = self.network_outputs.shape[1] * self.tangent.num_weights
        for some in slices(len(whole.rows), max(1, _KEPT_NUMBERS // each)):
            batch = Batch(whole.rows[some], whole.examples[some], None, whole.y[some])
            yield batch, self._masked(batch, self._kept.take(some))

    def at(self, batch: Batch) -> Jacobian:
        """The Jacobian of one batch of this process."""
        kept = self._kept
        at = self.tangent.at(batch.x) if kept is None else kept.take(batch.rows)
        return self._masked(batch, at)

    def _masked(self, batch: Batch, at: Jacobian) -> Jacobian:
        mask = self.mask(batch)
        return at if mask is None else MaskedJacobian(at, mask)

    def mask(self, batch: Batch) -> Float[Tensor, "b C 1"] | None:
        """One where an output counts, else zero; None where all do."""
        counted = None if self.likelihood is None else self.likelihood.counted(batch.y)
        if counted is None or bool(counted.all()):
            return None
        classes = self.network_outputs.shape[1] // counted.shape[1]
        mask = counted.repeat_interleave(classes, 1).to(self.network_outputs)
        return mask.unsqueeze(-1)

    @torch.no_grad()
    def forward(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "r C k"]:
        """J w for all examples, one pass."""
        return self.table((batch, at.jvp(w)) for batch, at in self.batches())

    @torch.no_grad()
    def adjoint(
        self,
        pull: Callable[[Batch, Jacobian], Float[Tensor, "b C k"]],
        columns: int,
    ) -> Float[Tensor, "D k"]:
        """sum_n J_n^T u_n, one pass; ``pull`` gives u for a batch."""
        total = self.zeros(columns)
        for batch, at in self.batches():
            at.vjp(pull(batch, at), out=total)
        self.stream.processes.sum_(total)
        return total

    def zeros(self, columns: int) -> Float[Tensor, "D k"]:
        """Weights that are zero, the columns one after another in memory."""
        tangent = self.tangent
        return torch.zeros(
            columns, tangent.num_weights, dtype=tangent.dtype, device=tangent.device
        ).mT

    def table(self, parts: Iterator[tuple[Batch, Tensor]]) -> Tensor:
        """A table (r, ...) from its values (b, ...) at each batch."""
        table: Tensor | None = None
        for batch, values in parts:
            if len(values) != len(batch.rows):
                raise ValueError(
                    f"loader: a batch has {len(batch.rows)} targets, the network gives "
                    f"{len(values)} outputs for its inputs"
                )
            if table is None:
                table = values.new_empty(self.stream.num_rows, *values.shape[1:])
            table[batch.rows] = values
        if table is None:
            raise ValueError(
                "loader: this process has no examples; use fewer processes"
            )
        return table

    def total(self, value: Tensor) -> Tensor:
        """Sums over the examples of all processes, from those of this one."""
        self.stream.processes.sum_(value)
        return value


@dataclass(frozen=True)
class WeightSystem:
    """(phi^T phi + I) V = B in whitened weights.

    Attributes:
        data: The data set.
        prior: R.
        likelihood: H and its root.
        outputs: Where H is evaluated (r, C), a table.
    """

    data: TangentData
    prior: WeightPrior
    likelihood: Likelihood
    outputs: Float[Tensor, "r C"]

    @property
    def num_weights(self) -> int:
        """Size of the system, D."""
        return self.data.tangent.num_weights

    def product(self, v: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """phi^T phi v, one pass over the data."""
        w = self.prior.root(v)
        images = self.data.adjoint(
            lambda batch, at: self.likelihood.hessian(
                self.outputs[batch.rows], at.jvp(w)
            ),
            v.shape[1],
        )
        return self.prior.root_adjoint(images)

    @functools.cached_property
    @torch.no_grad()
    def gram(self) -> Float[Tensor, "D D"]:
        """phi^T phi itself in float64, one pass at first."""
        size, like = self.num_weights, self.outputs
        total = torch.zeros(size, size, dtype=torch.float64, device=like.device)
        for batch, at in self.data.batches():
            features = self.features(batch, at).double()
            total.addmm_(features.mT, features)
        return self.data.total(total)

    @functools.cached_property
    def kernel(self) -> Float[Tensor, "N N"]:
        """J R R^T J^T in float64, of a single process; rows are (example, output).

        One pass at first, none for other precisions.
        """
        scales = self.prior.precisions.double().reciprocal()
        return torch.tensordot(scales, self.data.kernels(self.prior), 1)

    @functools.cached_property
    @torch.no_grad()
    def row_gram(self) -> Float[Tensor, "N N"]:
        """Phi phi^T = L^T J R R^T J^T L in float64, see ``kernel``."""
        return self._between_roots(self.kernel)

    @functools.cached_property
    @torch.no_grad()
    def _roots(self) -> Float[Tensor, "r C C"]:
        """L_n^T itself, as products have it in their dtype; few rows have few of it."""
        unit = torch.eye(self.outputs.shape[1]).to(self.outputs)
        unit = unit.expand(len(self.outputs), -1, -1)
        return self.likelihood.hessian_root_transpose(self.outputs, unit).double()

    def _between_roots(self, kernel: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
        """L^T K L of a symmetric matrix over all rows."""
        for _ in range(2):
            rows = kernel.mT.unflatten(0, self.outputs.shape)
            kernel = (self._roots @ rows).flatten(0, 1)
        return kernel

    @property
    def is_wide(self) -> bool:
        """Whether phi phi^T is what is formed, being smaller than phi^T phi."""
        return self.data.is_wide

    @property
    def smaller_gram(self) -> Float[Tensor, "m m"]:
        """Phi phi^T or phi^T phi in float64: the same but for eigenvalues of zero."""
        return self.row_gram if self.is_wide else self.gram

    @property
    def is_formed(self) -> bool:
        """Whether the smaller of them needs no pass over the data any more."""
        if self.is_wide:
            return self.data.has_kernels(self.prior)
        return "gram" in vars(self)

    @functools.cached_property
    @torch.no_grad()
    def factor(self) -> Float[Tensor, "m m"]:
        """Lower Cholesky factor of phi phi^T + I or phi^T phi + I in float64."""
        matrix = self.smaller_gram.clone()
        matrix.diagonal().add_(1.0)
        return torch.linalg.cholesky(matrix)

    @torch.no_grad()
    def solve(
        self, b: Float[Tensor, "D k"], noise: Float[Tensor, "r C k"] | None = None
    ) -> Float[Tensor, "D k"]:
        """(phi^T phi + I)^-1 (b + phi^T noise) by the factor of few rows, in one pass.

        That is b + phi^T (phi phi^T + I)^-1 (noise - phi b), Matheron's rule where b
        and the noise are standard normal.
        """
        images = self.data.forward(self.prior.root(b))
        images = self.likelihood.hessian_root_transpose(self.outputs, images)
        missing = -images if noise is None else noise - images
        u = torch.cholesky_solve(missing.flatten(0, 1).double(), self.factor)
        return b + self.pull(u.to(b))

    def pull(self, u: Float[Tensor, "N k"]) -> Float[Tensor, "D k"]:
        """phi^T u of a table with rows (example, output); one pass."""
        table = u.unflatten(0, self.outputs.shape)
        return self._adjoint(
            lambda batch: self.likelihood.hessian_root(
                self.outputs[batch.rows], table[batch.rows]
            ),
            u.shape[1],
        )

    def weights_of(self, a: Float[Tensor, "N 1"]) -> Float[Tensor, "D 1"]:
        """V = R^T J^T a, as the optimum of the linear model is one; one pass."""
        table = a.to(self.outputs).view(*self.outputs.shape, 1)
        return self._adjoint(lambda batch: table[batch.rows], 1)

    @torch.no_grad()
    def newton_step(self, a: Float[Tensor, "N 1"]) -> Float[Tensor, "N 1"]:
        """Of the linear model's loss at v = R^T J^T a with ``outputs``, without a pass.

        The step in v is (phi^T phi + I)^-1 R^T J^T c with c = -g - a, g the gradient in
        the outputs. It is R^T J^T of c - L (phi phi^T + I)^-1 L^T J R R^T J^T c.
        """
        shape = *self.outputs.shape, 1
        gradient = self.likelihood.gradient(self.outputs, self.data.targets)
        c = -(gradient.reshape(-1, 1).double() + a)
        images = (self._roots @ (self.kernel @ c).view(shape)).flatten(0, 1)
        u = torch.cholesky_solve(images, self.factor)
        return c - (self._roots.mT @ u.view(shape)).flatten(0, 1)

    @torch.no_grad()
    def dimensions(self) -> Float[Tensor, " G"]:
        """How many weights of each group the data determine, in float64."""
        inverse, prior = torch.cholesky_inverse(self.factor), self.prior
        if not self.is_wide:
            shares = (1 - inverse.diagonal()).clamp_min(0.0).unsqueeze(1)
            return prior.group_sums(shares, torch.ones_like(shares))[:, 0]
        traces = [
            (inverse * self._between_roots(kernel)).sum()
            for kernel in self.data.kernels(prior)
        ]
        return torch.stack(traces) / prior.precisions.double()

    def features(self, batch: Batch, at: Jacobian) -> Float[Tensor, "bC D"]:
        """Phi of some examples itself."""
        rows = at.jacobian()
        rows = self.prior.root_adjoint(rows.flatten(0, 1).mT).mT.reshape(rows.shape)
        outputs = self.outputs[batch.rows]
        return self.likelihood.hessian_root_transpose(outputs, rows).flatten(0, 1)

    def precision(self, v: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """(phi^T phi + I) v, one pass over the data."""
        return self.product(v).add_(v)

    def residual(
        self, rhs: Float[Tensor, "D k"], v: Float[Tensor, "D k"]
    ) -> Float[Tensor, "D k"]:
        """B - (phi^T phi + I) V, one pass over the data."""
        return self.precision(v).neg_().add_(rhs)

    @torch.no_grad()
    def batch_product(
        self, batch: Batch, v: Float[Tensor, "D k"]
    ) -> Float[Tensor, "D k"]:
        """phi_b^T phi_b v for one batch of this process."""
        at = self.data.at(batch)
        images = at.jvp(self.prior.root(v))
        images = self.likelihood.hessian(self.outputs[batch.rows], images)
        return self.prior.root_adjoint(at.vjp(images))

    @torch.no_grad()
    def preconditioner(self, rank: int, generator: torch.Generator) -> LowRankInverse:
        """(F F^T + I)^-1 with phi^T phi ~ F F^T by a Nystrom sketch of ``rank``.

        The sketch takes one pass with as many columns, the first time. From there on
        F is scaled as precisions and a Gaussian's noise are, which leaves it exact.
        """
        key, sketches = (self.prior.root_at_one, rank), self.data._sketches
        passes = 0.0 if key in sketches else 1.0
        if key not in sketches:
            found = nystrom_factor(self.product, rank, self.data.zeros(1), generator)
            sketches.clear()
            sketches[key] = (self, found)
        then, factor = sketches[key]
        ratio = (then.prior.precisions / self.prior.precisions).double()
        factor = factor.clone()
        for s, g in zip(self.prior.groups, self.prior.group_of, strict=True):
            factor[s] *= ratio[g].sqrt()
        before, now = then.likelihood.variance, self.likelihood.variance
        if isinstance(before, float) and isinstance(now, float):
            factor *= (before / now) ** 0.5
        unit = factor.new_ones(len(factor), 1)
        return damped_inverse(factor, unit, self.outputs.dtype, passes)

    def noise(self, samples: range, seed: int) -> Float[Tensor, "D s"]:
        """phi^T eps of some samples, eps ~ N(0, I) drawn for every example, one pass.

        An example's draws depend on the seed, its number and the sample's only: not
        on batches or processes, nor on where the likelihood is linearised.
        """
        return self._adjoint(
            lambda batch: self.likelihood.hessian_root(
                self.outputs[batch.rows], self._noise_at(batch, samples, seed)
            ),
            len(samples),
        )

    def noise_table(self, samples: range, seed: int) -> Float[Tensor, "r C s"]:
        """The same eps themselves."""
        stream = self.data.stream
        return self.data.table((b, self._noise_at(b, samples, seed)) for b in stream)

    def _noise_at(self, batch: Batch, samples: range, seed: int) -> Tensor:
        outputs = self.outputs
        noise = example_noise(batch.examples, outputs.shape[1], samples, seed)
        return noise.to(outputs)

    def slope(self) -> Float[Tensor, "D 1"]:
        """R^T J^T g with g the gradient of the loss at ``outputs``, one pass."""
        return self._adjoint(
            lambda batch: self.likelihood.gradient(
                self.outputs[batch.rows], batch.y
            ).unsqueeze(-1),
            1,
        )

    def _adjoint(
        self, pull: Callable[[Batch], Float[Tensor, "b C k"]], columns: int
    ) -> Float[Tensor, "D k"]:
        """R^T J^T u, one pass; ``pull`` gives u for a batch."""
        found = self.data.adjoint(lambda batch, at: pull(batch), columns)
        return self.prior.root_adjoint(found)

    def loss(self, outputs: Float[Tensor, "r C m"]) -> Float[Tensor, " m"]:
        """Negative log-likelihood of the targets at m tables of outputs."""
        losses = outputs.new_zeros(outputs.shape[2], dtype=torch.float64)
        targets = self.data.targets
        for some, y in zip(outputs.split(_ROWS), targets.split(_ROWS), strict=True):
            losses -= self.likelihood.log_prob(some, y).double().sum(0)
        return self.data.total(losses)

    def at(self, outputs: Float[Tensor, "r C"]) -> WeightSystem:
        """The system with the likelihood linearised elsewhere."""
        other, same = replace(self, outputs=outputs), {"kernel"}
        if isinstance(self.likelihood, Gaussian):
            # The Hessian is the same everywhere.
            same |= {"gram", "row_gram", "_roots", "factor"}
        for name in same & vars(self).keys():
            vars(other)[name] = vars(self)[name]
        return other


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], v: Float[Tensor, "D 1"], steps: int
) -> float:
    """Largest eigenvalue of a symmetric product, from below, by power iteration.

    Args:
        product: Products with a positive semi-definite matrix.
        v: Where the iteration starts (D, 1).
        steps: Products taken.
    """
    for _ in range(steps):
        v = product(v / v.norm().clamp_min(1e-30))
    return float(v.norm())


@torch.no_grad()
def curvature_probes(
    data: TangentData,
    likelihood: Likelihood,
    outputs: Float[Tensor, "r C"],
    count: int,
    seed: int,
) -> Iterator[Float[Tensor, "D p"]]:
    """J_b^T L eps of every batch b of this process, with signs eps = +-1.

    Squares of their entries have the expectation sum_{n in b} (J_n^T H_n J_n)_ii:
    cross terms of two examples vanish.
    """
    for batch in data.stream:
        f = outputs[batch.rows]
        signs = example_noise(batch.examples, f.shape[1], range(count), seed).sign()
        yield data.at(batch).vjp(likelihood.hessian_root(f, signs.to(f)))


def example_noise(
    examples: Tensor, outputs: int, samples: range, seed: int
) -> Float[Tensor, "b C s"]:
    """Standard normal draws that are a function of seed, example and sample number.

    Blocks of examples and samples have a stream each, so that any of them can be drawn
    anew, in any batch and any process.
    """
    generator = torch.Generator()
    columns = range(samples.start // _SAMPLES, -(-samples.stop // _SAMPLES))
    blocks, place = torch.unique(
        examples.cpu() // _EXAMPLES, return_inverse=True, sorted=True
    )
    drawn = torch.empty(
        len(blocks), len(columns), _EXAMPLES, _SAMPLES, outputs, device="cpu"
    )
    for some, block in zip(drawn, blocks.tolist(), strict=True):
        for part, column in zip(some, columns, strict=True):
            generator.manual_seed(_mixed(seed, block, column))
            torch.randn(
                _EXAMPLES,
                _SAMPLES,
                outputs,
                generator=generator,
                device="cpu",
                out=part,
            )
    noise = drawn[place, :, examples.cpu() % _EXAMPLES]
    first = samples.start - columns.start * _SAMPLES
    return noise.flatten(1, 2)[:, first : first + len(samples)].mT


def _mixed(*numbers: int) -> int:
    """One number of 32 bits from several: generators on the CPU use no more."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ (number + 1)) * 0x9E3779B97F4A7C15 % 2**64
        mixed ^= mixed >> 29
    return mixed >> 32
