"""Real architectures and real images: a small sample of what `benchmarks/zoo.py` runs in full."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

import bnctl
from bnctl.data.batches import Batch
from bnctl.models.importing import import_module
from bnctl.runtime.ort import OrtRunner
from bnctl.runtime.torch import TorchRunner
from bnctl.verification import compare_layers, compare_runners

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from zoo_count import count, is_norm
from zoo_measure import outputs, relative_error
from zoo_models import create

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_resnet20"
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def randomised_blindly(model: torch.nn.Module) -> torch.nn.Module:
    """Statistics drawn without a look at the activations."""
    generator = torch.Generator().manual_seed(0)
    for module in filter(is_norm, model.modules()):
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
    return randomised_blindly(factory(name, **arguments) if package == "timm" else factory(weights=None, **arguments))


@pytest.mark.parametrize(
    ("word", "size", "executed", "left"),
    [
        ("torchvision:resnet18", 64, 20, {}),
        ("torchvision:mobilenet_v2", 64, 52, {}),
        ("torchvision:densenet121", 64, 121, {"BN101": 62}),
        ("torchvision:shufflenet_v2_x0_5", 64, 56, {}),
        ("timm:efficientnet_b0", 64, 49, {}),
        ("timm:levit_128s", 224, 52, {}),
        ("timm:repvgg_a0", 64, 61, {"BN101": 17}),
        ("timm:resnetv2_18", 64, 17, {"BN101": 9}),
    ],
)
def test_folds_what_can_be_folded(word: str, size: int, executed: int, left: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = randomised_blindly(create(word))
    x, other = torch.randn(2, 3, size, size), torch.randn(3, 3, size, size)
    result = bnctl.fold(model, x)
    assert Counter(site.code for site in result.report.sites if site.action == "left") == left
    assert count(model, lambda: model(other)) == executed
    assert count(result.model, lambda: result.model(other)) == sum(left.values())
    exact = outputs(copy.deepcopy(model).double(), (other.double(),))
    assert relative_error(outputs(result.model, (other,)), exact) < 1e-4
    assert result.report.verification is not None
    assert result.report.verification["layers"] > 0


def test_the_counter_sees_every_kind_of_batch_norm_and_what_is_left() -> None:
    frozen = import_module("torchvision.ops").FrozenBatchNorm2d

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.frozen = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), frozen(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = functional.batch_norm(self.conv.weight, None, None, training=True)  # no layer
            y = self.frozen(self.bn(functional.conv2d(x, weight)))
            y = functional.batch_norm(input=y, running_mean=self.bn.running_mean, running_var=self.bn.running_var)
            return torch.batch_norm(y, None, None, self.bn.running_mean, self.bn.running_var, False, 0.1, 1e-5, False)

    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    assert count(model, lambda: model(x)) == 4
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU(), torch.nn.BatchNorm2d(3)).eval()
    left = bnctl.fold(model, x).model
    assert count(left, lambda: left(x)) == 1
    left[2] = torch.nn.Identity()
    assert count(left, lambda: left(x)) == 0


def test_the_error_is_relative_and_never_blind_to_shapes_and_nan() -> None:
    one = np.float32([[3, 4], [0, 5]])
    assert relative_error([one], [one]) == 0
    assert relative_error([one], [2 * one]) == pytest.approx(5 / np.sqrt(50))
    assert relative_error([one], [one[:1]]) == relative_error([one], []) == float("inf")
    assert relative_error([one * np.nan], [one * np.nan]) == float("inf")


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
