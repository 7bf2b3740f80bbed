"""Five small networks, one of each kind that a posterior has to be made for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


class Recurrent(nn.Module):
    """Two layers of an LSTM, and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(b, steps, 4) -> (b, classes)."""
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """A layer-norm encoder of two layers, with one embedding for each position."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.1, batch_first=True, norm_first=True
        )
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(b, steps, 4) -> (b, classes)."""
        return self.head(self.encoder(self.embed(x) + self.positions).mean(1))


class Residual(nn.Module):
    """A convolution block with batch norm and a strided shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""
        h = self.norm_two(self.second(self.relu(self.norm(self.first(x)))))
        h += self.shortcut(x)
        return F.relu(h)


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, CLASSES)
    )


def cnn() -> nn.Module:
    """Two convolutions, one of them with groups, and pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def resnet() -> nn.Module:
    """A stem and two residual blocks with batch norm."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, 1, 1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        Residual(3, 4, 1),
        Residual(4, 5, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "cnn": (cnn, (1, 8, 8)),
    "resnet": (resnet, (1, 8, 8)),
    "transformer": (Transformer, (5, 4)),
    "lstm": (Recurrent, (5, 4)),
}
"""Name -> builder of a network, and the shape of one of its inputs."""


def network_of(
    kind: str, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in evaluation mode with its statistics set, and its input shape.

    Args:
        kind: A key of :data:`KINDS`.
        dtype: Of the weights.
    """
    builder, shape = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = builder().to(dtype)
        with torch.no_grad():
            for _ in range(5):
                network(torch.randn(16, *shape, dtype=dtype))
        # Gains and shifts of normalisation layers away from ones and zeros.
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return network.eval(), shape


def inputs_of(
    kind: str, examples: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> Tensor:
    """Standard normal inputs (examples, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (examples, *KINDS[kind][1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
