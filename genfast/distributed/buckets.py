"""Buckets that keep their memory from step to step, and what rounding left out of each parameter's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.gradient_wire import BucketLayout


class Bucket:
    """Some parameters' place on the wire.

    ``sent`` is what this rank packs, and in the end everybody's reduced chunks; ``received`` is its own chunk of every
    rank. ``residual`` and ``chunk_residual`` are what the two roundings left out, or None without error feedback.
    """

    def __init__(self, layout: BucketLayout, device: torch.device, error_feedback: bool):
        self.layout = layout
        self.sent, self.received = (torch.empty(layout.shape, dtype=torch.uint8, device=device) for _ in range(2))
        self.residual = self.chunk_residual = None
        if error_feedback:
            self.residual = torch.zeros(layout.numel, device=device)
            self.chunk_residual = torch.zeros(layout.chunk, device=device) if layout.ranks > 1 else None

    def parts(self) -> list[Tensor]:
        """The residual of each tensor."""
        return [self.residual[o : o + n] for o, n in zip(self.layout.offsets, self.layout.numels)]


class Buckets:
    """The buckets in use, by the parameters in them.

    DDP puts parameters into other buckets once it knows the order of their gradients. Residuals move with their
    parameter. That of the second rounding belongs to whoever reduces a value, which is another rank then: it is
    dropped, once.
    """

    def __init__(self, numels: list[int], ranks: int, wire: str, device: torch.device, error_feedback: bool):
        self.numels, self.ranks, self.wire = numels, ranks, wire
        self.device, self.error_feedback = device, error_feedback
        self._found: dict[tuple[int, ...], Bucket] = {}
        self._kept: dict[int, Tensor] = {}  # residuals, also of parameters whose new bucket has not come yet

    def get(self, indices: tuple[int, ...]) -> Bucket:
        """The bucket of parameters ``indices``, made when they come together for the first time."""
        found = self._found.get(indices)
        return found if found is not None else self._made(indices)

    def _made(self, indices: tuple[int, ...]) -> Bucket:
        layout = BucketLayout([self.numels[k] for k in indices], self.ranks, self.wire)
        bucket = Bucket(layout, self.device, self.error_feedback)
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
