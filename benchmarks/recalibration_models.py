"""The networks and images on which methods of recalibration are compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from zoo_models import create, randomise

ROOT = Path(__file__).resolve().parents[1]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10_resnet20"
MEAN, SD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Case:
    """A network, how many images, how large, and how many in a batch."""

    name: str
    word: str
    images: int
    size: int
    batch: int


CASES = (
    Case("ResNet-20, trained", "resnet20", 1000, 32, 32),
    Case("ResNet-18", "torchvision:resnet18", 128, 96, 8),
    Case("ResNet-50", "torchvision:resnet50", 128, 96, 8),
    Case("MobileNetV2", "torchvision:mobilenet_v2", 128, 96, 8),
    Case("EfficientNet-B0", "timm:efficientnet_b0", 128, 96, 8),
    Case("LeViT-128S", "timm:levit_128s", 128, 224, 8),
    Case("DenseNet-121", "torchvision:densenet121", 128, 96, 8),
)
PHOTOGRAPHS = (
    Case("ResNet-18, photographs", "torchvision:resnet18", 128, 224, 32),
    Case("MobileNetV2, photographs", "torchvision:mobilenet_v2", 128, 224, 32),
    Case("EfficientNet-B0, photographs", "timm:efficientnet_b0", 128, 224, 32),
    Case("ResNet-50, photographs", "torchvision:resnet50", 128, 224, 32),
)
"""As they are recalibrated in earnest; for cost alone: the truth would take hours."""


def model_of(case: Case) -> nn.Module:
    """The network in eval mode: trained, or with random weights and statistics that a trained one could have."""
    if case.word == "resnet20":
        return resnet20()
    torch.manual_seed(0)
    model = create(case.word)
    images = images_of(case)[:8]
    randomise(model, lambda: model(images))
    return model


def resnet20() -> nn.Module:
    """ResNet-20 with its trained weights, in eval mode."""
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.append(tests)
    from safetensors.torch import load_file

    from nets_resnet20 import build

    model = build()
    model.load_state_dict(load_file(CIFAR / "resnet20_cifar10.safetensors"), strict=False)
    return model.eval()


def images_of(case: Case) -> torch.Tensor:
    """(N, 3, size, size) float32, as the network is fed with."""
    if case.word == "resnet20":
        return cifar_input(np.load(CIFAR / "calibration.npz")["x"][: case.images])
    return torch.from_numpy(pink_images(case.images, case.size))


def cifar_input(x: np.ndarray) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) as the network takes it: ``(x/255 - mean)/sd``, (N, 3, 32, 32) float32."""
    return torch.from_numpy((np.float32(x) / 255 - MEAN) / SD).permute(0, 3, 1, 2).contiguous()


def pink_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Images with the spectrum of photographs: amplitude 1/f, colours correlated, each with its own contrast and brightness.

    Batch statistics then differ from batch to batch as they do with photographs, which white noise would not show.

    Returns:
        (N, 3, size, size) float32 with mean 0 and standard deviation 1 over all, about.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((count, 3, size, size))) / frequency
    fields = np.fft.irfft2(spectrum, s=(size, size))
    fields /= fields.std((2, 3), keepdims=True)
    colours = 0.9 * fields[:, :1] + 0.44 * fields
    contrast = np.exp(rng.normal(-0.3, 0.5, (count, 1, 1, 1)))
    brightness = rng.normal(0, 0.6, (count, 1, 1, 1)) + rng.normal(0, 0.2, (count, 3, 1, 1))
    return np.float32(colours * contrast + brightness)
