"""The Python face: objects in, objects out, and what goes in stays as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import nn

import bnctl
from bnctl.errors import DataError, ModelError, UntrustedError, UsageError
from bnctl.fixture import plain, with_bn
from conftest import BN, CALIBRATION, ONNX_BN, ONNX_PLAIN, PLAIN, faults

X = torch.from_numpy(np.load(CALIBRATION)["x"][:40])


@pytest.fixture
def net():
    torch.manual_seed(0)
    module = with_bn()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return module.eval()


class Named(nn.Module):
    """Takes a keyword, gives a dict."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)

    def forward(self, image, scale=None):
        return {"features": self.norm(self.conv(image)) * (1.0 if scale is None else scale)}


def norms(module):
    return sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def untouched():
    """Fails where a surgery changes the module that it was given."""
    seen = []

    def watch(module):
        seen.append(
            (module, state(module), module.training, repr(module), [len(m._forward_hooks) for m in module.modules()])
        )
        return module

    yield watch
    for module, before, training, text, hooks in seen:
        assert module.training == training
        assert repr(module) == text
        assert [len(m._forward_hooks) for m in module.modules()] == hooks
        after = module.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("inputs", [X[:4], (X[:4],), {"x": X[:4]}], ids=["tensor", "tuple", "dict"])
def test_fold_a_module(inputs, net, untouched):
    name = next(iter(__import__("inspect").signature(net.forward).parameters))
    result = bnctl.fold(untouched(net), {name: X[:4]} if isinstance(inputs, dict) else inputs)
    assert type(result.model) is type(net)
    assert norms(result.model) == 0
    assert norms(net) == 5
    torch.testing.assert_close(result.model(X), net(X), rtol=1e-4, atol=1e-5)
    assert faults(result.report.to_dict()) == []
    assert result.report.summary == {"found": 5, "folded": 5, "left": 0}


def test_keywords_and_dicts(untouched):
    module = untouched(Named().eval())
    given = {"image": X[:4], "scale": torch.tensor(2.0)}
    result = bnctl.fold(module, given)
    assert norms(result.model) == 0
    torch.testing.assert_close(result.model(**given)["features"], module(**given)["features"])


def test_insert_and_recalibrate_a_module(net, untouched):
    batches = [X[:16], X[16:32], X[32:]]
    inserted = bnctl.insert(untouched(plain().eval()), batches, where="conv*")
    assert inserted.report.summary["inserted"] == 4
    assert norms(inserted.model) == 4
    recalibrated = bnctl.recalibrate(untouched(net), [(x, torch.zeros(len(x))) for x in batches])
    assert recalibrated.report.summary["samples"] == 40
    assert type(recalibrated.model) is type(net)
    assert not torch.equal(recalibrated.model.state_dict()["bn1.running_mean"], net.state_dict()["bn1.running_mean"])
    for result in (inserted, recalibrated):
        assert faults(json.loads(json.dumps(result.report.to_dict()))) == []


def test_a_module_in_training_mode_stays_in_it(net, untouched):
    assert bnctl.recalibrate(untouched(net.train()), [X]).model.training


def test_fold_a_proto():
    proto = onnx.load(ONNX_BN)
    before = proto.SerializeToString()
    result = bnctl.fold(proto)
    assert isinstance(result.model, onnx.ModelProto)
    onnx.checker.check_model(result.model)
    assert "BatchNormalization" not in {node.op_type for node in result.model.graph.node}
    assert proto.SerializeToString() == before


def test_fold_and_insert_an_ir_model():
    model = onnx_ir.load(ONNX_BN)
    before = onnx_ir.to_proto(model).SerializeToString()
    result = bnctl.fold(model)
    assert isinstance(result.model, onnx_ir.Model)
    assert result.report.summary["folded"] == 5
    assert onnx_ir.to_proto(model).SerializeToString() == before
    assert bnctl.insert(onnx_ir.load(ONNX_PLAIN), [X.numpy()]).report.summary["inserted"] == 5


def test_words_and_paths(tmp_path):
    result = bnctl.fold(ONNX_BN)
    assert isinstance(result.model, onnx_ir.Model)
    result.save(tmp_path / "folded.onnx")
    assert bnctl.verify(ONNX_BN, tmp_path / "folded.onnx", [X.numpy()]).passed
    assert norms(bnctl.fold(BN, X[:4]).model) == 0


