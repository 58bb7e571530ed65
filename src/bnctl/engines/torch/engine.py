"""The torch engine: capture by execution, surgery on a copy of the user's own module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnctl.data.resize import other_choices, other_shapes, other_values, resized
from bnctl.engines import Captured
from bnctl.engines.torch.calibrate import output_moments
from bnctl.engines.torch.copies import workable
from bnctl.engines.torch.edits import apply_edits
from bnctl.engines.torch.layers import inserted_norm
from bnctl.engines.torch.lift import Lifted, lift
from bnctl.engines.torch.merge import apply_merges, is_stock, limits
from bnctl.engines.torch.numbers import Others, reads_of_values, settle
from bnctl.engines.torch.record import Trace, record
from bnctl.engines.torch.state import keeping_state, snapshot
from bnctl.engines.torch.surgery import apply_fold
from bnctl.errors import ModelError
from bnctl.graph.graph import Node
from bnctl.numerics.batchnorm import identity_parameters
from bnctl.plan.fold import FoldPlan
from bnctl.plan.insert import InsertSite
from bnctl.plan.merge import Merge, plan_merge
from bnctl.runtime.tensors import as_tensors

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.numerics.moments import Moments


@dataclass(frozen=True, eq=False)
class _Native:
    """A copy of the module to work on, its lifted graph, and the mode in which each submodule came."""

    module: nn.Module
    lifted: Lifted
    modes: Mapping[str, bool]


class TorchEngine:
    """See :class:`bnctl.engines.Engine`."""

    last_axis = True

    def capture(self, model: Model, batch: Batch) -> Captured:
        """Run a copy of the module once on the batch and lift what happened.

        A model in training mode is put in eval mode; in a model in eval mode, a layer that was left in training mode stays so, and is refused as a site.

        Raises:
            ModelError: the model cannot be copied, or fails on the batch.
        """
        given: Any = model.native
        if any(is_lazy(t) for t in (*given.parameters(), *given.buffers())):
            raise ModelError(
                f"{model.word} has parameters that are not initialised yet", hint="run the model once on real inputs"
            )
        module = workable(given, model.word)
        modes = {name: part.training for name, part in module.named_modules()}
        if module.training:
            module.eval()
        args, kwargs = as_tensors(batch, module)
        with keeping_state(module), torch.random.fork_rng(devices=[]):
            try:
                trace = record(module, args, kwargs)
            except Exception as error:
                raise ModelError(
                    f"{model.word} fails on the example input: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                    hint="give the shapes that the model takes with --input, or real data with --data (and without --input, which comes first)",
                ) from error
        if trace.overwritten:  # buffers are put back after each pass; copies of all parameters would be too dear
            raise ModelError(
                f"the forward of {model.word} writes into its parameter {trace.overwritten[0]}: it could not be left as it was",
                hint="register as a buffer what the forward counts or averages",
            )
        others = cache(lambda: _other_passes(module, batch))
        settle(trace, others)
        lifted = lift(trace, others)
        return Captured(model, lifted.graph, _Native(module, lifted, modes), tuple(_notes(trace)))

    def fold(self, captured: Captured, plan: FoldPlan) -> Model:
        """Fold on the copy that was captured; call it once."""
        native: _Native = captured.native
        edits = apply_fold(native.module, native.lifted, plan)
        _restore_mode(native.module, native.modes)
        return _edited(captured.model, native.module, edits)

    def takes_ones(self, captured: Captured, node: Node) -> bool:
        """One of torch's own convolutions."""
        return is_stock(captured.native.module, node)

    def plan_merges(self, captured: Captured, selected: Callable[[str], bool]) -> tuple[Merge, ...]:
        """Within what can be done to a module tree."""
        native: _Native = captured.native
        return plan_merge(captured.graph, limits=limits(native.module, native.lifted), selected=selected)

    def merge(self, captured: Captured, merges: tuple[Merge, ...], *, keep: bool = False) -> Model:
        """Merge on the copy that was captured; call it once."""
        native: _Native = captured.native
        edits = apply_merges(native.module, native.lifted, merges, keep=keep)
        _restore_mode(native.module, native.modes)
        return _edited(captured.model, native.module, edits)

    def shows(self, captured: Captured, values: Collection[int]) -> set[str]:
        """Paths of the modules that return them."""
        shown = captured.native.lifted.shown
        return {path for value in values for path in shown.get(value, ())}

    def shown_as(self, captured: Captured, node: Node) -> str:
        """The module's path."""
        return node.layer

    def calibrate(
        self, captured: Captured, sites: Sequence[InsertSite], batches: Iterable[Batch]
    ) -> Mapping[str, Moments]:
        """Moments of the outputs of layers, all calls of a layer together."""
        module: nn.Module = captured.native.module
        with keeping_state(module):
            return output_moments(module, {site.name: _channel_axis(site) for site in sites}, batches)

    def insert(
        self, captured: Captured, sites: Sequence[InsertSite], moments: Mapping[str, Moments], eps: float
    ) -> Model:
        """Hang an identity BatchNorm below each layer; names of all other parameters stay."""
        module: nn.Module = captured.native.module
        edits = [
            {"edit": "insert", "module": s.name, "norm": _norm_name(s), "features": s.features, "eps": eps}
            for s in sites
        ]
        apply_edits(module, edits)
        for site in sites:
            norm = inserted_norm(module.get_submodule(site.name))
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
            _make_identity(norm, moments[site.name])
        _restore_mode(module, captured.native.modes)
        return _edited(captured.model, module, edits)


