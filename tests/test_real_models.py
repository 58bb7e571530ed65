"""Real architectures and real images: a small sample of what `benchmarks/zoo.py` runs in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import bnctl
from bnctl.data.batches import Batch
from bnctl.models.importing import import_module
from bnctl.runtime.ort import OrtRunner
from bnctl.runtime.torch import TorchRunner
from bnctl.verification import compare_layers, compare_runners

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_resnet20"
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(-0.3, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model.eval()


def build(package: str, name: str, **arguments: Any) -> torch.nn.Module:
    import_module("torchvision")
    torch.manual_seed(0)
    factory = getattr(import_module(package), name if package != "timm" else "create_model")
    return randomised(factory(name, **arguments) if package == "timm" else factory(weights=None, **arguments))


@pytest.mark.parametrize(
    ("package", "name", "size", "found", "left"),
    [
        ("torchvision.models", "resnet18", 64, 20, {}),
        ("torchvision.models", "mobilenet_v2", 64, 52, {}),
        ("torchvision.models", "densenet121", 64, 121, {"BN101": 62}),
        ("timm", "efficientnet_b0", 64, 49, {}),
        ("timm", "levit_128s", 224, 52, {}),
        ("timm", "repvgg_a0", 64, 61, {"BN101": 17}),
    ],
)
def test_folds_what_can_be_folded(package: str, name: str, size: int, found: int, left: dict[str, int]) -> None:
    model = build(package, name)
    result = bnctl.fold(model, torch.randn(2, 3, size, size))
    codes = [site.code for site in result.report.sites if site.action == "left"]
    assert result.report.summary["found"] == found
    assert {code: codes.count(code) for code in codes} == left
    x = torch.randn(3, 3, size, size)
    truth = TorchRunner(build(package, name).double()).run(Batch((x.double(),)))["out"]
    folded = TorchRunner(result.model).run(Batch((x,)))["out"]
    assert np.abs(folded - truth).max() < 1e-4 * np.sqrt((truth**2).mean())
    assert result.report.verification is not None
    assert result.report.verification["layers"] > 0


def test_negative_control_a_fault_that_the_outputs_do_not_show() -> None:
    """With random weights an efficientnet forgets its input: 1 % in the first layer changes no output, but the layers show it."""
    model = build("timm", "efficientnet_b0")
    batch = Batch((torch.randn(2, 3, 64, 64),))
    result = bnctl.fold(model, batch.args)
    with torch.no_grad():
        result.model.conv_stem.weight *= 1.01
    right, wrong = TorchRunner(model), TorchRunner(result.model)
    outputs_alone = compare_runners(right, wrong, [batch])
    names = [site.name for site in result.report.sites]
    assert outputs_alone.passed, "the control is only one if the outputs do not show the fault"
    judged = compare_layers(right, wrong, batch, names, outputs_alone)
    assert not judged.passed
    assert judged.first_difference is not None and judged.first_difference.name == "bn1"


def test_a_detector_that_cannot_be_traced() -> None:
    model = build("torchvision.models.detection", "fcos_resnet50_fpn", weights_backbone=None, min_size=96, max_size=160)
    result = bnctl.fold(model, ([torch.randn(3, 96, 128), torch.randn(3, 110, 90)],))
    assert result.report.summary == {"found": 53, "folded": 53, "left": 0}
    assert result.report.verification is not None and result.report.verification["passed"]
    features = [
        m.backbone(torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))) for m in (model, result.model)
    ]
    for key in features[0]:
        assert torch.allclose(features[0][key], features[1][key], atol=1e-4)


def test_insertion_into_vgg() -> None:
    model = build("torchvision.models", "vgg11", num_classes=10)
    result = bnctl.insert(model, [torch.randn(4, 3, 32, 32) for _ in range(2)])
    assert result.report.summary["inserted"] == 10
    back = bnctl.fold(result.model, torch.randn(2, 3, 32, 32)).model
    assert list(back.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("name", "folded", "left"),
    [("light_densenet121", 301, 62), ("light_inception_v2", 207, 0), ("light_shufflenet", 49, 0)],
)
def test_onnx_files_that_others_wrote(name: str, folded: int, left: int) -> None:
    summary = bnctl.fold(str(LIGHT / f"{name}.onnx")).report.summary
    assert (summary["folded"], summary["left"]) == (folded, left)


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    if not CIFAR.is_dir():
        pytest.skip("the trained ResNet-20 and its images are not beside the checkout")
    found = {}
    for name in ("test", "calibration"):
        with np.load(CIFAR / f"{name}.npz") as archive:
            found[name] = np.ascontiguousarray(
                ((archive["x"] / np.float32(255) - MEAN) / STD).transpose(0, 3, 1, 2), np.float32
            )
            found[f"{name} labels"] = archive["y"]
    return found


@pytest.fixture(scope="module")
def resnet20(images: dict[str, np.ndarray]) -> torch.nn.Module:
    from safetensors.torch import load_file

    from nets_resnet20 import build as build_resnet20

    model = build_resnet20()
    model.load_state_dict(load_file(CIFAR / "resnet20_cifar10.safetensors"), strict=False)
    return model.eval()


def accuracy(runner: Any, images: dict[str, np.ndarray]) -> float:
    hits = 0
    for start in range(0, 2000, 500):
        part = slice(start, start + 500)
        (logits,) = runner.run(Batch((images["test"][part],))).values()
        hits += int((logits.argmax(1) == images["test labels"][part]).sum())
    return 100 * hits / 2000


def test_a_trained_network_keeps_its_accuracy(
    resnet20: torch.nn.Module, images: dict[str, np.ndarray], tmp_path: Path
) -> None:
    example = torch.from_numpy(images["test"][:4])
    folded = bnctl.fold(resnet20, example)
    assert folded.report.summary == {"found": 19, "folded": 19, "left": 0}
    assert accuracy(TorchRunner(resnet20), images) == 91.0
    assert accuracy(TorchRunner(folded.model), images) == 91.0
    folded.save(tmp_path / "folded.onnx", inputs=example)
    assert accuracy(OrtRunner(tmp_path / "folded.onnx"), images) == 91.0
