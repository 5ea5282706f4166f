"""PyTorch's communication hooks, by name and signature, on genfast's reduction: they work on Gloo too.

    from genfast.dropin import ddp_hooks
    ddp.register_comm_hook(None, ddp_hooks.bf16_compress_hook)

As in ``torch.distributed.algorithms.ddp_comm_hooks`` the state is the process group, or None for all ranks. What
differs: sums are made in float32 and rounded once, also between half-precision numbers; the quantised hooks send int8
with a scale per 256 values, so that they are finer than PyTorch's, send an eighth of what those do with two ranks, and
work on Gloo, where PyTorch's raise IndexError. :func:`genfast.comm_hook` adds norms, error feedback and names.

This file has no postponed annotations: DDP compares those of a hook with the classes themselves. Nor do the functions
of bfloat16 carry their own names inside: DDP refuses a hook that is called so where torch was built without NCCL.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from genfast.distributed.buckets import Bucket
from genfast.distributed.exchange import Exchange, Pending
from genfast.distributed.hook import settle_later

__all__ = [
    "allreduce_hook",
    "bf16_compress_hook",
    "bf16_compress_wrapper",
    "fp16_compress_hook",
    "fp16_compress_wrapper",
    "quantization_perchannel_hook",
    "quantization_pertensor_hook",
]

OWN_WIRE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Future = torch.futures.Future[torch.Tensor]


def allreduce_hook(process_group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    """The average, each number sent as it is."""
    return _reduced(process_group, bucket, OWN_WIRE.get(bucket.buffer().dtype, "fp32"))


def fp16_compress_hook(process_group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    """The average, sent as float16."""
    return _reduced(process_group, bucket, "fp16")


def bf16_compress_hook(process_group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    """The average, sent as bfloat16."""
    return _reduced(process_group, bucket, "bf16")


bf16_compress_hook.__name__ = "bf16"


def quantization_pertensor_hook(process_group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    """The average, sent as int8."""
    return _reduced(process_group, bucket, "int8")


def quantization_perchannel_hook(
    process_group: dist.ProcessGroup, bucket: dist.GradBucket, bucket_size=512
) -> Future:  # fmt: skip
    """The average, sent as int8.

    Args:
        bucket_size: values that may share a scale; here it is always 256 of them, so it must be at least that.
    """
    if bucket_size < 256:
        raise ValueError(f"bucket_size must be at least 256, the values that share a scale; got {bucket_size}")
    return _reduced(process_group, bucket, "int8")


def fp16_compress_wrapper(hook: Callable[[Any, dist.GradBucket], Future]) -> Callable[[Any, dist.GradBucket], Future]:
    """``hook`` on a bucket cast to float16; its result is cast back."""
    return _cast(hook, torch.float16)


def bf16_compress_wrapper(hook: Callable[[Any, dist.GradBucket], Future]) -> Callable[[Any, dist.GradBucket], Future]:
    """``hook`` on a bucket cast to bfloat16; its result is cast back."""
    return _cast(hook, torch.bfloat16)


def _cast(hook, dtype: torch.dtype):
    def wrapped(hook_state, bucket: dist.GradBucket) -> Future:
        buffer = bucket.buffer()
        bucket.set_buffer(buffer.to(dtype))
        return hook(hook_state, bucket).then(lambda future: buffer.copy_(future.value()))

    return wrapped


class _Group:
    """What the hooks keep of a process group: its exchange, buckets on their way, and memory of those that are not."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        # As PyTorch's hooks: a rank is waited for as long as the process group says.
        timeout = group._get_backend(device).options._timeout.total_seconds()
        self.exchange = Exchange(group, device, f"ddp_hooks/{group.group_name}", timeout)
        self.exchange.connect()
        self.running: list[Pending] = []
        self.free: dict[tuple[int, str], list[Bucket]] = defaultdict(list)

    def settle(self) -> None:
        """Wait until all that was begun has ended; what failed is raised as it is."""
        running, self.running = self.running, []
        for pending in running:
            pending.wait()


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, _Group] = weakref.WeakKeyDictionary()
"""Made by all ranks of a process group at the same bucket, their first one."""


def _reduced(process_group, bucket: dist.GradBucket, wire: str) -> Future:
    buffer = bucket.buffer()
    if buffer.layout is not torch.strided or buffer.dtype not in OWN_WIRE:
        raise TypeError(f"a bucket of {buffer.dtype}, {buffer.layout} cannot travel: float32, bfloat16, float16 can")
    group = dist.group.WORLD if process_group is None else process_group
    if group not in _groups:
        _groups[group] = _Group(group, buffer.device)
    ours = _groups[group]
    exchange, free = ours.exchange, ours.free[buffer.numel(), wire]
    place = (
        free.pop()
        if free
        else Bucket([buffer.numel()], exchange.ranks, exchange.rank, wire, buffer.device, False, True)
    )

    def unpack():
        place.unpack([buffer])
        free.append(place)

    pending = exchange.begin(place, [buffer], 1.0, unpack, f"bucket {bucket.index()}", average=True)
    pending.result = buffer
    ours.running.append(pending)
    settle_later(bucket, ours.settle)
    if bucket.is_last():
        exchange.finish()
    return pending.future
