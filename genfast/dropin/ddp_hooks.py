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

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from genfast.distributed.buckets import Bucket
from genfast.distributed.exchange import Exchange

__all__ = [
    "allreduce_hook",
    "bf16_compress_hook",
    "bf16_compress_wrapper",
    "fp16_compress_hook",
    "fp16_compress_wrapper",
    "quantization_perchannel_hook",
    "quantization_pertensor_hook",
]

TIMEOUT = 600.0
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


_free: dict[tuple, list[Bucket]] = defaultdict(list)
"""Memory of buckets that are not on their way."""


def _reduced(process_group, bucket: dist.GradBucket, wire: str) -> Future:
    buffer = bucket.buffer()
    if buffer.layout is not torch.strided or buffer.dtype not in OWN_WIRE:
        raise TypeError(f"a bucket of {buffer.dtype}, {buffer.layout} cannot travel: float32, bfloat16, float16 can")
    exchange = _exchange(process_group, buffer.device)
    key = exchange, buffer.numel(), wire
    place = (
        _free[key].pop()
        if _free[key]
        else Bucket([buffer.numel()], exchange.ranks, exchange.rank, wire, buffer.device, False, True)
    )

    def unpack():
        place.unpack([buffer])
        _free[key].append(place)

    pending = exchange.begin(place, [buffer], 1.0, unpack, f"bucket {bucket.index()}", average=True)
    pending.result = buffer
    return pending.future


@functools.cache
def _exchange(process_group, device: torch.device) -> Exchange:
    """Made by all ranks at the same bucket: the first one."""
    group = dist.group.WORLD if process_group is None else process_group
    exchange = Exchange(group, device, f"ddp_hooks/{group.group_name}", TIMEOUT)
    exchange.connect()
    return exchange
