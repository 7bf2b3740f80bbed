"""The U-Net of the deep image prior, for images and volumes of any size.

Its form is that of the linearised deep image prior (Antoran et al., "Uncertainty
estimation for computed tomography with a linearised deep image prior", 2022): strided
convolutions down, linear interpolation up, leaky rectifiers, and few channels past the
coarse scales, which is what keeps noise out of the image. Nothing in it hinders forward
mode, reverse mode twice, or ``vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sgdgp.core.checks import check_count, check_number
from sgdgp.core.codec import register_stored_class

_SLOPE = 0.2
"""Of the leaky rectifiers, as published."""

_LAYERS: dict[int, tuple[type[nn.Module], str]] = {
    2: (nn.Conv2d, "bilinear"),
    3: (nn.Conv3d, "trilinear"),
}
"""Convolution and interpolation by dimension."""


@register_stored_class
class UNet(nn.Module):
    """An hourglass from images (b, in_channels, ...) to images of the same size.

    Its blocks are ``down.0`` (at full size), ``down.s`` from scale s - 1 to scale s of
    half the size, ``skip.s`` past scale s, ``up.s`` from scale s back to s - 1, and
    ``out``.

    Args:
        channels: Channels of each scale; as many scales.
        skips: Channels that pass each scale by, 0 for none. Nothing passes the first.
        dimensions: 2 for images, 3 for volumes.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        norm: Groups of a ``GroupNorm`` after each convolution but the last; None for
            no norm.
        sigmoid: Whether outputs lie strictly within ``limits``.
        dropout: Probability of dropping a number after each rectifier, in training.
        limits: Where outputs lie: a sigmoid's bounds, else the images of 0 and 1 of
            the last convolution.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument does not fit; named, with what was found.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 32, 32),
        skips: Sequence[int] = (0, 4, 4),
        dimensions: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        norm: int | None = None,
        sigmoid: bool = True,
        dropout: float = 0.0,
        limits: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        for name, value in (
            ("channels", channels),
            ("skips", skips),
            ("limits", limits),
        ):
            if not isinstance(value, Iterable):
                raise TypeError(f"{name}: expected a sequence, found {value!r}")
        self.channels, self.skips = tuple(channels), tuple(skips)
        self.dimensions = dimensions
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm, self.sigmoid, self.dropout = norm, sigmoid, dropout
        self.limits = tuple(limits)
        self._check()
        self.down, self.skip, self.up = (
            nn.ModuleList(),
            nn.ModuleDict(),
            nn.ModuleDict(),
        )
        self.down.append(self._layer(in_channels, self.channels[0]))
        for s in range(1, len(self.channels)):
            fine, coarse, skip = self.channels[s - 1], self.channels[s], self.skips[s]
            self.down.append(
                nn.Sequential(
                    *self._layer(fine, coarse, stride=2), *self._layer(coarse, coarse)
                )
            )
            if skip:
                self.skip[str(s)] = self._layer(fine, skip, width=1)
            self.up[str(s)] = nn.Sequential(
                *self._layer(coarse + skip, fine), *self._layer(fine, fine)
            )
        convolution, self._interpolation = _LAYERS[dimensions]
        self.out = convolution(self.channels[0], out_channels, 1)

    def _check(self) -> None:
        if self.dimensions not in _LAYERS:
            raise ValueError(f"dimensions: expected 2 or 3, found {self.dimensions!r}")
        check_count("in_channels", self.in_channels, 1)
        check_count("out_channels", self.out_channels, 1)
        if not self.channels or len(self.channels) != len(self.skips):
            raise ValueError(
                "skips: expected a number for each scale in channels, found "
                f"{self.skips} beside {self.channels}"
            )
        for count in self.channels:
            check_count("channels", count, 1)
        for count in self.skips:
            check_count("skips", count, 0)
        if self.skips[0]:
            raise ValueError(
                "skips: expected 0 first, since there is nothing to pass by at full "
                f"size, found {self.skips}"
            )
        if self.norm is not None:
            check_count("norm", self.norm, 1)
            uneven = [n for n in (*self.channels, *self.skips) if n % self.norm]
            if uneven:
                raise ValueError(
                    f"norm: {self.norm} groups do not divide {uneven[0]} channels"
                )
        check_number("dropout", self.dropout, "a probability")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout: expected a probability below 1, found {self.dropout}"
            )
        finite = len(self.limits) == 2 and all(map(math.isfinite, self.limits))
        if not finite or not self.limits[0] < self.limits[1]:
            raise ValueError(
                "limits: expected two finite numbers, the smaller one first, found "
                f"{self.limits}"
            )

    def _layer(
        self, inputs: int, outputs: int, width: int = 3, stride: int = 1
    ) -> nn.Sequential:
        """A convolution and what follows it."""
        convolution, _ = _LAYERS[self.dimensions]
        layers = [convolution(inputs, outputs, width, stride, padding=width // 2)]
        if self.norm is not None:
            layers.append(nn.GroupNorm(self.norm, outputs))
        layers.append(nn.LeakyReLU(_SLOPE))
        if self.dropout:
            layers.append(nn.Dropout(self.dropout))
        return nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b o *size"]:
        """The images that belong to inputs."""
        if x.ndim != 2 + self.dimensions or x.shape[1] != self.in_channels:
            sizes = ", ".join(["b", str(self.in_channels), *"n" * self.dimensions])
            raise ValueError(
                f"x: expected images ({sizes}), found shape {tuple(x.shape)}"
            )
        scales = []
        for block in self.down:
            x = block(x)
            scales.append(x)
        scales.pop()
        for s in range(len(scales), 0, -1):
            fine = scales.pop()
            x = F.interpolate(
                x, fine.shape[2:], mode=self._interpolation, align_corners=True
            )
            if self.skips[s]:
                x = torch.cat([x, self.skip[str(s)](fine)], 1)
            x = self.up[str(s)](x)
        x = self.out(x)
        low, high = self.limits
        return low + (high - low) * (torch.sigmoid(x) if self.sigmoid else x)

    def stored_parts(self) -> dict[str, Any]:
        """What a file holds: settings, and all weights."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**settings, "weights": dict(self.state_dict())}

    @classmethod
    def from_stored_parts(cls, weights: dict[str, Tensor], **settings: Any) -> UNet:
        """The network behind ``stored_parts``, in evaluation mode."""
        # Made without values, so that no random number is drawn.
        with torch.device("meta"):
            network = cls(**settings)
        network.load_state_dict(weights, assign=True)
        return network.requires_grad_().eval()


_SETTINGS = (
    "channels",
    "skips",
    "dimensions",
    "in_channels",
    "out_channels",
    "norm",
    "sigmoid",
    "dropout",
    "limits",
)
