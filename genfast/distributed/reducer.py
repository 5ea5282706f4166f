"""Gradients reduced during backward without DistributedDataParallel: straight from and into ``p.grad``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genfast._registry import export
from genfast.distributed.engine import Engine
from genfast.distributed.finished import Finished
from genfast.distributed.readiness import UNUSED, Readiness, grouped

FIRST_BUCKET = 2**20
"""Bytes of the bucket that leaves first."""


@export("distributed")
class GradientReducer:
    """Averages the gradients of a module over all ranks while ``backward`` runs; a module needs no wrapper for it.

        reducer = genfast.GradientReducer(model, wire="bf16", max_norm=1.0)
        ...
        with reducer.no_sync():          # all but the last part of a batch
            loss(model(a)).backward()
        loss(model(b)).backward()
        reducer.finish().apply_to(optimizer)
        optimizer.step()

    Buckets follow the order in which rank 0's first backward pass made the gradients. Nothing is copied: they are
    packed from ``p.grad`` and unpacked into it. Parameters are not broadcast: the ranks begin with equal ones.

    Args:
        module_or_named_parameters, wire, process_group, error_feedback, average, grad_scaler, max_norm, timeout: as of
            :class:`HookState`.
        unused: what becomes of a parameter without gradient on some rank: ``"error"``; ``"zero"``: it counts as zeros
            there, and has a gradient everywhere; ``"keep_none"``: the same, but without one on any rank it stays None
            (the ranks tell each other, after each pass).
        bucket_bytes: of gradients that leave together.

    Raises:
        TypeError, ValueError, RankFailure: as of :class:`HookState`.
    """

    def __init__(
        self,
        module_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        wire: str = "bf16",
        *,
        unused: str = "error",
        bucket_bytes: int = 25 * 2**20,
        process_group=None,
        error_feedback: bool | None = None,
        average: bool = True,
        grad_scaler=None,
        max_norm: float | None = None,
        timeout: float = 600.0,
    ):
        if unused not in UNUSED:
            raise ValueError(f"unused must be one of {', '.join(UNUSED)}; got {unused!r}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
        self.unused, self._bucket_bytes = unused, bucket_bytes
        self.engine = Engine(
            module_or_named_parameters, wire, process_group, error_feedback, average, grad_scaler, max_norm, timeout,
            f"GradientReducer, unused {unused}, bucket_bytes {bucket_bytes}",
        )  # fmt: skip
        parameters = self.engine.parameters
        # Until a backward pass has shown the order, the last parameter is taken to be the first one ready.
        buckets = self._grouped(range(len(parameters))[::-1])
        self._readiness = Readiness(parameters, buckets, self.engine.start, self.engine.reduce)
        self._ordered = False

    def _grouped(self, order) -> list[tuple[int, ...]]:
        parameters = self.engine.parameters.parameters
        limits = min(FIRST_BUCKET, self._bucket_bytes), self._bucket_bytes
        return grouped(order, lambda k: parameters[k].numel() * parameters[k].element_size(), limits, lambda k: None)

    def no_sync(self):
        """Backward passes in this context only accumulate."""
        return self._readiness.paused()

    def finish(self, *, max_norm: float | None = None) -> Finished:
        """After ``backward``: waits until the gradients are reduced; their norm, finiteness, and how to clip them.

        Args:
            max_norm: instead of that of the reducer.

        Raises:
            RuntimeError: a parameter without gradient, with ``unused="error"``; the other ranks get a RankFailure.
        """
        engine, readiness = self.engine, self._readiness
        missing = readiness.without_gradient()
        if missing and self.unused == "error":
            names = ", ".join(engine.parameters.names[k] for k in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            error = RuntimeError(f'no gradient for {names}{more}; unused="zero" or "keep_none" allows that')
            engine.give_up(error)
            raise error
        order = readiness.complete()
        finished = engine.finish(max_norm)
        if self.unused == "keep_none":
            used = torch.ones(len(engine.parameters), dtype=torch.uint8, device=engine.exchange.device)
            used[missing] = 0
            anywhere = engine.exchange.gather(used, "the list of used parameters").amax(0).tolist()
            for k in missing:
                if not anywhere[k]:
                    engine.parameters.parameters[k].grad = None
        if not self._ordered:
            self._follow(order)
        return finished

    def _follow(self, order: list[int]) -> None:
        """Buckets in rank 0's order, if all its parameters took part; the ranks agree on that, too."""
        device = self.engine.exchange.device
        mine = torch.tensor(order or [-1] * len(self.engine.parameters), device=device)
        theirs = self.engine.exchange.gather(mine, "the order of the gradients")[0].tolist()
        if theirs[0] >= 0:
            self._readiness.regroup(self._grouped(theirs))
            self._ordered = True

    def residuals(self) -> dict[str, Tensor]:
        """What rounding has left out of each parameter's gradient so far, flat float32, on this rank."""
        return {self.engine.parameters.names[k]: r for k, r in self.engine.buckets.residuals().items()}

    def close(self) -> None:
        """End the thread that shows the other ranks that this one lives; also done when the process ends."""
        self.engine.close()
