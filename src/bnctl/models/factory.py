"""Building an `nn.Module` by calling what the user names, and loading weights into it without running code from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.errors import ModelError, UntrustedError
from bnctl.models.importing import current_folder_importable, import_module

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHOWN = 4


def build_module(factory: str, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Import `package.module:callable` (the current folder is importable) and call it with `args` as keyword arguments.

    Runs the user's code: see :mod:`bnctl.models.trust` for who may name a factory.

    Raises:
        ModelError: the import or the call failed, or the result is not an `nn.Module`.
    """
    with current_folder_importable():
        return call_factory(resolve_factory(factory), args or {}, factory)


def resolve_factory(factory: str) -> Callable[..., Any]:
    """Import the module of `package.module:callable` and return the callable.

    Raises:
        ModelError: the module cannot be imported, or has no such callable.
    """
    module_name, _, attr = factory.partition(":")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{factory}: no module named {error.name}", hint="install it, or run bnctl in the folder that holds it"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module that calls sys.exit() must not end bnctl with its status
        raise ModelError(
            f"{factory}: importing {module_name} failed: {_cause(error)}",
            hint="the cause is in that module: import it in Python to see where",
        ) from error
    for name in attr.split("."):
        if not hasattr(found, name):
            raise ModelError(
                f"{factory}: {module_name} has no {attr}",
                hint=_near(found, name) or "name a function or class of that module",
            )
        found = getattr(found, name)
    if not callable(found):
        raise ModelError(
            f"{factory} is a {type(found).__name__}, not something to call",
            hint="name a function or class that returns the model",
        )
    return found  # type: ignore[no-any-return]


def call_factory(call: Callable[..., Any], args: Mapping[str, Any], name: str) -> nn.Module:
    """Call `call(**args)` and check that an `nn.Module` comes back.

    Raises:
        ModelError: the call failed, or returned something else.
    """
    from torch import nn

    try:
        module = call(**args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ModelError(f"{name}({_shown(args)}) failed: {_cause(error)}", hint="see --model-arg") from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{name} returned a {type(module).__name__}, not an nn.Module",
            hint="name a function or class that returns the model",
        )
    return module


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a weight file into `module`, strictly: every tensor must be there, with its shape, and no other; only
    BatchNorm's batch counters may be missing.

    A `.safetensors` file, or a pickle of tensors (`.pt`, `.pth`) that loads with `weights_only=True`: a state dict, or a checkpoint with
    one under `state_dict`. Values are cast to the dtype of the module's own tensors.

    Raises:
        UntrustedError: the pickle needs code to load.
        ModelError: the file is damaged, holds no state dict, or does not fit.
    """
    state = _with_counters(module, read_state_dict(path))
    check_fit(module, state, str(path))
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ModelError(
            f"{path} does not load: {_cause(error)}", hint="give the weights that were saved from this model"
        ) from error


def _with_counters(module: nn.Module, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Add the batch counters that weights from before torch 0.4.1, and from other frameworks, do not have; inference never reads them."""
    own = module.state_dict()
    if not any(name in own for name in state):
        return state  # these are somebody else's names: let the check say so
    return {**{name: value for name, value in own.items() if name.endswith("num_batches_tracked")}, **state}


def read_state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    """Read the tensors of a weight file, on the CPU.

    Raises:
        UntrustedError: see :func:`load_weights`.
        ModelError: the file is damaged, or holds no state dict.
    """
    content = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not _all_tensors(content):
        raise ModelError(
            f"{path} holds no state dict", hint="save model.state_dict(), or a dict with it under the key state_dict"
        )
    return content


def check_fit(module: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Compare names and shapes of `state` with those of `module`.

    Raises:
        ModelError: what is missing, what is unexpected, and what has another shape; the first few are named.
    """
    own = module.state_dict()
    problems = [
        _listed("missing", [name for name in own if name not in state]),
        _listed("unexpected", [name for name in state if name not in own]),
        _listed(
            "of another shape", [_shapes(n, state[n], own[n]) for n in own if n in state and _differ(own[n], state[n])]
        ),
    ]
    found = "; ".join(p for p in problems if p)
    if found:
        prefixed = own and all(name.startswith("module.") for name in state)
        raise ModelError(
            f"{source} does not fit {type(module).__name__}: {found}",
            hint="the names start with 'module.': save model.module.state_dict()"
            if prefixed
            else "the factory's arguments must be those that the weights were trained with (--model-arg)",
        )


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: {_cause(error)}",
            hint="the file is damaged, or not of this kind: write it again",
        ) from error


def _read_pickle(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UntrustedError(
            f"{path} needs code to load: {_first_line(error)}",
            hint="save only the tensors: torch.save(model.state_dict(), path), or a .safetensors file",
        ) from error
    except Exception as error:
        raise ModelError(
            f"{path} is not a whole weight file: {_cause(error)}",
            hint="the file is damaged, or not of this kind: write it again",
        ) from error


def _all_tensors(content: Mapping[Any, Any]) -> bool:
    import torch

    return all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())


def _differ(own: Any, other: Any) -> bool:
    # Extra state (get_extra_state) has no shape, and a lazy parameter has none yet: load_state_dict judges those.
    from torch.nn.parameter import is_lazy

    return hasattr(own, "shape") and not is_lazy(own) and own.shape != other.shape


def _shapes(name: str, given: torch.Tensor, own: torch.Tensor) -> str:
    return f"{name} ({'x'.join(map(str, given.shape)) or 'scalar'}, not {'x'.join(map(str, own.shape)) or 'scalar'})"


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}" if names else ""


def _shown(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in args.items())


def _near(owner: Any, name: str) -> str | None:
    import difflib

    close = difflib.get_close_matches(name, [n for n in dir(owner) if not n.startswith("_")], n=3)
    return f"did you mean {', '.join(close)}?" if close else None


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
