"""The workers of a ``torchrun``: processes that talk through torch.distributed, on one machine or many."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from bnctl.errors import BnctlError, UsageError, WorkerError
from bnctl.recalibration.workers import Alone, Workers

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=1)
"""How long a worker waits for another one. One that has died is noticed at once: its connections close."""


class Group:
    """Workers in a star: all send to worker 0, which answers. So what fails has a name.

    Moments travel as float64 arrays in the processors' memory, through gloo, whatever device the models run on.

    Args:
        rank: of this process.
        size: how many there are.
        group: of torch.distributed, with a backend for the processor.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self.rank, self.size = rank, size
        self._group = group
        self._owing = set[int]()  # those who have sent, and got no answer

    def share(self, value: T, combine: Callable[[list[T]], R]) -> R:
        """See :class:`bnctl.recalibration.workers.Workers`."""
        if self.rank:
            self._send(0, ("value", value))
            self._owing.add(0)
            answer: R = self._receive(0)
            self._owing.clear()
            return answer
        values = [value]
        for rank in range(1, self.size):
            values.append(self._receive(rank))
            self._owing.add(rank)
        combined = combine(values)
        for rank in range(1, self.size):
            self._send(rank, ("value", combined))
            self._owing.discard(rank)
        return combined

    def fail(self, error: BaseException) -> None:
        """Tell the others that this worker ends with an error. Both sides of a message must be there at a time: what is under way is finished first."""
        if isinstance(error, WorkerError):
            said = str(error), error.hint
        else:
            cause = str(error) if isinstance(error, BnctlError) else f"{type(error).__name__}: {error}".rstrip(": ")
            said = f"worker {self.rank}: {cause}", getattr(error, "hint", None)
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            with suppress(WorkerError):
                if (rank in self._owing) == bool(self.rank):
                    self._receive(rank)
                self._send(rank, ("error", said))

    def _send(self, rank: int, message: tuple[str, Any]) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        try:
            torch.distributed.send(torch.tensor([data.numel()]), group_dst=rank, group=self._group)
            torch.distributed.send(data, group_dst=rank, group=self._group)
        except RuntimeError as error:
            raise _gone(rank) from error

    def _receive(self, rank: int) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        try:
            torch.distributed.recv(length, group_src=rank, group=self._group)
            data = torch.empty(int(length), dtype=torch.uint8)
            torch.distributed.recv(data, group_src=rank, group=self._group)
        except RuntimeError as error:
            raise _gone(rank) from error
        kind, content = pickle.load(io.BytesIO(data.numpy().tobytes()))
        if kind == "error":
            message, hint = content
            raise WorkerError(message, hint=hint)
        return content


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Workers]:
    """The workers of this run: those that ``torchrun`` has started, or this process alone.

    Raises:
        UsageError: the workers do not find each other.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in environment:
        yield Alone()
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        # the store outlives a restart of the workers, and would have them call those who are gone
        store = PrefixStore(f"bnctl/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the {size} workers do not find each other: {error}",
            hint="start them with torchrun, which sets MASTER_ADDR and MASTER_PORT",
        ) from error
    group = Group(torch.distributed.get_rank(), torch.distributed.get_world_size(), None)
    try:
        yield group
        group.share(None, len)  # nobody ends before all have: worker 0 writes the result
    except BaseException as error:
        if group.rank == 0 or not isinstance(error, WorkerError):
            group.fail(error)
        raise
    finally:
        with suppress(Exception):
            torch.distributed.destroy_process_group()


def _gone(rank: int) -> WorkerError:
    return WorkerError(
        f"worker {rank} is gone",
        hint="see what ended it (its own output, the kernel's log for lack of memory), and run again with --resume",
    )
