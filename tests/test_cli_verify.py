"""`bnctl verify` as a gate: what it looks at beyond the inputs that it was given, and what it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from conftest import PLAIN, TEST
from test_onnx_checks import Net

NETS = """
import torch
from torch import nn

class Choosing(nn.Module):
    def __init__(self, code):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.code = nn.Conv2d(3, 4, 3), code

    def forward(self, x, flag=None):
        return self.code(self.conv(x), *([] if flag is None else [flag]))

def flag():
    return Choosing(lambda y, flag: y).eval()

def flag_wrong():
    return Choosing(lambda y, flag: torch.where(flag, y, 3 * y)).eval()

def plain():
    return Choosing(lambda y: y).eval()

def of_one_size():
    def code(y):
        if y.shape[-1] != 6:
            raise ValueError("made for one size")
        return y
    return Choosing(code).eval()

def wrong_size():
    return Choosing(lambda y: y + (y.shape[-1] - 6)).eval()

def masked(code):
    def with_mask(y):
        y = code(y)
        y[..., -1] = float("-inf")
        return y
    return Choosing(with_mask).eval()

def masked_plain():
    return masked(lambda y: y)

def masked_wrong_size():
    return masked(lambda y: y + (y.shape[-1] - 6))

def masked_wrong_batch():
    return masked(lambda y: y * (1 + (len(y) != 2)))

def wrong_sign():
    return Choosing(lambda y: y if y.max() < 3 else y.clamp(max=3)).eval()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "verify_nets", raising=False)
    Path("verify_nets.py").write_text(NETS)


IMAGE = ("--input", "2x3x8x8")


@pytest.mark.parametrize(
    ("right", "wrong", "inputs"),
    [
        ("flag", "flag_wrong", (*IMAGE, "--input", "flag::bool")),
        ("plain", "wrong_size", IMAGE),
        ("plain", "wrong_sign", IMAGE),
        ("masked_plain", "masked_wrong_size", IMAGE),
        ("masked_plain", "masked_wrong_batch", (*IMAGE, "--seed", "1")),
    ],
)
def test_what_the_drawn_inputs_do_not_show(cli: Any, right: str, wrong: str, inputs: tuple[str, ...]) -> None:
    right, wrong = f"verify_nets:{right}", f"verify_nets:{wrong}"
    assert cli("verify", right, right, *inputs).code == 0
    ended = cli("verify", right, wrong, *inputs)
    assert ended.code == 1
    assert "varied" in ended.out
    np.savez("data.npz", x=np.zeros((4, 3, 8, 8), np.float32))
    if "bool" not in str(inputs) and "batch" not in wrong:  # with data, these say what matters
        assert cli("verify", right, wrong, "--data", "data.npz").code == 0


def test_a_branch_that_the_drawn_condition_does_not_take(cli: Any) -> None:
    files = []
    for factor in (1.0, 1.1):
        net = Net("N", 3, 8, 8)
        flag = onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
        net.inputs.append(flag)
        branches = []
        for name, scale in (("then", 1.0), ("else", factor)):
            node = onnx.helper.make_node("Mul", ["x", net.param(np.array(scale))], [name])
            out = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, 8, 8])
            branches.append(onnx.helper.make_graph([node], name, [], [out]))
        net.nodes.append(onnx.helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1]))
        files.append(f"{factor}.onnx")
        onnx.save(net.proto("y"), files[-1])
    assert cli("verify", files[0], files[0]).code == 0
    assert cli("verify", *files).code == 1


def loop(path: str, factor: float) -> str:
    """Multiplies from the second pass on."""
    helper, tensor = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Greater", ["i", "zero"], ["later"]),
        helper.make_node("Identity", ["go"], ["on"]),
        helper.make_node("Mul", ["s", "factor"], ["t"]),
        helper.make_node("Where", ["later", "t", "s"], ["u"]),
    ]
    values = [("i", tensor.INT64), ("go", tensor.BOOL)]
    inputs = [helper.make_tensor_value_info(name, kind, []) for name, kind in values]
    inputs.append(helper.make_tensor_value_info("s", tensor.FLOAT, None))
    outputs = [
        helper.make_tensor_value_info("on", tensor.BOOL, []),
        helper.make_tensor_value_info("u", tensor.FLOAT, None),
    ]
    constants = [onnx.numpy_helper.from_array(np.array(0), "zero")]
    constants.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor"))
    body = helper.make_graph(nodes, "body", inputs, outputs, constants)
    net = Net("N", 3, 4, 4)
    net.inputs.append(helper.make_tensor_value_info("passes", tensor.INT64, []))
    net.nodes.append(helper.make_node("Loop", ["passes", "", "x"], ["y"], body=body))
    y = helper.make_tensor_value_info("y", tensor.FLOAT, None)
    graph = helper.make_graph(net.nodes, "net", net.inputs, [y], [])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_passes_of_a_loop_that_the_drawn_number_does_not_reach(cli: Any) -> None:
    one, two = loop("1.onnx", 1.0), loop("2.onnx", 2.0)
    assert cli("verify", one, one).code == 0
    assert cli("verify", one, two).code == 1


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_rows_of_a_table_that_the_drawn_indices_do_not_reach(cli: Any, kind: str) -> None:
    words = []
    for number, first in enumerate((1000, 2)):
        table = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
        table[first:] += 1
        if kind == "onnx":
            net = Net("N")
            net.inputs = [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["N", 7])]
            net.add("Gather", table, "ids", out="y")
            onnx.save(net.proto("y"), f"{number}.onnx")
            words.append(f"{number}.onnx")
        else:
            np.save(f"{number}.npy", table)
            Path("tables.py").write_text(
                "import numpy, torch\n"
                "def net(number):\n"
                "    return torch.nn.Embedding.from_pretrained(torch.from_numpy(numpy.load(f'{number}.npy')))\n"
                "def zero(): return net(0)\n"
                "def one(): return net(1)\n"
            )
            words.append(f"tables:{('zero', 'one')[number]}")
    given = () if kind == "onnx" else ("--input", "2x7:int64")
    assert cli("verify", words[0], words[0], *given).code == 0
    assert cli("verify", *words, *given).code == 1


