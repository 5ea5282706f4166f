"""Which gradients a backward pass has made, and which buckets can therefore leave."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from genfast.distributed.parameters import ParameterList

UNUSED = ("error", "zero", "keep_none")


class Readiness:
    """Calls ``launch(indices, gradients)`` for bucket after bucket, in an order that is the same on all ranks.

    ``start`` is called before the first of a backward pass. A hook on each parameter tells when its gradient is
    complete; a bucket leaves when its own are, and those before it have left.
    """

    def __init__(self, parameters: ParameterList, buckets: list[tuple[int, ...]], start: Callable, launch: Callable):
        self.parameters, self._start, self._launch = parameters, start, launch
        self.enabled = True
        self.regroup(buckets)
        me = weakref.ref(self)

        def ready(p: Tensor) -> None:
            if (found := me()) is not None and found.enabled:
                found.ready(p)

        self._handles = [p.register_post_accumulate_grad_hook(ready) for p in parameters.parameters]
        weakref.finalize(self, lambda handles: [h.remove() for h in handles], self._handles)

    def regroup(self, buckets: list[tuple[int, ...]]) -> None:
        """Other buckets from now on."""
        self.buckets = buckets
        self._bucket_of = {k: b for b, indices in enumerate(buckets) for k in indices}
        self._forget()

    def _forget(self) -> None:
        self._missing = [len(indices) for indices in self.buckets]
        self.order: list[int] = []  # in which gradients became ready
        self._seen: set[int] = set()
        self._next = 0

    def ready(self, p: Tensor) -> None:
        k = self.parameters.index[id(p)]
        name = self.parameters.names[k]
        if k in self._seen:
            raise RuntimeError(
                f"{name} got a second gradient before finish() or step(): accumulate inside no_sync(), and call one of "
                "them after each other backward pass"
            )
        if p.grad.layout is not torch.strided:
            raise TypeError(f"{name} has a sparse gradient, which buckets cannot hold")
        self._begin_once()
        self._seen.add(k)
        self.order.append(k)
        self._missing[self._bucket_of[k]] -= 1
        while self._next < len(self.buckets) and not self._missing[self._next]:
            self._leave()

    def _begin_once(self) -> None:
        if not self._seen and not self._next:
            self._start()

    def _leave(self) -> None:
        indices = self.buckets[self._next]
        self._next += 1
        self._launch(indices, [self.parameters.parameters[k].grad for k in indices])

    def without_gradient(self) -> list[int]:
        """Parameters that have none, also from earlier passes."""
        return [k for k, p in enumerate(self.parameters.parameters) if p.grad is None]

    def complete(self) -> list[int]:
        """Let the buckets leave that have not: those with gradients of earlier passes, and with zeros where there are
        none. The order of this pass, if all parameters took part, otherwise []."""
        self._begin_once()
        for k in self.without_gradient():
            self.parameters.parameters[k].grad = torch.zeros_like(self.parameters.parameters[k])
        while self._next < len(self.buckets):
            self._leave()
        order = self.order if len(self.order) == len(self.parameters) else []
        self._forget()
        return order

    @contextlib.contextmanager
    def paused(self):
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


def grouped(
    order: Sequence[int], size_of: Callable[[int], int], limits: tuple[int, int], kind: Callable[[int], Hashable]
):
    """Indices in ``order``, cut into buckets: the first one small, so that the wire is busy early; each of one kind."""
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    size = 0
    for k in order:
        if current and (kind(k) != kind(current[0]) or size >= limits[min(len(found), 1)]):
            found.append(tuple(current))
            current, size = [], 0
        current.append(k)
        size += size_of(k)
    return [*found, tuple(current)]
