"""What a run that was interrupted had found out, in a file from which another one goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bnctl.errors import DataError, UsageError
from bnctl.numerics.moments import Moments
from bnctl.recalibration.book import Account
from bnctl.recalibration.seen import Seen
from bnctl.recalibration.site import Site

EVERY_S = 2.0
"""The file is written anew when it is so old, in seconds."""

_SCALARS = ("name", "mean_path", "var_path", "eps", "resolution", "between", "momentum", "calls_before")


@dataclass(frozen=True)
class State:
    """How far a run has come.

    Args:
        random_state: of torch's generator at the start of each pass.
        accounts: of the sites that are settled (exact), or of all (batch, ema).
        probe: the same of one batch in some.
        next_batch: number of the first batch that is not entered yet; 0 for the exact method.
        samples: how many came before it; for the exact method, all.
        count: how many batches are used, at least; None for all.
        skipped: batches that were left out.
    """

    random_state: bytes
    accounts: Mapping[str, Account] = field(default_factory=dict)
    probe: Mapping[str, Account] = field(default_factory=dict)
    next_batch: int = 0
    samples: int = 0
    count: int | None = None
    skipped: frozenset[int] = frozenset()


class Partial:
    """The file of a run.

    Args:
        path: of the file; None: nothing is kept.
        about: what decides on the result, in words: another run goes on only where these are the same.
        every_s: least time between two versions of the file, in seconds.
    """

    def __init__(
        self, path: Path | None = None, about: Mapping[str, Any] | None = None, *, every_s: float = EVERY_S
    ) -> None:
        if path is not None and path.is_dir():
            raise UsageError(
                f"{path} is a folder, and what is known is to be kept there", hint="move it away, or give another -o"
            )
        self.path = path
        self._about = json.loads(json.dumps(dict(about or {})))
        self._every_s = every_s
        self._written_s = time.monotonic()
        self._unwritten: State | None = None

    def require_place(self, *, force: bool) -> None:
        """Refuse to begin anew over what the same command has found out before, and over any file that no run of bnctl has written. What was found out about
        something else goes.

        Args:
            force: all that a run of bnctl has written may go.

        Raises:
            UsageError: there is such a file.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                about = json.loads(str(archive["head"]))["about"]
        except Exception:  # zipfile, numpy and json each have several for what is none of ours
            about = None
        if about is None:
            raise UsageError(
                f"{self.path} exists, and is not what an interrupted run leaves",
                hint="what is known is kept there: move it away, or give another -o",
            )
        if about == self._about and not force:
            raise UsageError(
                f"{self.path} holds what the same command had found out before it was interrupted",
                hint="go on with --resume, or begin anew with --force",
            )

    def read(self) -> State | None:
        """What the file holds, None where there is none.

        Raises:
            UsageError: it is of a run on something else.
            DataError: it cannot be read.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
            head = json.loads(str(arrays["head"]))
            about = head["about"]
            accounts, probe = (
                {entry["name"]: _account(entry, arrays[f"{part}.{number}"]) for number, entry in enumerate(head[part])}
                for part in ("accounts", "probe")
            )
            state = State(
                arrays["random_state"].tobytes(),
                accounts,
                probe,
                head["next_batch"],
                head["samples"],
                head["count"],
                frozenset(head["skipped"]),
            )
            other = [key for key in {**about, **self._about} if about.get(key) != self._about.get(key)]
        except Exception as error:  # zipfile, numpy and json each have several for a damaged file
            raise DataError(
                f"{self.path} cannot be read: {error}", hint="remove it, and run without --resume"
            ) from error
        if other:
            said = ", ".join(f"{key} was {about.get(key)} and is {self._about.get(key)}" for key in other)
            raise UsageError(
                f"{self.path} is of another run: {said}", hint="repeat the command as it was, or leave --resume out"
            )
        return state

    def keep(self, state: State) -> None:
        """Remember how far the run has come, and write it when it is time."""
        self._unwritten = state
        if time.monotonic() - self._written_s >= self._every_s:
            self.write()

    def write(self) -> None:
        """Write what was remembered last; the file is replaced in one step, so that it is whole at any time."""
        state, self._unwritten = self._unwritten, None
        if self.path is None or state is None:
            return
        head = {
            "about": self._about,
            "next_batch": state.next_batch,
            "samples": state.samples,
            "count": state.count,
            "skipped": sorted(state.skipped),
        }
        arrays: dict[str, Any] = {"random_state": np.frombuffer(state.random_state, dtype=np.uint8)}
        for part, accounts in (("accounts", state.accounts), ("probe", state.probe)):
            head[part] = [_entry(account) for account in accounts.values()]
            arrays |= {f"{part}.{number}": _vectors(account) for number, account in enumerate(accounts.values())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with beside.open("wb") as file:
            np.savez(file, head=np.array(json.dumps(head)), **arrays)
        beside.replace(self.path)
        self._written_s = time.monotonic()

    def remove(self) -> None:
        """The run has ended well."""
        self._unwritten = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _entry(account: Account) -> dict[str, Any]:
    counts = {"values": account.seen.values.count, "samples": account.seen.samples.count, "calls": account.calls}
    return {name: getattr(account.site, name) for name in _SCALARS} | counts | {"first": account.first}


def _vectors(account: Account) -> Any:
    """(10, C): all that an account has per channel."""
    seen = (account.seen.values, account.seen.samples, account.seen.spread)
    moments = [vector for part in seen for vector in (part.mean, part.m2)]
    return np.stack([*account.site.before, *moments, *account.average])


def _account(entry: Mapping[str, Any], vectors: Any) -> Account:
    before, values, samples, spread, average = (vectors[row : row + 2] for row in range(0, 10, 2))
    site = Site(**{name: entry[name] for name in _SCALARS}, before=(before[0], before[1]))
    count = entry["samples"]
    seen = Seen(Moments(entry["values"], *values), Moments(count, *samples), Moments(count, *spread))
    return Account(site, tuple(entry["first"]), seen, entry["calls"], (average[0], average[1]))
