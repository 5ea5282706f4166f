"""Buckets that keep their memory from step to step, and what rounding left out of each parameter's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.gradient_wire import BucketLayout
from genfast.ops.gradient_bucket import Unpacked, unpack_gradients, unpack_sum


class Bucket:
    """Some parameters' place on the wire.

    Usually ``sent`` is what this rank packs, chunk r for rank r, and ``received`` its own chunk of every rank; in the
    end ``sent`` holds everybody's reduced chunks. ``direct``: two ranks on CPUs that both need the sum send each other
    all they have, which is no more bytes, and half the waiting. Then ``sent`` is this rank's row of ``received``, which
    both add up by themselves: there is no second rounding. ``residual`` and ``sum_residual`` are what the two roundings
    left out, or None without error feedback.
    """

    def __init__(
        self, numels: list[int], ranks: int, rank: int, wire: str, device: torch.device, error_feedback: bool,
        direct: bool,
    ):  # fmt: skip
        def made(shape):
            return torch.empty(shape, dtype=torch.uint8, device=device)

        self.direct = direct and ranks == 2 and device.type == "cpu"
        self.layout = BucketLayout(numels, 1 if self.direct else ranks, wire)
        self.received = made((ranks, self.layout.chunk_bytes))
        if self.direct:
            self.sent = self.received[rank : rank + 1]
        else:
            self.sent, self.sum = made(self.layout.shape), self.received[rank]
        self.residual = self.sum_residual = None
        if error_feedback:
            self.residual = torch.zeros(self.layout.numel, device=device)
            if ranks > 1 and not self.direct:
                self.sum_residual = torch.zeros(self.layout.chunk, device=device)

    def unpack(self, gradients: list[Tensor], scale: float | Tensor = 1.0, average: bool = True) -> Unpacked:
        """The sum or the average over the ranks into ``gradients``, once the exchange has done its part."""
        if self.direct:
            buckets = self.received[:, None]
            return unpack_sum(buckets, self.layout, gradients, scale=scale / len(buckets) if average else scale)
        return unpack_gradients(self.sent, self.layout, gradients, scale=scale)

    def parts(self) -> list[Tensor]:
        """The residual of each tensor."""
        return [self.residual[o : o + n] for o, n in zip(self.layout.offsets, self.layout.numels)]


class Buckets:
    """The buckets in use, by the parameters in them.

    DDP puts parameters into other buckets once it knows the order of their gradients. Residuals move with their
    parameter. That of the second rounding belongs to whoever reduces a value, which is another rank then: it is
    dropped, once.
    """

    def __init__(
        self, numels: list[int], ranks: int, rank: int, wire: str, device: torch.device, error_feedback: bool,
        direct: bool = True,
    ):  # fmt: skip
        self.numels, self.error_feedback = numels, error_feedback
        self._options = ranks, rank, wire, device, error_feedback, direct
        self._found: dict[tuple[int, ...], Bucket] = {}
        self._kept: dict[int, Tensor] = {}  # residuals, also of parameters whose new bucket has not come yet

    def get(self, indices: tuple[int, ...]) -> Bucket:
        """The bucket of parameters ``indices``, made when they come together for the first time."""
        found = self._found.get(indices)
        return found if found is not None else self._made(indices)

    def _made(self, indices: tuple[int, ...]) -> Bucket:
        bucket = Bucket([self.numels[k] for k in indices], *self._options)
        if self.error_feedback:
            kept = self.residuals()
            for k, part in zip(indices, bucket.parts()):
                if k in kept:
                    part.copy_(kept.pop(k))
            self._kept = kept
        self._found = {key: b for key, b in self._found.items() if set(indices).isdisjoint(key)}
        self._found[indices] = bucket
        return bucket

    def residuals(self) -> dict[int, Tensor]:
        """What rounding left out of each parameter's gradient, flat, by the parameter's number."""
        if not self.error_feedback:
            return {}
        return self._kept | {k: part for key, b in self._found.items() for k, part in zip(key, b.parts())}
