"""The two small classifiers of the fixture; their weights are made by `fixtures/build.py`.

Apart from `bnctl.fixture` because a class derived from `nn.Module` needs torch to exist.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_SHAPE = (1, 8, 8)


class PlainDigits(nn.Module):
    """A classifier of 8x8 digits without normalisation: four convolutions, one hidden linear layer, ten classes.

    (N, 1, 8, 8) float32, standardised, to (N, 10) logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 2 * 2, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        x = F.max_pool2d(F.relu(self.conv4(x)), 2)
        x = F.relu(self.hidden(x.flatten(1)))
        logits: torch.Tensor = self.head(x)
        return logits


class DigitsBN(nn.Module):
    """The twin of :class:`PlainDigits` with BN between each layer and its ReLU; four BatchNorm2d and one BatchNorm1d.

    (N, 1, 8, 8) float32, standardised, to (N, 10) logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 2 * 2, 64, bias=False)
        self.bn5 = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.max_pool2d(F.relu(self.bn4(self.conv4(x))), 2)
        x = F.relu(self.bn5(self.hidden(x.flatten(1))))
        logits: torch.Tensor = self.head(x)
        return logits
