"""Before and after: the check that every surgery ends in."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from bnctl.data.resize import other_choices, other_integers, other_shapes, other_values, resized
from bnctl.errors import BnctlError, EquivalenceError, ModelError
from bnctl.runtime import Runner, open_runner
from bnctl.runtime.ahead import Ahead
from bnctl.verification import VARIED, Verification, compare_layers, compare_runners

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model


MOST_THREADS = 8
"""Of ONNX Runtime in a comparison; more do not pay for small batches."""

Varied = Literal["values", "choices", "batch size", "shape"]


def check_equivalence(
    before: Model,
    after: Model,
    example: Batch,
    *,
    layers: Collection[str] = (),
    altered: Collection[str] = (),
    vary: Collection[Varied] = ("values", "choices", "batch size", "shape"),
    tolerance: float | None = None,
    device: str = "cpu",
    baseline: Runner | None = None,
) -> Verification:
    """Run both models on the example, and where they take them on other batch sizes, values and shapes; runtime optimisations are off.

    Other values and shapes find what one run on one example cannot show: a number that Python computed from the input, a path that the example did not take.

    Args:
        before: right by definition.
        after: the model after surgery.
        example: inputs.
        layers: inner layers whose outputs the surgery preserves, to be compared too, on one sample.
        altered: inner layers whose outputs the surgery changes.
        vary: what of the example the second model must take in other forms where the first does; an exported graph has sizes that are fixed on purpose.
        tolerance: largest relative error that counts as equal; by default it follows from the dtype.
        device: "cpu" or "cuda".
        baseline: runs `before`, where there is a runner already.
    """
    others = list(variations(example, vary, branching=may_branch(before), device=device))
    with keeping(before), keeping(after):
        baseline, candidate = baseline or _opened(before, device), _opened(after, device)
        verification = compare_runners(
            baseline,
            candidate,
            [example],
            where_taken=others,
            layers=layers,
            altered=altered,
            tolerance=tolerance,
        )
        if verification.layers:
            return verification
        return compare_layers(baseline, candidate, resized(example, 1), layers, verification)


@contextmanager
def baseline_ahead(model: Model, example: Batch, device: str) -> Iterator[Runner | None]:
    """What :func:`check_equivalence` will ask of the model before surgery, begun while the surgery is done; None for a torch model, which one thread at a
    time may run, and for one that cannot be run.
    """
    if model.kind != "onnx":
        yield None
        return
    try:
        baseline = Ahead(_opened(model, device), example)
    except BnctlError:  # there may be nothing to verify; where there is, it is opened again
        yield None
        return
    try:
        yield baseline
    finally:
        baseline.close()


def _opened(model: Model, device: str) -> Runner:
    return open_runner(model, threads=min(os.cpu_count() or 1, MOST_THREADS), device=device)


def variations(example: Batch, vary: Collection[Varied], *, branching: bool, device: str) -> Iterator[Sequence[Batch]]:
    """The example in other forms, each with alternatives. Another size and other values share their runs: a fault in either shows.

    One sample is the size to look inside at, and the cheapest; an example of one sample becomes two. Where values decide on what is computed, they are tried
    with either sign. Integers of a wider range are tried where an index that is too large does no more than raise: on a GPU it ends the process' use of it.
    """
    other = resized(example, 2 if example.size == 1 else 1) if "batch size" in vary and example.size else example
    if "values" in vary:
        ways = list(other_values(other))  # some are too much for a logarithm, say; the size counts in any case
        yield from ([way, *ways[i + 1 :], other] for i, way in enumerate(ways[: None if branching else 1]))
    elif "batch size" in vary:
        yield [other]
    if "choices" in vary and branching:
        yield from ([way] for way in chain.from_iterable(other_choices(other)))
    if "choices" in vary and device == "cpu":
        yield from filter(None, [other_integers(other)])
    if "shape" in vary:
        yield from other_shapes(other)


def may_branch(model: Model) -> bool:
    """Whether the values that come in may decide on what is computed: in code they may, in an ONNX graph only where it has subgraphs."""
    if model.kind != "onnx":
        return True
    native: Any = model.native
    bodies = chain(native.graph.subgraphs(), *(function.subgraphs() for function in native.functions.values()))
    return next(iter(bodies), None) is not None


def keeping(model: Model) -> AbstractContextManager[object]:
    """Leave a torch model as it is: running it may count, cache, or update statistics."""
    if model.kind == "onnx":
        return nullcontext()
    import torch

    from bnctl.engines.torch.state import keeping_state

    native: Any = model.native
    both = ExitStack()
    both.enter_context(torch.random.fork_rng(devices=[]))
    both.enter_context(keeping_state(native))
    return both


def check_copy(model: Model, example: Batch, device: str) -> None:
    """See whether a mere copy of a model computes the same: surgery works on one. Of a model that does not even agree with itself (random), that shows nothing.

    Raises:
        ModelError: it does not; or it is an ONNX model that draws random numbers, which depend on where a node stands.
    """
    drawing = _random_node(model)
    if drawing is not None:
        raise ModelError(
            f"{model.word} draws random numbers ({drawing}), and others after any change: before and after cannot be compared",
            hint="--no-verify does not try to; compare the accuracy with bnctl bench",
        )
    with keeping(model):
        runner = _opened(model, device)
        twin = runner.perturbed(0.0)
        if twin is None or not compare_runners(runner, runner, [example], locate=False).passed:
            return
        verification = compare_runners(runner, twin, [example], locate=False)
    if not verification.passed and not verification.inconclusive:
        raise ModelError(
            f"a copy of {model.word} computes something else ({verification.reason}): it loses something on the way, before any surgery",
            hint="see to it that copy.deepcopy keeps all that its forward uses (__deepcopy__, __getstate__, attributes of a torch.fx graph)",
        )


def _random_node(model: Model) -> str | None:
    """A node of an ONNX model that draws random numbers, and its name."""
    if model.kind != "onnx":
        return None
    native: Any = model.native
    nodes = chain(native.graph.all_nodes(), *(function.all_nodes() for function in native.functions.values()))
    found = next((node for node in nodes if node.op_type in _RANDOM and node.domain == ""), None)
    return None if found is None else f"{found.op_type} {found.name or ''}".strip()


_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def require(verification: Verification, command: str, word: str, culprits: Sequence[str] = ()) -> None:
    """Refuse a surgery that changed the function, or of which that cannot be said.

    Args:
        verification: before against after.
        command: that did it.
        word: the model.
        culprits: the layers that do it by themselves, where that was found out.

    Raises:
        EquivalenceError: naming the output, the error and the layer where the two part.
    """
    if verification.passed:
        return
    if verification.inconclusive:
        raise EquivalenceError(
            f"{command} of {word} cannot be verified: {verification.reason}. Nothing was written.",
            hint="give inputs with --data on which the outputs are not all zero",
            verification=verification.to_dict(),
        )
    first = verification.first_difference
    where = f"; they part at {first.name}" if first is not None else ""
    where += f". It is the {command} of {_listed(culprits)} that does it" if culprits else ""
    skip = " ".join(f"--skip {name!r}" for name in culprits[:4]) or "--skip"
    varied = (
        "; what never changes (a flag, a number) can be fixed in a wrapper around the model"
        if VARIED in str(verification.reason)
        else ""
    )
    leave_out = "" if command == "export" else f"leave the layer out with {skip}, or "
    raise EquivalenceError(
        f"{command} of {word} does not preserve the function: {verification.reason}{where}. Nothing was written.",
        hint=f"{leave_out}try other inputs with --data{varied}; please report the model",
        verification=verification.to_dict(),
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more together" if len(names) > 4 else shown
