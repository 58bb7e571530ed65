"""What is known of all sites: calls are noted as they happen, and entered in the order of the batches, whoever saw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

from bnctl.numerics.moments import Moments
from bnctl.recalibration.estimate import moving_average
from bnctl.recalibration.seen import Seen
from bnctl.recalibration.site import Site
from bnctl.recalibration.workers import Workers

if TYPE_CHECKING:
    from bnctl.recalibration.estimate import Statistics

Moment = tuple[int, int]
"""When a call happened: index of the batch, and the number of the call in its forward pass."""

Note = tuple[Moment, Seen]


@dataclass(frozen=True)
class Account:
    """What a site saw so far.

    Args:
        site: the site.
        first: when it was called first.
        seen: moments of everything.
        calls: how many calls that was.
        average: the running statistics as training would have them by now.
    """

    site: Site
    first: Moment
    seen: Seen
    calls: int
    average: Statistics

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.seen.values.count


@dataclass(eq=False)
class Book:
    """The accounts of all sites, by name."""

    accounts: dict[str, Account] = field(default_factory=dict)
    _notes: dict[str, tuple[Site, list[Note]]] = field(default_factory=dict)

    def note(self, site: Site, when: Moment, seen: Seen) -> None:
        """Remember what a call saw; from any thread."""
        self._notes.setdefault(site.name, (site, []))[1].append((when, seen))

    def enter(self, workers: Workers, *names: str) -> None:
        """Enter what all workers noted since the last time, of the sites named, or of all. Every worker calls this in step."""
        own = {name: self._notes.pop(name) for name in names or tuple(self._notes) if name in self._notes}
        self.accounts |= workers.share(own, self._entered)

    def _entered(self, of_workers: list[dict[str, tuple[Site, list[Note]]]]) -> dict[str, Account]:
        """The accounts that change. Computed where the notes come together: all workers have the same accounts from before."""
        merged: dict[str, tuple[Site, list[Note]]] = {}
        for name, (site, notes) in (item for own in of_workers for item in own.items()):
            merged.setdefault(name, (site, []))[1].extend(notes)
        for _, notes in merged.values():
            notes.sort(key=itemgetter(0))
        return {name: _enter(self.accounts.get(name), site, notes) for name, (site, notes) in merged.items()}

    def in_order(self) -> list[Account]:
        """The accounts, in the order of their first calls."""
        return sorted(self.accounts.values(), key=lambda account: account.first)


def _enter(account: Account | None, site: Site, notes: Sequence[Note]) -> Account:
    """The account after further calls, one after the other: the order decides on the last bit, and on training's average."""
    seen, calls, average = (None, 0, site.before) if account is None else (account.seen, account.calls, account.average)
    for _, new in notes:
        seen = new if seen is None else seen.merge(new, between=site.between)
        training = _for_training(site, new)
        if training.count > 1:
            average = moving_average(average, [training], site.momentum, site.calls_before + calls)
        calls += 1
    assert seen is not None, "a site is entered with its first call"
    return Account(site, notes[0][0] if account is None else account.first, seen, calls, average)


def _for_training(site: Site, seen: Seen) -> Moments:
    """Moments whose unbiased variance is the one that training averages: of instances, each has its own mean to subtract."""
    means = 1 if site.between else seen.samples.count
    return Moments(seen.values.count - means + 1, seen.values.mean, seen.values.m2)
