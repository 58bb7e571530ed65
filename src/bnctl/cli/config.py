"""Settings of a project: ``[tool.bnctl]`` in ``pyproject.toml``, or ``bnctl.toml``. Flags beat environment beat file."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnctl.errors import UsageError

GLOBAL_KEYS = {"trusted-factories"}


@dataclass(frozen=True)
class Option:
    """What is asked of an option: may it be given more than once, and is it given without a value."""

    repeatable: bool = False
    flag: bool = False


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
            found = _table(document, path) if name == "pyproject.toml" else document
            if found is not None:
                return found, path
    return {}, None


def _table(document: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """``[tool.bnctl]``."""
    found: Any = document
    for key in ("tool", "bnctl"):
        found = found.get(key)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise UsageError(
                f"{path}: [{'tool' if key == 'tool' else 'tool.bnctl'}] is not a table", hint="correct the file"
            )
    return dict(found)


def trusted_factories(settings: Mapping[str, Any], path: Path | None) -> tuple[str, ...]:
    """Globs of factories that bundles may name.

    Raises:
        UsageError: they are not a list of strings.
    """
    globs = settings.get("trusted-factories", [])
    if not isinstance(globs, list) or not all(isinstance(glob, str) for glob in globs):
        raise UsageError(
            f"{path}: trusted-factories is not a list of strings", hint='trusted-factories = ["my_code.nets:*"]'
        )
    return tuple(globs)


def default_map(
    settings: Mapping[str, Any],
    commands: Mapping[str, Mapping[str, Option]],
    path: Path | None,
    environment: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Defaults by command, as click takes them. A key outside of a table holds for every command that has such an option.

    Of the environment this reads `BNCTL_OPTION`, which holds for every command that has the option; `BNCTL_COMMAND_OPTION` is read by click and beats it.

    Args:
        settings: what the file holds.
        commands: per command its options.
        path: the file, for messages.
        environment: usually `os.environ`.

    Raises:
        UsageError: a key that no command knows, or a variable that looks like one that is read: what is not read must not look as if it were.
    """
    tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
    general = {k: v for k, v in settings.items() if k not in tables and k not in GLOBAL_KEYS}
    for key in sorted(tables.keys() - commands.keys()):
        raise UsageError(
            f"{path}: there is no command {key!r}", hint="tables are named like commands: [tool.bnctl.bench]"
        )
    for table in (general, *tables.values()):
        _refuse_twice(table, path)
    everywhere = set().union(*commands.values())
    _refuse_unknown(
        general, everywhere, f"{path}: unknown setting", "settings are named like the long options: batch-size = 64"
    )
    _refuse_misspelt(environment, commands)
    found = {}
    for command, options in commands.items():
        own = tables.get(command, {})
        _refuse_unknown(own, options, f"{path}: bnctl {command} has no option", f"bnctl {command} --help lists them")
        values = {key.replace("-", "_"): value for each in (general, own) for key, value in each.items()}
        for key, value in values.items():
            if isinstance(value, bool) and key in options and not options[key].flag:
                raise UsageError(
                    f"{path}: {key.replace('_', '-')} = {str(value).lower()}: not a value that it takes",
                    hint=f"bnctl {command} --help",
                )
        # A repeatable option may be given as one string, which click would take for a list of letters.
        found[command] = {
            key: [value] if options[key].repeatable and isinstance(value, str) else value
            for key, value in values.items()
            if key in options
        }
        for key, option in options.items():
            text = environment.get(f"BNCTL_{key.upper()}")
            if text:
                found[command][key] = text.split() if option.repeatable else text
    return found


def origin(
    option: str, command: str, settings: Mapping[str, Any], path: Path | None, environment: Mapping[str, str]
) -> str | None:
    """Where an option gets its value, if not from the command line.

    Args:
        option: as on the command line, ``--batch-size``.
        command: that has it.
        settings: what the file holds.
        path: the file.
        environment: usually `os.environ`.
    """
    key = option.removeprefix("--")
    name = key.replace("-", "_")
    for variable in (f"BNCTL_{command}_{name}".upper(), f"BNCTL_{name}".upper()):
        if environment.get(variable):
            return f"the environment variable {variable}"
    own = settings.get(command)
    given = {*settings, *(own if isinstance(own, dict) else ())}
    return f"the file {path}" if {key, name} & given else None


def _refuse_misspelt(environment: Mapping[str, str], commands: Mapping[str, Mapping[str, Option]]) -> None:
    known = {"BNCTL_TRACEBACK"}
    for command, options in commands.items():
        known |= {f"BNCTL_{name}".upper() for name in options} | {f"BNCTL_{command}_{name}".upper() for name in options}
    for variable in environment:
        if variable.startswith("BNCTL_") and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
            if close:
                raise UsageError(f"nothing reads the environment variable {variable}", hint=f"did you mean {close[0]}?")


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], problem: str, hint: str) -> None:
    for key in given:
        if key.replace("-", "_") not in known:
            raise UsageError(f"{problem} {key!r}", hint=hint)


def _refuse_twice(given: Mapping[str, Any], path: Path | None) -> None:
    for key in given:
        other = key.replace("-", "_")
        if other != key and other in given:
            raise UsageError(f"{path}: {key!r} and {other!r} are the same setting", hint="leave one of them out")
