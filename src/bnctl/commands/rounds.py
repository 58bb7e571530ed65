"""Folding in rounds: fold, and where it is asked for, merge and fold again until nothing changes. Nothing is verified and nothing written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from bnctl.errors import ModelError, OverflowInFoldError, UsageError
from bnctl.graph.ops import LinearOp
from bnctl.plan.fold import FoldPlan, plan_fold
from bnctl.plan.merge import changed_values
from bnctl.report import Site

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.engines import Engine
    from bnctl.models.model import Model


@dataclass(frozen=True)
class FoldOptions:
    """What fold may do.

    Args:
        merge_branches: let parallel linear operators that are summed become one.
        untie: give a tied weight an array of its own where only one of its layers changes.
        freeze_initializers: take the defaults of an ONNX graph's inputs for constants.
        pad_exact: fold into convolutions behind that pad with zeros, by a further input channel of ones.
    """

    merge_branches: bool = False
    untie: bool = True
    freeze_initializers: bool = False
    pad_exact: bool = False


@dataclass(eq=False)
class Rounds:
    """A model on its way.

    Args:
        model: as it is now.
        sites: what became of each layer, by name.
        preserved: removed layers whose output is still what it was.
        altered: layers whose output is not.
        added_parameters: by untying.
        notes: of the captures.
        changed: whether anything was done.
        nodes: operators before the last merge; every round must leave fewer.
    """

    model: Model
    sites: dict[str, Site] = field(default_factory=dict)
    preserved: set[str] = field(default_factory=set)
    altered: set[str] = field(default_factory=set)
    added_parameters: int = 0
    notes: dict[str, None] = field(default_factory=dict)
    changed: bool = False
    nodes: float = math.inf


def run_rounds(
    model: Model, example: Batch, *, takes: Callable[[str], bool], options: FoldOptions, plan_only: bool = False
) -> Rounds:
    """Do what the options allow to the layers that `takes` names; the model that is given is left alone.

    Args:
        model: to be folded.
        example: inputs.
        takes: says by name which layers may go.
        options: see there.
        plan_only: stop at the first plan. What merging would do is only known once it is done.

    Raises:
        UsageError: an option does not fit the model.
        ModelError: the model cannot be captured.
        OverflowInFoldError: folded weights do not fit their dtype.
    """
    from bnctl.engines import engine_of

    engine = engine_of(model)
    for keep in (False, True):
        state = Rounds(_prepared(model, options))
        _fold(state, engine, example, takes, options, plan_only and not options.merge_branches)
        try:
            while options.merge_branches and _merge(state, engine, example, takes, keep=keep):
                _fold(state, engine, example, takes, options, plan_only=False)
        except ModelError:  # some code asks a merged layer for its type, or its sizes
            if keep or not state.changed:
                raise
        else:
            break
    return state


def _prepared(model: Model, options: FoldOptions) -> Model:
    if not options.freeze_initializers:
        return model
    if model.kind != "onnx":
        raise UsageError(f"--freeze-initializers is for ONNX files, and {model.word} is none", hint="leave it out")
    from bnctl.engines.onnx.freeze import frozen

    return replace(model, native=frozen(model.native))  # type: ignore[arg-type]


def _fold(
    state: Rounds, engine: Engine, example: Batch, takes: Callable[[str], bool], options: FoldOptions, plan_only: bool
) -> None:
    """Every affine that can go, goes."""
    captured = engine.capture(state.model, example)
    takes_ones = partial(engine.takes_ones, captured) if options.pad_exact else lambda node: False
    plan = plan_fold(captured.graph, selected=takes, untie=options.untie, takes_ones=takes_ones)
    state.notes |= dict.fromkeys(captured.notes)
    for site in plan.sites:
        if site.action == "folded" or site.name not in state.sites:
            state.sites[site.name] = Site(site.name, site.action, site.into, site.code, site.reason)
    if plan.removed and not plan_only:
        try:
            state.model, state.changed = engine.fold(captured, plan), True
        except OverflowInFoldError as error:
            raise _naming_sites(error, plan, state.model.word) from error
        state.preserved |= {engine.shown_as(captured, node) for node in plan.preserved}
        state.altered |= engine.shows(captured, plan.meaning)
        state.added_parameters += plan.added_parameters


def _naming_sites(error: OverflowInFoldError, plan: FoldPlan, word: str) -> OverflowInFoldError:
    """The error with the names of what the layer would take in: those are what the user can leave out."""
    names = [site.name for site in plan.sites if site.action == "folded" and error.layer in site.into]
    skip = " ".join(f"--skip {name!r}" for name in names) or "--skip"
    return OverflowInFoldError(
        f"{word}: {', '.join(names) or 'a layer'} cannot be folded into {error.message}",
        layer=error.layer,
        hint=f"leave it out with {skip}, or work in float32 and convert to half precision afterwards",
    )


def _merge(state: Rounds, engine: Engine, example: Batch, takes: Callable[[str], bool], *, keep: bool) -> bool:
    """Every branch that can be merged, is; whether there was one."""
    captured = engine.capture(state.model, example)
    merges = engine.plan_merges(captured, takes)
    if not merges:
        return False
    if len(captured.graph.nodes) >= state.nodes:
        raise RuntimeError(f"merging {', '.join(merges[0].names)} into {merges[0].into.layer} changed nothing")
    state.nodes = len(captured.graph.nodes)
    for merge in merges:
        for node in (term.node for term in merge.terms if term.node is not None):
            action = "merged" if isinstance(node.op, LinearOp) else "folded"
            state.sites[node.layer] = Site(node.layer, action, (merge.into.layer,))
        changed = engine.shows(captured, changed_values(merge, captured.graph))
        state.preserved -= changed
        state.altered |= changed
    state.model, state.changed = engine.merge(captured, merges, keep=keep), True
    return True
