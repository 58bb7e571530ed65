"""Folding inside the bodies of If, Loop and Scan, at any depth, and over their borders not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bnctl.engines.onnx.lift import lift
from bnctl.engines.onnx.scopes import uniquely_named
from bnctl.plan.fold import plan_fold
from bnctl.plan.insert import plan_insert
from test_onnx_checks import FREE, Net, fold, relative_error, run

FLAGS = ({"flag": np.array(False)}, {"flag": np.array(True)})


class Body(Net):
    """A subgraph, written down like a model; its arrays become initializers of its own, or Constant nodes."""

    def graph(
        self, name: str, outputs: dict[str, int], inputs: Mapping[str, int] | None = None, *, constants: bool = False
    ) -> onnx.GraphProto:
        arrays = {f"{name}_{n}": a for n, a in self.initializers.items()}
        own = {*self.initializers}
        for node in self.nodes:
            for i, value in enumerate(node.input):
                if value in own:
                    node.input[i] = f"{name}_{value}"
        tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors] if constants else []
        given = [
            helper.make_tensor_value_info(n, kind, [None] * 4 if kind == TensorProto.FLOAT else [])
            for n, kind in (inputs or {}).items()
        ]
        made = [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()]
        return helper.make_graph([*nodes, *self.nodes], name, given, made, [] if constants else tensors)


def body(seed: int = 0) -> Body:
    return Body(FREE, 4, 6, 6, seed=seed)


class Outer(Net):
    """A model whose outputs have four axes, or what `ranks` says, where inference does not know."""

    ranks: Mapping[str, int] = {}

    def proto(self, *outputs: str) -> onnx.ModelProto:
        proto = super().proto(*outputs)
        for output in proto.graph.output:
            if not output.type.tensor_type.HasField("shape"):
                sizes = [None] * self.ranks.get(output.name, 4)
                output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, sizes))
        return proto


def flagged(**options: Any) -> Net:
    net = Outer(FREE, 4, 8, 8, **options)
    net.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    return net


def graphs(model: ir.Model) -> list[ir.Graph]:
    return [model.graph, *model.graph.subgraphs()]


def number_of(model: ir.Model, op_type: str) -> int:
    return sum(n.op_type == op_type for g in graphs(model) for n in g)


def check(model: ir.Model, *more: Mapping[str, NDArray[Any]]) -> tuple[ir.Model, dict[str, str | None]]:
    """Fold; the result is valid, every name is used once, and it computes the same as before, by two implementations."""
    original = ir.to_proto(model).SerializeToString(deterministic=True)
    folded, found = fold(model)
    proto = ir.to_proto(folded)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == original
    onnx.checker.check_model(proto, full_check=True)
    assert uniquely_named(folded) is folded
    for batch, extra in ((b, e) for b in (1, 3) for e in (more or ({},))):
        feeds = {"x": np.random.default_rng(batch).normal(0, 1, (batch, 4, 8, 8)).astype(np.float32), **extra}
        wanted = run(model, feeds, inner=False)
        second = dict(zip(wanted, ReferenceEvaluator(proto).run(None, dict(feeds)), strict=True))
        answers = [run(folded, feeds, inner=False), second]
        for answer in answers:
            for name, value in wanted.items():
                assert relative_error(value, answer[name]) < 2e-5, name
    return folded, found


def branch(name: str, value: str, seed: int, *, constants: bool = False) -> onnx.GraphProto:
    """relu(bn(conv(value))), with inner names that do not depend on the branch."""
    net = body(seed)
    net.add("Relu", net.bn(net.conv(value, 4, 4), 4, out="normed"), out="r")
    for node in net.nodes:
        node.name = f"{name}_{node.op_type}"
    return net.graph(name, {"r": TensorProto.FLOAT}, constants=constants)


@pytest.mark.parametrize("constants", [True, False])
def test_both_branches_of_an_if(constants: bool) -> None:
    net = flagged()
    branches = [branch(n, "x", seed, constants=constants) for seed, n in enumerate(("yes", "no"))]
    net.add("If", "flag", out="y", then_branch=branches[0], else_branch=branches[1])
    folded, found = check(net.model("y"), *FLAGS)
    assert found == {"yes_BatchNormalization": None, "no_BatchNormalization": None}
    assert number_of(folded, "BatchNormalization") == 0
    assert {v.name for v in folded.graph.inputs} == {"x", "flag"}


def test_the_check_notices_a_wrong_weight_in_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnctl.plan import parameters

    monkeypatch.setattr(parameters, "absorb_output", lambda op, w, b, s, t, dtype: (w, b + t))
    net = flagged()
    net.add("If", "flag", out="y", then_branch=branch("yes", "x", 0), else_branch=branch("no", "x", 1))
    with pytest.raises(AssertionError):
        check(net.model("y"), *FLAGS)


def test_weights_of_the_outer_graph_that_inner_and_outer_nodes_share() -> None:
    net = flagged()
    w, stats = net.param(net.normal(4, 4, 3, 3), "w"), net.statistics(4)
    one = net.add("Relu", net.add("Conv", "x", w))
    inner = body()
    inner.add("BatchNormalization", inner.add("Conv", "x", "w", out="c"), *stats, out="i")
    other = body(1)
    other.add("Conv", "x", "w", out="o")
    inner.initializers.clear()
    two = net.add(
        "If",
        "flag",
        out="two",
        then_branch=inner.graph("yes", {"i": TensorProto.FLOAT}),
        else_branch=other.graph("no", {"o": TensorProto.FLOAT}),
    )
    folded, found = check(net.model(one, two), *FLAGS)
    assert list(found.values()) == [None]
    assert "w" in folded.graph.initializers and len(folded.graph.initializers) == 3


def test_ways_that_would_lead_out_of_a_body() -> None:
    net = flagged()
    v = net.add("Relu", net.bn(net.conv("x", 4, 4, out="c"), 4, out="outer"))
    into = body()  # its input comes from outside, its output goes outside
    into.bn("c", 4, out="i")
    onwards = body(1)
    onwards.bn(onwards.add("Relu", "c"), 4, out="o")
    net.add(
        "If",
        "flag",
        out="y",
        then_branch=into.graph("yes", {"i": TensorProto.FLOAT}),
        else_branch=onwards.graph("no", {"o": TensorProto.FLOAT}),
    )
    folded, found = check(net.model(v, "y"), *FLAGS)
    assert found == {"n_outer": "BN101", "n_i": "BN120", "n_o": "BN103"}
    assert number_of(folded, "BatchNormalization") == 3


def test_an_outer_batch_norm_does_not_go_into_a_body() -> None:
    net = flagged()
    v = net.bn(net.add("Relu", "x"), 4, out="outer")
    inner, other = body(), body(1)
    inner.conv(v, 4, 4, out="i")
    other.conv(v, 4, 4, out="o")
    net.add(
        "If",
        "flag",
        out="y",
        then_branch=inner.graph("yes", {"i": TensorProto.FLOAT}),
        else_branch=other.graph("no", {"o": TensorProto.FLOAT}),
    )
    plan = plan_fold(lift(net.model("y")).graph)
    assert [s.code for s in plan.sites] == ["BN103"] and "BN120" in str(plan.sites[0].reason)


def test_an_outer_fold_whose_result_a_body_reads() -> None:
    net = flagged()
    v = net.bn(net.conv("x", 4, 4), 4, out="normed")
    inner, other = body(), body(1)
    inner.add("Relu", v, out="i")
    other.add("Neg", v, out="o")
    net.add(
        "If",
        "flag",
        out="y",
        then_branch=inner.graph("yes", {"i": TensorProto.FLOAT}),
        else_branch=other.graph("no", {"o": TensorProto.FLOAT}),
    )
    _, found = check(net.model("y"), *FLAGS)
    assert found == {"n_normed": None}


def loop(net: Net, inner: Body, state: str, result: str, *, out: str = "y") -> str:
    inner.add("Identity", "going", out="still")
    kinds = {"i": TensorProto.INT64, "going": TensorProto.BOOL, "s": TensorProto.FLOAT}
    graph = inner.graph("loop", {"still": TensorProto.BOOL, result: TensorProto.FLOAT}, kinds)
    return net.add("Loop", np.array(3), net.param(np.array(True)), state, out=out, body=graph)


def test_a_loop() -> None:
    net = Outer(FREE, 4, 8, 8)
    inner = body()
    inner.bn(inner.conv("s", 4, 4, pads=[1, 1, 1, 1]), 4, out="normed")
    inner.conv(inner.bn(inner.add("Tanh", "normed"), 4, out="ahead"), 4, 4, 1, out="last")
    folded, found = check(net.model(loop(net, inner, "x", "last")))
    assert found == {"n_normed": None, "n_ahead": None}
    assert number_of(folded, "BatchNormalization") == 0


def test_a_batch_norm_on_the_state_of_a_loop() -> None:
    net = Outer(FREE, 4, 8, 8)
    inner = body()
    inner.bn("s", 4, out="normed")
    inner.add("Tanh", "normed", out="t")
    _, found = check(net.model(loop(net, inner, "x", "t")))
    assert found == {"n_normed": "BN120"}


def test_a_batch_norm_behind_the_state_of_a_loop() -> None:
    net = Outer(FREE, 4, 8, 8)
    inner = body()
    inner.conv("s", 4, 4, 1, out="c")
    v = loop(net, inner, "x", "c")
    _, found = check(net.model(net.bn(v, 4, out="after")))
    assert found == {"n_after": "BN116"}


def test_declared_shapes_of_what_a_loop_carries_are_not_believed() -> None:
    net = Outer(FREE, 4, 8, 8)
    inner = body()
    inner.add("Conv", "s", inner.normal(4, 4, 3, 3), out="c", pads=[1, 1, 1, 1])
    inner.add("Reshape", inner.bn(inner.add("Reshape", "c", np.array([-1, 4])), 4), np.array([-1, 4, 8, 8]), out="r")
    proto = net.proto(loop(net, inner, "x", "r"))
    graph = next(a.g for n in proto.graph.node for a in n.attribute if a.name == "body")
    stale = {"s": [1, 4, 1, 1], "c": [1, 4, 1, 1]}
    for name, shape in stale.items():
        info = next((v for v in graph.input if v.name == name), None) or graph.value_info.add()
        info.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    lifted = lift(ir.from_proto(proto))
    sizes = {name: [n for n in lifted.info[name].shape or () if isinstance(n, int)] for name in "sc"}
    assert sizes == {"s": [], "c": [4]}
    assert [site.code for site in plan_fold(lifted.graph).sites] == ["BN116"]


def test_a_scan() -> None:
    net = Outer(FREE, 4, 8, 8)
    inner = body()
    v = inner.bn(inner.conv("s", 4, 4, pads=[1, 1, 1, 1]), 4, out="normed")
    inner.add("Tanh", v, out="state")
    inner.bn(inner.add("MatMul", inner.add("GlobalAveragePool", "e", out="g"), inner.normal(1, 1)), 4, out="each")
    graph = inner.graph(
        "scan", {"state": TensorProto.FLOAT, "each": TensorProto.FLOAT}, dict.fromkeys(("s", "e"), TensorProto.FLOAT)
    )
    stacked = net.add("Concat", *[net.add("Unsqueeze", "x", np.array([0]), out=n) for n in "ab"], axis=0, out="stacked")
    net.ranks = {"y_1": 5}
    net.add("Scan", "x", stacked, out="y", outputs=2, body=graph, num_scan_inputs=1)
    folded, found = check(net.model("y", "y_1"))
    assert found["n_normed"] is None
    assert number_of(folded, "BatchNormalization") == 1  # the features of the MatMul are the last axis


def test_a_body_in_a_body() -> None:
    net = flagged()
    middle = body(5)
    middle.bn(middle.conv("s", 4, 4, pads=[1, 1, 1, 1], out="c"), 4, out="beside")
    deep = {}
    for seed, key in enumerate(("then_branch", "else_branch")):
        inner = body(seed)
        inner.bn(inner.conv("c", 4, 4, pads=[1, 1, 1, 1]), 4, out=f"{key}_bn")
        deep[key] = inner.graph(key, {f"{key}_bn": TensorProto.FLOAT})
    middle.add("If", "flag", out="inner", **deep)
    middle.add("Add", "beside", "inner", out="next")
    _, found = check(net.model(loop(net, middle, "x", "next")), *FLAGS)
    assert found == {"n_beside": "BN101", "n_then_branch_bn": None, "n_else_branch_bn": None}


def test_before_ir_version_4_new_parameters_are_inputs_of_the_main_graph() -> None:
    net = flagged(opset=8, ir_version=3)
    branches = [branch(n, "x", seed, constants=True) for seed, n in enumerate(("yes", "no"))]
    net.add("If", "flag", out="y", then_branch=branches[0], else_branch=branches[1])
    folded, found = check(net.model("y"), *FLAGS)
    assert set(found.values()) == {None}
    assert len(folded.graph.initializers) == 4


def test_nothing_is_inserted_in_a_body() -> None:
    net = flagged()
    net.add("If", "flag", out="y", then_branch=branch("yes", "x", 0), else_branch=branch("no", "x", 1))
    assert {s.obstacle.code for s in plan_insert(lift(net.model("y")).graph) if s.obstacle} == {"BN120"}


def test_a_graph_inside_a_node_of_another_domain_is_not_entered() -> None:
    net = flagged()
    net.add("Search", "x", domain="mine", out="y", body=branch("yes", "x", 0))
    assert [s.code for s in plan_fold(lift(net.model("y")).graph).sites] == ["BN120"]


def _if(then_: onnx.GraphProto, else_: onnx.GraphProto) -> onnx.ModelProto:
    node = helper.make_node("If", ["flag"], ["y"], then_branch=then_, else_branch=else_)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])
    graph = helper.make_graph([node], "g", [x, flag], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _branch(name: str, constant: float) -> onnx.GraphProto:
    """``x + constant``, under names that the other branch has, too."""
    tensor = numpy_helper.from_array(np.full(4, constant, np.float32), "c")
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, ["N", 4])
    return helper.make_graph([helper.make_node("Add", ["x", "c"], ["o"])], name, [], [out], [tensor])


@pytest.mark.parametrize("constants", [(1.0, 2.0), (0.0, 2.0), (0.0, 0.0)])
def test_branches_with_the_same_names_and_affines_that_do_nothing(constants: tuple[float, float]) -> None:
    """A body's output is computed in the body, also where nothing but a value from outside is left of it."""
    from bnctl.commands.rounds import FoldOptions, run_rounds
    from bnctl.data.batches import Batch
    from bnctl.models import Model

    proto = _if(_branch("then", constants[0]), _branch("else", constants[1]))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    given = Batch(kwargs={"x": x, "flag": np.array(True)})
    model = Model("onnx", ir.from_proto(proto), "if.onnx")
    folded = run_rounds(model, given, takes=lambda name: True, options=FoldOptions()).model
    for flag, constant in ((True, constants[0]), (False, constants[1])):
        feeds = {"x": x, "flag": np.array(flag)}
        np.testing.assert_allclose(run(folded.native, feeds, inner=False)["y"], x + constant)
