"""Who may name a factory.

A bundle names its factory, and calling it is running code: `{"factory": "os:system"}` must not run. Without a word from the user
(`--trust`, or the factory given on the command line) a factory of a bundle is called only when it is one of these:

1. It matches a pattern in the user's own configuration (`trusted-factories`, e.g. `"my_nets:*"`).
2. The bundle was written by this user's bnctl, here: its `bnctl.json` is on record (:mod:`bnctl.models.written`).
3. It is a model builder that torchvision or timm itself registers, or an `nn.Module` class defined in their model packages; the package
   must be the installed one, not a folder of that name in the current directory. Other functions in there (that download, load
   checkpoints or write to a hub) are not builders. Arguments that would fetch something are refused.
4. It is a class derived from `nn.Module`, named by the module that defines it, and that module *is imported already*: someone else
   chose to run its code. An `nn.Module` in a module that is not imported would be safe to call only after running that module, so it is
   left to 1, 2 and `--trust`; being installed makes no difference, for importing an arbitrary installed module can do anything. Of
   torch itself only `torch.nn.modules` counts: other modules of it hold classes that run what their arguments say (remote modules,
   graph modules).

Names are checked before anything is imported, and only the attribute itself is looked up: no walk through dots.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bnctl.errors import UntrustedError
from bnctl.models.importing import import_module

_NAME = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<attr>[A-Za-z_]\w*)", re.ASCII)
# Where the architectures of a package live.
_ZOOS = {"torchvision": "torchvision.models", "timm": "timm.models"}


def check_factory(factory: str, args: Mapping[str, Any], *, trusted_factories: Sequence[str] = ()) -> None:
    """Refuse a factory that a file names and nobody vouches for (rules 1, 3 and 4 above).

    Raises:
        UntrustedError: the factory is none that may be called unasked, or its arguments would fetch something.
    """
    if any(fnmatchcase(factory, pattern) for pattern in trusted_factories):
        return
    match = _NAME.fullmatch(factory)
    if match is None:
        raise _untrusted(factory, "is not of the form package.module:callable")
    module, attr = match["module"], match["attr"]
    root = module.partition(".")[0]
    if root in _ZOOS and (module == root or f"{module}.".startswith(f"{_ZOOS[root]}.")):
        _check_zoo(root, module, attr, args)
    elif not _is_imported_module_class(module, attr):
        raise _untrusted(factory, "is not a known architecture")


def _check_zoo(root: str, module: str, attr: str, args: Mapping[str, Any]) -> None:
    factory = f"{module}:{attr}"
    if not _is_installed(root):
        raise _untrusted(factory, f"is not from the installed {root}")
    try:
        found = getattr(import_module(module), attr, None)
    except Exception as error:
        raise _untrusted(factory, f"cannot be looked up ({type(error).__name__}: {error})") from error
    if _is_module_class_of(found, _ZOOS[root]):
        return
    if (root, attr) == ("timm", "create_model") and found is getattr(sys.modules["timm"], attr, None):
        _check_timm_name(factory, args)
    elif not _is_registered_builder(root, attr, found):
        raise _untrusted(factory, f"is not a model builder of {root}")
    _check_no_download(factory, found, args)


def _is_registered_builder(root: str, name: str, found: Any) -> bool:
    """Whether the package itself lists `found` among its architectures."""
    if root == "timm":
        timm = import_module("timm")
        return timm.is_model(name) and found is timm.model_entrypoint(name)
    models = import_module("torchvision.models")
    return any(found is models.get_model_builder(listed) for listed in models.list_models())


def _check_timm_name(factory: str, args: Mapping[str, Any]) -> None:
    name = args.get("model_name")
    timm = import_module("timm")
    # "hf-hub:..." and "local-dir:..." fetch or read a configuration of someone else's making.
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name) or not timm.is_model(name):
        raise _untrusted(factory, f"with model_name={name!r} is not an architecture of timm")
    if args.get("checkpoint_path"):
        raise _untrusted(factory, "with checkpoint_path reads another file")


def _check_no_download(factory: str, builder: Any, args: Mapping[str, Any]) -> None:
    """Every argument on pretrained weights, given or by default, must be off."""
    defaults = {name: p.default for name, p in inspect.signature(builder).parameters.items()}
    for name, value in {**defaults, **args}.items():
        if name.startswith(("pretrained", "weights")) and value not in (None, False, inspect.Parameter.empty):
            raise _untrusted(factory, f"with {name}={value!r} would download weights")


def _is_imported_module_class(module: str, attr: str) -> bool:
    import torch  # noqa: F401 - torch.nn.modules counts as imported, whoever comes first

    # vars() and not getattr(): a module may define __getattr__, which imports lazily.
    found = vars(sys.modules[module]).get(attr) if module in sys.modules else None
    if module.partition(".")[0] == "torch":
        return _is_module_class_of(found, "torch.nn.modules")
    return _is_module_class_of(found, module) and found.__module__ == module


def _is_module_class_of(found: Any, package: str) -> bool:
    from torch import nn

    return isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.".startswith(f"{package}.")


def _is_installed(root: str) -> bool:
    """Whether the top-level package `root`, as it would be imported now, lies in a folder that packages are installed to."""
    module = sys.modules.get(root)
    spec = module.__spec__ if module is not None else importlib.util.find_spec(root)
    if spec is None or spec.origin is None:
        return False
    folders = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
    package = Path(spec.origin).parent.parent.resolve()
    return any(package == Path(folder).resolve() for folder in folders)


def _untrusted(factory: str, why: str) -> UntrustedError:
    return UntrustedError(
        f"{factory} {why}, and a bundle may not run what it names",
        hint="if you trust this bundle: --trust, or name the factory yourself, or list it under trusted-factories in your configuration",
    )
