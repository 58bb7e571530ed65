"""Fold real architectures: what is found, what is folded, what is left and why, how large the error is, how long it takes.

    python benchmarks/zoo.py [NAME ...]

Weights are random, statistics and affine parameters are drawn at random (negative scales too), inputs are 2x3x224x224.
The error is the largest over all outputs relative to the output's root mean square, float32 against float32, on two batch sizes.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch

import bnctl
from bnctl.models.importing import import_module

TORCH = {
    "torchvision.models:resnet18": {},
    "torchvision.models:resnet50": {},
    "torchvision.models:mobilenet_v2": {},
    "torchvision.models:densenet121": {},
    "timm:efficientnet_b0": {},
    "timm:levit_128s": {},
    "timm:repvgg_a0": {},
    "timm:mobileone_s0": {},
    "timm:resnetv2_50x1_bit": {},
    "timm:regnety_002": {},
}
ONNX = ("light_resnet50", "light_densenet121", "light_inception_v2", "light_shufflenet", "light_squeezenet")


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Statistics and affine parameters that a trained network could have."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.uniform_(-0.3, 1.5, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
    return model.eval()


def build(word: str, arguments: dict[str, Any]) -> torch.nn.Module:
    """A model with random weights, no download."""
    torch.manual_seed(0)
    import_module("torchvision")
    package, _, name = word.partition(":")
    if package == "timm":
        return import_module("timm").create_model(name, pretrained=False, **arguments)
    return getattr(import_module(package), name)(weights=None, **arguments)


def row(name: str, model: Any, inputs: Any) -> str:
    """One line of the table."""
    started = time.perf_counter()
    report = bnctl.fold(model, inputs).report
    elapsed = time.perf_counter() - started
    left = Counter(site.code for site in report.sites if site.action == "left")
    codes = ", ".join(f"{code} {n}" for code, n in sorted(left.items())) or "-"
    error = "-" if report.verification is None else f"{report.verification['max_rel_error']:.1e}"
    s = report.summary
    return f"| {name} | {s['found']} | {s['folded']} | {codes} | {error} | {elapsed:.2f} |"


def main(wanted: list[str]) -> None:
    print("| model | affines found | folded | left by code | largest relative error | seconds |")
    print("|---|---|---|---|---|---|")
    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    for word, arguments in TORCH.items():
        if not wanted or any(w in word for w in wanted):
            print(row(word, randomise(build(word, arguments)), torch.randn(2, 3, 224, 224)), flush=True)
    for name in ONNX:
        if not wanted or any(w in name for w in wanted):
            print(row(f"{name}.onnx", str(folder / f"{name}.onnx"), None), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
