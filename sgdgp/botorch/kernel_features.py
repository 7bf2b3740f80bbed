"""Random features for the kernels that BoTorch's prior paths refuse.

BoTorch draws prior functions of RBF, Matern and scale kernels only. Importing this
module registers a builder for every other kernel that
:func:`sgdgp.features.random_features` knows: rational quadratic, periodic, spectral
mixture, linear, polynomial, constant and index kernels, KeOps kernels, sums and
products of all of these, and whatever was added with
:func:`sgdgp.register_features`. What BoTorch knows stays as it is; its scale kernel
finds the features of its base here.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
from botorch.sampling.pathwise.features.generators import GenKernelFeatures
from botorch.sampling.pathwise.features.maps import FeatureMap as BotorchFeatureMap
from botorch.sampling.pathwise.utils import ChainedTransform
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from sgdgp.features import FeatureMap, random_features


class KernelFeatures(BotorchFeatureMap):
    """Feature maps of sgdgp in the form of BoTorch's prior paths.

    Unlike BoTorch's own maps they do not follow later changes of the kernel's
    parameters.

    Args:
        kernel: The kernel, with batch shape B (or none).
        maps: One map for each element of the batch, all of M features.
    """

    def __init__(self, kernel: Kernel, maps: tuple[FeatureMap, ...]) -> None:
        super().__init__()
        self.kernel = kernel
        self.maps = maps
        self.num_outputs = maps[0].num_features
        self.batch_shape = kernel.batch_shape
        # Empty chains: BoTorch's scale kernel puts its own transforms around them.
        self.input_transform = ChainedTransform()
        self.output_transform = ChainedTransform()

    def forward(self, x: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*out q M"]:
        """Features at x (*batch, q, d), as (*broadcast of batch and B, q, M)."""
        batch = torch.broadcast_shapes(x.shape[:-2], self.batch_shape)
        if not self.batch_shape:
            return _features_at(self.maps[0], x)
        x = x.expand(*batch, *x.shape[-2:])
        x = x.reshape(-1, len(self.maps), *x.shape[-2:])
        parts = [_features_at(own, x[:, i]) for i, own in enumerate(self.maps)]
        out = torch.stack(parts, dim=1)
        return out.reshape(*batch, *out.shape[-2:])


def _features_at(features: FeatureMap, x: Tensor) -> Tensor:
    values = features.features(x.reshape(-1, x.shape[-1]))
    return values.reshape(*x.shape[:-1], values.shape[-1])


@GenKernelFeatures.register(Kernel)
def kernel_features(
    kernel: Kernel, *, num_inputs: int, num_outputs: int
) -> KernelFeatures:
    """Features of any kernel that sgdgp has features for.

    Args:
        kernel: The kernel; its own ``active_dims`` are applied.
        num_inputs: Columns of the inputs.
        num_outputs: Random features of each random part: a sum of two random kernels
            has twice as many, a linear kernel has as many as columns. Fewer where
            all parts together would have more than the 21,201 that BoTorch's Sobol
            weights allow.

    Raises:
        NoRandomFeatures: The kernel, or a part of it, has no features.
    """
    dim, dims = num_inputs, kernel.active_dims
    if dims is not None and dims.numel():
        # Below a scale kernel num_inputs is the number of selected columns.
        dim = max(dim, int(dims.max()) + 1)
    # BoTorch's prior sampler has no generator argument: it draws from torch's global
    # one, and torch.manual_seed has to reach these features too.
    generator = torch.Generator().manual_seed(
        int(torch.randint(2**62, (), device="cpu"))
    )

    def drawn(count: int) -> tuple[FeatureMap, ...]:
        return tuple(
            random_features(
                kernel_element(kernel, index),
                dim=dim,
                num_features=count,
                generator=generator,
                dtype=kernel.dtype,
                device=kernel.device,
            )
            for index in itertools.product(*map(range, kernel.batch_shape))
        )

    maps = drawn(num_outputs)
    most = SobolEngine.MAXDIM
    if maps[0].num_features > most:
        share = most / maps[0].num_features
        maps = drawn(max(2, 2 * math.floor(num_outputs * share / 2)))
    return KernelFeatures(kernel, maps)


def kernel_element(kernel: Kernel, index: tuple[int, ...]) -> Kernel:
    """The kernel of one element of a batch.

    GPyTorch's own ``kernel[index]`` takes the element of active dims as well, and
    leaves parts behind in sums inside of scale kernels.

    Args:
        kernel: A kernel with any batch shape, also none.
        index: Element of a batch that the kernel's batch shape broadcasts to.

    Returns:
        The kernel itself if it has no batch shape, else a copy of one element.
    """
    if not kernel.batch_shape:
        return kernel
    element, done = copy.deepcopy(kernel), set()
    for part in element.modules():
        if not isinstance(part, Kernel):
            continue
        shape = part._batch_shape  # its own; batch_shape asks the parts too
        place = index[len(index) - len(shape) :]
        place = tuple(
            0 if size == 1 else i for i, size in zip(place, shape, strict=True)
        )
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in done:  # two parts may share one
                parameter.data = parameter.data[place]
                done.add(id(parameter))
        part.batch_shape = torch.Size()
    return element
