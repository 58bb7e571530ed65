"""BatchNormalization that an exporter wrote out as arithmetic with constants, found where its statistics can be told from gamma and beta.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

Two ways to tell. Where the root is in the graph, the constants below it say what eps and the variance are; and a constant is the mean if, with
``y = scale * x + shift``, neither ``gamma = scale * sqrt(var + eps)`` nor ``beta = shift + scale * mean`` depends on it or on the variance. That is the
definition, and it is tried on random numbers: the order of operators, and what is computed ahead of x, do not matter.

Where only ``sqrt(var + eps)`` is stored, it is the one that divides: the mean is subtracted, gamma multiplies, and beta is added. All four must be there:
less is what any input is scaled with. A stored reciprocal is a factor like gamma, and nothing tells which of the two is which: that is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from bnctl.engines.onnx.lift import Lifted
from bnctl.engines.onnx.recalibration.sites import Form, Operand, Role
from bnctl.engines.onnx.recalibration.trial import Trial
from bnctl.engines.onnx.tensors import stored_tensor
from bnctl.engines.onnx.translated import Place
from bnctl.errors import ModelError

_LINKS = frozenset({"Add", "Sub", "Mul", "Div"})
_FACTORS = frozenset({"Mul", "Div"})
_LONGEST = 4
_ROOTS = frozenset({"Sqrt", "Pow"})
_OF_OTHER_NORMS = frozenset({"BatchNormalization", "Div", "InstanceNormalization", "LayerNormalization", "Mul"})
"""Operators behind which scale and shift are the affine part of a normalisation that is seen."""

_ASSUMED_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class Chain:
    """A BatchNormalization in several nodes.

    Args:
        nodes: those between x and y, in order; the last may have any number of readers.
        x: what is normalised.
        axis: of the channels.
        mean: the constant that is the mean.
        var: the constant that is the variance, or holds it in another form.
        form: which.
        eps: added to the variance. Where it is part of what is stored, 1e-5, or the smallest variance if that is smaller.
        operands: where the two are read.
    """

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    axis: int
    mean: ir.Value
    var: ir.Value
    form: Form
    eps: float
    operands: tuple[Operand, ...]


@dataclass(frozen=True, eq=False)
class _Link:
    """Arithmetic with a constant."""

    node: ir.Node
    constant: int
    """Index of the input that is constant."""

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[1 - self.constant]
        assert value is not None
        return value

    @property
    def place(self) -> Place:
        return Place(self.node, self.constant)

    @property
    def operand(self) -> ir.Value:
        value = self.node.inputs[self.constant]
        assert value is not None
        return value


def find_chains(lifted: Lifted) -> tuple[dict[ir.Node, Chain], dict[ir.Node, str]]:
    """The chains of the main graph by their first node; and affines that may be BatchNormalization too, but whose statistics cannot be told, with what
    they are."""
    finder = _Finder(lifted)
    chains: dict[ir.Node, Chain] = {}
    used: set[ir.Node] = set()
    for node in lifted.model.graph:
        chain = None if node in used else finder.chain_from(node)
        if chain is not None:
            chains[node] = chain
            used.update(chain.nodes)
    merged: dict[ir.Node, str] = {}
    for node in lifted.model.graph:
        run = [] if node in used else finder.run_from(node)
        if run and finder.is_merged(run) and not any(link.node in used for link in run):
            merged[node] = " and ".join(link.node.op_type for link in run)
            used.update(link.node for link in run)
    return chains, merged


class _Finder:
    def __init__(self, lifted: Lifted) -> None:
        self._model = lifted.model
        self._constants = lifted.constants
        self._info = lifted.info

    def chain_from(self, node: ir.Node) -> Chain | None:
        run = self.run_from(node)
        tried = (self._by_definition(run[:end]) for end in range(2, len(run) + 1))
        found = next((chain for chain in tried if chain is not None), None)
        return self._by_order(run) if found is None and len(run) == _LONGEST else found

    def run_from(self, node: ir.Node) -> list[_Link]:
        """A node and those behind it, each the only reader of the one before; at most as many as a chain has."""
        run: list[_Link] = []
        link = self._link(node)
        while link is not None and len(run) < _LONGEST and (not run or link.x is run[-1].node.outputs[0]):
            run.append(link)
            output = link.node.outputs[0]
            uses = tuple(output.uses())
            if len(uses) != 1 or output.is_graph_output():
                break
            link = self._link(uses[0].node)
        return run

    def is_merged(self, run: list[_Link]) -> bool:
        """A factor and a term per channel, on something that is neither normalised already nor an input of the model."""
        producer = run[0].x.producer()
        if producer is None or producer.op_type in _OF_OTHER_NORMS:
            return False
        kinds = {link.node.op_type in _FACTORS for link in run if self._axis(link) is not None}
        return kinds == {True, False}

    def _link(self, node: ir.Node) -> _Link | None:
        if node.op_type not in _LINKS or node.domain != "" or node.graph is not self._model.graph:
            return None
        constant = [value in self._constants for value in node.inputs]
        if sum(constant) != 1 or None in node.inputs:
            return None
        link = _Link(node, constant.index(True))
        first = link.constant == 0 and node.op_type in {"Sub", "Div"}
        return None if first or not self._is_floating(link.operand) else link

    def _by_definition(self, run: list[_Link]) -> Chain | None:
        x, y = run[0].x, run[-1].node.outputs[0]
        rank = self._rank(x)
        leaves, roots = self._below(link.operand for link in run)
        arrays = {leaf: self._constants.array(leaf) for leaf in leaves if self._is_vector(leaf)}
        vectors = {leaf: array for leaf, array in arrays.items() if array is not None}
        if rank is None or not roots or len(vectors) < 2:
            return None
        points = np.arange(2, dtype=np.dtype(self._info[str(x.name)].dtype)).reshape(2, *[1] * (rank - 1))
        try:
            trial = Trial(self._model, x, points, vectors, y, roots)
        except ModelError:  # half precision, for example
            return None
        for root, var in product(roots, vectors):
            eps = trial.eps(root, var)
            found = None if eps is None else trial.mean(var, eps)
            if eps is not None and found is not None:
                mean, axis = found
                roles: dict[ir.Value, Role] = {mean: "mean", var: "var"}
                # an operand without these below it is rewired to itself
                operands = tuple(Operand(link.place, roles) for link in run)
                return Chain(tuple(link.node for link in run), x, axis, mean, var, "variance", eps, operands)
        return None

    def _by_order(self, run: list[_Link]) -> Chain | None:
        ops = [link.node.op_type for link in run]
        axes = {self._axis(link) for link in run}
        if ops[0] != "Sub" or ops[3] != "Add" or sorted(ops[1:3]) != ["Div", "Mul"]:
            return None
        axis = axes.pop()
        if axis is None or axes:
            return None
        spread = run[2] if ops[2] == "Div" else run[1]
        mean, var = self._leaf(run[0]), self._leaf(spread)
        array = np.asarray(self._constants.array(var), np.float64)
        if mean is None or var is None or not np.all(array > 0):
            return None
        eps = min(_ASSUMED_EPS, float(np.square(array).min()))
        operands = (Operand(run[0].place, {mean: "mean"}), Operand(spread.place, {var: "var"}))
        return Chain(tuple(link.node for link in run), run[0].x, axis, mean, var, "deviation", eps, operands)

    def _below(self, values: Iterable[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        """The constants that some are computed from, and what roots are taken of on the way."""
        leaves: dict[ir.Value, None] = {}
        roots: dict[ir.Value, None] = {}
        todo = list(values)
        for value in todo:  # which grows
            node = value.producer()
            if node is None or stored_tensor(value) is not None or node.op_type == "ConstantOfShape":
                leaves[value] = None
                continue
            first = node.inputs[0]
            if node.op_type in _ROOTS and first is not None:
                roots[first] = None
            todo += [v for v in node.inputs if v is not None and v not in todo]
        return [leaf for leaf in leaves if self._is_floating(leaf)], list(roots)

    def _leaf(self, link: _Link) -> ir.Value | None:
        """The one constant of which the operand is another shape."""
        leaves, _ = self._below([link.operand])
        vectors = [leaf for leaf in leaves if self._is_vector(leaf)]
        if len(vectors) != 1:
            return None
        one, two = self._constants.array(vectors[0]), self._constants.array(link.operand)
        same = one is not None and two is not None and np.array_equal(one.reshape(-1), two.reshape(-1))
        return vectors[0] if same else None

    def _is_floating(self, value: ir.Value) -> bool:
        return self._info[str(value.name)].floating if str(value.name) in self._info else False

    def _is_vector(self, value: ir.Value) -> bool:
        shape = self._constants.tensor_shape(value)
        return shape is not None and sum(size > 1 for size in shape) == 1

    def _rank(self, value: ir.Value) -> int | None:
        info = self._info.get(str(value.name))
        return None if info is None or info.shape is None else len(info.shape)

    def _axis(self, link: _Link) -> int | None:
        """The axis of x, not the first, along which the operand varies; None where that is not one."""
        rank, shape = self._rank(link.x), self._constants.tensor_shape(link.operand)
        if rank is None or shape is None or len(shape) > rank:
            return None
        axes = [axis for axis, size in enumerate(shape, start=rank - len(shape)) if size > 1]
        return axes[0] if len(axes) == 1 and axes[0] > 0 else None
