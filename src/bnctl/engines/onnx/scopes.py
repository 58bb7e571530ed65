"""What a name means where: graphs inside nodes (the bodies of If, Loop and Scan, at any depth), and domains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

_ENTERED = frozenset({"If", "Loop", "Scan"})
"""Operators that only run their bodies. What a node of another domain does with a graph is not known."""


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs directly inside a node."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def bodies(node: ir.Node) -> tuple[ir.Graph, ...]:
    """The graphs inside a node whose layers can be edited like any others."""
    return tuple(subgraphs(node)) if node.domain == "" and node.op_type in _ENTERED else ()


def within(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and all graphs inside its nodes."""
    yield graph
    for node in graph:
        for inner in subgraphs(node):
            yield from within(inner)


def captured(graph: ir.Graph) -> tuple[ir.Value, ...]:
    """Values of the graphs around it that a graph reads, once each."""
    inner = set(within(graph))
    reads = (v for g in inner for v in (*(v for node in g for v in node.inputs), *g.outputs) if v is not None)
    return tuple(dict.fromkeys(v for v in reads if v.graph not in inner))


def named_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph, those of its subgraphs left out."""
    yield from graph.inputs
    yield from (v for v in graph.initializers.values() if not v.is_graph_input())
    for node in graph:
        yield from node.outputs


def uniquely_named(model: ir.Model) -> ir.Model:
    """The model with a name for each value that no other value has; a structural copy where some had to change.

    Names of the main graph stay. Two branches of an If may use the same name for different values.
    """
    values = [v for graph in within(model.graph) for v in named_values(graph)]
    names = [v.name for v in values if _needs_name(v)]
    if len(set(names)) == len(names) and all(names):
        return model
    clone = model.clone()
    taken: set[str] = {str(v.name) for v in values}
    seen: set[str] = set()
    # a list: initializers are kept by name, and change their places when they are renamed
    for value in [v for graph in within(clone.graph) for v in named_values(graph) if _needs_name(v)]:
        if not value.name or value.name in seen:
            value.name = fresh_name(value.name or "value", taken)
        seen.add(value.name)
    return clone


def _needs_name(value: ir.Value) -> bool:
    return bool(value.name or value.uses() or value.is_graph_output())


def fresh_name(base: str, taken: set[str]) -> str:
    """A name that is not taken, and is from now on."""
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def opsets(imports: Mapping[str, int]) -> dict[str, int]:
    """Versions by domain. The default domain, which a file may spell ``ai.onnx``, is the empty string, as onnx-ir spells it in nodes."""
    return {"" if domain == "ai.onnx" else domain: version for domain, version in imports.items()}
