"""One kernel of a batch of kernels: BoTorch's way of having several outputs."""

from __future__ import annotations

import copy

import torch
from gpytorch.kernels import Kernel


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
        own = index[len(index) - len(shape) :]
        own = tuple(0 if size == 1 else i for i, size in zip(own, shape, strict=True))
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in done:  # two parts may share one
                parameter.data = parameter.data[own]
                done.add(id(parameter))
        part.batch_shape = torch.Size()
    return element
