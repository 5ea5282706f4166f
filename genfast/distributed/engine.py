"""What the hook and the reducer share: buckets of a list of parameters reduced, and what is found out on the way."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genfast.distributed.buckets import Buckets
from genfast.distributed.exchange import Exchange, Pending
from genfast.distributed.finished import Finished
from genfast.distributed.parameters import ParameterList
from genfast.gradient_wire import WIRES

PIECE, HOST_PIECE, LEAST_CHUNK = 2**23, 2**21, 2**14
"""Values that travel together, on GPUs or between two ranks, and among more on CPUs; and of them to one rank."""
_made: Counter = Counter()
"""How many engines each group of ranks has made: the name of the next one in the store."""


class Engine:
    """Reduces buckets of gradients, one backward pass after the other."""

    def __init__(
        self, source: nn.Module | Iterable[tuple[str, Tensor]], wire: str, process_group, error_feedback: bool | None,
        average: bool, grad_scaler, max_norm: float | None, timeout: float, kind: str,
    ):  # fmt: skip
        if wire not in WIRES:
            raise ValueError(f"wire must be one of {', '.join(WIRES)}; got {wire!r}")
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed has no process group: call torch.distributed.init_process_group()")
        self.parameters = ParameterList(source)
        self.wire, self.average, self.max_norm, self._scaler = wire, average, max_norm, grad_scaler
        self.error_feedback = WIRES[wire].largest is not None if error_feedback is None else bool(error_feedback)
        members = tuple(dist.get_process_group_ranks(dist.group.WORLD if process_group is None else process_group))
        label = f"{'-'.join(map(str, members))}/{_made[members]}"
        _made[members] += 1
        self.exchange = Exchange(process_group, self.parameters.device, label, timeout)
        options = f"{kind}, wire {wire}, error_feedback {self.error_feedback}, average {average}"
        try:
            self.parameters.compare(self.exchange.watch, options)
        except BaseException:
            self.exchange.watch.close()
            raise
        self.exchange.connect()
        self.numels = [p.numel() for p in self.parameters.parameters]
        self._cuts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        exchange = self.exchange
        self.buckets = Buckets(self.numels, exchange.ranks, exchange.rank, wire, exchange.device, self.error_feedback)
        self.running: dict[tuple[int, ...], Pending] = {}
        self._scale: Tensor | None = None

    def start(self) -> None:
        """A backward pass begins: what was found out in the last one is no longer asked for."""
        self.running = {}
        self._scale = None
        if self._scaler is not None and self._scaler.is_enabled():
            self._scale = self._scaler.scale(torch.ones((), device=self.parameters.device))

    def reduce(self, indices: tuple[int, ...], gradients: list[Tensor]) -> Pending:
        """Begin to reduce the gradients of parameters ``indices``, which the result overwrites.

        They travel in pieces, so that one is reduced while the next is on the wire. What is returned ends last.
        """
        pending = None
        for first, end in self._pieces(indices):
            pending = self._reduce(indices[first:end], gradients[first:end])
        return pending

    def _pieces(self, indices: tuple[int, ...]) -> list[tuple[int, int]]:
        if indices not in self._cuts:
            exchange = self.exchange
            # On CPUs the network waits for the kernels: the smaller a piece, the less. Two ranks gather nothing, and
            # are often on one machine, where each message costs them more than it saves.
            piece = HOST_PIECE if exchange.device.type == "cpu" and exchange.ranks > 2 else PIECE
            most = max(piece, exchange.ranks * LEAST_CHUNK)
            ends, values = [0], 0
            for k, index in enumerate(indices):
                values += self.numels[index]
                if values >= most or k + 1 == len(indices):
                    ends.append(k + 1)
                    values = 0
            self._cuts[indices] = list(itertools.pairwise(ends))
        return self._cuts[indices]

    def _reduce(self, indices: tuple[int, ...], gradients: list[Tensor]) -> Pending:
        bucket = self.buckets.get(indices)
        pack_scale = unpack_scale = 1.0
        if self._scale is not None and self.error_feedback:
            # What rounding left out must not change its meaning when the loss scale changes.
            pack_scale, unpack_scale = self._scale.reciprocal(), self._scale

        def unpack():
            return bucket.unpack(gradients, unpack_scale, self.average)

        what = f"the gradients from {self.parameters.names[indices[0]]} on"
        pending = self.exchange.begin(bucket, gradients, pack_scale, unpack, what, self.average)
        self.running[indices] = pending
        return pending

    def settle(self) -> None:
        """Wait until all that was begun has ended; what failed is raised as it is."""
        for pending in self.running.values():
            pending.wait()

    def finish(self, max_norm: float | None) -> Finished:
        """Norm and finiteness of all gradients, from what unpacking has counted."""
        if not self.running:
            raise RuntimeError("finish() follows a backward pass that reduced gradients; there was none")
        outcomes = [pending.wait() for pending in self.running.values()]
        norm = torch.cat([o.square_norm for o in outcomes]).sum().sqrt()
        finite = torch.cat([o.finite for o in outcomes])
        if self._scale is not None:
            norm = norm / self._scale
        flags = torch.cat([p.finite for p in self.running.values()])
        order = [k for indices in self.running for k in indices]
        return Finished(
            norm.float(), finite.all(), self.max_norm if max_norm is None else max_norm, self._scale is not None,
            lambda: self.bad(order, flags, finite),
        )  # fmt: skip

    def bad(self, order: list[int], sent: Tensor, reduced: Tensor) -> dict[str, list[int]]:
        """Names of parameters ``order``, by what each rank sent, which is exact: on the wire a block is spoilt as a
        whole. Where nothing was, the sum has overflowed."""
        everywhere = self.exchange.gather(sent.to(torch.uint8), "the names of bad parameters").T.tolist()
        found = {
            self.parameters.names[k]: [self.exchange.members[r] for r, good in enumerate(column) if not good]
            for k, column in zip(order, everywhere)
            if not all(column)
        }
        return found or {self.parameters.names[k]: [] for k, good in zip(order, reduced.tolist()) if not good}

    def give_up(self, error: BaseException) -> None:
        """Before an error is raised that the other ranks know nothing of: they are told, and stop waiting."""
        self.exchange.watch.declare(error)
        self.exchange.leave()

    def close(self) -> None:
        """End the signs of life."""
        self.exchange.watch.close()
