"""Who died: every rank shows in the store that it lives, and whoever waits in vain reads there whom for."""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import time
import weakref
from datetime import timedelta

import torch.distributed as dist

from genfast._registry import export

BEATS = 20
"""Signs of life in the time that a rank waits for the others."""


@export("distributed")
class RankFailure(RuntimeError):
    """Ranks that died, stopped, or gave up; ``ranks`` has their global numbers, if they could be told."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()):
        super().__init__(message)
        self.ranks = ranks


class Watch:
    """The signs of life of a group of ranks, and the waiting that looks at them.

    A thread writes, 20 times in ``timeout``, how often it has done so and how many buckets this rank has sent.
    When a message fails, or has not come in two thirds of ``timeout``, the waiting rank reads everybody's twice: ranks
    that stand still are dead or stopped, ranks that have begun less are busy elsewhere. The first verdict stands.
    """

    def __init__(self, group, label: str, timeout: float):
        self.members = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        store = dist.distributed_c10d._get_default_store()
        # A client of its own, where torch can make one: the other one may be held by a call that blocks.
        store = store.clone() if hasattr(store, "clone") else store
        self.store = dist.PrefixStore(f"genfast/{label}", store)
        self.store.set_timeout(timedelta(seconds=timeout))
        self.timeout = timeout
        self._patience = timedelta(seconds=timeout * 2 / 3)
        self.beat = max(timeout / BEATS, 0.02)
        self.begun = [0]
        self.store.set(f"life/{self.rank}", "0 0")
        self._stop = threading.Event()
        arguments = self.store, f"life/{self.rank}", self.beat, self.begun, self._stop
        thread = threading.Thread(target=_live, args=arguments, name="genfast signs of life", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _end, self._stop, thread)
        self.close.atexit = False
        atexit.register(self.close)  # before the interpreter takes from the thread what it stands on

    def wait(self, work, what: str) -> None:
        """Until a message has come or gone; RankFailure if that is not to be expected any more."""
        try:
            work.wait(self._patience)
        except RuntimeError as error:
            raise self.failure(what, str(error)) from None

    def declare(self, error: BaseException) -> None:
        """Tell the ranks that wait for this one that it gave up, and why."""
        message = f"rank {self.rank} stopped: {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # without a store there is nobody to tell
            self.store.compare_set("failure", "", json.dumps([[self.rank], message]))

    def failure(self, what: str, error: str) -> RankFailure:
        """The ranks that ``what`` waits for, as an error to raise."""
        begun = self.begun[0]
        try:
            if not self.store.check(["failure"]):
                before = self._signs()
                time.sleep(2.5 * self.beat)
                if not self.store.check(["failure"]):
                    ranks, message = self._verdict(before, self._signs(), begun, what)
                    if not ranks:
                        return RankFailure(f"{what} failed, though all ranks live: {error}")
                    self.store.compare_set("failure", "", json.dumps([ranks, message]))
            ranks, message = json.loads(self.store.get("failure"))
        except RuntimeError as lost:
            return RankFailure(f"{what} failed, and rank 0, which holds the store, is gone: {lost}", (0,))
        with contextlib.suppress(RuntimeError):  # rank 0 knew before, and has left with the store
            self._leave_together(len(ranks))
        return RankFailure(f"{message} ({error})", tuple(ranks))

    def _signs(self) -> list[list[int]]:
        return [[int(x) for x in sign.split()] for sign in self.store.multi_get([f"life/{r}" for r in self.members])]

    def _verdict(self, before, after, begun: int, what: str) -> tuple[list[int], str]:
        still = [r for r, old, new in zip(self.members, before, after) if old == new and r != self.rank]
        if still:
            return still, f"{_ranks(still)} died or stopped: no sign of life while rank {self.rank} waited for {what}"
        late = [r for r, (_, others) in zip(self.members, after) if others < begun]
        return late, f"{_ranks(late)} did not come to {what} in {self.timeout:g} s, though alive"

    def _leave_together(self, failed: int) -> None:
        """Stay, alive, until all the others know or had the time to: one of them holds the store, and who leaves early
        looks dead."""
        seen = self.store.add("seen", 1)
        deadline = time.monotonic() + 3 * self.beat
        while seen < len(self.members) - failed and time.monotonic() < deadline:
            time.sleep(self.beat / 4)
            seen = self.store.add("seen", 0)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _live(store, key: str, beat: float, begun: list[int], stop: threading.Event) -> None:
    count = 0
    while not stop.wait(beat):
        count += 1
        try:
            store.set(key, f"{count} {begun[0]}")
        except RuntimeError:
            return  # the store has ended, and with it whoever could read this


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=5)
