"""What folding and merging gain in latency, measured with `bnctl bench`: interleaved, in fresh processes, one thread, batch 1.

    python benchmarks/latency.py [--only NAME] [--write docs/latency.md]

Each row is a ratio candidate over baseline with its 95 % interval; the noise floor is that of the same model against itself. Weights are random. Where the
authors of a network wrote its merging by hand (timm's `reparameterize_model`), `--merge-branches` is held against that, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INPUT = "1x3x224x224"
NETS = {
    "ResNet-50": "torchvision.models:resnet50",
    "MobileNetV2": "torchvision.models:mobilenet_v2",
    "RepVGG-A0": "timm.models:repvgg_a0",
    "MobileOne-S0": "timm.models:mobileone_s0",
}
BY_HAND = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050")


def bnctl(*words: str) -> Any:
    """Run a command; its JSON document.

    Raises:
        RuntimeError: it fails for another reason than a gate.
    """
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "bnctl", *words, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode not in {0, 3}:
        raise RuntimeError(f"{' '.join(words)}: {ended.stderr[-800:]}")
    return json.loads(ended.stdout)


def compared(name: str, baseline: str, candidate: str) -> list[str]:
    """Rows of the table, one per runtime setting that bench measures."""
    report = bnctl(
        *("bench", baseline, candidate, "--no-accuracy", "--data", "random:4", "--input", INPUT, "--batch-size", "1"),
        *("--processes", "5", "--max-processes", "7", "--precision", "0.02"),
    )
    rows = []
    for entry in report["latency"]:
        low, high = entry["ci95"]
        before, after = list(entry["p50_ms"].values())[:2] if isinstance(entry["p50_ms"], dict) else entry["p50_ms"][:2]
        rows.append(
            f"| {name} | {entry['runtime']} | {before:.1f} | {after:.1f} | {entry['ratio']:.3f} [{low:.3f}, {high:.3f}] | {entry['noise_floor']:.3f} |"
        )
        print(rows[-1], flush=True)
    return rows


def as_chains(source: Path, target: Path) -> None:
    """Every BatchNormalization as a Mul and an Add with constants, as Keras' exports have them."""
    import numpy as np
    import onnx_ir as ir

    model = ir.load(source)
    for node in [n for n in model.graph if n.op_type == "BatchNormalization"]:
        x, *given = node.inputs
        gamma, beta, mean, var = (v.const_value.numpy() for v in given)
        scale = gamma / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
        made = x
        for op, array in (("Mul", scale), ("Add", beta - mean * scale)):
            name = f"{node.outputs[0].name}_{op}"
            tensor = ir.Tensor(array.astype(np.float32).reshape(-1, 1, 1), name=f"{name}_c")
            constant = ir.Value(
                name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            model.graph.register_initializer(constant)
            new = ir.node(op, [made, constant], name=name)
            new.outputs[0].name = name
            model.graph.insert_before(node, new)
            made = new.outputs[0]
        node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    ir.save(model, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    head = ["| model | runtime | before, ms | after, ms | ratio, 95 % | noise floor |", "|---|---|--:|--:|---|--:|"]
    folded, merged = [], []
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        for name, word in NETS.items():
            if options.only.lower() not in name.lower():
                continue
            bnctl("fold", word, "-o", str(at / name), "--input", "2x3x224x224")
            folded += compared(name, word, str(at / name))
            kept = at / f"{name}.onnx"
            bnctl("export", word, "-o", str(kept), "--keep-bn", "--input", "2x3x224x224")
            bnctl("fold", str(kept), "-o", str(at / f"{name}.folded.onnx"))
            folded += compared(name, str(kept), str(at / f"{name}.folded.onnx"))
            if name == "ResNet-50":
                as_chains(kept, at / "keras.onnx")
                bnctl("fold", str(at / "keras.onnx"), "-o", str(at / "keras.folded.onnx"))
                folded += compared(
                    "ResNet-50, BN as Mul and Add", str(at / "keras.onnx"), str(at / "keras.folded.onnx")
                )
        for name in BY_HAND:
            if options.only.lower() not in name:
                continue
            out = str(at / f"{name}-merged")
            bnctl("fold", f"timm.models:{name}", "-o", out, "--merge-branches", "--input", "2x3x224x224")
            merged += compared(name, f"latency_models:{name}", out)
    if options.write:
        text = [PAGE, *head, *folded, "", MERGED, "", *head, *merged, ""]
        options.write.write_text("\n".join(text))


PAGE = """# Latency

What `bnctl fold` gains, measured with `bnctl bench` by `benchmarks/latency.py`: batch 1, 224 x 224, one thread, random weights, two shared cores. A ratio
below 1 is a gain; where its interval reaches the noise floor there is none. ONNX Runtime folds Conv and BatchNormalization by itself when it loads a model
(`optimised`), and does not where a BN was written as Mul and Add.
"""

MERGED = """## Merged by bnctl, against merged by hand

`--merge-branches` (after) against what the authors of the networks wrote for them, timm's `reparameterize_model` (before), in torch."""


if __name__ == "__main__":
    main()