def _other_passes(module: nn.Module, batch: Batch) -> Others:
    """Records on small batches of other sizes and values, as far as the model takes them."""
    small = resized(batch, 1 if batch.size > 1 else 2) if batch.size else batch
    restore = snapshot(module)

    def passes(batches: Iterable[Batch]) -> Iterator[Trace]:
        for other in batches:
            try:
                with torch.random.fork_rng(devices=[]):
                    trace = record(module, *as_tensors(next(other_values(other)), module), methods=True)
            except Exception:  # made for one size
                continue
            finally:
                restore()
            yield trace

    shaped = tuple(trace for ways in other_shapes(small) for trace in islice(passes(ways), 1))
    chosen = [tuple(passes(ways)) for ways in other_choices(small, arrays=False)]
    traces = (*shaped, *(trace for choice in chosen for trace in choice))
    return Others(traces or tuple(passes([small])), bool(shaped) and all(chosen))


def _notes(trace: Trace) -> Iterator[str]:
    """Says so where Python looked at values: other inputs may take another path than the example."""
    for call in reads_of_values(trace):
        place = call.within.path or "the model"
        yield f"the forward of {place} reads values of tensors: only the path that the example took has been analysed"
        return


def _edited(model: Model, module: nn.Module, edits: list[dict[str, Any]]) -> Model:
    origin = model.origin.edited(*edits) if model.origin is not None else None
    return replace(model, native=module, origin=origin, program=None)


def _channel_axis(site: InsertSite) -> int:
    return -1 if site.spatial is None else 1


def _norm_name(site: InsertSite) -> str:
    return "LastAxisBatchNorm" if site.spatial is None else f"BatchNorm{max(site.spatial, 1)}d"


def _make_identity(norm: nn.modules.batchnorm._BatchNorm, moments: Moments) -> None:
    """Statistics are stored in the layer's dtype; gamma and beta are computed from what was stored, so that nothing is lost twice."""
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(torch.from_numpy(moments.mean))
        norm.running_var.copy_(torch.from_numpy(moments.variance()))
        gamma, beta = identity_parameters(
            norm.running_mean.double().cpu().numpy(), norm.running_var.double().cpu().numpy(), norm.eps
        )
        norm.weight.copy_(torch.from_numpy(gamma))
        norm.bias.copy_(torch.from_numpy(beta))


def _restore_mode(module: nn.Module, modes: Mapping[str, bool]) -> None:
    """Each submodule gets its mode back; an inserted norm has that of its layer."""
    for name, part in module.named_modules():
        part.training = modes.get(name, modes.get(name.rpartition(".")[0], modes[""]))
