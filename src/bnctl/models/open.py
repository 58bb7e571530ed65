"""From a MODEL word to a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.errors import ModelError, UsageError
from bnctl.models.digest import sha256_file
from bnctl.models.model import Model
from bnctl.models.origin import Origin
from bnctl.models.spec import BundleWord, FactoryWord, ModelWord, OnnxWord, Pt2Word, parse_model_word

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def open_model(
    word: str | ModelWord,
    *,
    weights: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust: bool = False,
    trusted_factories: Sequence[str] = (),
    factory: str | Callable[..., Any] | None = None,
) -> Model:
    """Open what a MODEL word names.

    Args:
        word: as on the command line, or parsed already.
        weights: for a factory that names none itself.
        model_args: keyword arguments of a factory; not used by the other kinds.
        trust: let files that can run code do so (`.pt2`, bundles).
        trusted_factories: patterns of factories that a bundle may name, from the user's configuration.
        factory: what to build a bundle with, instead of what it names.

    Raises:
        UsageError: `factory` is given for something else than a bundle.
        ModelError: the model cannot be loaded.
        UntrustedError: it would run code, and nobody said that it may.
    """
    parsed = parse_model_word(word, weights=weights) if isinstance(word, str) else word
    if factory is not None and not isinstance(parsed, BundleWord):
        raise UsageError(
            f"{parsed.word} is not a bundle, so there is no factory to replace",
            hint="give the factory itself as the MODEL",
        )
    match parsed:
        case OnnxWord():
            return _open_onnx(parsed)
        case Pt2Word():
            return _open_pt2(parsed, trust)
        case BundleWord():
            return _open_bundle(parsed, trust, trusted_factories, factory)
        case FactoryWord():
            return _open_factory(parsed, dict(model_args or {}))


def require_values(module: Any, word: str) -> None:
    """Refuse a module that has shapes only.

    Raises:
        ModelError: a parameter or a buffer is on torch's meta device.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            f"{word} has parameters on the meta device: they have shapes, and no values",
            hint="build it on the CPU (to_empty and load_state_dict), and load its weights",
        )


def _open_onnx(word: OnnxWord) -> Model:
    from bnctl.models.onnx_file import load_with_digest

    native, sha256 = load_with_digest(word.path)
    return Model("onnx", native, word.word, sha256)


def _open_pt2(word: Pt2Word, trust: bool) -> Model:
    from bnctl.models.pt2 import load_pt2

    program = load_pt2(word.path, trust=trust)
    axes = _dynamic_axes(program)
    return Model("torch", program.module(), word.word, sha256_file(word.path), program=program, dynamic_axes=axes)


def _dynamic_axes(program: ExportedProgram) -> tuple[tuple[int, ...], ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    shapes = [getattr(values.get(name), "shape", ()) for name in program.graph_signature.user_inputs]
    return tuple(tuple(axis for axis, size in enumerate(shape) if not isinstance(size, int)) for shape in shapes)


def _open_bundle(
    word: BundleWord, trust: bool, trusted_factories: Sequence[str], factory: str | Callable[..., Any] | None
) -> Model:
    from bnctl.models.bundle import bundle_sha256, load_bundle

    module, origin = load_bundle(word.path, trust=trust, factory=factory, trusted_factories=trusted_factories)
    if factory is not None:  # nobody vouches for the one that the bundle names, and it is not what built this model
        origin = replace(origin, factory=factory if isinstance(factory, str) else "")
    return Model("torch", module, word.word, bundle_sha256(word.path), origin)


def _open_factory(word: FactoryWord, args: dict[str, Any]) -> Model:
    from bnctl.models.factory import build_module, load_weights

    module = build_module(word.factory, args)
    sha256 = None
    if word.weights is not None:
        load_weights(module, word.weights)
        sha256 = sha256_file(word.weights)
    require_values(module, word.word)
    origin = Origin(word.factory, args, weights=None if word.weights is None else str(word.weights))
    return Model("torch", module, word.word, sha256, origin)
