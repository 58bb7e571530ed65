"""What a user calls a node: the path of its module where the exporter kept that, else the node's own name, else its output's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from bnctl.engines.onnx.scopes import named_values, within

_PARAMETER_SUFFIXES = (".weight", ".running_mean")


def layer_names(nodes: Iterable[ir.Node]) -> dict[ir.Node, str]:
    """A name for each node that no other node could be called by.

    ``layer1.0.bn1`` (from the parameter ``layer1.0.bn1.weight``) comes before ``/layer1/layer1.0/bn1/BatchNormalization``. Of two nodes that share
    a parameter, both are called by what tells them apart.
    """
    candidates = {node: tuple(dict.fromkeys(_candidates(node))) for node in nodes}
    count = Counter(name for names in candidates.values() for name in names)
    return {node: next((n for n in names if count[n] == 1), names[-1]) for node, names in candidates.items()}


def _candidates(node: ir.Node) -> Iterator[str]:
    for value in node.inputs:
        name = str(value.name) if value is not None else ""
        suffix = next((s for s in _PARAMETER_SUFFIXES if name.endswith(s)), None)
        if suffix is not None:
            yield name.removesuffix(suffix)
    if node.name:
        yield node.name
    yield next((str(v.name) for v in node.outputs if v.name), node.op_type)


def value_names(model: ir.Model) -> set[str]:
    """Names of all values, also those inside subgraphs: a new name must not hide one of them."""
    return {str(v.name) for graph in within(model.graph) for v in named_values(graph)}