def test_verify_sees_a_difference(net):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.bn3.bias += 1
    verification = bnctl.verify(net, other, [X])
    assert not verification.passed
    assert verification.first_difference.name == "bn3"
    assert bnctl.verify(net, copy.deepcopy(net), [X]).passed


@pytest.mark.parametrize("output", ["out.onnx", "out.pt2", "out"])
def test_save_in_every_form(output, net, tmp_path):
    result = bnctl.fold(net, X[:4])
    result.save(tmp_path / output, inputs=X[:4], factory="bnctl.fixture:with_bn")
    assert bnctl.verify(net, tmp_path / output, [X.numpy()]).passed
    with pytest.raises(UsageError, match="exists"):
        result.save(tmp_path / output, inputs=X[:4], factory="bnctl.fixture:with_bn")
    result.save(tmp_path / output, inputs=X[:4], factory="bnctl.fixture:with_bn", force=True)


def test_a_bundle_needs_a_factory(net, tmp_path):
    with pytest.raises(UsageError) as caught:
        bnctl.fold(net, X[:4]).save(tmp_path / "out")
    assert "factory" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_insert_save_load_train(tmp_path):
    """What insertion is for: the loaded module is the user's class, and a step of training lowers the loss."""
    data = np.load(CALIBRATION)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
    result = bnctl.insert(PLAIN, [x])
    result.save(tmp_path / "with_bn")
    model = bnctl.load(tmp_path / "with_bn")
    assert type(model) is type(plain())
    assert norms(model) == 5
    torch.testing.assert_close(model.eval()(x), result.model.eval()(x))
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]


def test_names_of_functions_are_not_hidden_by_modules():
    """Importing a submodule sets its name in the package: none may be called like a function of the API."""
    folder = Path(bnctl.__file__).parent
    names = {path.stem for path in folder.iterdir()}
    assert not names & set(bnctl.__all__)


def test_an_untrusted_bundle_does_not_load(tmp_path):
    bnctl.insert(PLAIN, [X]).save(tmp_path / "bundle")
    path = tmp_path / "bundle" / "bnctl.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"factory": "os:system", "args": {"command": f"touch {tmp_path}/ran"}}
        )
    )
    with pytest.raises(UntrustedError):
        bnctl.load(tmp_path / "bundle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda: bnctl.fold(3),
        lambda: bnctl.fold(plain()),
        lambda: bnctl.fold(None, X),
        lambda: bnctl.fold(with_bn(), X, where="layer9"),
        lambda: bnctl.recalibrate(ONNX_BN, [X.numpy()], prior=7, method="ema"),
    ],
    ids=["a number", "no inputs", "nothing", "no such layer", "onnx"],
)
def test_misuse_says_what_to_do(call):
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.hint


def test_the_names_are_there():
    assert set(bnctl.__all__) <= {*dir(bnctl), *bnctl.__all__}
    assert all(getattr(bnctl, name) is not None for name in bnctl.__all__)
    with pytest.raises(AttributeError, match="unfold"):
        bnctl.unfold  # noqa: B018


def test_what_cannot_be_an_example_is_refused():
    with pytest.raises(DataError, match="holds no sample"):
        bnctl.fold(torch.nn.BatchNorm2d(3), torch.randn(0, 3, 8, 8))
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.raises(ModelError, match="Sequential has parameters on the meta device"):
        bnctl.fold(net, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("form", ["initializer", "constant"])
def test_a_sparse_tensor_is_named(form):
    from onnx import TensorProto, helper, numpy_helper

    values = numpy_helper.from_array(np.ones(2, np.float32), "bias")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 2])), [4])
    constant = [helper.make_node("Constant", [], ["bias"], sparse_value=sparse)] if form == "constant" else []
    graph = helper.make_graph(
        [*constant, helper.make_node("Add", ["x", "bias"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        sparse_initializer=[sparse] if form == "initializer" else [],
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"bias is sparse, and bnctl reads dense ones only"):
        bnctl.fold(helper.make_model(graph))
