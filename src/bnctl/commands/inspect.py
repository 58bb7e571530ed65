"""`bnctl inspect`: every normalisation layer, and every place where one could go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from bnctl.commands.setup import Setup
from bnctl.graph.graph import Graph, Node
from bnctl.graph.ops import Affine
from bnctl.plan.fold import plan_fold
from bnctl.plan.insert import plan_insert
from bnctl.report import Artifact, Report, Site

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model


def inspect_model(model: Model, example: Batch) -> Report:
    """Look at a model without changing it: nothing is applied, so nothing has to be verified."""
    from bnctl.engines import engine_of

    started = time.perf_counter()
    engine = engine_of(model)
    graph = engine.capture(model, example).graph
    fold = plan_fold(graph)
    affine = {node.layer: node for node in graph.nodes if isinstance(node.op, Affine)}
    sites = [
        Site(
            s.name,
            "foldable" if s.action == "folded" else "left",
            s.into,
            s.code,
            s.reason,
            _details(graph, affine.get(s.name)),
        )
        for s in fold.sites
    ]
    places = plan_insert(graph, last_axis=engine.last_axis)
    open_places = [p for p in places if p.obstacle is None]
    rows = [
        {
            "name": p.name,
            "features": p.features,
            "insertable": p.obstacle is None,
            "code": p.obstacle.code if p.obstacle else None,
            "reason": p.obstacle.detail if p.obstacle else None,
        }
        for p in places
    ]
    foldable = sum(s.action == "foldable" for s in sites)
    summary = {
        "found": len(sites),
        "foldable": foldable,
        "left": len(sites) - foldable,
        "linear": len(places),
        "insertable": len(open_places),
    }
    return Report(
        "inspect",
        Artifact(model.word, model.sha256),
        sites=tuple(sites),
        summary=summary,
        details={"places": rows},
        elapsed_s=time.perf_counter() - started,
    )


def run_inspect(word: str, setup: Setup) -> Report:
    """The command."""
    model = setup.open(word)
    return inspect_model(model, setup.example(model, run=False))


def _details(graph: Graph, node: Node | None) -> dict[str, Any]:
    """What feeds a layer, and what its scale and shift look like: ``y = scale * x + shift``."""
    if node is None or not isinstance(node.op, Affine) or not node.op.map.scale.size:
        return {}
    producer = graph.producer.get(node.inputs[0])
    scale, shift = node.op.map.scale, node.op.map.shift
    return {
        "fed_by": None if producer is None else f"{producer.op.label} {producer.layer}",
        "channels": int(max(node.op.map.shape, default=1)),
        "scale_min": float(np.min(scale)),
        "scale_max": float(np.max(scale)),
        "shift_max_abs": float(np.max(np.abs(shift))),
        "negative_scales": int(np.sum(scale < 0)),
        "zero_scales": int(np.sum(scale == 0)),
    }
