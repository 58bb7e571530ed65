"""The fixture: what is committed is what its README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bnctl import fixture
from bnctl.data.open import open_data
from bnctl.errors import InputError
from bnctl.fixture import fixture_path, plain, with_bn

NETS = {"digits_plain": plain, "digits_bn": with_bn}
DATA = {"test": 600, "shifted": 600, "calibration": 300, "shifted_calibration": 300}


@pytest.fixture(scope="module")
def arrays():
    return {name: dict(np.load(fixture_path(f"{name}.npz"))) for name in DATA}


def trained(name: str) -> nn.Module:
    net = NETS[name]()
    net.load_state_dict(load_file(fixture_path(f"{name}.safetensors")))
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, data: dict[str, np.ndarray]) -> float:
    return float((net(torch.from_numpy(data["x"])).argmax(1).numpy() == data["y"]).mean())


def measured_in_readme(name: str) -> list[float]:
    row = next(line for line in fixture_path("README.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    return [float(number) for number in re.findall(r"([\d.]+)%", row)]


@torch.no_grad()
def recalibrated(net: nn.Module, x: np.ndarray) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    net.train()(torch.from_numpy(x))
    return net.eval()


class TestData:
    @pytest.mark.parametrize("name", DATA)
    def test_arrays(self, arrays, name):
        x, y = arrays[name]["x"], arrays[name]["y"]
        assert (x.shape, x.dtype) == ((DATA[name], 1, 8, 8), np.float32)
        assert (y.shape, y.dtype) == ((DATA[name],), np.int64)
        assert set(y) == set(range(10))
        assert next(iter(open_data(fixture_path(f"{name}.npz"), batch_size=256))).size == 256

    def test_shifted_images_are_the_same_images(self, arrays):
        for clean, shifted in (("test", "shifted"), ("calibration", "shifted_calibration")):
            np.testing.assert_array_equal(arrays[clean]["y"], arrays[shifted]["y"])
            a, b = (arrays[n]["x"].reshape(len(arrays[n]["x"]), -1) for n in (clean, shifted))
            correlation = [np.corrcoef(p, q)[0, 1] for p, q in zip(a, b, strict=True)]
            assert min(correlation) > 0.7
            assert b.std() < 0.8 * a.std()

    def test_no_image_is_in_both_parts(self, arrays):
        parts = [{image.tobytes() for image in arrays[name]["x"]} for name in ("test", "calibration")]
        assert not parts[0] & parts[1]


class TestNets:
    def test_bn_is_the_only_difference(self):
        def layers(net):
            return [(n, type(m)) for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

        assert layers(plain()) == layers(with_bn())
        kinds = [type(m) for m in with_bn().modules()]
        assert (kinds.count(nn.BatchNorm2d), kinds.count(nn.BatchNorm1d)) == (4, 1)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain().modules())

    @pytest.mark.parametrize("name", NETS)
    def test_accuracy_is_what_the_readme_says(self, arrays, name):
        clean, shifted = (100 * accuracy(trained(name), arrays[part]) for part in ("test", "shifted"))
        assert clean >= 97
        # One image of 600 may tip over on another processor.
        assert [clean, shifted] == pytest.approx(measured_in_readme(name)[:2], abs=0.4)

    def test_recalibration_helps_on_shifted_images(self, arrays):
        net = trained("digits_bn")
        before = accuracy(net, arrays["shifted"])
        after = accuracy(recalibrated(net, arrays["shifted_calibration"]["x"]), arrays["shifted"])
        assert after > before + 0.3
        assert 100 * after == pytest.approx(measured_in_readme("digits_bn")[2], abs=0.4)

    def test_random_weights_know_nothing(self, arrays):
        torch.manual_seed(0)
        assert accuracy(plain().eval(), arrays["test"]) < 0.5


class TestOnnx:
    @pytest.mark.parametrize(("name", "norms"), [("digits_plain", 0), ("digits_bn", 5)])
    def test_the_same_function_with_the_norms_kept(self, arrays, name, norms):
        model = onnx.load(fixture_path(f"{name}.onnx"))
        onnx.checker.check_model(model, full_check=True)
        assert [n.op_type for n in model.graph.node].count("BatchNormalization") == norms
        session = onnxruntime.InferenceSession(fixture_path(f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for size in (1, 2, 600):
            x = arrays["test"]["x"][:size]
            with torch.no_grad():
                want = trained(name)(torch.from_numpy(x)).numpy()
            (got,) = session.run(None, {session.get_inputs()[0].name: x})
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            other = NETS[name]().eval()(torch.from_numpy(x)).numpy()
        assert not np.allclose(got, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", NETS)
    def test_nothing_of_the_machine_that_made_it(self, name):
        content = fixture_path(f"{name}.onnx").read_bytes()
        for trace in (b".py", b"/home", b"/root", b"File ", b"site-packages", b"stack_trace"):
            assert trace not in content
        model = onnx.load_from_string(content)
        assert not model.metadata_props and not model.doc_string
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


class TestPaths:
    def test_all_files_are_small(self):
        assert sum(p.stat().st_size for p in fixture_path("README.md").parent.iterdir() if p.is_file()) < 1_500_000

    def test_unknown_names(self):
        with pytest.raises(InputError, match=r"no file 'digits_bm\.onnx'") as caught:
            fixture_path("digits_bm.onnx")
        assert "digits_bn.onnx" in caught.value.hint

    def test_in_a_wheel_it_lies_in_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fixture, "_FOLDERS", (tmp_path / "bnctl" / "fixtures", tmp_path / "fixtures"))
        with pytest.raises(InputError, match="not installed"):
            fixture_path("test.npz")
        (tmp_path / "fixtures").mkdir()
        (tmp_path / "fixtures" / "other.txt").touch()  # somebody else's folder of that name
        with pytest.raises(InputError, match="not installed"):
            fixture_path("other.txt")
        inside = tmp_path / "bnctl" / "fixtures"
        inside.mkdir(parents=True)
        for name in ("digits_bn.onnx", "test.npz"):
            (inside / name).touch()
        assert fixture_path("test.npz") == inside / "test.npz"

    def test_paths_need_no_torch(self):
        code = "import sys; from bnctl.fixture import fixture_path; fixture_path('test.npz'); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"

    def test_classes_by_name(self):
        assert isinstance(plain(), fixture.PlainDigits)
        assert isinstance(with_bn(), fixture.DigitsBN)
        with pytest.raises(AttributeError, match="nothing"):
            fixture.nothing  # noqa: B018

    def test_the_script_is_there(self):
        assert (Path(__file__).parents[1] / "fixtures" / "build.py").is_file()
