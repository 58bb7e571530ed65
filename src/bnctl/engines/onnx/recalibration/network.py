"""A model with its statistics as inputs, and how its sites depend on each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from bnctl.engines.onnx.editor import Editor
from bnctl.engines.onnx.recalibration.rewire import rewire
from bnctl.engines.onnx.recalibration.sites import Role, Site
from bnctl.engines.onnx.scopes import captured, named_values, subgraphs


class Network:
    """The model as a sequence of levels.

    A value's level is the largest number of sites on a way from the inputs of the model to it; a site belongs to the level of what it normalises, and
    its output to the next. So all sites of a level can be settled when those of the levels before are.

    Args:
        model: not changed. Initializers that a caller could override are constants here.
        sites: of the main graph.

    Attributes:
        model: a copy in which each site reads its statistics from inputs of the graph.
        inputs: the inputs for the data.
        statistics: the inputs for the statistics of each site.
        depth: number of levels that have a site.
    """

    def __init__(self, model: ir.Model, sites: Sequence[Site]) -> None:
        editor = Editor(model)
        self.model = editor.model
        graph = self.model.graph
        self.inputs = tuple(value for value in graph.inputs if not value.is_initializer())
        self.statistics = {site: _as_inputs(editor, site) for site in sites}
        values = {str(value.name): value for value in named_values(graph)}
        self._x = {site: values[str(site.x.name)] for site in sites}
        self._levels = self._count_levels()
        self._last_read = self._last_reads()
        self.depth = 1 + max((self._levels[x] for x in self._x.values()), default=-1)

    def sites_at(self, level: int) -> tuple[Site, ...]:
        """The sites of a level, in the order in which they were given."""
        return tuple(site for site, x in self._x.items() if self._levels[x] == level)

    def x(self, site: Site) -> ir.Value:
        """What a site normalises."""
        return self._x[site]

    def boundary(self, level: int) -> tuple[ir.Value, ...]:
        """The values of this level and those before that sites of later levels depend on directly; of level -1, the inputs."""
        if level < 0:
            return self.inputs
        return tuple(v for v, last in self._last_read.items() if self._levels[v] <= level < last)

    def wanted(self, level: int) -> tuple[ir.Value, ...]:
        """What a run to this level must show: what its sites normalise, and its boundary."""
        return tuple(dict.fromkeys((*map(self.x, self.sites_at(level)), *self.boundary(level))))

    def _count_levels(self) -> dict[ir.Value, int]:
        """Level of each value that is computed from data; what depends on constants alone has none, unless it is normalised."""
        levels = dict.fromkeys((*self.inputs, *self._x.values()), 0)
        site_of = {value: site for site, values in self.statistics.items() for value in values.values()}
        for node in self.model.graph:
            reads = tuple(_reads(node))
            found = [levels[v] for v in reads if v in levels]
            found += [levels[self._x[site_of[v]]] + 1 for v in reads if v in site_of]
            if found:
                levels.update(dict.fromkeys(node.outputs, max(found)))
        return levels

    def _last_reads(self) -> dict[ir.Value, int]:
        """The last level in which each value is read by something that a site depends on."""
        last: dict[ir.Value, int] = {}
        needed: set[ir.Value] = set(self._x.values())
        for node in reversed(self.model.graph):
            if needed.isdisjoint(node.outputs):
                continue
            level = max(self._levels.get(v, -1) for v in node.outputs)
            for value in _reads(node):
                needed.add(value)
                if value in self._levels:
                    last[value] = max(level, last.get(value, -1))
        return dict(reversed(last.items()))


def _as_inputs(editor: Editor, site: Site) -> dict[Role, ir.Value]:
    new: dict[Role, ir.Value] = {}
    for role, stored in site.stored.items():
        type_ = ir.TensorType(ir.DataType.from_numpy(stored.dtype))
        new[role] = ir.Value(name=editor.fresh(f"{site.name}.{role}"), type=type_, shape=ir.Shape(stored.shape))
        editor.model.graph.inputs.append(new[role])
    rewire(editor, site, new)
    return new


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
        yield from captured(graph)
