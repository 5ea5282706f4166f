"""A block of queries over a long cache, beside PyTorch's scaled_dot_product_attention over the same keys and values.

The shape is that of LLaMA-3 8B, LLaDA and Dream in their grouped forms: 32 queries, 32 heads over 8, 4096 cached keys
of 128 numbers. The floor is the keys and values, read once.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

import genfast
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import backends

HEADS, KV_HEADS, SIZE = 32, 8, 128
QUERIES, KEYS = 32, 4096
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def plans(settings: Settings) -> list[Plan]:
    """The cases of this part of the family, for the settings' device."""
    queries, keys = (8, 256) if settings.quick else (QUERIES, KEYS)
    wanted = [("bf16", queries, None), ("fp32", queries, None), ("bf16", queries, 64)]
    if not settings.quick:
        wanted += [(dtype, n, None) for n in (1, 8) for dtype in DTYPES]
    found = [
        Plan(f"cached {dtype} {n}", functools.partial(cached_case, settings.device, n, keys, dtype, page_size))
        for dtype, n, page_size in wanted
    ]
    return [*found, Plan("append bf16", functools.partial(append_case, settings.device, queries, keys, "bf16"))]


def append_case(device, n: int, length: int, dtype: str) -> Case:
    """One block behind ``length`` keys, and cropped again; the peer assigns to slices. The floor is read and write."""
    k, v = (pool((1, KV_HEADS, n, SIZE), DTYPES[dtype], device, seed=seed) for seed in (1, 2))
    cache = genfast.KVCache(1, KV_HEADS, length + n, SIZE, dtype=DTYPES[dtype], device=device)
    cache.append(*(torch.ones(1, KV_HEADS, length, SIZE, dtype=DTYPES[dtype], device=device) for _ in range(2)))
    keys, values = (torch.zeros_like(t) for t in (cache.key_store, cache.value_store))

    def append(i):
        cache.crop(length)
        cache.append(k[i], v[i])
        return cache.key_store[:, :, length:]

    def assigned(i):
        keys[:, :, length:], values[:, :, length:] = k[i], v[i]
        return keys[:, :, length:]

    backend = backends.choose("attention", "cache_write", device)[0]
    return Case(
        "append",
        (1, KV_HEADS, n, length, SIZE),
        dtype,
        run=append,
        exact=lambda: k[0].double(),
        copy_dtype=DTYPES[dtype],
        copy_shape=(KV_HEADS, n, SIZE),
        peers=[Peer("assignment to slices", torch.__version__, assigned)],
        bytes=4 * KV_HEADS * n * SIZE * k[0].element_size(),
        output_bytes=0,
        backend=f"{backend} {backends.cpu_isa()}" if device.type == "cpu" else backend,
    )


def cached_case(device, queries: int, length: int, dtype: str, page_size: int | None) -> Case:
    """``attention_cached`` without a block, so that the peers see the same keys."""
    q = pool((1, HEADS, queries, SIZE), DTYPES[dtype], device)
    k = pool((1, KV_HEADS, length, SIZE), DTYPES[dtype], device, seed=1)
    v = pool((1, KV_HEADS, length, SIZE), DTYPES[dtype], device, seed=2)
    caches = []
    for i in range(len(k)):
        cache = genfast.KVCache(
            1, KV_HEADS, length, SIZE, dtype=DTYPES[dtype], device=device, page_size=page_size
        )  # fmt: skip
        cache.append(k[i], v[i])
        caches.append(cache)

    def repeated(i):
        keys, values = (t[i].repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        return scaled_dot_product_attention(q[i], keys, values)

    def workspace():
        """The most that the kernel took from genfast's pool in one call, where torch's profiler does not see it."""
        genfast.release_memory()
        genfast.attention_cached(q[0], caches[0])
        return {"workspace_bytes": genfast.release_memory()}

    on_cpu = device.type == "cpu"
    bars = (Bar("ratio", at_least=2),) if on_cpu and dtype == "bf16" else ()
    backend = backends.choose("attention", "attention_cached", device)[0]
    item = q[0].element_size()
    ours_bytes = HEADS * queries * (SIZE * item + 4)
    return Case(
        "cached" if page_size is None else f"cached, pages of {page_size}",
        (1, HEADS, KV_HEADS, queries, length, SIZE),
        dtype,
        run=lambda i: genfast.attention_cached(q[i], caches[i % len(caches)]),
        exact=lambda: genfast.attention(q[0].double(), k[0].double(), v[0].double()),
        copy_dtype=DTYPES[dtype],
        copy_shape=(KV_HEADS, length, SIZE),
        peers=[
            Peer(
                "SDPA enable_gqa",
                torch.__version__,
                lambda i: scaled_dot_product_attention(q[i], k[i], v[i], enable_gqa=True),
                bars=bars,
            ),
            Peer("SDPA repeat_interleave", torch.__version__, repeated, bars=bars),
        ],
        bytes=2 * KV_HEADS * length * SIZE * item + 2 * HEADS * queries * SIZE * item,
        output_bytes=ours_bytes,
        bars=(Bar("workspace_bytes", at_most=2 * KV_HEADS * length * SIZE * 2),) if on_cpu else (),
        counts=workspace if on_cpu else None,
        backend=f"{backend} {backends.cpu_isa()}" if on_cpu else backend,
    )
