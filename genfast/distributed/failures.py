"""Who died: every rank shows in the store that it lives, and whoever waits in vain reads there whom for."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import json
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from genfast._registry import export

BEATS = 20
"""Signs of life in the time that a rank waits for the others, if that is short."""
LONGEST_BEAT = 1.0
"""Seconds."""
ENDED = "failure"
"""The store's key of the first failure: what is raised, the ranks to blame, and a sentence. All ranks tell the same."""
KINDS = {"RankFailure": lambda message, ranks: RankFailure(message, ranks), "ValueError": lambda m, _: ValueError(m)}


@export("distributed")
class RankFailure(RuntimeError):
    """Ranks that died, stopped, or gave up; ``ranks`` has their global numbers, if they could be told."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()):
        super().__init__(message)
        self.ranks = ranks


class Watch:
    """The signs of life of a group of ranks, and the waiting that looks at them.

    A thread writes, 20 times in ``timeout`` or every second, how often it has done so and how many buckets this rank
    has sent. When a message fails, or has not come in two thirds of ``timeout``, the waiting rank reads everybody's
    twice: ranks that stand still are dead or stopped, ranks that have begun less are busy elsewhere. The first verdict
    stands. Nobody leaves before the others' threads have read it: one of the ranks holds the store.

    Args:
        group: a process group of this rank.
        label: what the group's members, and nobody else, call this watch.
        timeout: seconds.
    """

    def __init__(self, group, label: str, timeout: float):
        self.members = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.timeout = timeout
        self._patience = timedelta(seconds=timeout * 2 / 3)
        self.beat = min(max(timeout / BEATS, 0.02), LONGEST_BEAT)
        self.begun = [0]
        self._talk = _Talk(dist.PrefixStore(f"genfast/{label}", _client()), self.rank, self.beat, self.begun)
        self._talk.start()
        self.close = weakref.finalize(self, _Talk.end, self._talk)
        self.close.atexit = False
        atexit.register(self.close)  # before the interpreter takes from the thread what it stands on

    def wait(self, work, what: str) -> None:
        """Until a message has come or gone; RankFailure if that is not to be expected any more."""
        try:
            work.wait(self._patience)
        except RuntimeError as error:
            raise self.failure(what, str(error)) from None

    def tell(self, **values: str) -> None:
        """Write to the store, for :meth:`read`."""
        with self._answering():
            self._ask(lambda store: store.multi_set(list(values), list(values.values())))

    def read(self, keys: list[str]) -> list[str] | None:
        """What the store has under ``keys``, as soon as it has all of them; None if it has not in two thirds of
        ``timeout``.

        Raises:
            RankFailure, ValueError: what a rank has declared meanwhile.
        """
        pause, end = 0.002, time.monotonic() + self._patience.total_seconds()
        with self._answering():
            while not self._ask(lambda store: store.check(keys)):
                if self._ask(self._talk.look):
                    raise self._ended()
                if time.monotonic() > end:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, self.beat)
            return [value.decode() for value in self._ask(lambda store: store.multi_get(keys))]

    def there(self, keys: list[str]) -> list[bool]:
        """Which of ``keys`` the store has."""
        with self._answering():
            if self._ask(lambda store: store.check(keys)):
                return [True] * len(keys)
            return [self._ask(lambda store, key=key: store.check([key])) for key in keys]

    def declare(self, error: BaseException) -> None:
        """Tell the ranks that wait for this one that it gave up, and why."""
        with contextlib.suppress(RankFailure):  # without a store there is nobody to tell
            self.end("RankFailure", [self.rank], f"rank {self.rank} stopped: {type(error).__name__}: {error}")

    def end(self, kind: str, ranks: list[int], message: str) -> Exception:
        """The verdict, if there is none yet; the error of the one that stands.

        Args:
            kind: ``"RankFailure"`` or ``"ValueError"``.
            ranks: that failed, and will not read the verdict.
        """
        with self._answering():
            self._ask(lambda store: store.compare_set(ENDED, "", json.dumps([kind, ranks, message])))
            self._ask(self._talk.look)
            return self._ended()

    def failure(self, what: str, error: str) -> Exception:
        """The ranks that ``what`` waits for, as an error to raise."""
        begun = self.begun[0]
        try:
            with self._answering():
                if not self._ask(self._talk.look):
                    before = self._signs()
                    time.sleep(2.5 * self.beat)
                    after = self._signs()
                    if not self._ask(self._talk.look):
                        ranks, message = self._verdict(before, after, begun, what)
                        if not ranks:
                            return RankFailure(f"{what} failed, though all ranks live: {error}")
                        return self.end("RankFailure", ranks, f"{message} ({error})")
                return self._ended()
        except RankFailure as gone:
            return gone

    def _ask(self, question: Callable[[Any], Any]):
        answer = concurrent.futures.Future()
        self._talk.questions.put((question, answer))
        return answer.result(max(4 * self.beat, 0.2))

    @contextlib.contextmanager
    def _answering(self):
        """If the store does not answer any more: what was known before, or else that its host is to blame."""
        try:
            yield
        except RankFailure:
            raise
        except (RuntimeError, concurrent.futures.TimeoutError) as lost:
            if self._talk.told is not None:
                raise self._ended() from None
            # Under torchrun it is the launcher's, and none of the ranks is to blame.
            launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            host, ranks = ("the launcher", ()) if launched else ("rank 0", (0,))
            what = "is gone" if isinstance(lost, RuntimeError) else "does not answer"
            raise RankFailure(f"{host}, which holds the store, {what}: {lost}", ranks) from None

    def _ended(self) -> Exception:
        """The error of the verdict, once the ranks that live have read it."""
        kind, ranks, message = json.loads(self._talk.told)
        deadline = time.monotonic() + 10 * self.beat
        with contextlib.suppress(RuntimeError, concurrent.futures.TimeoutError):  # one that held the store had waited
            while self._ask(lambda store: store.add("seen", 0)) < len(self.members) - len(ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(self.beat / 4)
        return KINDS[kind](message, tuple(ranks))

    def _signs(self) -> list[list[int]]:
        """Beats and begun buckets of every member; of one that never came -1, which stands as still as a dead one."""
        keys = [f"life/{r}" for r in self.members]
        there = [key for key, came in zip(keys, self.there(keys)) if came]
        signs = dict(zip(there, self._ask(lambda store: store.multi_get(there))))
        return [[int(x) for x in signs.get(key, b"-1 -1").split()] for key in keys]

    def _verdict(self, before, after, begun: int, what: str) -> tuple[list[int], str]:
        still = [r for r, old, new in zip(self.members, before, after) if old == new and r != self.rank]
        if still:
            return still, f"{named(still)} died or stopped: no sign of life while rank {self.rank} waited for {what}"
        late = [r for r, (_, others) in zip(self.members, after) if others < begun]
        return late, f"{named(late)} did not come to {what} in {self.timeout:g} s, though alive"


_clients: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _client():
    """The store of this process's ranks, by a connection of our own where torch can make one: the other one may be held
    by a call that waits. Nothing here waits for a key, so that all watches can share it."""
    store = dist.distributed_c10d._get_default_store()
    if store not in _clients:
        _clients[store] = store.clone() if hasattr(store, "clone") else store
    return _clients[store]


class _Talk(threading.Thread):
    """All that is said to the store and read from it, so that one that does not answer holds up nobody else.

    ``told`` is the verdict, once it has been read.
    """

    def __init__(self, store, rank: int, beat: float, begun: list[int]):
        super().__init__(name="genfast signs of life", daemon=True)
        self.store, self.key, self.beat, self.begun = store, f"life/{rank}", beat, begun
        self.questions: queue.SimpleQueue = queue.SimpleQueue()
        self.told: bytes | None = None
        store.set(self.key, "0 0")

    def run(self) -> None:
        beats, next_beat = 0, time.monotonic() + self.beat
        while True:
            try:
                pause = None if next_beat is None else max(0.0, next_beat - time.monotonic())
                question = self.questions.get(timeout=pause)
            except queue.Empty:
                beats, next_beat = beats + 1, time.monotonic() + self.beat
                try:
                    self.store.set(self.key, f"{beats} {self.begun[0]}")
                    self.look(self.store)
                except RuntimeError:
                    next_beat = None  # the store has ended, and with it whoever could read this
                continue
            if question is None:
                return
            asked, answer = question
            try:
                answer.set_result(asked(self.store))
            except Exception as error:
                answer.set_exception(error)
            del question, asked, answer

    def look(self, store) -> bool:
        """Whether there is a verdict; says, once, that this rank has seen it."""
        if self.told is None and store.check([ENDED]):
            self.told = store.get(ENDED)
            store.add("seen", 1)
        return self.told is not None

    def end(self) -> None:
        self.questions.put(None)
        self.join(timeout=2)


def named(ranks: list[int]) -> str:
    """``rank 3``, or ``ranks 1, 2``."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