def test_outputs_that_show_nothing_are_not_called_different(cli: Any) -> None:
    Path("nothing.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    model = nn.Sequential(nn.BatchNorm2d(3)).eval()\n"
        "    model[0].running_mean.fill_(float('nan'))\n"
        "    return model\n"
    )
    ended = cli("verify", "nothing:net", "nothing:net", "--input", "1x3x4x4")
    assert ended.code == 3
    assert "NOTHING SHOWN" in ended.out and "DIFFERENT" not in ended.out
    assert "inconclusive" in ended.out.splitlines()[-1]
    assert cli("verify", "nothing:net", "nothing:net", "--input", "1x3x4x4", "--format", "markdown").code == 3


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_data_of_the_other_byte_order(cli: Any, command: str) -> None:
    x = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    y = np.arange(6) % 4
    np.savez("data.npz", x=x.astype(">f4"), y=y.astype(">i8"))
    Path("pooled.py").write_text(
        "import verify_nets\nfrom torch import nn\n"
        "def net(): return nn.Sequential(verify_nets.plain(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()\n"
    )
    more = ("--no-latency",) if command == "bench" else ()
    ended = cli(command, "pooled:net", "pooled:net", "--data", "data.npz", *more, "--json")
    assert ended.code == 0, ended.err


def test_sizes_that_only_one_of_the_two_takes_are_no_fault_and_are_said(cli: Any) -> None:
    ended = cli("verify", "verify_nets:plain", "verify_nets:of_one_size", *IMAGE)
    assert ended.code == 0
    assert "takes only some of the sizes" in ended.out
    assert "takes only some" not in cli("verify", "verify_nets:of_one_size", "verify_nets:plain", *IMAGE).out


def test_an_export_for_one_batch_size_passes_and_that_is_said(cli: Any) -> None:
    assert cli("export", "verify_nets:plain", "-o", "one.onnx", "--static-batch", *IMAGE).code == 0
    ended = cli("verify", "verify_nets:plain", "one.onnx", *IMAGE)
    assert ended.code == 0
    assert "one.onnx is made for one batch size" in " ".join(ended.out.split())
    assert cli("export", "verify_nets:plain", "-o", "any.onnx", *IMAGE).code == 0
    assert "one batch size" not in cli("verify", "verify_nets:plain", "any.onnx", *IMAGE).out
    assert cli("verify", "verify_nets:masked_wrong_batch", "one.onnx", *IMAGE).code == 1


def test_inputs_that_are_given_beside_data_are_looked_at(cli: Any) -> None:
    words = ("bnctl.fixture:with_bn", "--data", TEST, "--limit", "8", "--dry-run")
    assert cli("fold", *words).code == 0
    assert cli("fold", *words, "--input", "1x1x8x8").code == 0
    ended = cli("fold", *words, "--input", "1x7x8x8")
    assert ended.code == 2
    assert "fails on the example input" in ended.err
    words = ("insert", PLAIN, "--data", TEST, "--limit", "8", "--dry-run")
    assert cli(*words, "--input", "1x1x8x8").code == 0
    assert cli(*words, "--input", "1x7x8x8").code == 2
    np.savez("zeros.npz", x=np.zeros((4, 3, 8, 8), np.float32))
    words = ("verify", "verify_nets:plain", "verify_nets:wrong_size", "--data", "zeros.npz")
    assert cli(*words).code == 0
    assert cli(*words, "--input", "1x3x9x9").code == 1


def test_a_model_of_one_batch_size_says_how_to_feed_it(cli: Any) -> None:
    assert cli("export", "verify_nets:plain", "-o", "one.onnx", "--static-batch", *IMAGE).code == 0
    np.savez("four.npz", x=np.zeros((4, 3, 8, 8), np.float32))
    words = ("verify", "one.onnx", "one.onnx", "--data", "four.npz")
    ended = cli(*words)
    assert ended.code == 2
    assert "--batch-size 2 makes such batches" in " ".join(ended.err.split())
    assert cli(*words, "--batch-size", "2").code == 0
