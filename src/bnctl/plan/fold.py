"""The planner of `fold`: every affine is moved back to its producers, or else forward to its consumers, until linear operators absorb it.

The plan holds no weights; engines read and write those (:func:`bnctl.numerics.absorb`). The search itself is in :mod:`bnctl.plan.draft`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bnctl.codes import Obstacle
from bnctl.graph.graph import Graph, Node, Slot
from bnctl.graph.ops import Affine, Norm
from bnctl.plan.draft import Draft, Edit


@dataclass(frozen=True)
class Site:
    """What becomes of one affine layer. ``code`` and ``reason`` say why it is left."""

    name: str
    action: str
    into: tuple[str, ...] = ()
    code: str | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """What to do, where, and why not.

    Args:
        sites: one entry per normalisation layer, and per plain channel affine that is folded.
        edits: one per place that stores a weight, however often it is called.
        removed: affine nodes that become the identity.
        untied: slots that shared an array with others, and get one of their own.
        shared: slots whose new array is that of another slot, by key.
        meaning: the values that the surgery changes. Each is now equal to the old value of the number given here (the output of a removed affine), or to
            none of the old ones: None. An engine whose values have names keeps equal names for equal values.
    """

    sites: tuple[Site, ...]
    edits: tuple[Edit, ...]
    removed: tuple[Node, ...]
    untied: tuple[Slot, ...] = ()
    shared: dict[str, str] = field(default_factory=dict)
    meaning: dict[int, int | None] = field(default_factory=dict)

    @property
    def preserved(self) -> tuple[Node, ...]:
        """Removed affines whose output is still there afterwards, made by what comes before them."""
        kept = set(self.meaning.values())
        return tuple(node for node in self.removed if node.outputs[0] in kept)

    @property
    def added_parameters(self) -> int:
        """Parameters that untying adds, and input channels of ones."""
        ones = (edit.weight for edit in self.edits if edit.takes_ones)
        return sum(slot.size for slot in self.untied) + sum(w.size // (w.shape or (0, 1))[1] for w in ones)


def plan_fold(
    graph: Graph,
    *,
    selected: Callable[[str], bool] = lambda name: True,
    untie: bool = True,
    takes_ones: Callable[[Node], bool] = lambda node: False,
) -> FoldPlan:
    """Plan which affines of a graph are folded where.

    Args:
        graph: the model.
        selected: says by name which layers may be folded.
        untie: whether a parameter that is tied to another may get an array of its own.
        takes_ones: whether a padded convolution may get a further input channel of ones.
    """
    draft = Draft(graph, untie, takes_ones)
    sites = _sites(graph)
    into: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, Obstacle] = {}
    open_sites = [name for name in sites if selected(name)]
    # Folding one site can open the way for another; nothing is tried again once a round changes nothing.
    while open_sites:
        left = []
        for name in open_sites:
            result = draft.fold(sites[name])
            if isinstance(result, Obstacle):
                reasons[name] = result
                left.append(name)
            else:
                into[name] = result
        if len(left) == len(open_sites):
            break
        open_sites = left
    untied, shared = draft.ties()
    return FoldPlan(
        sites=tuple(
            _report(name, sites[name], into, reasons)
            for name in sites
            if into.get(name) or any(map(_is_norm, sites[name]))
        ),
        edits=tuple(draft.edits()),
        removed=tuple(node for name in into for node in sites[name]),
        untied=tuple(untied),
        shared=shared,
        meaning={value: old for value, old in draft.meaning.items() if value not in draft.alias and value != old},
    )


def _sites(graph: Graph) -> dict[str, list[Node]]:
    """Affine and BatchNorm layers, all calls of each, in order of execution.

    A factor that is the same for all channels is no site: it costs nothing that folding could save. What changes nothing (``x + 0``) is one.
    """
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if _is_norm(node) or (
            isinstance(node.op, Affine) and (max(node.op.map.shape, default=1) > 1 or node.op.map.identity)
        ):
            found.setdefault(node.layer, []).append(node)
    return found


def _is_norm(node: Node) -> bool:
    return (isinstance(node.op, Affine) and node.op.norm) or (
        isinstance(node.op, Norm) and node.op.obstacle is not None
    )


def _report(name: str, nodes: list[Node], into: dict[str, tuple[str, ...]], reasons: dict[str, Obstacle]) -> Site:
    if name in into:
        return Site(name, "folded", into[name])
    reason = reasons.get(name, Obstacle("BN204", "not selected"))
    return Site(name, "left", (), reason.code, reason.detail)
