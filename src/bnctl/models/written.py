"""The record of the bundles that this user's bnctl wrote here: they load without being asked about, as with direnv's allow list.

`$XDG_STATE_HOME/bnctl/written.json` (by default under `~/.local/state`) maps the SHA-256 of a `bnctl.json` to the file that its factory
was imported from. Both must agree on loading: the same bundle names other code when it is opened in another folder, where a module of
the same name lies. The record is a convenience: where it cannot be read or written, bundles ask for trust.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from bnctl.errors import BnctlError
from bnctl.models.importing import current_folder_importable
from bnctl.models.write import atomic_path

_KEPT = 2000


def record_written(digest: str, factory: str) -> bool:
    """Note that this bnctl wrote the `bnctl.json` with this SHA-256; says whether that worked."""
    code = _code_of(factory)
    if code is None:
        return False
    entries = {**_read(), digest: code}
    newest = dict(list(entries.items())[-_KEPT:])
    try:
        path = record_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, force=True) as new:
            new.write_text(json.dumps({"format_version": 1, "bundles": newest}, indent=1), encoding="utf-8")
    except (OSError, BnctlError, RuntimeError):
        return False
    return True


def was_written_here(digest: str, factory: str) -> bool:
    """Whether the `bnctl.json` with this SHA-256 is on record, and its factory still comes from the same file."""
    code = _code_of(factory)
    return code is not None and _read().get(digest) == code


def record_path() -> Path:
    """Where the record is kept.

    Raises:
        RuntimeError: the user has no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore a relative path.
    return (Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state") / "bnctl" / "written.json"


def _read() -> dict[str, str]:
    try:
        content = json.loads(record_path().read_text(encoding="utf-8"))
        entries = content["bundles"]
        return {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return {}


def _code_of(factory: str) -> str | None:
    """The file that the top-level package of `factory` would be imported from; nothing is imported."""
    root = factory.partition(":")[0].partition(".")[0]
    try:
        with current_folder_importable():
            spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    # A folder without __init__.py has no origin; its location stands for it.
    origin = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    return None if origin is None else str(Path(origin).resolve())
