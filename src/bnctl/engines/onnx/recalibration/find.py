"""The sites of an ONNX model, and why some layers are left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.codes import Obstacle
from bnctl.engines.onnx.lift import Lifted
from bnctl.engines.onnx.recalibration.chains import Chain, find_chains
from bnctl.engines.onnx.recalibration.sites import Operand, Role, Site, Stored, decode
from bnctl.engines.onnx.statistics import EPSILON
from bnctl.engines.onnx.translated import Place, flag
from bnctl.recalibration.statistics import NO_STATISTICS, NOT_IN_STATE

MERGED = "BN307"
OUT_OF_REACH = "BN308"
EPS_ASSUMED = "BN309"

MOMENTUM = 0.9
"""The operator's default: the weight of the old statistics, where torch's momentum is that of the new."""


def find_sites(lifted: Lifted) -> dict[str, Site | Obstacle]:
    """Every normalisation with stored statistics by name, in the order of the graph; with the reason where they cannot be replaced."""
    chains, merged = find_chains(lifted)
    found: dict[str, Site | Obstacle] = {}
    for node in lifted.graph.nodes:
        for native in lifted.natives[node.id]:
            if native.op_type == "BatchNormalization" and native.domain == "":
                found[node.layer] = _obstacle(native, lifted) or _batch_norm(node.layer, native, lifted)
            elif native in chains:
                found[node.layer] = _site(node.layer, chains[native], 1 - MOMENTUM, lifted)
            elif native in merged:
                found[node.layer] = Obstacle(MERGED, merged[native])
    return found


def _obstacle(node: ir.Node, lifted: Lifted) -> Obstacle | None:
    if node.graph is not lifted.model.graph:
        return Obstacle(OUT_OF_REACH, "it is in a graph inside a node, or in a local function that cannot be inlined")
    if flag(node, "training_mode") or any(v.name for v in node.outputs[1:]):  # the second before opset 14
        return Obstacle(NO_STATISTICS, "it is in training mode")
    if not flag(node, "spatial", default=True):
        return Obstacle(OUT_OF_REACH, "its statistics vary over positions (spatial=0)")
    if node.inputs[0] in lifted.constants:
        return Obstacle(OUT_OF_REACH, "what it normalises is a constant")
    for value in node.inputs[3:5]:
        if value is None or lifted.constants.array(value) is None:
            known = None if value is None else lifted.constants.obstacle(value)
            return Obstacle(NOT_IN_STATE, "its statistics cannot be evaluated" if known is None else known.detail)
    return None


def _batch_norm(name: str, node: ir.Node, lifted: Lifted) -> Site:
    x, mean, var = node.inputs[0], node.inputs[3], node.inputs[4]
    assert x is not None and mean is not None and var is not None
    eps = float(np.float32(node.attributes.get_float("epsilon", EPSILON)))
    operands = (Operand(Place(node, 3), {mean: "mean"}), Operand(Place(node, 4), {var: "var"}))
    kept = float(node.attributes.get_float("momentum", MOMENTUM))
    return _site(name, Chain((node,), x, 1, mean, var, "variance", eps, operands), 1 - kept, lifted)


def _site(name: str, chain: Chain, momentum: float, lifted: Lifted) -> Site:
    stored: dict[Role, Stored] = {}
    arrays: list[NDArray[Any]] = []
    roles: tuple[tuple[Role, ir.Value], ...] = (("mean", chain.mean), ("var", chain.var))
    for role, value in roles:
        array = lifted.constants.array(value)
        assert array is not None
        stored[role] = Stored(str(value.name), array.shape, array.dtype)
        arrays.append(array)
    before = decode(arrays[0], arrays[1], chain.form, chain.eps)
    return Site(name, chain.x, chain.axis, chain.eps, momentum, stored, chain.form, chain.operands, before)
