"""The paper's models: torchvision's where it has them, the others written out.

Shapes: B examples, C channels, S the side of a square image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18, vgg

__all__ = ["CNN", "FCN", "VGG19", "ResNet18", "UNet"]


class FCN(nn.Sequential):
    """The paper's fully connected network: one linear layer. With the squared hinge loss it is a linear SVM.

    Args:
        num_inputs: Numbers in an example: 784 for MNIST, 3072 for CIFAR.
        num_outputs: Classes, or coordinates of a regression.
    """

    def __init__(self, num_inputs: int = 784, num_outputs: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(num_inputs, num_outputs))


class CNN(nn.Sequential):
    """The paper's CNN: 5 x 5 convolutions to 20 and to 50 channels, each pooled, and 500 hidden units.

    431,080 parameters on MNIST.

    Args:
        in_channels: C.
        image_size: S.
        num_outputs: Classes, or coordinates of a regression.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_outputs: int = 10) -> None:
        side = ((image_size - 4) // 2 - 4) // 2
        super().__init__(
            nn.Conv2d(in_channels, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(50 * side * side, 500),
            nn.ReLU(),
            nn.Linear(500, num_outputs),
        )


class ResNet18(nn.Module):
    """torchvision's ResNet18, from scratch, for images of any number of channels. 11 M parameters.

    Args:
        in_channels: C.
        num_outputs: Classes, or coordinates of a regression.
    """

    def __init__(self, in_channels: int = 3, num_outputs: int = 10) -> None:
        super().__init__()
        self.net = resnet18(num_classes=num_outputs)
        if in_channels != 3:
            self.net.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class VGG19(nn.Module):
    """torchvision's VGG19 with BatchNorm, from scratch, with one linear layer as its head, as usual for small images.

    20 M parameters; torchvision's own head of three layers, made for images of 224 x 224, would be another 120 M.
    Images must be 32 x 32 at least.

    Args:
        in_channels: C.
        num_outputs: Classes, or coordinates of a regression.
    """

    def __init__(self, in_channels: int = 3, num_outputs: int = 10) -> None:
        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["E"], batch_norm=True)
        if in_channels != 3:
            self.features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # as torchvision's whole VGG does
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.head = nn.Linear(512, num_outputs)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class UNet(nn.Module):
    """U-Net (Ronneberger, Fischer, Brox, MICCAI 2015, arXiv 1505.04597): logits of each pixel's class.

    Padded convolutions with BatchNorm, so that the output has the input's size. 1.9 M parameters as it is set.

    Args:
        in_channels: C.
        num_classes: Classes of a pixel.
        width: Channels of the first level; each level down doubles them.
        depth: Levels. S must be a multiple of ``2 ** (depth - 1)``.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 21, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(_convolutions(i, o) for i, o in zip([in_channels, *widths], widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(_convolutions(2 * w, w) for w in reversed(widths[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Any:
        """Map images, shape ``(B, C, S, S)``, to logits, shape ``(B, num_classes, S, S)``."""
        skipped = []
        for level, convolutions in enumerate(self.down):
            x = convolutions(self.pool(x) if level else x)
            skipped.append(x)
        for grow, convolutions, skip in zip(self.grow, self.up, reversed(skipped[:-1])):
            x = convolutions(torch.cat([skip, grow(x)], dim=1))
        return self.head(x)


def _convolutions(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)
