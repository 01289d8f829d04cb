"""Small networks of the shapes that people build, for tests of receptive fields."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patch_gan(width: int = 4) -> nn.Sequential:
    """pix2pix's discriminator, which judges patches of 70 pixels."""
    layers: list[nn.Module] = []
    sizes = [3, width, 2 * width, 4 * width, 8 * width]
    for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [nn.Conv2d(a, b, 4, 2 if i < 3 else 1, 1), nn.InstanceNorm2d(b),
                   nn.LeakyReLU(0.2, inplace=True)]  # fmt: skip
    return nn.Sequential(*layers, nn.Conv2d(sizes[-1], 1, 4, 1, 1))


class UNet(nn.Module):
    """Ronneberger's, with two levels, and one of the ways to enlarge a map."""

    def __init__(self, up: str = "transposed", width: int = 4) -> None:
        super().__init__()
        self.up = up
        self.stem = self.block(3, width)
        self.down = nn.ModuleList([self.block(width, width) for _ in range(2)])
        self.rise = nn.ModuleList([nn.ConvTranspose2d(width, width, 2, 2) for _ in range(2)])
        self.merge = nn.ModuleList([self.block(2 * width, width) for _ in range(2)])
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def block(a: int, b: int) -> nn.Sequential:
        convolutions = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for rise, merge, skip in zip(self.rise, self.merge, reversed(skips), strict=True):
            if self.up == "transposed":
                x = rise(x)
            else:
                x = F.interpolate(x, size=skip.shape[2:], mode=self.up)
            x = merge(torch.cat([skip, x], 1))
        return self.head(x)


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, along one dimension."""

    def __init__(self, levels: int = 5, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        self.layers = nn.ModuleList(
            [nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(levels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            gate, value = layer(F.pad(x, (layer.dilation[0], 0))).chunk(2, 1)
            x = x + torch.sigmoid(gate) * torch.tanh(value)
        return x


def dilated(width: int = 4) -> nn.Sequential:
    """DeepLab's kind: strides early, then dilations instead."""
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        *(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 4)),
        nn.MaxPool2d(3, 1, 1, dilation=2),
    )  # fmt: skip


def volumes(width: int = 4) -> nn.Sequential:
    """Three dimensions, each with its own sizes."""
    return nn.Sequential(
        nn.Conv3d(1, width, (3, 5, 3), (1, 2, 2), (1, 2, 1)), nn.BatchNorm3d(width), nn.GELU(),
        nn.MaxPool3d((1, 2, 2)), nn.Conv3d(width, width, 3, groups=2, padding=1),
        nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear"), nn.AvgPool3d((2, 1, 1)),
    )  # fmt: skip


class DataDependent(nn.Module):
    """Looks at numbers, which no tracing follows: twice the convolution where they are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.conv(x) if float(x.detach().sum()) > -1e9 else x
