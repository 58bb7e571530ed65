"""Recalibrating ONNX models: real ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bnctl.data.batches import Batch
from bnctl.errors import ModelError
from onnx_recalibration import (
    LIGHT,
    Array,
    data,
    over,
    recalibrate,
    split,
)
from test_onnx_checks import count, run


def test_the_same_as_the_torch_engine() -> None:
    torch = pytest.importorskip("torch")
    import bnctl
    from bnctl.engines.torch.export import to_onnx, to_program
    from nets_resnet20 import BasicBlock

    torch.manual_seed(0)
    stem = (torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    module = torch.nn.Sequential(*stem, BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)).eval()
    batches = split(data(7, 3, 16, 16), 4, 3)
    exported = to_onnx(to_program(module, batches[0]))
    for method in ("exact", "batch", "ema"):
        new, sites, _ = recalibrate(exported, batches, method=method)
        other = bnctl.recalibrate(module, batches, method=method).model.state_dict()
        assert [s.name for s in sites] == ["1", "3.bn1", "3.bn2", "4.bn1", "4.bn2"]
        arrays = {name: v.const_value.numpy() for name, v in new.graph.initializers.items()}
        for site in sites:
            mean, var = (other[f"{site.name}.running_{n}"].numpy() for n in ("mean", "var"))
            np.testing.assert_allclose(arrays[f"{site.name}.running_var"], var, rtol=1e-5)
            scale = np.sqrt(var.max())
            np.testing.assert_allclose(arrays[f"{site.name}.running_mean"], mean, rtol=1e-5, atol=1e-5 * scale)


def test_a_norm_in_custom_torch_code() -> None:
    """The exporter folds sqrt(var + eps) into one constant, as it would for any module that computes BN by hand; of its reciprocal nobody can tell."""
    torch = pytest.importorskip("torch")
    from bnctl.engines.torch.export import to_onnx, to_program

    class Divided(torch.nn.BatchNorm2d):  # type: ignore[name-defined, misc]
        def forward(self, x: Any) -> Any:
            column = (1, -1, 1, 1)
            x = (x - self.running_mean.view(column)) / torch.sqrt(self.running_var.view(column) + self.eps)
            return x * self.weight.view(column) + self.bias.view(column)

    class Multiplied(torch.nn.BatchNorm2d):  # type: ignore[name-defined, misc]
        def forward(self, x: Any) -> Any:
            column = (1, -1, 1, 1)
            x = (x - self.running_mean.view(column)) * torch.rsqrt(self.running_var.view(column) + self.eps)
            return x * self.weight.view(column) + self.bias.view(column)

    batches = split(data(7, 3, 8, 8), 4, 3)
    outputs = []
    for norm in (torch.nn.BatchNorm2d, Divided, Multiplied):
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), norm(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), norm(4)
        )
        torch.nn.init.uniform_(module[1].weight, -1, 2)
        exported = to_onnx(to_program(module.eval(), batches[0]))
        assert (count(exported, "BatchNormalization") == 0) == (norm is not torch.nn.BatchNorm2d)
        if norm is Multiplied:
            with pytest.raises(ModelError, match="BN307"):
                recalibrate(exported, batches)
            continue
        new, sites, _ = recalibrate(exported, batches)
        assert [s.action for s in sites] == ["recalibrated"] * 2
        feeds = {str(new.graph.inputs[0].name): batches[0].args[0]}
        outputs.append(next(iter(run(new, feeds, inner=False).values())))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def check_fixed_point(model: ir.Model, batches: list[Batch], found: int) -> None:
    """The definition of exact: in the new model, what each node sees has the statistics that it stores. The old model fails."""
    new, sites, _ = recalibrate(model, batches)
    assert [s.action for s in sites] == ["recalibrated"] * found
    assert discrepancies(new, batches).max() < 1e-4
    assert np.median(discrepancies(model, batches)) > 0.1


def discrepancies(model: ir.Model, batches: list[Batch]) -> Array:
    nodes = [n for n in model.graph if n.op_type == "BatchNormalization"]
    name = next(str(v.name) for v in model.graph.inputs if not v.is_initializer())
    feeds = [{name: batch.args[0]} for batch in batches]
    runs = [run(model, feed) | feed for feed in feeds]
    worst = []
    for node in nodes:
        mean, var = over(np.concatenate([values[str(node.inputs[0].name)] for values in runs]))
        stored = [constant(v, runs[0]).astype(np.float64) for v in node.inputs[3:5]]
        scale = var + node.attributes.get_float("epsilon", 1e-5)
        worst.append(max(np.max(np.abs(stored[0] - mean) / np.sqrt(scale)), np.max(np.abs(stored[1] - var) / scale)))
    return np.array(worst)


def constant(value: ir.Value, values: dict[str, Array]) -> Array:
    return values[str(value.name)] if value.const_value is None else value.const_value.numpy()


LIGHT_MODELS = [
    pytest.param("shufflenet", 49),
    pytest.param("resnet50", 53, marks=pytest.mark.slow),
    pytest.param("densenet121", 121, marks=pytest.mark.slow),
    pytest.param("inception_v2", 69, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "found"), LIGHT_MODELS)
def test_models_of_the_onnx_package(name: str, found: int) -> None:
    """They have a fixed batch size of one; their weights are ConstantOfShape nodes, so that channels are equal."""
    path = LIGHT / f"light_{name}.onnx"
    if not path.exists():
        pytest.skip("this build of the onnx package has no test data")
    check_fixed_point(ir.load(path), split(data(2, 3, 224, 224), 1, 1), found)


@pytest.mark.parametrize(
    ("name", "found", "size"),
    [
        ("ch_ppocr_mobile_v2.0_cls_infer", 35, (48, 192)),
        ("ch_PP-OCRv4_det_infer", 3, (96, 96)),
        ("ch_PP-OCRv4_rec_infer", 6, (48, 160)),
    ],
)
def test_models_of_paddle(name: str, found: int, size: tuple[int, int]) -> None:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        pytest.skip("PP-OCR comes with the package rapidocr_onnxruntime, which is not installed")
    path = Path(package.submodule_search_locations[0], "models", f"{name}.onnx")
    check_fixed_point(ir.load(path), split(data(5, 3, *size), 2, 2, 1), found)
