from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnctl.errors import BnctlError, ModelError, UntrustedError
from bnctl.models.pt2 import check_pt2, load_pt2
from bnctl.models.pt2_expr import check_expression

PROGRAM = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.offset = torch.ones(2)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        y = self.norm(self.conv(x)).relu()
        y = y.masked_fill(y > 3, float("-inf")).amax((2, 3)) * scale
        pairs = y.reshape(x.shape[0] // 2, -1)[:, :2] + self.offset
        return {"pairs": pairs, "rest": (y, [x.shape[0]])}


ARGS, KWARGS = (torch.randn(4, 3, 6, 6),), {"scale": torch.ones(4)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "good.pt2"
    batch = torch.export.Dim("b", min=2, max=64)
    program = torch.export.export(Net().eval(), ARGS, KWARGS, dynamic_shapes={"x": {0: 2 * batch}, "scale": None})
    torch.export.save(program, path)
    return path


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a planted command would make, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "marker"


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch marker",)


CODE = "__import__('os').system('touch marker')"
Change = bytes | Callable[[Any], Any]


def rewrite(source: Path, target: Path, changes: dict[str, Change], **options: Any) -> Path:
    """Copy an archive; an entry is replaced by bytes, or its JSON by what a function makes of it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        root = old.namelist()[0].partition("/")[0]
        content = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, change in changes.items():
            if isinstance(change, bytes):
                content[name] = change
            else:
                document = json.loads(content[name])
                content[name] = json.dumps(change(document) or document).encode()
        for name, data in content.items():
            new.writestr(f"{root}/{name}", data)
    return target


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def graph(document: Any) -> Any:
    return document["graph_module"]["graph"]


def call_signature(document: Any) -> Any:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def pickled_weight(config: Any) -> None:
    config["config"]["conv.weight"].update(use_pickle=True, path_name="weight_0")


def pickled_constant(config: Any) -> None:
    config["config"]["offset"].update(use_pickle=True)


def custom_object(config: Any) -> None:
    config["config"]["offset"].update(use_pickle=True, path_name="custom_obj_0", tensor_meta=None)


def opaque_object(config: Any) -> None:
    config["config"]["offset"].update(use_pickle=True, path_name="opaque_obj_0", tensor_meta=None)


def opaque_object_that_denies_it(config: Any) -> None:
    config["config"]["offset"].update(path_name="opaque_obj_0")


def evil_size(document: Any) -> None:
    def plant(node: Any) -> None:
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            if isinstance(value, dict) and "expr_str" in value:
                value["expr_str"] = CODE
            plant(value)

    plant(graph(document)["tensor_values"])


def evil_guard(document: Any) -> None:
    document["guards_code"] = [f"{CODE} == 0"]


def evil_tree(document: Any) -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    context = json.dumps([{"__enum__": True, "fqn": "bnctl_test_planted:X", "name": "y"}])
    call_signature(document)["out_spec"] = json.dumps(
        [1, {"type": "builtins.dict", "context": context, "children_spec": [leaf]}]
    )


def evil_default_factory(document: Any) -> None:
    context = {"default_factory_module": "bnctl_test_planted", "default_factory_name": "X", "dict_context": []}
    node = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    call_signature(document)["out_spec"] = json.dumps([1, node])


PICKLE = pickle.dumps(Evil())
ATTACKS: dict[str, dict[str, Change]] = {
    "weight": {WEIGHTS: pickled_weight, "data/weights/weight_0": saved(Evil())},
    "constant": {CONSTANTS: pickled_constant, "data/constants/tensor_0": saved(Evil())},
    "opaque object": {CONSTANTS: opaque_object, "data/constants/opaque_obj_0": PICKLE},
    "opaque object that denies it": {
        CONSTANTS: opaque_object_that_denies_it,
        "data/constants/opaque_obj_0": PICKLE * 8,
    },
    "sample inputs": {INPUTS: saved(Evil())},
    "legacy weights": {"data/weights/model.pt": saved(Evil())},
    "legacy constants": {"data/constants/model.pt": saved(Evil())},
    "size": {PROGRAM: evil_size},
    "tree": {PROGRAM: evil_tree},
    "default factory": {PROGRAM: evil_default_factory},
}


@contextlib.contextmanager
def planted_module(folder: Path) -> Iterator[None]:
    (folder / "bnctl_test_planted.py").write_text("from pathlib import Path\nPath('marker').touch()\n")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("bnctl_test_planted", None)


def run_as_torch_does(path: Path) -> None:
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(*ARGS, **KWARGS)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_a_planted_command_does_not_run(good: Path, marker: Path, attack: str) -> None:
    path = rewrite(good, marker.with_name("bad.pt2"), ATTACKS[attack])
    with planted_module(marker.parent):
        with pytest.raises(UntrustedError) as caught:
            load_pt2(path)
        with pytest.raises(UntrustedError):
            check_pt2(path)
        assert not marker.exists()
        assert "bad.pt2" in caught.value.message and "--trust" in (caught.value.hint or "")
        run_as_torch_does(path)
        assert marker.exists(), "the attack must be real, or this test proves nothing"


def test_guards_are_left_out(good: Path, marker: Path) -> None:
    path = rewrite(good, marker.with_name("bad.pt2"), {PROGRAM: evil_guard})
    load_pt2(path).module()(*ARGS, **KWARGS)
    assert not marker.exists()
    run_as_torch_does(path)
    assert marker.exists()


def test_trust_hands_the_file_to_torch(good: Path, marker: Path) -> None:
    path = rewrite(good, marker.with_name("bad.pt2"), {PROGRAM: evil_guard})
    load_pt2(path, trust=True).module()(*ARGS, **KWARGS)
    assert marker.exists()


def test_a_good_archive_loads_and_computes_the_same(good: Path) -> None:
    check_pt2(good)
    program, reference = load_pt2(good), torch.export.load(good)
    x = torch.randn(10, 3, 6, 6)
    ours, theirs = (p.module()(x, **KWARGS) for p in (program, reference))
    assert torch.equal(ours["pairs"], theirs["pairs"])
    assert torch.equal(ours["rest"][0], theirs["rest"][0]) and ours["rest"][1] == [10]
    assert program.range_constraints == reference.range_constraints
    assert torch.equal(program.example_inputs[0][0], ARGS[0])
    stacks = [
        [n.meta.get("nn_module_stack") for n in p.graph.nodes if n.op == "call_function"] for p in (program, reference)
    ]
    assert stacks[0] == stacks[1]


def test_an_archive_without_sample_inputs_loads(good: Path, tmp_path: Path) -> None:
    program = load_pt2(rewrite(good, tmp_path / "n.pt2", {INPUTS: b""}))
    assert program.example_inputs is None
    program.module()(*ARGS, **KWARGS)


def test_a_model_of_torchvision_passes(tmp_path: Path) -> None:
    from bnctl.models.factory import build_module

    module = build_module("torchvision.models:shufflenet_v2_x0_5").eval()
    torch.export.save(torch.export.export(module, (torch.randn(1, 3, 32, 32),)), tmp_path / "m.pt2")
    load_pt2(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.load_library",
        "torch.ops.image.write_file.default",
        "torch.ops.aten.relu.default.__class__",
        "torch.ops.aten.__init__.__globals__",
        "torch.hub.load",
        "torch.load",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.__loader__.load_module",
        "#namespace:op",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation",
    ],
)
def test_operators_that_are_not_known_are_refused(good: Path, tmp_path: Path, target: str) -> None:
    def plant(document: Any) -> None:
        graph(document)["nodes"][0]["target"] = target

    with pytest.raises(ModelError, match=r"target"):
        check_pt2(rewrite(good, tmp_path / "b.pt2", {PROGRAM: plant}))


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    def plant(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return plant


CALL = ("graph_module", "module_call_graph", 0, "signature")
QUOTE = 'a") or exit("'


@pytest.mark.parametrize(
    ("entry", "plant"),
    [
        (PROGRAM, put("range_constraints", value={"s0": {"min_val": "0", "max_val": 3}})),
        (PROGRAM, put("range_constraints", value={QUOTE: {"min_val": 0, "max_val": 3}})),
        (PROGRAM, put("verifiers", value=["a.b"])),
        (PROGRAM, put(*CALL, "forward_arg_names", value=["x=exit()"])),
        (PROGRAM, put(*CALL, "forward_arg_names", value="x")),
        (PROGRAM, put("graph_module", "graph", "nodes", 0, "name", value="q\nimport os\n#")),
        (PROGRAM, put("graph_module", "graph", "nodes", 0, "outputs", 0, "as_tensor", "name", value="q; import os")),
        (PROGRAM, put("graph_module", "graph", "nodes", 0, "inputs", 0, "name", value="a=1, b")),
        (PROGRAM, put(*CALL, "in_spec", value="[1, 2]")),
        (PROGRAM, put(*CALL, "in_spec", value="{")),
        (PROGRAM, put("graph_module", "graph", "inputs", 0, value={"as_tensor": {"name": "x"}, "as_none": True})),
        (PROGRAM, put("graph_module", "graph", "inputs", 0, value={"as_string": QUOTE})),
        (PROGRAM, put("graph_module", "graph", "inputs", 0, value={"as_nothing": 1})),
        (PROGRAM, put("graph_module", "graph", "inputs", 0, value={"as_int": True})),
        (PROGRAM, put("graph_module", "graph", "custom_obj_values", value={"a": {"name": "a", "class_fqn": "b"}})),
        (PROGRAM, put("graph_module", "signature", "input_specs", 0, "parameter", "parameter_name", value=QUOTE)),
        (PROGRAM, put("graph_module", value=[])),
        (WEIGHTS, put("config", "conv.weight", "path_name", value="../weight_0")),
        (WEIGHTS, put("config", "conv.weight", "path_name", value="weight_99")),
        (WEIGHTS, put("config", "conv.weight", "tensor_meta", "sizes", value=[{"as_int": 10**9}])),
        (WEIGHTS, put("config", "conv.weight", "tensor_meta", "dtype", value=99)),
        (CONSTANTS, put("config", value=3)),
    ],
)
def test_odd_fields_are_refused(good: Path, tmp_path: Path, entry: str, plant: Callable[[Any], None]) -> None:
    with pytest.raises(ModelError, match=r"b\.pt2"):
        load_pt2(rewrite(good, tmp_path / "b.pt2", {entry: plant}))


@pytest.mark.parametrize("value", [({QUOTE: 1},), ({"a": {1, 2}},), [1], ((QUOTE,), {})])
def test_odd_sample_inputs_are_refused(good: Path, tmp_path: Path, value: Any) -> None:
    with pytest.raises(UntrustedError, match="sample_inputs"):
        check_pt2(rewrite(good, tmp_path / "b.pt2", {INPUTS: saved(value)}))


def test_an_empty_weight_does_not_become_zeros(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no values \(data/weights/weight_0 is empty\)"):
        load_pt2(rewrite(good, tmp_path / "b.pt2", {"data/weights/weight_0": b""}))


def test_the_zip_itself_is_read_with_suspicion(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "b.pt2"
    rewrite(good, bad, {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UntrustedError, match="is compressed"):
        check_pt2(bad)
    for name, message in {
        f"good/{PROGRAM.upper()}": "is there twice",
        "other/x": "2 root folders",
        "good/../x": "leaves the archive",
        "/good/x": "odd name",
        "good//x": "odd name",
        "serialized_exported_program.json": "torch 2.7",
    }.items():
        rewrite(good, bad, {})
        with zipfile.ZipFile(bad, "a") as archive:
            archive.writestr(name, b"{}")
        with pytest.raises(UntrustedError, match=message):
            check_pt2(bad)


def test_what_else_is_in_the_archive_is_not_looked_at(good: Path, tmp_path: Path) -> None:
    others = {"models/other.json": b"{", "data/aotinductor/model/x.so": b"code", "extra/note": b"hi"}
    load_pt2(rewrite(good, tmp_path / "b.pt2", {**others}))


@pytest.mark.parametrize("keep", [0, 10, 2000, -30])
def test_a_damaged_file_is_named(good: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "b.pt2").write_bytes(good.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"b\.pt2"):
        load_pt2(tmp_path / "b.pt2")


def test_a_flipped_bit_is_found(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(good) as archive:
        weights = archive.read("good/data/weights/weight_0")
    whole = good.read_bytes()
    at = whole.index(weights)
    (tmp_path / "b.pt2").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ModelError, match="weight_0 is damaged"):
        load_pt2(tmp_path / "b.pt2")


def test_another_format_version_is_named(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="archive_version"):
        check_pt2(rewrite(good, tmp_path / "b.pt2", {"archive_version": b"7"}))
    with pytest.raises(ModelError, match=r"holds no models/model\.json"):
        with zipfile.ZipFile(tmp_path / "c.pt2", "w") as archive:
            archive.writestr("c/archive_format", b"pt2")
            archive.writestr("c/archive_version", b"0")
        check_pt2(tmp_path / "c.pt2")


SYMBOLS = st.sampled_from([sympy.Symbol("s0", positive=True, integer=True), sympy.Symbol("u1", integer=True)])
EXPRESSIONS = st.recursive(
    st.one_of(SYMBOLS, st.integers(-100, 100).map(sympy.Integer)),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, inner).map(lambda p: sympy.Max(p[0], p[1])),
        inner.map(lambda e: e**2),
        inner.map(sympy.floor),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_what_torch_writes_is_in_the_grammar(expression: sympy.Expr) -> None:
    check_expression(sympy.srepr(expression), "here")


@pytest.mark.parametrize(
    "text",
    [
        "FloorDiv(Symbol('s0', positive=True, integer=True), Integer(2))",
        "Mod(Add(Symbol('s0', integer=True), Integer(-1)), Integer(3))",
        "Equality(Symbol('u0'), Integer(1))",
        "Float('0.5', precision=53)",
        "Rational(1, 2)",
        "true",
        "-3",
        " Integer( 3 ) ",
    ],
)
def test_expressions_that_are_fine(text: str) -> None:
    check_expression(text, "here")


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        "",
        "s0",
        "exec",
        "Symbol",
        "Symbol()x",
        "Symbol('s0').__class__",
        "Symbol('s0', positive=exec)",
        "Symbol('s0', positive='x')",
        'Symbol("s0")',
        "Symbol('a b')",
        "Symbol('s0\\x41')",
        "Symbol(f's0')",
        "Integer('3')",
        "Integer(3",
        "Integer(3))",
        "Integer(3) Integer(4)",
        "Integer(3,, 4)",
        "Integer(,3)",
        "Add(x=Integer(3))",
        "Add(*Integer(3))",
        "Lambda(Integer(3))",
        "[Integer(3)]",
        "Integer(3) + Integer(4)",
        "Integer(3)\n",
        "Integer(3)#",
        "Float('1e9999')",
        "Float('x')",
        "Pow(Integer(9), Integer(999))",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Integer(9))",
        "LShift(Integer(1), Symbol('s0'))",
        "9" * 30,
        "Add(" * 100 + "1" + ")" * 100,
        "Add(1" + ", 1" * 5000 + ")",
        "ｅxec",  # noqa: RUF001 - a letter that Python would normalise
    ],
)
def test_expressions_that_are_refused(text: str) -> None:
    with pytest.raises(UntrustedError, match="here"):
        check_expression(text, "here")


@given(st.text(max_size=40))
def test_any_text_is_judged(text: str) -> None:
    with contextlib.suppress(BnctlError):
        check_expression(text, "here")
