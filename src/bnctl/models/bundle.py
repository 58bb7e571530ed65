"""Bundles: a folder from which a torch model comes back as the user's own class.

    bnctl.json          how to build it: factory, arguments, edits; what else is known (see :mod:`bnctl.models.manifest`)
    model.safetensors   the tensors of its state dict, each stored once

Loading builds the module by its factory, applies the edits, and loads the tensors strictly. Values, shapes and dtypes of the state dict,
ties, `requires_grad` and the mode of the whole module come back exactly. Not kept: memory format (tensors are stored contiguous), device
(everything is loaded to the CPU), hooks, values of buffers outside the state dict (the factory computes them again), and overlapping
views that are not the same parameter (each gets its own storage).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl import __version__
from bnctl.errors import ModelError, UsageError
from bnctl.models.digest import sha256_file
from bnctl.models.factory import build_module, call_factory, check_fit
from bnctl.models.manifest import Manifest, parse_manifest
from bnctl.models.origin import Origin
from bnctl.models.spec import BUNDLE_JSON, require_file
from bnctl.models.ties import find_ties, named_tensors, restore_ties, set_tensor
from bnctl.models.trust import check_factory
from bnctl.models.write import atomic_path
from bnctl.models.written import record_written, was_written_here

if TYPE_CHECKING:
    import torch
    from torch import nn

STATE_FILE = "model.safetensors"


def save_bundle(
    folder: str | os.PathLike[str],
    module: nn.Module,
    origin: Origin,
    *,
    source: dict[str, Any] | None = None,
    inputs: Sequence[Any] | None = None,
    force: bool = False,
) -> None:
    """Write `module` as a bundle, in one step, and put it on record as this user's own.

    Args:
        folder: does not exist yet, or is a bundle and `force` is set.
        module: as `origin` builds it, with any values.
        origin: how it is built again.
        source: what it was made from, for the record; JSON.
        inputs: example inputs, as `--input` takes them.
        force: replace a bundle that is there; it stays until the new one is complete.

    Raises:
        UsageError: `folder` exists and `force` is not set, or is something else than a bundle.
        ModelError: something in the module or its origin cannot be stored.
    """
    target = Path(folder)
    if target.is_dir() and force and any(target.iterdir()) and not (target / BUNDLE_JSON).is_file():
        raise UsageError(f"{target} is not a bundle, so it is not replaced", hint="give another output folder")
    with atomic_path(target, force=force) as new:
        new.mkdir()
        ties = find_ties(module)
        _write_state(new / STATE_FILE, module, ties)
        manifest = Manifest(
            origin=origin,
            state_sha256=sha256_file(new / STATE_FILE),
            bnctl=__version__,
            source=source,
            inputs=None if inputs is None else list(inputs),
            training=module.training,
            ties=ties,
            frozen=tuple(name for name, p in module.named_parameters() if not p.requires_grad),
            buffer_dtypes=_buffer_dtypes(module),
        )
        text = manifest.to_json().encode()
        (new / BUNDLE_JSON).write_bytes(text)
    record_written(hashlib.sha256(text).hexdigest(), origin.factory)


def load_bundle(
    folder: str | os.PathLike[str],
    *,
    trust: bool = False,
    factory: str | Callable[..., Any] | None = None,
    trusted_factories: Sequence[str] = (),
) -> tuple[nn.Module, Origin]:
    """Read a bundle back.

    Args:
        folder: the bundle.
        trust: call whatever factory it names.
        factory: build with this instead (a callable, or `"package.module:callable"`); the caller vouches for it.
        trusted_factories: patterns of factories that may be called, from the user's configuration.

    Returns:
        The module, and its origin.

    Raises:
        UntrustedError: nobody vouches for the factory; see :mod:`bnctl.models.trust`.
        ModelError: the bundle is incomplete or was changed, or what its factory builds does not fit.
    """
    root = Path(folder)
    document = require_file(root / BUNDLE_JSON).read_bytes()
    try:
        manifest = parse_manifest(document.decode(), root / BUNDLE_JSON)
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{root / BUNDLE_JSON} is not UTF-8 text",
            hint="the bundle is damaged or was edited: write it again with bnctl",
        ) from error
    origin = manifest.origin
    own = was_written_here(hashlib.sha256(document).hexdigest(), origin.factory)
    if not (trust or factory is not None or own):
        check_factory(origin.factory, origin.args, trusted_factories=trusted_factories)
    state = _read_state(root / STATE_FILE, manifest.state_sha256)
    name = factory if isinstance(factory, str) else origin.factory
    module = call_factory(factory, origin.args, name) if callable(factory) else build_module(name, origin.args)
    module = rebuilt(module, origin)
    _restore(module, state, manifest, root)
    return module, origin


def rebuilt(module: nn.Module, origin: Origin) -> nn.Module:
    """What a factory has built, with the edits of an origin.

    Raises:
        ModelError: it is not the model that was edited.
    """
    from bnctl.engines.torch.copies import editable
    from bnctl.engines.torch.edits import apply_edits

    module = editable(module)
    apply_edits(module, origin.edits)
    return module


def bundle_sha256(folder: str | os.PathLike[str]) -> str:
    """Hex digest of `bnctl.json`, which holds the digest of the tensors: it stands for the whole bundle."""
    return sha256_file(Path(folder) / BUNDLE_JSON)


def _write_state(path: Path, module: nn.Module, ties: Mapping[str, str]) -> None:
    import torch
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{name} is a {type(value).__name__}: a bundle holds tensors only",
                hint="leave values that are not tensors out of the state dict",
            )
        if name in ties:
            continue
        try:
            tensor = value.detach().cpu().contiguous()
            # The format refuses shared memory: overlapping views are stored apart.
            address = tensor.untyped_storage().data_ptr()
            stored[name] = tensor.clone() if address in storages else tensor
            storages.add(address)
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(f"{name} cannot be stored: {error}", hint="write it as .pt2 or .onnx") from error
    try:
        save_file(stored, path, metadata={"format": "pt"})
    except Exception as error:  # sparse and quantised tensors each fail in their own way
        if isinstance(error, OSError) or "os error" in str(error):
            raise UsageError(f"{path} cannot be written: {error}", hint="is there room on the disk?") from error
        raise ModelError(
            f"the tensors of {type(module).__name__} cannot be stored: {error}", hint="write it as .pt2 or .onnx"
        ) from error


def _read_state(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if sha256_file(require_file(path)) != sha256:
        raise ModelError(
            f"{path} is not the file that {BUNDLE_JSON} describes: it was changed or cut off",
            hint="write the bundle again from its source",
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: {error}",
            hint="the bundle is damaged or was edited: write it again with bnctl",
        ) from error


def _restore(module: nn.Module, state: Mapping[str, torch.Tensor], manifest: Manifest, root: Path) -> None:
    if unknown := [name for name in manifest.ties.values() if name not in state]:
        raise ModelError(
            f"{root / BUNDLE_JSON}: {unknown[0]} is tied to, and is not in {STATE_FILE}",
            hint="the bundle is damaged or was edited: write it again with bnctl",
        )
    whole = {**state, **{name: state[first] for name, first in manifest.ties.items()}}
    check_fit(module, whole, str(root))
    # assign: the tensors come as they were stored (their dtype too), each in a parameter of its own; then what was tied is tied.
    module.load_state_dict(whole, assign=True)
    restore_ties(module, manifest.ties)
    for name, dtype in manifest.buffer_dtypes.items():
        _cast_buffer(module, name, dtype, root)
    frozen = set(manifest.frozen)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    module.train(manifest.training)


def _buffer_dtypes(module: nn.Module) -> dict[str, str]:
    stored = module.state_dict().keys()
    return {n: str(b.dtype).removeprefix("torch.") for n, b in module.named_buffers() if n not in stored}


def _cast_buffer(module: nn.Module, name: str, dtype: str, root: Path) -> None:
    import torch

    buffer = named_tensors(module).get(name)
    wanted = getattr(torch, dtype, None)
    if buffer is None or not isinstance(wanted, torch.dtype):
        raise ModelError(
            f"{root}: the module has no buffer {name} of dtype {dtype}",
            hint="build the bundle with the factory it was written with",
        )
    if buffer.dtype != wanted:
        set_tensor(module, name, buffer.to(wanted))
