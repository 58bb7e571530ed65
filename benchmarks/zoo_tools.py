"""What each tool is called with: the folded torch model, or the file that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

TORCH = ("bnctl", "torch.fx", "aimet")
ONNX = ("bnctl", "onnxruntime", "onnxscript", "onnxoptimizer", "onnxslim", "onnxsim")
PEERS = {"aimet": "aimet_torch", "onnxoptimizer": "onnxoptimizer", "onnxslim": "onnxslim", "onnxsim": "onnxsim"}
"""Tools that usually live in an environment of their own, and what they are imported as."""


def versions(tool: str) -> str:
    """The version of a tool, as installed beside this interpreter."""
    from importlib.metadata import version

    return version({"torch.fx": "torch", "aimet": "aimet-torch"}.get(tool, tool))


def fold_torch(tool: str, model: Any, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """The folded model, and what is known of it. The model that comes in may be changed."""
    started = time.perf_counter()
    if tool == "bnctl":
        return _bnctl(model, arguments)
    if tool == "torch.fx":
        from torch.fx.experimental.optimization import fuse

        folded = fuse(model)
    else:
        from aimet_torch.batch_norm_fold import fold_all_batch_norms

        folded = model
        fold_all_batch_norms(model, input_shapes=None, dummy_input=arguments)
    return folded, {"seconds": {"whole": time.perf_counter() - started}}


def _bnctl(model: Any, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    import bnctl
    from bnctl.api import as_example, as_model
    from bnctl.engines import engine_of
    from bnctl.errors import EquivalenceError

    seconds = {}
    opened = as_model(model)
    started = time.perf_counter()
    engine_of(opened).capture(opened, as_example(arguments))
    seconds["capture"] = time.perf_counter() - started
    started = time.perf_counter()
    unverified = bnctl.fold(model, arguments, verify=False)
    seconds["fold"] = time.perf_counter() - started
    known: dict[str, Any] = {"seconds": seconds, **_sites(unverified.report.to_dict())}
    started = time.perf_counter()
    try:
        result = bnctl.fold(model, arguments)
    except EquivalenceError as error:  # what the tool would have written is measured all the same
        return unverified.model, known | {"refused": f"{error}"[:400]}
    seconds["whole"] = time.perf_counter() - started
    verification = result.report.to_dict()["verification"] or {}
    return result.model, known | {"verified": verification.get("max_rel_error"), "notes": list(result.report.notes)}


def _sites(report: dict[str, Any]) -> dict[str, Any]:
    left = [s for s in report["sites"] if s["action"] == "left"]
    return {
        "found": report["summary"]["found"],
        "folded": report["summary"]["folded"],
        "codes": dict(Counter(s["code"] for s in left)),
        "left": [[s["name"], s["code"], s["reason"]] for s in left],
    }


def fold_onnx(tool: str, source: Path, target: Path) -> dict[str, Any]:
    """Write the folded file; what is known of it."""
    started = time.perf_counter()
    known: dict[str, Any] = {}
    if tool == "bnctl":
        command = [sys.executable, "-m", "bnctl", "fold", str(source), "-o", str(target), "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(ended.stderr[-400:])
        report = json.loads(ended.stdout)
        known = _sites(report) | {"verified": (report["verification"] or {}).get("max_rel_error")}
        if not target.exists():  # nothing to fold: nothing is written
            target.write_bytes(source.read_bytes())
    else:
        _PEER[tool](source, target)
    return known | {"seconds": {"whole": time.perf_counter() - started}}


def _onnxruntime(source: Path, target: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _onnxscript(source: Path, target: Path) -> None:
    import onnx_ir
    from onnxscript.optimizer import optimize
    from onnxscript.rewriter import rewrite

    model = onnx_ir.load(source)  # the rules for BatchNormalization are among the default ones
    optimize(model)
    onnx_ir.save(rewrite(model), target)


def _onnxoptimizer(source: Path, target: Path) -> None:
    import onnx
    import onnxoptimizer

    passes = ["extract_constant_to_initializer", "eliminate_unused_initializer", "fuse_bn_into_conv"]
    onnx.save(onnxoptimizer.optimize(onnx.load(source), passes), target)


def _onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnxslim.slim(str(source), str(target))


def _onnxsim(source: Path, target: Path) -> None:
    import onnx
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(simplified, target)


_PEER: dict[str, Callable[[Path, Path], None]] = {
    "onnxruntime": _onnxruntime,
    "onnxscript": _onnxscript,
    "onnxoptimizer": _onnxoptimizer,
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
}
