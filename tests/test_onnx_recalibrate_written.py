"""Recalibrating ONNX models in which normalisations are written out in arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bnctl.errors import ModelError
from onnx_recalibration import (
    OVER_POSITIONS,
    Array,
    Reference,
    data,
    recalibrate,
    split,
)
from test_onnx_checks import FREE, Net, run


class Written(Net):
    """A net whose normalisations are written out in some way, or not at all ("node")."""

    def __init__(self, form: str, *shape: int | str, rank: int = 4, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.form, self.rank = form, rank

    def constant(self, array: Array, name: str) -> str:
        """One value per channel, on axis 1."""
        shape = (1,) * (self.rank % 2) + array.shape + (1, 1)
        return self.param(array.reshape(shape), name)

    def norm(self, x: str, channels: int, name: str) -> str:
        gamma, beta, mean, var = (self.initializers.pop(p) for p in self.statistics(channels))
        if self.form == "node":
            arrays = zip(("gamma", "beta", "mean", "var"), (gamma, beta, mean, var), strict=True)
            return self.add("BatchNormalization", x, *(self.param(a, f"{name}.{n}") for n, a in arrays), out=name)
        eps = self.param(np.array(1e-5)) if "p_eps" not in self.initializers else "p_eps"
        g, b, m = (self.constant(a, f"{name}.{n}") for n, a in (("gamma", gamma), ("beta", beta), ("mean", mean)))
        if self.form.startswith("stored"):
            deviation = np.sqrt(var.astype(np.float64) + 1e-5)
            std = self.form != "stored reciprocal"
            spread = "Div" if std else "Mul", self.constant(deviation if std else 1 / deviation, f"{name}.var")
            steps = (("Mul", g), spread) if self.form == "stored deviation, gamma first" else (spread, ("Mul", g))
            return self.then(x, ("Sub", m), *steps, ("Add", b), out=name)
        if self.form == "unsqueezed":  # as torch decomposes it: (x - mean) * (1 / sqrt(var + eps)) * weight + bias
            del self.initializers[f"{name}.mean"]
            v = self.param(var, f"{name}.var")
            m = self.unsqueezed(self.param(mean, f"{name}.mean"))
            inverse = self.unsqueezed(self.add("Reciprocal", self.add("Sqrt", self.add("Add", v, eps))))
            return self.then(x, ("Sub", m), ("Mul", inverse), ("Mul", g), ("Add", b), out=name)
        v = self.constant(var, f"{name}.var")
        if self.form == "power":
            inverse = self.add("Pow", self.add("Add", v, eps), np.array(-0.5))
            return self.then(x, ("Sub", m), ("Mul", inverse), ("Mul", g), ("Add", b), out=name)
        root = self.add("Sqrt", self.add("Add", v, eps))
        match self.form:
            case "divided":
                return self.then(x, ("Sub", m), ("Div", root), ("Mul", g), ("Add", b), out=name)
            case "gamma first":
                return self.then(x, ("Sub", m), ("Mul", g), ("Div", root), ("Add", b), out=name)
            case "one factor":
                return self.then(x, ("Sub", m), ("Mul", self.add("Div", g, root)), ("Add", b), out=name)
            case "negative mean":
                return self.then(x, ("Add", self.add("Neg", m)), ("Div", root), ("Mul", g), ("Add", b), out=name)
            case "scale and shift":  # tf.nn.batch_normalization: x * inv + (beta - mean * inv)
                inverse = self.add("Mul", self.add("Reciprocal", root), g)
                shift = self.add("Sub", b, self.add("Mul", m, inverse))
                return self.add("Add", shift, self.add("Mul", inverse, x), out=name)
        raise AssertionError(self.form)

    def unsqueezed(self, x: str) -> str:
        if self.opset < 13:
            return self.add("Unsqueeze", x, axes=[1, 2])
        return self.add("Unsqueeze", x, np.array([1, 2]))

    def then(self, x: str, *steps: tuple[str, str], out: str) -> str:
        for op, constant in steps[:-1]:
            x = self.add(op, x, constant)
        return self.add(steps[-1][0], x, steps[-1][1], out=out)


FORMS = [
    *("divided", "gamma first", "one factor", "power", "negative mean", "scale and shift", "unsqueezed"),
    *("stored deviation", "stored deviation, gamma first"),
]


def written(form: str, **options: Any) -> Written:
    net = Written(form, FREE, 3, 8, 8, **options)
    v = net.add("Relu", net.norm(net.conv("x", 3, 4), 4, "a"))
    w = net.add("Add", v, net.norm(net.conv(v, 4, 4, pads=[1, 1, 1, 1]), 4, "b"))
    net.norm(net.conv(net.add("Relu", w), 4, 5), 5, "y")
    return net


def output_of(model: ir.Model, x: Array) -> Array:
    return run(model, {"x": x}, inner=False)["y"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("opset", "rank", "memory_bytes"), [(17, 4, None), (9, 5, None), (17, 5, 0)])
def test_written_out(form: str, opset: int, rank: int, memory_bytes: int | None) -> None:
    x = data(7, 3, 8, 8)
    as_node = written("node").model("y")
    expected, expected_sites, _ = recalibrate(as_node, split(x, 4, 3))
    net = written(form, opset=opset, rank=rank)
    model = net.model("y")
    np.testing.assert_allclose(output_of(model, x), output_of(as_node, x), rtol=1e-3, atol=1e-4)
    new, sites, _ = recalibrate(model, split(x, 4, 3), memory_bytes=memory_bytes)
    onnx.checker.check_model(ir.to_proto(new), full_check=True)
    assert [s.action for s in sites] == ["recalibrated"] * 3
    np.testing.assert_allclose(output_of(new, x), output_of(expected, x), rtol=1e-3, atol=1e-4)
    assert np.abs(output_of(new, x) - output_of(model, x)).max() > 0.5, "the control: it is not the old output"
    assert {s.code for s in sites} == {"BN309" if form.startswith("stored") else None}
    for site, other in zip(sites, expected_sites, strict=True):
        assert site.drift.max == pytest.approx(other.drift.max, rel=1e-3)
        assert site.self_consistency < 1e-6 and site.count == other.count
    assert sorted(n.op_type for n in new.graph) == sorted(n.op_type for n in model.graph)
    assert new.graph.initializers.keys() == model.graph.initializers.keys()


def test_a_stored_reciprocal_is_a_factor_like_gamma() -> None:
    """Nothing tells which is which: to guess would be silently wrong where an exporter has them the other way round."""
    with pytest.raises(ModelError, match="BN307"):
        recalibrate(written("stored reciprocal").model("y"), split(data(7, 3, 8, 8), 4, 3))


@pytest.mark.parametrize("form", FORMS)
def test_written_out_in_half_precision(form: str) -> None:
    x = data(7, 3, 8, 8)
    new, sites, _ = recalibrate(written(form, dtype=np.float16).model("y"), split(x, 4, 3))
    assert [s.action for s in sites] == ["recalibrated"] * 3
    arrays = {name: v.const_value.numpy().reshape(-1) for name, v in new.graph.initializers.items()}
    assert {arrays[f"a.{n}"].dtype for n in ("mean", "var")} == {np.dtype(np.float16)}
    mean, _ = Reference(written("node").proto("y")).exact(x)["a"]
    np.testing.assert_allclose(arrays["a.mean"], mean, rtol=1e-2, atol=1e-2)
    assert max(s.self_consistency for s in sites) < 1e-2


def test_written_out_statistics_are_stored_in_their_form() -> None:
    x = data(7, 3, 8, 8)
    truth = Reference(written("node").proto("y")).exact(x)
    for form in FORMS:
        new, _, _ = recalibrate(written(form).model("y"), split(x, 4, 3))
        arrays = {name: v.const_value.numpy().reshape(-1) for name, v in new.graph.initializers.items()}
        for name, (mean, var) in truth.items():
            deviation = np.sqrt(var + 1e-5)
            spread = deviation if form.startswith("stored") else var
            np.testing.assert_allclose(arrays[f"{name}.mean"], mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(arrays[f"{name}.var"], spread, rtol=1e-4, atol=1e-6)


def test_along_the_last_axis() -> None:
    """As Keras writes it for dense layers and channels-last images."""
    net = Net(FREE, 5, 3)
    gamma, beta, mean, var = (net.param(a) for a in (net.normal(4), net.normal(4), net.normal(4), np.ones(4)))
    v = net.add("Sub", net.add("MatMul", "x", net.normal(3, 4)), mean)
    v = net.add("Div", v, net.add("Sqrt", net.add("Add", var, np.array(1e-3))))
    net.add("Add", net.add("Mul", v, gamma), beta, out="y")
    x = data(6, 5, 3)
    new, sites, _ = recalibrate(net.model("y"), split(x, 4, 2))
    seen = x.astype(np.float64) @ net.initializers["p4"].astype(np.float64)
    arrays = {name: v.const_value.numpy() for name, v in new.graph.initializers.items()}
    np.testing.assert_allclose(arrays[mean], seen.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(arrays[var], seen.var((0, 1)), rtol=1e-5)
    assert (sites[0].channels, sites[0].count) == (4, 30)


def test_chains_that_share_constants_get_their_own() -> None:
    """A layer that is called twice: both calls read the same constants, and what is computed from them, and a third reader keeps the old ones."""
    net = Written("divided", FREE, 4, 6, 6)
    gamma, beta, mean, var = (
        net.constant(a, f"c{i}") for i, a in enumerate((*(net.normal(4) for _ in range(3)), np.ones(4)))
    )
    root = net.add("Sqrt", net.add("Add", var, np.array(1e-5)), out="root")
    steps = (("Sub", mean), ("Div", root), ("Mul", gamma), ("Add", beta))
    v = net.then(net.then("x", *steps, out="a"), *steps, out="b")
    net.add("Add", net.add("Relu", v), root, out="y")
    x = data(6, 4, 6, 6)
    model = net.model("y")
    new, sites, _ = recalibrate(model, split(x, 4, 2))
    assert [s.action for s in sites] == ["recalibrated"] * 2
    inner = run(new, {"x": x})
    for name in ("a", "b"):
        y = inner[name].astype(np.float64)
        np.testing.assert_allclose(y.mean(OVER_POSITIONS), net.initializers["c1"].reshape(-1), atol=1e-5)
        np.testing.assert_allclose(y.std(OVER_POSITIONS), np.abs(net.initializers["c0"].reshape(-1)), rtol=1e-3)
    assert np.array_equal(inner["root"], run(model, {"x": x})["root"])
    some, _, _ = recalibrate(model, split(x, 4, 2), where=sites[0].name)
    assert [n.op_type for n in some.graph].count("Sqrt") == 2
    onnx.checker.check_model(ir.to_proto(some), full_check=True)


def not_a_norm(what: str) -> tuple[Net, str | None]:
    """Arithmetic with constants that is none, or of which it cannot be told, behind a BN and a ReLU; and the code it is left with."""
    net = Net(FREE, 4, 4, 4)
    v = net.add("Relu", net.bn("x", 4, out="a"))
    column, row = (net.param(net.rng.uniform(0.5, 2, shape)) for shape in ((4, 1, 1), (4,)))
    column2, column3, sample = (
        net.param(net.rng.uniform(0.5, 2, shape)) for shape in ((4, 1, 1), (4, 1, 1), (1, 4, 4))
    )
    eps = net.param(np.array(1e-5))

    def root(value: str) -> str:
        return net.add("Sqrt", net.add("Add", value, eps))

    def chain(*steps: tuple[str, str]) -> None:
        x = v
        for number, (op, constant) in enumerate(steps, start=1):
            x = net.add(op, x, constant, out="y" if number == len(steps) else None)

    match what:
        case "stored deviation along another axis":
            chain(("Sub", column), ("Div", row), ("Mul", column2), ("Add", column3))
            return net, "BN307"
        case "variance along another axis":
            chain(("Sub", column), ("Div", root(row)))
            return net, "BN307"
        case "statistics per position":
            chain(("Sub", sample), ("Div", root(sample)))
        case "twice the mean":
            chain(("Sub", net.add("Mul", column, np.array(2.0))), ("Div", root(column2)))
            return net, "BN307"
        case "a fourth root":
            chain(("Sub", column), ("Div", net.add("Sqrt", root(column2))))
            return net, "BN307"
        case "mean added":
            chain(("Add", column), ("Div", root(column2)))
            return net, "BN307"
        case "mean subtracted behind the factor":
            chain(("Div", root(column2)), ("Sub", column))
            return net, "BN307"
        case "a negative deviation":
            negative = net.param(-np.ones((4, 1, 1)))
            chain(("Sub", column), ("Mul", negative), ("Mul", column2), ("Add", column3))
            return net, "BN307"
        case "scale and shift":
            chain(("Mul", column), ("Add", column2))
            return net, "BN307"
        case "three constants":
            chain(("Sub", column), ("Div", column2), ("Add", column3))
            return net, "BN307"
        case "another reader between":
            centred = net.add("Sub", v, column, out="between")
            net.add("Add", net.add("Div", centred, root(column2)), centred, out="y")
        case "a term alone":
            chain(("Add", column))
        case "scalars":
            chain(("Sub", net.param(np.array(0.5))), ("Div", root(net.param(np.array(2.0)))))
        case "the affine of another norm":
            net.add(
                "Add",
                net.add("Mul", net.add("InstanceNormalization", v, net.normal(4), net.normal(4)), column),
                column2,
                out="y",
            )
    return net, None


@pytest.mark.parametrize(
    "what",
    [
        "stored deviation along another axis",
        "variance along another axis",
        "statistics per position",
        "twice the mean",
        "a fourth root",
        "mean added",
        "mean subtracted behind the factor",
        "a negative deviation",
        "scale and shift",
        "three constants",
        "another reader between",
        "a term alone",
        "scalars",
        "the affine of another norm",
    ],
)
def test_arithmetic_that_is_no_norm_is_left(what: str) -> None:
    net, code = not_a_norm(what)
    model = net.model("y")
    new, sites, _ = recalibrate(model, split(data(6, 4, 4, 4), 4, 2))
    assert [s.code for s in sites] == [None] + [code] * (code is not None)
    stays = model.graph.initializers.keys() - set(net.nodes[0].input[3:])
    assert all(new.graph.initializers[n].const_value is model.graph.initializers[n].const_value for n in stays)


def test_preprocessing_is_no_norm() -> None:
    net = Net(FREE, 3, 8, 8)
    v = net.add("Div", net.add("Sub", "x", net.normal(3, 1, 1)), net.rng.uniform(0.5, 2, (3, 1, 1)))
    net.bn(net.conv(v, 3, 4), 4, out="y")
    _, sites, _ = recalibrate(net.model("y"), split(data(6, 3, 8, 8), 6))
    assert [s.name for s in sites] == ["n_y"]
