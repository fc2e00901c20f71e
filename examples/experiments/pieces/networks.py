"""The networks of the PyTorch recipes: a small one for MNIST, and the wide residual network of the papers."""

import torch
from torch import nn


def small(width: int, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two strided convolutions and two linear layers, whose widths are proportional to `width`.

    It is normalised per sample, not per batch, so that training, attack and evaluation compute the same function.
    """
    channels, height, _ = shape
    side = (height + 3) // 4
    return nn.Sequential(
        nn.Conv2d(channels, width, 5, stride=2, padding=2),
        nn.GroupNorm(1, width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
        nn.GroupNorm(1, 2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, num_classes),
    )


class WideResidual(nn.Module):
    """WRN-depth-width of Zagoruyko and Komodakis, for images of about 32 x 32."""

    def __init__(self, depth: int, width: int, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(shape[0], widths[0], 3, padding=1, bias=False)
        self.groups = nn.Sequential(
            *(
                _Block(
                    widths[group] if block == 0 else widths[group + 1],
                    widths[group + 1],
                    2 if group and not block else 1,
                )
                for group in range(3)
                for block in range(blocks)
            )
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(widths[3]),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[3], num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits [N, classes] of images [N, channels, height, width]."""
        logits: torch.Tensor = self.head(self.groups(self.stem(images)))
        return logits


class _Block(nn.Module):
    """Two convolutions, each after a normalisation, and a shortcut around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised = self.first(x)
        around = x if self.shortcut is None else self.shortcut(normalised)
        return self.body(normalised) + around


def build(network: tuple[int, ...], shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network of the settings: (width,) is a small one, (depth, width) a wide residual one."""
    if len(network) == 1:
        return small(*network, shape, num_classes)
    return WideResidual(*network, shape, num_classes)
