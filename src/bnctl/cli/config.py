"""Settings of a project: ``[tool.bnctl]`` in ``pyproject.toml``, or ``bnctl.toml``. Flags beat environment beat file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from bnctl.errors import UsageError

GLOBAL_KEYS = {"trusted-factories"}


def read_config(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """The settings that hold in a folder: the nearest file upwards that has any.

    Raises:
        UsageError: the file is not TOML, or holds something else than tables and values.
    """
    for place in (folder, *folder.parents):
        for name in ("bnctl.toml", "pyproject.toml"):
            path = place / name
            if not path.is_file():
                continue
            try:
                document = tomllib.loads(path.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"{path}: {error}", hint="correct the file") from error
            found = document.get("tool", {}).get("bnctl") if name == "pyproject.toml" else document
            if found is not None:
                if not isinstance(found, dict):
                    raise UsageError(f"{path}: [tool.bnctl] is not a table", hint="correct the file")
                return found, path
    return {}, None


def default_map(settings: dict[str, Any], commands: dict[str, set[str]], path: Path | None) -> dict[str, Any]:
    """Defaults by command, as click takes them. A key outside of a table holds for every command that has such an option.

    Raises:
        UsageError: a key that no command knows: a setting that is not read must not look as if it were.
    """
    general = {k: v for k, v in settings.items() if not isinstance(v, dict) and k not in GLOBAL_KEYS}
    known = set().union(*commands.values())
    for key in general:
        if key.replace("-", "_") not in known:
            raise UsageError(
                f"{path}: unknown setting {key!r}", hint="settings are named like the long options: batch-size = 64"
            )
    found: dict[str, Any] = {}
    for command, options in commands.items():
        own = {**general, **settings.get(command, {})}
        for key in settings.get(command, {}):
            if key.replace("-", "_") not in options:
                raise UsageError(
                    f"{path}: bnctl {command} has no option {key!r}", hint=f"bnctl {command} --help lists them"
                )
        found[command] = {
            key.replace("-", "_"): value for key, value in own.items() if key.replace("-", "_") in options
        }
    for key, value in settings.items():
        if isinstance(value, dict) and key not in commands:
            raise UsageError(
                f"{path}: there is no command {key!r}", hint="tables are named like commands: [tool.bnctl.bench]"
            )
    return found
