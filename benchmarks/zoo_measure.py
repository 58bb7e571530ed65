"""One tool on one model: BatchNorms before and after, errors against references that owe nothing to the tool, seconds."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from zoo_tools import fold_onnx, fold_torch

Arrays = list[np.ndarray[Any, Any]]
DENSE = ("backbone", "head", "rpn.head")
"""What is compared of a detector: the boxes that non-maximum suppression keeps hang on the last bit of a score."""


def relative_error(found: Arrays, truth: Arrays) -> float:
    """The largest absolute difference relative to the root mean square, over all outputs; infinite where shapes or NaNs differ."""
    if [a.shape for a in found] != [a.shape for a in truth]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, truth, strict=True):
        a, b = one.astype(np.float64), other.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        scale = float(np.sqrt(np.mean(b**2))) if b.size else 0.0
        gap = float(np.abs(a - b).max(initial=0))
        worst = max(worst, gap / scale if scale else gap)
    return worst


def measure_torch(tool: str, word: str, row: dict[str, Any]) -> None:
    """A torch model: fill in its row. Errors on a batch of another size and of other values than the tool has seen."""
    import torch
    from zoo_count import count
    from zoo_models import create, example, randomise

    torch.manual_seed(0)
    model = create(word)
    shown, other = example(model, seed=1), example(model, seed=2, batch=1)
    randomise(model, lambda: model(*shown))
    row["executed"] = count(model, lambda: model(*other))
    row["parameters"] = sum(p.numel() for p in model.parameters())
    before = outputs(model, other)
    row["fault"] = fault(model, lambda: outputs(model, other), before)
    try:
        exact = outputs(copy.deepcopy(model).double(), doubled(other))
        row["baseline"] = relative_error(before, exact)
    except RuntimeError:  # code that asks for float32 by name
        exact, row["baseline"] = before, 0.0
    folded, known = fold_torch(tool, model, shown)
    row |= known
    after = outputs(folded, other)
    row["remaining"] = count(folded, lambda: folded(*other))
    row["error"] = relative_error(after, exact)
    row["error32"] = relative_error(after, before)


def fault(model: Any, run: Callable[[], Arrays], right: Arrays) -> float:
    """Negative control: the error that a fault of 10 % in every other channel of the first BatchNorm's scale shows."""
    import torch
    from zoo_count import is_norm

    norm = next(m for m in model.modules() if is_norm(m))
    kept = norm.running_var.clone()
    with torch.no_grad():
        norm.running_var[::2] *= 1.2
        wrong = run()
        norm.running_var.copy_(kept)
    return relative_error(wrong, right)


def doubled(arguments: Any) -> Any:
    """The same inputs in float64."""
    from torch.utils import _pytree

    return _pytree.tree_map(lambda x: x.double(), arguments)


def outputs(model: Any, arguments: tuple[Any, ...]) -> Arrays:
    """Every tensor that a model returns; of a detector, what comes before the boxes."""
    import torch

    seen: list[Any] = []
    parts = dict(model.named_modules())
    dense = [parts[name] for name in DENSE if name in parts] if isinstance(arguments[0], list) else []
    handles = [part.register_forward_hook(lambda _m, _a, out: seen.append(out)) for part in dense]
    try:
        with torch.no_grad():
            whole = model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return [t.detach().numpy() for t in _tensors(seen if dense else whole)]


def _tensors(value: Any) -> Iterable[Any]:
    from torch import Tensor
    from torch.utils import _pytree

    return (leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def measure_onnx(tool: str, word: str, row: dict[str, Any]) -> None:
    """An ONNX file: fill in its row. Errors against itself with the runtime's optimisations off, in float32.

    The baseline is how far the outputs move when the inputs are changed in the last place.
    """
    import onnx
    import zoo_onnx

    model = onnx.load(word)
    inputs = zoo_onnx.feeds(model, Path(word).stem, seed=2)
    row |= {"randomised": zoo_onnx.randomise(model), "executed": zoo_onnx.count(model)}
    before = zoo_onnx.outputs(model, inputs)
    nudged = {name: np.nextafter(x, np.float32(np.inf)) for name, x in inputs.items()}
    row["baseline"] = relative_error(zoo_onnx.outputs(model, nudged), before)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "folded.onnx")
        onnx.save(model, source)
        row |= fold_onnx(tool, source, target)
        folded = onnx.load(target)
    row["remaining"] = zoo_onnx.count(folded)
    row["error"] = row["error32"] = relative_error(zoo_onnx.outputs(folded, inputs), before)
