"""The networks of the study: a small residual network, and a perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.settings import Setting


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.around: nn.Module = nn.Identity()
        if inputs != outputs or stride > 1:
            self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o H W"]:
        hidden = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.around(x))


class SmallResNet(nn.Module):
    """A residual network of a few ten thousand weights.

    Args:
        channels: Of the images.
        outputs: Classes.
        stem: Kernel size and stride of the first convolution.
        widths: Channels of each block.
        strides: Stride of each block.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        stem: tuple[int, int],
        widths: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        size, stride = stem
        self.stem = nn.Conv2d(channels, widths[0], size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        sizes = zip([widths[0], *widths[:-1]], widths, strides, strict=True)
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o"]:
        hidden = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(hidden.mean((2, 3)))


def perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Fully connected layers with tanh between them; inputs are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.Tanh()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def build_network(setting: Setting, shape: Sequence[int], outputs: int) -> nn.Module:
    """The network of a setting for images of shape (channels, height, width).

    Raises:
        ValueError: An unknown kind of network.
    """
    channels, height, width = shape
    if setting.network == "resnet":
        return SmallResNet(
            channels,
            outputs,
            stem=setting.stem,
            widths=setting.widths,
            strides=setting.strides,
        )
    if setting.network == "mlp":
        return perceptron(channels * height * width, setting.widths, outputs)
    raise ValueError(f"network: found {setting.network!r}, expected 'resnet' or 'mlp'")
