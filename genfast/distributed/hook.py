"""A communication hook of DistributedDataParallel for every wire.

This file has no postponed annotations: DDP compares those of a hook with the classes themselves.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genfast._registry import export
from genfast.distributed.engine import Engine
from genfast.distributed.finished import Finished


@export("distributed")
class HookState:
    """The state of :func:`comm_hook`, and what it finds out: one for each DistributedDataParallel.

        state = genfast.HookState(model, wire="int8", max_norm=1.0)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(state, genfast.comm_hook)
        ...
        loss.backward()
        state.finish().apply_to(optimizer)
        optimizer.step()

    All ranks must make it, in the same order among other such objects. It can be pickled and copied, as DDP is with its
    hooks: the copy joins all ranks, when its first bucket comes, with nothing left over from rounding.

    Args:
        module_or_named_parameters: the module, wrapped or not, or pairs of names and parameters.
        wire: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"``, ``"fp8_e4m3"`` or ``"fp8_e5m2"``.
        process_group: DDP's; by default all ranks. A group of the same ranks is made from it.
        error_feedback: whether what rounding leaves out is added to the next gradient; by default on int8 and fp8.
        average: divide the sum by the number of ranks, as DDP does.
        grad_scaler: the ``torch.amp.GradScaler`` in use. Gradients keep its scale, norms are told without it.
        max_norm: for the clip coefficient.
        timeout: seconds within which a rank that died or stopped is named. On GPUs it is NCCL that watches.

    Raises:
        TypeError: a parameter of a dtype that does not travel, or with sparse gradients.
        ValueError: an unknown wire, or parameters that differ between ranks: with the first difference, on all ranks.
        RankFailure: (from ``backward``) a rank died, stopped or gave up.
    """

    def __init__(
        self,
        module_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
        wire: str = "bf16",
        *,
        process_group: dist.ProcessGroup | None = None,
        error_feedback: bool | None = None,
        average: bool = True,
        grad_scaler=None,
        max_norm: float | None = None,
        timeout: float = 600.0,
    ):
        self._options = wire, process_group, error_feedback, average, grad_scaler, max_norm, timeout, "DDP hook"
        self.engine = Engine(module_or_named_parameters, *self._options)

    def __getstate__(self) -> dict:
        parameters = self.engine.parameters
        wire, _, *others = self._options
        return {"_parameters": list(zip(parameters.names, parameters.parameters)), "_options": (wire, None, *others)}

    def __getattr__(self, name: str):
        if name != "engine" or "_parameters" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.engine = Engine(self.__dict__.pop("_parameters"), *self._options)
        return self.engine

    def finish(self, *, max_norm: float | None = None) -> Finished:
        """After ``backward``: the norm of the gradients, whether they are finite, and how to clip them.

        Args:
            max_norm: instead of that of the state.

        Raises:
            RuntimeError: no backward pass has reduced gradients since the state was made.
        """
        return self.engine.finish(max_norm)

    def residuals(self) -> dict[str, Tensor]:
        """What rounding has left out of each parameter's gradient so far, flat float32, on this rank."""
        return {self.engine.parameters.names[k]: r for k, r in self.engine.buckets.residuals().items()}

    def close(self) -> None:
        """End the thread that shows the other ranks that this one lives; also done when the process ends."""
        self.engine.close()


@export("distributed")
def comm_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """For ``DistributedDataParallel.register_comm_hook(HookState(...), comm_hook)``.

    A bucket is packed into the wire's format, sent to all ranks in chunks, summed in float32 in the order of the ranks,
    rounded, gathered and unpacked: the same bits on every rank and in every run.

    Args:
        state: of this DistributedDataParallel's module.
        bucket: of strided gradients, float32, bfloat16 or float16, which the result overwrites.

    Returns:
        A future of ``bucket.buffer()``. In ``DistributedDataParallel.join`` the average is over all ranks, also those
        that have run out of data (``divide_by_initial_world_size=True``).

    Raises:
        TypeError: a sparse gradient, by its parameter's name.
        ValueError: a parameter that the state was not given.
    """
    engine = state.engine
    buffer = bucket.buffer()
    indices = engine.parameters.indices(bucket.parameters())
    if buffer.layout is not torch.strided:
        raise TypeError(f"{engine.parameters.names[indices[0]]} has a sparse gradient, which buckets cannot hold")
    if bucket.index() == 0:
        engine.start()
    pending = engine.reduce(indices, bucket.gradients())
    pending.result = buffer
    settle_later(bucket, engine.settle)
    if bucket.is_last():
        engine.exchange.finish()
    return pending.future


def settle_later(bucket: dist.GradBucket, settle: Callable[[], None]) -> None:
    """Have ``settle``, which may raise, called at the end of the backward pass of a bucket that has been begun."""
    if torch._C._current_graph_task_id() == -1:
        # A rank that has run out of data, in DDP's join(): it sends zeros, and waits for nothing else.
        if bucket.is_last():
            settle()
    elif bucket.index() == 0:
        # In two steps, so that it comes after DDP's own, which copies buckets while others are still on their way.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(settle))
