"""Build the models of the zoo: random weights, no download; and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from bnctl.models.importing import import_module

DETECTION_SIZE = 320


def create(word: str) -> nn.Module:
    """``timm:name`` or ``torchvision:name``, in eval mode."""
    package, _, name = word.partition(":")
    import_module("torchvision")
    if package == "timm":
        return import_module("timm").create_model(name, pretrained=False).eval()
    builder = import_module("torchvision.models").get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in signature(builder).parameters:
        options["weights_backbone"] = None
    if is_detector(builder.__module__):
        _give_torchvision_nms()
        if not name.startswith("ssd"):
            options |= {"min_size": DETECTION_SIZE, "max_size": DETECTION_SIZE}
        if "rcnn" in name:  # without compiled operators, pooling a thousand regions takes minutes
            options |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
    model: nn.Module = builder(**options)
    return model.eval()


def is_detector(module: str) -> bool:
    """Whether a model of this module takes a list of images and returns boxes."""
    return module.startswith("torchvision.models.detection")


def example(model: nn.Module, seed: int, batch: int = 2) -> tuple[Any, ...]:
    """Arguments of a forward pass, at the model's own input size where that does not take minutes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    module = type(model).__module__
    if hasattr(model, "default_cfg"):
        return (draw(batch, *model.default_cfg["input_size"]),)
    if is_detector(module):
        return ([draw(3, DETECTION_SIZE, DETECTION_SIZE) for _ in range(batch)],)
    if module.startswith("torchvision.models.video"):
        return (draw(batch, 3, 8, 112, 112) if "resnet" in module else draw(batch, 3, 16, 224, 224),)
    if module.startswith("torchvision.models.optical_flow"):
        return (draw(batch, 3, 128, 128), draw(batch, 3, 128, 128))
    if module.startswith("torchvision.models.segmentation"):
        return (draw(batch, 3, 128, 128),)
    size = 299 if "inception" in module else 224
    return (draw(batch, 3, size, size),)


def randomise(model: nn.Module, run: Callable[[], Any], seed: int = 0) -> None:
    """Affine parameters and statistics that a trained network could have, negative scales too.

    gamma ~ U(-0.3, 1.5), beta ~ N(0, 0.2), mean ~ N(0, 0.2) standard deviations, var ~ U(0.5, 2) times the variance of what arrives at the layer on one
    pass. With a variance drawn blindly a deep network forgets its input on the way, and its outputs prove nothing; with the true mean taken off, it
    amplifies rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, kind: str, *parameters: float) -> Tensor:
        return getattr(torch.empty(like.shape), f"{kind}_")(*parameters, generator=generator)

    seen: set[nn.Module] = set()

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module in seen:
            return
        seen.add(module)
        x = arguments[0].detach()
        axis = 1 if x.ndim > 1 and x.shape[1] == module.running_mean.numel() else x.ndim - 1
        others = [a for a in range(x.ndim) if a != axis]
        var = x.var(others, correction=0)
        var = var.clamp(min=float(var.mean()) * 1e-2 + 1e-6)  # dead channels, and maps of one value
        module.running_mean.copy_(var.sqrt() * draw(var, "normal", 0, 0.2))
        module.running_var.copy_(var * draw(var, "uniform", 0.5, 2.0))
        if module.weight is not None:
            module.weight.copy_(draw(var, "uniform", -0.3, 1.5))
            module.bias.copy_(draw(var, "normal", 0, 0.2))

    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    handles = [m.register_forward_pre_hook(before) for m in norms]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()


def _give_torchvision_nms() -> None:
    """Beside a torch for CPU the torchvision of the package index has no compiled operators; detectors need this one."""
    from torchvision.ops import boxes

    def nms(rectangles: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        overlaps = boxes.box_iou(rectangles, rectangles) > iou_threshold
        order = scores.argsort(descending=True, stable=True)
        alive = torch.ones(len(order), dtype=torch.bool)
        kept = []
        for i in order.tolist():
            if alive[i]:
                kept.append(i)
                alive &= ~overlaps[i]
        return torch.tensor(kept, dtype=torch.long)

    boxes.nms = nms
