"""One bucket's way: packed, to all ranks in chunks, reduced, gathered, unpacked; many buckets at a time.

On CPUs (Gloo) the calling thread packs and sends, so that the network is never idle while there is something packed,
and one thread of the exchange does the rest, bucket after bucket: it waits, reduces, sends, and, once the next bucket
has come as far, waits and unpacks. Direct buckets are not sent a second time, so that nothing waits for their rest: the
calling thread does it after the last one (``finish``), and two ranks have one thread less for their processors. Chunks
are sent from rank to rank: Gloo's own all-gather copies everything once more, and its futures' callbacks run on two
threads, where one collective that waits for another can stop both for ever.
On GPUs (NCCL) the same is queued on a side stream, as an all-to-all and an all-gather.
"""

from __future__ import annotations

import collections
import contextvars
import queue
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from genfast.distributed.buckets import Bucket
from genfast.distributed.failures import Watch
from genfast.ops.gradient_bucket import pack_gradients, reduce_chunks

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
HELD = 3 * 2**18
"""Bytes. A direct bucket of fewer, such as DDP's first one, leaves with the next: what its arrival wakes on the other
rank takes the processor from a backward pass for longer than a slow link (1 Gbit/s) needs for so little."""


class Pending:
    """A bucket on its way. ``future`` ends with ``outcome``, what the last stage returned, or with ``error``."""

    def __init__(self, finite: Tensor, devices: list[torch.device], finish: Callable[[], None] | None):
        self.finite = finite
        self._finish = finish  # for a bucket that the thread which waits for it has to end
        self.outcome: Any = None
        self.error: BaseException | None = None
        self.result: Tensor | None = None  # what ``future`` gives
        self._ended = torch.futures.Future(devices=devices)

    @property
    def future(self) -> torch.futures.Future:
        """For DDP. It ends well even after a failure, whose class DDP would not keep: ``Engine.settle`` raises it."""
        return self._ended.then(lambda _: self.result)

    def end(self, error: BaseException | None = None) -> None:
        self.error = error
        self._ended.set_result(None)

    def wait(self):
        """The outcome."""
        if self._finish is not None and not self._ended.done():
            self._finish()
        self._ended.wait()
        if self.error is not None:
            raise self.error
        return self.outcome


