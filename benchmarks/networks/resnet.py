"""ResNet-50 for ImageNet, under the names that published weights have.

He et al., "Deep residual learning for image recognition", CVPR 2016, with the stride of
a downsampling block in its 3 x 3 convolution, as the pre-trained weights of torchvision
have it. ``benchmarks.networks.resnet50`` measures a pass over data with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NUM_PARAMETERS = 25_557_032
"""Of the network with 1,000 classes."""

_EXPANSION = 4
_BLOCKS = (3, 4, 6, 3)
_WIDTHS = (64, 128, 256, 512)
_PREFIXES = ("module.", "_orig_mod.", "model.")
_WRAPPED_AS = ("state_dict", "model", "model_state_dict")
_NAMED = 4


class Bottleneck(nn.Module):
    """A residual of three convolutions: narrow, filter, widen."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return (self.bn3(self.conv3(out)) + self.downsample(x)).relu()


class ResNet50(nn.Module):
    """Images (b, 3, h, w), normalised, to logits (b, classes)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64
        for i, (blocks, width) in enumerate(zip(_BLOCKS, _WIDTHS, strict=True)):
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(Bottleneck(inputs, width, stride))
                inputs = _EXPANSION * width
            self.add_module(f"layer{i + 1}", stage)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for i in range(len(_BLOCKS)):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


def resnet50(
    weights: str | os.PathLike[str] | None = None,
    *,
    classes: int = 1000,
    seed: int = 0,
) -> ResNet50:
    """The network in evaluation mode, pre-trained or random.

    Args:
        weights: File of pre-trained weights, see ``load_weights``. Default: random
            weights by He's rule, for measurements.
        classes: Number of outputs.
        seed: Of the random weights.
    """
    # torch draws initial weights from the global generator only.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet50(classes)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
    if weights is not None:
        load_weights(network, weights)
    return network.eval()


def torchvision_resnet50(weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The same network by torchvision's definition, for those who have it.

    Raises:
        ImportError: torchvision is not installed.
    """
    from torchvision.models import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        resnet50 as build,
    )

    network: nn.Module = build(weights=None)
    if weights is not None:
        load_weights(network, weights)
    return network.eval()


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put pre-trained weights into a network; nothing in the file is executed.

    Args:
        network: Changed in place.
        path: A state dict as ``torch.save`` writes it, such as torchvision's
            ``resnet50-0676ba61.pth``, or a ``.safetensors`` file. A checkpoint that
            holds one, and prefixes of wrappers, are understood.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no state dict, or that of another network; says how the
            names or shapes differ.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(
            f"weights: no file {place}; torchvision's pre-trained ResNet-50 is at "
            "https://download.pytorch.org/models/resnet50-0676ba61.pth"
        )
    found = _unwrapped(_read(place), place)
    own = network.state_dict()
    # Older files do not count batches, and evaluation does not ask.
    missing = [
        name
        for name in own
        if name not in found and not name.endswith("num_batches_tracked")
    ]
    surplus = [name for name in found if name not in own]
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    problems = [
        f"{words} {', '.join(names[:_NAMED])}{' ...' if len(names) > _NAMED else ''}"
        for words, names in (
            ("missing", missing),
            ("unknown", surplus),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"weights: {place} does not fit {type(network).__name__}: "
            f"{'; '.join(problems)}"
        )
    network.load_state_dict({**own, **found})


def _read(place: Path) -> Any:
    if place.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(place)
    try:
        return torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights: {place} cannot be read as tensors alone ({error}); save the "
            "state dict: torch.save(network.state_dict(), path)"
        ) from error


def _unwrapped(found: Any, place: Path) -> dict[str, Tensor]:
    """The state dict itself, out of a checkpoint and without wrappers' prefixes."""
    for key in _WRAPPED_AS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(value, Tensor) for value in found.values()
    ):
        raise ValueError(f"weights: {place} holds no state dict of tensors")
    state = dict(found)
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): v for name, v in state.items()}
    return state
