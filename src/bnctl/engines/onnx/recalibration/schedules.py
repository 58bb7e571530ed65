"""In which order levels and batches take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bnctl.engines.onnx.recalibration.sites import Arrays, Site
from bnctl.engines.onnx.recalibration.workbench import Feed, Part, Workbench
from bnctl.recalibration.estimate import PROBE, moving_average
from bnctl.recalibration.seen import Seen

if TYPE_CHECKING:
    import onnxruntime

    from bnctl.recalibration.estimate import Statistics


@dataclass(frozen=True, eq=False)
class Account:
    """What a site saw so far.

    Args:
        seen: moments of everything.
        batches: how many that was.
        average: the running statistics as training would have them by now.
    """

    seen: Seen
    batches: int
    average: Statistics

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.seen.values.count


Accounts = dict[Site, Account]


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        accounts: of the sites that are settled (level by level), or of all (batch by batch).
        probe: the same of one batch in every ``PROBE``.
        next_batch: the first batch that is not entered yet; 0 where whole levels are.
        samples: how many came before it; level by level, all.
    """

    accounts: Accounts = field(default_factory=dict)
    probe: Accounts = field(default_factory=dict)
    next_batch: int = 0
    samples: int = 0


Keep = Callable[[Progress], None]
"""Is told how far a run has come, now and then."""


def enter(accounts: Accounts, site: Site, seen: Seen) -> None:
    """Note what a site saw of one more batch. The order of batches decides on the last bit, and on training's average."""
    known = accounts.get(site)
    average = site.before if known is None else known.average
    if seen.values.count > 1:
        average = moving_average(average, [seen.values], site.momentum)
    accounts[site] = (
        Account(seen, 1, average) if known is None else Account(known.seen.merge(seen), known.batches + 1, average)
    )


def level_by_level(
    bench: Workbench, settle: Callable[[Site, Account], Arrays], memory_bytes: int, begun: Progress, keep: Keep
) -> Accounts:
    """All batches to a level, the sites of the level settled, all batches to the next: every activation is computed once.

    Between two levels, the values that later ones read are held for every batch. Where they would take more than `memory_bytes` they are not, and the
    next level is reached from the last border that is held, or from the data.

    Args:
        bench: the model and its data.
        settle: the statistics of a site, from what it saw.
        memory_bytes: what held values may take.
        begun: how far another run has come; its last level is run again.
        keep: is told after each level.
    """
    network = bench.network
    bench.samples = begun.samples or None
    accounts: Accounts = {}
    statistics: dict[str, onnxruntime.OrtValue] = {}
    border = _Border()
    parts = {level: Part(bench, level - 1, level) for level in range(network.depth)}
    for level in range(network.depth):
        sites = network.sites_at(level)
        if level < network.depth - 1 and begun.accounts.keys() >= set(sites):
            accounts |= {site: begun.accounts[site] for site in sites}
        else:
            border = _advance(
                bench,
                border,
                [parts[n] for n in range(border.level + 1, level + 1)],
                level,
                statistics,
                accounts,
                memory_bytes,
            )
            parts = {n: part for n, part in parts.items() if n > border.level}
        for site in sites:
            statistics |= bench.inputs_of(site, settle(site, accounts[site]))
        keep(Progress(dict(accounts), samples=bench.samples or 0))
        bench.progress("settle", len(accounts), len(network.statistics))
    return accounts


def batch_by_batch(
    bench: Workbench,
    choose: Callable[[Site, int, Seen], Arrays],
    what: str,
    step: int = 1,
    begun: Progress | None = None,
    keep: Keep | None = None,
) -> Progress:
    """One pass over the data.

    Args:
        bench: the model and its data.
        choose: the statistics with which a site normalises a batch, from the batch's index and what it saw of it.
        what: is being done, for the progress.
        step: only one batch of so many.
        begun: how far another run has come.
        keep: is told after each batch.
    """
    network = bench.network
    begun = begun or Progress()
    accounts, probe = dict(begun.accounts), dict(begun.probe)
    done = begun
    parts = [Part(bench, level - 1, level) for level in range(network.depth)]
    for feed in bench.feeds(step, begun.next_batch, begun.samples):
        at_level = feed
        statistics: dict[str, onnxruntime.OrtValue] = {}
        for level, part in enumerate(parts):
            reached = part.run(at_level, statistics)
            for site in network.sites_at(level):
                seen = bench.seen_by(site, reached)
                for one in (accounts, probe) if feed.index % (PROBE * bench.stride) == 0 else (accounts,):
                    enter(one, site, seen)
                statistics |= bench.inputs_of(site, choose(site, feed.index, seen))
            at_level = reached.only(network.boundary(level))
        done = Progress(accounts, probe, feed.index + step * bench.stride, bench.samples_so_far)
        if keep is not None:
            keep(done)
        bench.progress(what, feed.index + 1, None)
    return done


@dataclass(eq=False)
class _Border:
    """What is held of all batches behind a level, by index. Behind level -1 are the data, which are read again each time."""

    level: int = -1
    feeds: dict[int, Feed] = field(default_factory=dict)
    nbytes: int = 0

    def take(self, feed: Feed) -> None:
        self.feeds[feed.index] = feed
        self.nbytes += feed.nbytes


def _advance(
    bench: Workbench,
    border: _Border,
    parts: Sequence[Part],
    level: int,
    statistics: Mapping[str, onnxruntime.OrtValue],
    accounts: Accounts,
    memory_bytes: int,
) -> _Border:
    """Run all batches to a level and return its border, or the last one where this one would not fit into memory.

    Always in the same parts, from level to level: the runtime computes half precision in float32, and rounds what leaves a part.

    Coming from the data, whose amount is not known, that shows when the limit is reached. Coming from a border, it is foreseen at the first batch, in
    proportion to what is held there, and that is let go batch by batch.
    """
    network = bench.network
    next_, fits = _Border(level), True
    at_data = border.level < 0
    for feed in bench.feeds() if at_data else map(border.feeds.__getitem__, tuple(border.feeds)):
        reached = feed
        for between, part in enumerate(parts, border.level):
            reached = part.run(reached.only(network.boundary(between)), statistics)
        for site in network.sites_at(level):
            enter(accounts, site, bench.seen_by(site, reached))
        if not fits:
            continue
        first = not next_.feeds
        next_.take(reached.only(network.boundary(level)))
        if at_data:
            fits = next_.nbytes <= memory_bytes
        elif first:
            fits = next_.nbytes * border.nbytes <= memory_bytes * feed.nbytes
        if not fits:
            next_.feeds.clear()
        elif not at_data:
            del border.feeds[feed.index]
    return next_ if fits else border
