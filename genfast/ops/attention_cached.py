"""The op ``attention_cached``: checks, choice of backend, torch.library. It reads a cache that lives across steps.

There is no CUDA C++, for the reason given in :mod:`genfast.ops.attention`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.kv_cache import KVCache
from genfast.ops.attention import FAMILY, _allocate
from genfast.reference import attention_cached as reference

WRITES = ("append", "rewrite")
STYLES = ("half", "interleaved")


@export(FAMILY)
def attention_cached(
    q: Tensor,
    cache: KVCache,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    write: str | None = None,
    start: Tensor | int | None = None,
    scale: float | None = None,
    rope: tuple[Tensor, Tensor, str] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of an active block of queries over the cached keys of its row and over the block itself.

    A denoising step passes the block's k and v, which every query of the block sees, and leaves the cache as it is; the
    last step of a block appends them. With a dual cache every step rewrites the block's places in the cached sequence.
    Query heads that share a key head are one product, the keys are split among threads whatever the number of
    queries, and the result is the same to the bit for any number of threads and any batch. It is not differentiable.

    Args:
        q: [B, H, n, D], dtype and device of the cache, with any strides. H is a multiple of the cache's heads.
        cache: the :class:`KVCache`.
        k: [B, Hkv, n, D], v: [B, Hkv, n, Dv], of the block; without them only the cache is seen.
        write: None leaves the cache alone. ``"append"`` stores k and v after the end of each row. ``"rewrite"`` stores
            them at positions start ... start + n - 1, which must be filled, and attends to the row, whose length does
            not change.
        start: int or int64 [B], with ``write="rewrite"``.
        scale: 1 / sqrt(D) by default.
        rope: (cos, sin, style), to rotate q and k by their positions before they meet or are stored: float32
            [positions, D / 2] on the device; style ``"half"`` (GPT-NeoX, LLaMA) or ``"interleaved"`` (GPT-J). Query i
            is at position lengths[b] + i, as it was before an append, or start[b] + i. On a GPU positions beyond the
            tables take the last row, on the CPU they are an error.
        return_lse: also return the log-sum-exp of the scaled scores, see :func:`merge_states`.

    Returns:
        [B, H, n, Dv] in q's dtype and order of strides; with ``return_lse``, and float32 [B, H, n] (float64 of
        float64). A query that sees no key has 0 and -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range; the cache is then as it was
            before.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: the caches of Wu et al. 2025 (Fast-dLLM, arXiv:2505.22618); split keys of Dao et al. 2023 (Flash-Decoding).
    The arithmetic: ``genfast/reference/attention_cached.py``.
    """
    _check_queries(q, cache)
    if (k is None) != (v is None):
        raise ValueError(f"k and v go together; {'k' if k is None else 'v'} is missing")
    if write is not None and write not in WRITES:
        raise ValueError(f"write must be one of {', '.join(WRITES)} or None; got {write!r}")
    if write is not None and k is None:
        raise ValueError(f'write="{write}" stores k and v, which are missing')
    if (start is None) == (write == "rewrite"):
        raise ValueError(f'start goes with write="rewrite"; got start={start!r} and write={write!r}')
    if k is not None:
        cache._checked_pair(k, v)
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"q has {q.shape[2]} positions and k {k.shape[2]}; expected as many, of one block")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if write == "append":
        todo = cache._checked_append(k, v, None)
    elif write == "rewrite":
        todo = cache._checked_rewrite(k, v, start)
    first = cos = sin = None
    interleaved = False
    if rope is not None:
        first = todo[2] if write == "rewrite" else cache.lengths
        cos, sin, interleaved = _checked_rope(rope, q, first)
        # The positions of now: an append moves the ends of the rows.
        first = first.clone() if write == "append" else first.contiguous()
    if write is not None:
        turn = None if rope is None else (cos, sin, interleaved)
        (cache._append if write == "append" else cache._rewrite)(*todo, rope=turn)
        k = v = None
    call = _attention_cached_op if torch.compiler.is_compiling() else _attention_cached
    out, lse = call(
        q.detach(), *(t if t is None else t.detach() for t in (k, v)), cache.key_store, cache.value_store, cache.table,
        cache.lengths, first, cos, sin, interleaved, scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_queries(q, cache) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    if q.dtype != cache.dtype:
        raise TypeError(f"q is {q.dtype}; expected {cache.dtype}, as the cache")
    if q.dim() != 4 or q.shape[0] != cache.batch or q.shape[3] != cache.head_dim:
        raise ValueError(f"q is {list(q.shape)}; expected [{cache.batch}, H, n, {cache.head_dim}]")
    if not q.shape[1] or q.shape[1] % cache.kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, the cache {cache.kv_heads}; expected a multiple")
    if q.device != cache.device:
        raise ValueError(f"q is on {q.device}; expected {cache.device}, as the cache")


def _checked_rope(rope, q: Tensor, first: Tensor) -> tuple[Tensor, Tensor, bool]:
    if not isinstance(rope, (tuple, list)) or len(rope) != 3:
        raise TypeError(f"rope must be (cos, sin, style), got {type(rope).__name__}")
    cos, sin, style = rope
    if style not in STYLES:
        raise ValueError(f"rope's style must be one of {', '.join(STYLES)}; got {style!r}")
    if q.shape[3] % 2:
        raise ValueError(f"rope rotates pairs of numbers; q's heads have {q.shape[3]}")
    for name, t in (("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor) or t.dtype != torch.float32:
            raise TypeError(f"rope's {name} must be a float32 tensor")
        if t.dim() != 2 or t.shape != cos.shape or t.shape[1] != q.shape[3] // 2 or not t.shape[0]:
            raise ValueError(f"rope's {name} is {list(t.shape)}; expected [positions, {q.shape[3] // 2}]")
        if t.device != q.device:
            raise ValueError(f"rope's {name} is on {t.device}; expected {q.device}")
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and first.numel() and q.shape[2]:
        last = int(first.max()) + q.shape[2] - 1
        if last >= cos.shape[0]:
            raise ValueError(f"rope has {cos.shape[0]} positions; the last query is at {last}")
    return cos.detach().contiguous(), sin.detach().contiguous(), style == "interleaved"


# --- torch.library ---------------------------------------------------------------------------------------------------


def _attention_cached(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, table: Tensor | None, lengths: Tensor,
    first: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _allocate(q, values)
    if q.dtype == torch.float64:
        name, function = "reference", reference.attention_cached
    else:
        name, function = choose(FAMILY, "attention_cached", q.device)
    with profiling.op_range(FAMILY, f"attention_cached[{name}]", *q.shape, keys.shape[2]):
        function(
            q, k, v, keys, values, table, lengths, first, cos, sin,
            interleaved=interleaved, scale=scale, out=out, lse=lse,
        )  # fmt: skip
    return out, lse


_attention_cached_op = torch.library.custom_op(
    "genfast::attention_cached",
    _attention_cached,
    mutates_args=(),
    schema="(Tensor q, Tensor? k, Tensor? v, Tensor keys, Tensor values, Tensor? table, Tensor lengths, Tensor? first, "
    "Tensor? cos, Tensor? sin, bool interleaved, float scale) -> (Tensor, Tensor)",
)


@_attention_cached_op.register_fake
def _attention_cached_fake(q, k, v, keys, values, table, lengths, first, cos, sin, interleaved, scale):
    return _allocate(q, values)