class Exchange:
    """The process group, the thread or stream, and the watch over the ranks, of one reducer."""

    def __init__(self, process_group, device: torch.device, label: str, timeout: float):
        self.group = dist.group.WORLD if process_group is None else process_group
        self.members = dist.get_process_group_ranks(self.group)
        self.ranks, self.rank = len(self.members), dist.get_group_rank(self.group, dist.get_rank())
        self.device = device
        self.watch = Watch(self.group, label, timeout)
        self._others = [(self.rank + k) % self.ranks for k in range(1, self.ranks)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._jobs: queue.SimpleQueue | None = None
        self._left: list = []  # of direct buckets: jobs
        self._held: list[Callable[[], None]] = []  # and what sends those that have not left yet
        self._timeout = timedelta(seconds=timeout)

    def connect(self) -> None:
        """Make a process group of its own: after the ranks have agreed that they want the same."""
        if self.ranks == 1:
            return
        self.group = dist.new_group(
            self.members, timeout=self._timeout, backend=BACKENDS.get(self.device.type),
            use_local_synchronization=self.ranks != dist.get_world_size(),
        )  # fmt: skip
        if self._stream is None:
            self._jobs = queue.SimpleQueue()
            self._worker = threading.Thread(target=_work, args=(self._jobs,), name="genfast reduction", daemon=True)
            self._worker.start()
            weakref.finalize(self, _end, self._jobs, self._worker)

    def begin(
        self, bucket: Bucket, gradients: list[Tensor], scale: float | Tensor, last: Callable[[], Any], what: str,
        average: bool, gather: bool = True,
    ) -> Pending:  # fmt: skip
        """Send a bucket on its way; ``last`` is called when everybody's sums are there, in ``bucket.sent``.

        Without ``gather`` there is only what this rank has summed, ``bucket.sum``. If ``bucket.direct``, both ranks'
        buckets are in ``bucket.received``. ``bucket.unpack`` knows both.
        """
        if self._stream is None:
            return self._begin(bucket, gradients, scale, last, what, average, gather)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            return self._begin(bucket, gradients, scale, last, what, average, gather)

    def _begin(self, bucket, gradients, scale, last, what, average, gather) -> Pending:
        packed = pack_gradients(gradients, bucket.layout, scale=scale, residual=bucket.residual, out=bucket.sent)
        devices = [] if self._stream is None else [self.device]
        pending = Pending(packed.finite, devices, self.finish if bucket.direct else None)
        self.watch.begun[0] += 1
        lost, works = None, []

        def send():
            nonlocal lost, works
            rows = [bucket.sent[0]] * 2 if bucket.direct else bucket.sent
            try:
                works = self._all_to_all(bucket.received, rows, tag=0)
            except RuntimeError as error:
                lost = error  # told by the stages, which take their time to find out who is to blame

        if self.ranks > 1:
            self._held.append(send)
            if not bucket.direct or bucket.sent.numel() >= HELD:
                self._send_held()

        def stages():
            """Pauses while a gather is on its way, then sets the outcome."""
            if self.ranks == 1:
                bucket.sum.copy_(bucket.sent[0])
            else:
                if lost is not None:
                    raise self.watch.failure(what, str(lost))
                self._wait(works, what)
                if not bucket.direct:
                    reduce_chunks(
                        bucket.received, bucket.layout, scale=1 / self.ranks if average else 1.0,
                        residual=bucket.sum_residual, out=bucket.sum,
                    )  # fmt: skip
                    if gather:
                        gathering = self._gather(bucket.sent, bucket.sum, what)
                        yield
                        self._wait(gathering, what)
            pending.outcome = last()

        if self._jobs is None:
            for _ in stages():
                pass
            pending.end()
        else:
            put = self._left.append if bucket.direct else self._jobs.put
            put((contextvars.copy_context(), stages(), pending))
        return pending

    def _send_held(self) -> None:
        for send in self._held:
            send()
        self._held.clear()

    def finish(self) -> None:
        """Do what is left of the direct buckets that were begun. What fails is kept, for ``Pending.wait``."""
        self._send_held()
        left, self._left, failed = self._left, [], None
        for job in left:
            failed = _advance(job, failed)[1]

    def _all_to_all(self, to: Tensor, rows, tag: int) -> list:
        """Row r goes to rank r, and what rank r sends into row r; an equal ``rows[r]`` for all is an all-gather.

        Messages with the same ``tag`` arrive in the order of their sending, which is the same on all ranks.
        """
        if self._stream is not None:
            if isinstance(rows, Tensor):
                return [dist.all_to_all_single(to.view(-1), rows.view(-1), group=self.group, async_op=True)]
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            return [gather(to.view(-1), rows[0].reshape(-1), group=self.group, async_op=True)]
        works = [dist.irecv(to[r], group=self.group, group_src=r, tag=tag) for r in reversed(self._others)]
        works += [dist.isend(rows[r], group=self.group, group_dst=r, tag=tag) for r in self._others]
        if to[self.rank].data_ptr() != rows[self.rank].data_ptr():
            to[self.rank].copy_(rows[self.rank])
        return works

    def _wait(self, works: list, what: str) -> None:
        for work in works:
            if self._stream is None:
                self.watch.wait(work, what)
            else:
                work.wait()  # orders the stream, and does not wait

    def _gather(self, to: Tensor, row: Tensor, what: str) -> list:
        try:
            return self._all_to_all(to, [row] * self.ranks, tag=1)
        except RuntimeError as error:
            raise self.watch.failure(what, str(error)) from None

    def gather_rows(self, flat: Tensor, what: str) -> None:
        """Every rank's part of something flat, in place, where each has its own part already. As :meth:`gather`."""
        if self.ranks > 1:
            rows = flat.view(torch.uint8).view(self.ranks, -1)
            self._wait(self._gather(rows, rows[self.rank], what), what)

    def leave(self) -> None:
        """Once what was begun has ended, close the connections: who waits for this rank then sees that it is gone."""
        if self._jobs is not None:
            self.finish()
            self._jobs.put(None)
            self._worker.join()
            dist.destroy_process_group(self.group)

    def gather(self, t: Tensor, what: str) -> Tensor:
        """[ranks, ...]: every rank's ``t``. After :meth:`begin` only when all that was begun has ended."""
        found = t.new_empty((self.ranks, *t.shape))
        if self.ranks == 1:
            return found.copy_(t)
        self._wait(self._gather(found, t.contiguous(), what), what)
        return found


def _end(jobs: queue.SimpleQueue, worker: threading.Thread) -> None:
    """Also when the interpreter ends, which would not survive a thread that comes back from C++ after it."""
    jobs.put(None)
    if worker is not threading.current_thread():  # which may be the one that lets go of the exchange last
        worker.join(timeout=2)


def _work(jobs: queue.SimpleQueue) -> None:
    """The thread: buckets in the order in which they were begun. After a failure those that follow fail at once.

    A bucket's sum is sent before the last one's has come: what the network has not to do yet comes first.
    """
    torch.get_num_threads()  # OpenMP's setting is a thread's own: this makes it the process's
    failed, ending, paused = None, False, collections.deque()
    while not ending or paused:
        try:
            job = jobs.get(block=not paused)
        except queue.Empty:
            job = paused.popleft()
        if job is None:
            ending = True
            continue
        pauses, failed = _advance(job, failed)
        if pauses:
            paused.append(job)
        del job  # so that the exchange can be collected while this waits


def _advance(job, failed: Exception | None) -> tuple[bool, Exception | None]:
    """The next stage of a bucket, unless one before it has failed. Whether it pauses there, and what has failed now."""
    context, stages, pending = job
    try:
        if failed is None and context.run(next, stages, stages) is None:
            return True, None
    except Exception as error:
        failed = error
    pending.end(failed)
    return False, failed
