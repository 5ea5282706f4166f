"""Masked attention in tiles, forward and backward. ``genfast.reference.attention`` is the specification.

Forward: a program holds a tile of query rows and goes over tiles of keys with a running maximum m and sum l in base 2,

    s = q k^T scale log2(e),  m' = max(m, max s),  p = 2^(s - m'),  l = l 2^(m - m') + sum p,  o = o 2^(m - m') + p v,

and in the end o / l and lse = m ln 2 + log l. Tiles of keys that none of its rows sees are never visited, those that
all see carry no mask (``attention_tiles``). With few queries the heads that share a key head become rows of one tile,
so that keys are read once; where programs are still too few to fill the device, keys are split between them and a last
kernel merges what the parts have found.

Backward: delta = rowsum(do o) - dlse; then dk and dv by tiles of keys, over all rows that see them and all heads of the
group, and dq by tiles of queries. Nothing is added atomically: results are the same to the bit from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.backends import interpreting
from genfast.kernels.attention_sizes import BACKWARD_KEYS, BACKWARD_QUERIES, FORWARD, target_of, tile_sizes
from genfast.kernels.attention_tiles import (
    all_tile_edges,
    bounds_kernel,
    full_count,
    full_tile,
    in_interval,
    key_tile_edges,
    masked_count,
    masked_tile,
    query_edges_kernel,
    row_intervals,
)

FILL = 132
"""Programs from which on the device counts as full: one for each multiprocessor of the largest there is."""

LEAST_KEYS = 128
"""Keys of a part, at least: below it merging costs more than a full device gains."""

LANES = 32
"""Tiles of keys whose rows one program looks up."""

FUSED = {"enable_fp_fusion": True}

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(interpreting())
"""Triton's interpreter multiplies the bit patterns of bfloat16; products of it are exact in float32."""


@triton.jit
def _load(base, rows, stride, inside, SIZE: tl.constexpr, PAD: tl.constexpr, BOUND: tl.constexpr):
    """Rows of SIZE numbers, 0 beyond them; with BOUND also 0 where a row is not ``inside``."""
    column = tl.arange(0, PAD)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    if BOUND:
        return tl.load(at, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)
    if SIZE < PAD:
        return tl.load(at, mask=(column < SIZE)[None, :] & (rows >= 0)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _store(base, rows, stride, inside, value, SIZE: tl.constexpr, PAD: tl.constexpr):
    column = tl.arange(0, PAD)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside[:, None] & (column < SIZE)[None, :])


@triton.jit
def _products(rows, others, FLIPPED: tl.constexpr):
    """Of each of a tile of rows with each of others.

    Without matrix instructions the rows, which stay the same over all tiles, would be held in registers whole, as the
    left factor. The backward kernels, which hold two such tiles, make them the right one.
    """
    if _INTERPRETED:
        rows, others = rows.to(tl.float32), others.to(tl.float32)
    if FLIPPED and rows.dtype == tl.float32:
        return tl.trans(tl.dot(others, tl.trans(rows), input_precision="ieee"))
    return tl.dot(rows, tl.trans(others), input_precision="ieee")


@triton.jit
def _dot_add(a, b, c):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _attend(
    o, m, total, q, k, v, tile, k_stride, v_stride, kv_len, intervals, scale,
    MASKED: tl.constexpr, RANGES: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr,
    V_PAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running output, maximum and sum of a tile of rows."""
    keys = tile * KEYS + tl.arange(0, KEYS)
    inside = keys < kv_len
    s = _products(q, _load(k, keys, k_stride, inside, SIZE, PAD, MASKED), False)
    if MASKED:
        seen = in_interval(keys, intervals, 0) if RANGES else tl.broadcast_to(inside[None, :], s.shape)
        s = tl.where(seen, s * scale, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet: its maximum is -inf, and any other number does for the differences.
        finite = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - finite[:, None])
    else:
        top = tl.maximum(m, tl.max(s, 1) * scale)
        finite = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s * scale - finite[:, None])
    fade = tl.exp2(m - finite)
    total = total * fade + tl.sum(p, 1)
    v_tile = _load(v, keys, v_stride, inside, V_SIZE, V_PAD, MASKED)
    o = _dot_add(p.to(v_tile.dtype), v_tile, o * fade[:, None])
    return o, top, total


@triton.jit
def _finished(o, m, total):
    """The output and the log-sum-exp of rows that have seen all their keys."""
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    lse = tl.where(unseen, float("-inf"), tl.fma(tl.where(unseen, 0.0, m), _LN2, tl.log(total)))
    return o * (1.0 / total)[:, None], lse


@triton.jit
def _write(
    o, m, total, out, lse, inside, part, parts, out_part, lse_part,
    SPLIT: tl.constexpr, V_SIZE: tl.constexpr, V_PAD: tl.constexpr,
):  # fmt: skip
    """Rows at ``out`` and ``lse``. Of SPLIT keys a part leaves what it has, undivided: o, and in place of lse its m
    and, beyond all parts', its l."""
    if SPLIT:
        lse += part.to(tl.int64) * lse_part
        tl.store(lse, m, mask=inside)
        tl.store(lse + parts.to(tl.int64) * lse_part, total, mask=inside)
    else:
        o, found = _finished(o, m, total)
        tl.store(lse, found, mask=inside)
    column = tl.arange(0, V_PAD)
    at = (out + part.to(tl.int64) * out_part)[:, None] + column[None, :]
    tl.store(at, o.to(out.dtype.element_ty), mask=inside[:, None] & (column < V_SIZE)[None, :])


@triton.jit
def _share(count, part, parts):
    """Where a part begins among so many tiles."""
    return (count.to(tl.int64) * part // parts).to(tl.int32)


@triton.jit(do_not_specialize=["ranges_stride", "heads", "group", "q_len", "kv_len", "parts", "scale"])
def forward_kernel(
    q, k, v, out, lse, ranges,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    out_part, lse_part, ranges_stride, heads, group, q_len, kv_len, parts, scale,
    PACKED: tl.constexpr, NEGATIVE: tl.constexpr, SPLIT: tl.constexpr, RANGES: tl.constexpr,
    SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """With PACKED heads in a tile, row r is of query r // PACKED and of head r % PACKED among them."""
    # The last rows first: under causal masks they see most.
    tiles = tl.cdiv(q_len * PACKED, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    own_heads = heads // PACKED
    batch = (head // own_heads).to(tl.int64)
    head = head % own_heads * PACKED
    kv_head = (head // group).to(tl.int64)
    part = tl.program_id(1)

    row = tile * ROWS + tl.arange(0, ROWS)
    query = row // PACKED
    heads_of = (head + row % PACKED).to(tl.int64)
    inside = query < q_len
    column = tl.arange(0, PAD)
    at = q + batch * q_batch + heads_of[:, None] * q_head + query.to(tl.int64)[:, None] * q_row + column[None, :]
    q_tile = tl.load(at, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)
    if NEGATIVE:
        # So that the largest score is that of the largest product.
        q_tile = (-q_tile.to(tl.float32)).to(q_tile.dtype)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    if RANGES:
        intervals = row_intervals(ranges + batch * ranges_stride, query, inside)
        edges = key_tile_edges(intervals, inside, kv_len, KEYS)
    else:
        intervals = (row, row, row, row)
        edges = all_tile_edges(kv_len, KEYS)

    o = tl.zeros((ROWS, V_PAD), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    full, masked = full_count(edges), masked_count(edges)
    for n in range(_share(full, part, parts), _share(full, part + 1, parts)):
        o, m, total = _attend(
            o, m, total, q_tile, k, v, full_tile(edges, n), k_row, v_row, kv_len, intervals, scale,
            False, RANGES, SIZE, PAD, V_SIZE, V_PAD, KEYS,
        )  # fmt: skip
    for n in range(_share(masked, part, parts), _share(masked, part + 1, parts)):
        o, m, total = _attend(
            o, m, total, q_tile, k, v, masked_tile(edges, n), k_row, v_row, kv_len, intervals, scale,
            True, RANGES, SIZE, PAD, V_SIZE, V_PAD, KEYS,
        )  # fmt: skip

    lse += (batch * heads + heads_of) * q_len + query
    out += batch * out_batch + heads_of * out_head + query.to(tl.int64) * out_row
    _write(o, m, total, out, lse, inside, part, parts, out_part, lse_part, SPLIT, V_SIZE, V_PAD)


@triton.jit(do_not_specialize=["lse_part", "heads", "q_len", "rows", "parts"])
def merge_kernel(
    partial, states, out, lse, out_batch, out_head, out_row, lse_part, heads, q_len, rows, parts,
    V_SIZE: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Parts o [P, B, H, Lq, Dv], m and l [2, P, B, H, Lq] put together."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lse_part = lse_part.to(tl.int64)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in range(parts):
        m = tl.maximum(m, tl.load(states + part * lse_part + row, mask=inside, other=float("-inf")))
    finite = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, V_PAD), tl.float32)
    for part in range(parts):
        first = part * lse_part
        weight = tl.exp2(tl.load(states + first + row, mask=inside, other=float("-inf")) - finite)
        total += weight * tl.load(states + (parts * lse_part + first) + row, mask=inside, other=0.0)
        o += weight[:, None] * _load(partial + first * V_SIZE, row, V_SIZE, inside, V_SIZE, V_PAD, True)
    o, found = _finished(o, m, total)
    tl.store(lse + row, found, mask=inside)
    column = tl.arange(0, V_PAD)
    at = row // q_len // heads * out_batch + row // q_len % heads * out_head + row % q_len * out_row
    mask = inside[:, None] & (column < V_SIZE)[None, :]
    tl.store(out + at[:, None] + column[None, :], o.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "q_len", "rows"])
def delta_kernel(
    grad_out, out, lse, grad_lse, delta, g_batch, g_head, g_row, out_batch, out_head, out_row, heads, q_len, rows,
    GRAD_LSE: tl.constexpr, V_SIZE: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do o) - dlse; the lse of a row that sees nothing depends on nothing."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    batch, head, query = row // q_len // heads, row // q_len % heads, row % q_len
    column = tl.arange(0, V_PAD)
    mask = inside[:, None] & (column < V_SIZE)[None, :]
    at = (batch * g_batch + head * g_head + query * g_row)[:, None] + column[None, :]
    g = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
    at = (batch * out_batch + head * out_head + query * out_row)[:, None] + column[None, :]
    found = tl.sum(g * tl.load(out + at, mask=mask, other=0.0).to(tl.float32), 1)
    if GRAD_LSE:
        seen = inside & (tl.load(lse + row, mask=inside, other=0.0) != float("-inf"))
        found -= tl.load(grad_lse + row, mask=seen, other=0.0)
    tl.store(delta + row, found, mask=inside)


@triton.jit
def _base_2(lse):
    """Where a row sees nothing, +inf: 2^(s - inf) is 0 whatever s."""
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)


@triton.jit
def _key_gradients(
    dk, dv, k, v, q, g, lse, delta, ranges, tile, keys, q_stride, g_stride, q_len, scale,
    MASKED: tl.constexpr, RANGES: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What one tile of rows adds to dk (less its scale) and dv of a tile of keys; scores are [keys, rows]."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < q_len
    q_tile = _load(q, rows, q_stride, inside, SIZE, PAD, MASKED)
    if MASKED:
        lse_2 = _base_2(tl.load(lse + rows, mask=inside, other=float("-inf")))
        mean = tl.load(delta + rows, mask=inside, other=0.0)
    else:
        lse_2 = _base_2(tl.load(lse + rows))
        mean = tl.load(delta + rows)
    p = tl.exp2(_products(k, q_tile, True) * scale - lse_2[None, :])
    if MASKED and RANGES:
        p = tl.where(in_interval(keys, row_intervals(ranges, rows, inside), 1), p, 0.0)
    g_tile = _load(g, rows, g_stride, inside, V_SIZE, V_PAD, MASKED)
    dv = _dot_add(p.to(g_tile.dtype), g_tile, dv)
    ds = p * (_products(v, g_tile, True) - mean[None, :])
    dk = _dot_add(ds.to(q_tile.dtype), q_tile, dk)
    return dk, dv


@triton.jit(
    do_not_specialize=["ranges_stride", "edges_stride", "kv_heads", "group", "q_len", "kv_len", "scale", "scale_2"]
)
def key_gradient_kernel(
    q, k, v, grad_out, lse, delta, ranges, edges, grad_k, grad_v,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    ranges_stride, edges_stride, kv_heads, group, q_len, kv_len, scale, scale_2,
    RANGES: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(kv_len, KEYS)
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    keys = tile * KEYS + tl.arange(0, KEYS)
    inside = keys < kv_len
    k_tile = _load(k + batch * k_batch + kv_head * k_head, keys, k_row, inside, SIZE, PAD, True)
    v_tile = _load(v + batch * v_batch + kv_head * v_head, keys, v_row, inside, V_SIZE, V_PAD, True)
    if RANGES:
        at = edges + batch * edges_stride + tile * 8
        bounds = (
            tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
            tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7),
        )  # fmt: skip
        ranges += batch * ranges_stride
    else:
        bounds = all_tile_edges(q_len, ROWS)
    full, masked = full_count(bounds), masked_count(bounds)
    dk = tl.zeros((KEYS, PAD), tl.float32)
    dv = tl.zeros((KEYS, V_PAD), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_of = q + batch * q_batch + head * q_head
        g_of = grad_out + batch * g_batch + head * g_head
        first = (batch * kv_heads * group + head) * q_len
        for n in range(full):
            dk, dv = _key_gradients(
                dk, dv, k_tile, v_tile, q_of, g_of, lse + first, delta + first, ranges, full_tile(bounds, n), keys,
                q_row, g_row, q_len, scale_2, False, RANGES, SIZE, PAD, V_SIZE, V_PAD, ROWS,
            )  # fmt: skip
        for n in range(masked):
            dk, dv = _key_gradients(
                dk, dv, k_tile, v_tile, q_of, g_of, lse + first, delta + first, ranges, masked_tile(bounds, n), keys,
                q_row, g_row, q_len, scale_2, True, RANGES, SIZE, PAD, V_SIZE, V_PAD, ROWS,
            )  # fmt: skip
    _store(grad_k + batch * dk_batch + kv_head * dk_head, keys, dk_row, inside, dk * scale, SIZE, PAD)
    _store(grad_v + batch * dv_batch + kv_head * dv_head, keys, dv_row, inside, dv, V_SIZE, V_PAD)


@triton.jit
def _query_gradient(
    dq, q, g, k, v, lse_2, mean, tile, k_stride, v_stride, kv_len, intervals, scale,
    MASKED: tl.constexpr, RANGES: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr,
    V_PAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dq, less its scale."""
    keys = tile * KEYS + tl.arange(0, KEYS)
    inside = keys < kv_len
    k_tile = _load(k, keys, k_stride, inside, SIZE, PAD, MASKED)
    p = tl.exp2(_products(q, k_tile, True) * scale - lse_2[:, None])
    if MASKED:
        seen = in_interval(keys, intervals, 0) if RANGES else tl.broadcast_to(inside[None, :], p.shape)
        p = tl.where(seen, p, 0.0)
    v_tile = _load(v, keys, v_stride, inside, V_SIZE, V_PAD, MASKED)
    ds = p * (_products(g, v_tile, True) - mean[:, None])
    return _dot_add(ds.to(k_tile.dtype), k_tile, dq)


@triton.jit(do_not_specialize=["ranges_stride", "heads", "group", "q_len", "kv_len", "scale", "scale_2"])
def query_gradient_kernel(
    q, k, v, grad_out, lse, delta, ranges, grad_q,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dq_batch, dq_head, dq_row, ranges_stride, heads, group, q_len, kv_len, scale, scale_2,
    RANGES: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(q_len, ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < q_len
    q_tile = _load(q + batch * q_batch + head * q_head, rows, q_row, inside, SIZE, PAD, True)
    g_tile = _load(grad_out + batch * g_batch + head * g_head, rows, g_row, inside, V_SIZE, V_PAD, True)
    first = (batch * heads + head) * q_len
    lse_2 = _base_2(tl.load(lse + first + rows, mask=inside, other=float("-inf")))
    mean = tl.load(delta + first + rows, mask=inside, other=0.0)
    k += batch * k_batch + head // group * k_head
    v += batch * v_batch + head // group * v_head
    if RANGES:
        intervals = row_intervals(ranges + batch * ranges_stride, rows, inside)
        edges = key_tile_edges(intervals, inside, kv_len, KEYS)
    else:
        intervals = (rows, rows, rows, rows)
        edges = all_tile_edges(kv_len, KEYS)
    dq = tl.zeros((ROWS, PAD), tl.float32)
    for n in range(full_count(edges)):
        dq = _query_gradient(
            dq, q_tile, g_tile, k, v, lse_2, mean, full_tile(edges, n), k_row, v_row, kv_len, intervals, scale_2,
            False, RANGES, SIZE, PAD, V_SIZE, V_PAD, KEYS,
        )  # fmt: skip
    for n in range(masked_count(edges)):
        dq = _query_gradient(
            dq, q_tile, g_tile, k, v, lse_2, mean, masked_tile(edges, n), k_row, v_row, kv_len, intervals, scale_2,
            True, RANGES, SIZE, PAD, V_SIZE, V_PAD, KEYS,
        )  # fmt: skip
    _store(grad_q + batch * dq_batch + head * dq_head, rows, dq_row, inside, dq * scale, SIZE, PAD)


# --- launches --------------------------------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """With neighbouring numbers in a row; a copy only where they are not."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in t.stride()[:3])


def _sizes(q: Tensor, v: Tensor) -> dict:
    size, v_size = q.shape[3], v.shape[3]
    pad, v_pad = (max(triton.next_power_of_2(n), 16) for n in (size, v_size))
    return dict(SIZE=size, PAD=pad, V_SIZE=v_size, V_PAD=v_pad)


def _ranges(ranges: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """The pointer and the stride of batches; where there are none, a pointer that is not read."""
    if ranges is None:
        return other, 0
    return ranges, 0 if ranges.shape[0] == 1 else ranges.stride(0)


def _chosen(table: dict, tiles, sizes: dict, q: Tensor, target: str | None) -> tuple[int, int, dict]:
    target = target or target_of(q.device)
    pad = max(sizes["PAD"], sizes["V_PAD"])
    rows, keys, warps, stages = tiles or tile_sizes(table, pad, q.element_size(), target)
    options = dict(num_warps=warps, num_stages=stages, **FUSED)
    if q.element_size() == 4 and pad < 256 and target.startswith("sm_"):
        # Left to itself ptxas spills a few bytes so that two programs fit; with the largest heads it does the opposite.
        options["maxnreg"] = 255
    return rows, keys, options


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, ranges: Tensor | None, scale: float, out: Tensor, lse: Tensor,
    fill: int = FILL, tiles: tuple[int, int, int, int] | None = None, target: str | None = None,
) -> None:  # fmt: skip
    """See :func:`genfast.attention`; ``fill``, ``tiles`` (rows, keys, warps, stages) and ``target`` are for tests."""
    q, k, v = map(_rows, (q, k, v))
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if not lse.numel():
        return
    sizes = _sizes(q, v)
    rows, keys, options = _chosen(FORWARD, tiles, sizes, q, target)
    group = heads // kv_heads
    packed = group if q_len < rows else 1
    rows = min(rows, next(n for n in (16, 64, rows) if n >= min(q_len * packed, rows)))
    if rows == 16:
        options["num_warps"] = 4
    programs = triton.cdiv(q_len * packed, rows) * (heads // packed) * batch
    parts = max(min(fill // programs, triton.cdiv(kv_len, max(LEAST_KEYS, keys))), 1)
    found, found_lse, part_sizes = out, lse, (0, 0)
    if parts > 1:
        found = torch.empty((parts, *out.shape), dtype=torch.float32, device=q.device)
        found_lse = torch.empty((2, parts, *lse.shape), dtype=torch.float32, device=q.device)
        part_sizes = (out.numel(), lse.numel())
    mask, mask_stride = _ranges(ranges, lse)
    forward_kernel[(programs, parts)](
        q, k, v, found, found_lse, mask,
        *_strides(q, k, v, found[0] if parts > 1 else out), *part_sizes, mask_stride,
        heads, group, q_len, kv_len, parts, abs(scale) * _LOG2_E.value,
        PACKED=packed, NEGATIVE=scale < 0, SPLIT=parts > 1, RANGES=ranges is not None, **sizes,
        ROWS=rows, KEYS=keys, **options,
    )  # fmt: skip
    if parts > 1:
        merged = 4
        merge_kernel[(triton.cdiv(lse.numel(), merged),)](
            found, found_lse, out, lse, *_strides(out), lse.numel(), heads, q_len, lse.numel(), parts,
            V_SIZE=sizes["V_SIZE"], V_PAD=sizes["V_PAD"], ROWS=merged, num_warps=2, **FUSED,
        )  # fmt: skip


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    ranges: Tensor | None, scale: float, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
    tiles: tuple[tuple[int, int, int, int], tuple[int, int, int, int]] | None = None, target: str | None = None,
) -> None:  # fmt: skip
    """The three gradients, written; ``tiles`` (of the keys' kernel and the queries') and ``target`` are for tests."""
    if not lse.numel() or not k.numel():
        for grad in (grad_q, grad_k, grad_v):
            grad.zero_()
        return
    wanted = (grad_q, grad_k, grad_v)
    grads = grad_q, grad_k, grad_v = tuple(_rows(t) for t in wanted)
    grad_out, q, k, v, out = map(_rows, (grad_out, q, k, v, out))
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    sizes = _sizes(q, v)
    values = dict(V_SIZE=sizes["V_SIZE"], V_PAD=sizes["V_PAD"])
    group = heads // kv_heads
    own = dict(RANGES=ranges is not None, **sizes)
    mask, mask_stride = _ranges(ranges, lse)
    scales = (scale, scale * _LOG2_E.value)
    of_keys, of_queries = tiles or (None, None)

    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    summed = 16
    delta_kernel[(triton.cdiv(lse.numel(), summed),)](
        grad_out, out, lse, lse if grad_lse is None else grad_lse.contiguous(), delta, *_strides(grad_out, out),
        heads, q_len, lse.numel(), GRAD_LSE=grad_lse is not None, **values, ROWS=summed, num_warps=4, **FUSED,
    )  # fmt: skip

    rows, keys, options = _chosen(BACKWARD_KEYS, of_keys, sizes, q, target)
    kv_tiles = triton.cdiv(kv_len, keys)
    edges = _query_edges(ranges, q_len, kv_len, rows, keys)
    edges, edges_stride = (mask, 0) if edges is None else (edges, 0 if edges.shape[0] == 1 else kv_tiles * 8)
    key_gradient_kernel[(kv_tiles * kv_heads * batch,)](
        q, k, v, grad_out, lse, delta, mask, edges, grad_k, grad_v, *_strides(q, k, v, grad_out, grad_k, grad_v),
        mask_stride, edges_stride, kv_heads, group, q_len, kv_len, *scales, **own, ROWS=rows, KEYS=keys, **options,
    )  # fmt: skip

    rows, keys, options = _chosen(BACKWARD_QUERIES, of_queries, sizes, q, target)
    query_gradient_kernel[(triton.cdiv(q_len, rows) * heads * batch,)](
        q, k, v, grad_out, lse, delta, mask, grad_q, *_strides(q, k, v, grad_out, grad_q),
        mask_stride, heads, group, q_len, kv_len, *scales, **own, ROWS=rows, KEYS=keys, **options,
    )  # fmt: skip
    for grad, found in zip(wanted, grads):
        if found is not grad:
            grad.copy_(found)


def _query_edges(ranges: Tensor | None, q_len: int, kv_len: int, rows: int, keys: int) -> Tensor | None:
    """int32 [B, tiles of keys, 8], see ``query_edges_kernel``; O(L) numbers, made on the device."""
    if ranges is None:
        return None
    batch, q_tiles, kv_tiles = ranges.shape[0], triton.cdiv(q_len, rows), triton.cdiv(kv_len, keys)
    bounds = ranges.new_empty((batch, q_tiles, 8))
    bounds_kernel[(q_tiles, batch)](
        ranges, ranges.stride(0), bounds, q_len, kv_len, q_tiles, TILE=rows, num_warps=1, **FUSED
    )
    edges = ranges.new_empty((batch, kv_tiles, 8))
    query_edges_kernel[(triton.cdiv(kv_tiles, LANES), batch)](
        bounds, edges, q_len, kv_len, q_tiles, kv_tiles, Q_TILE=rows, KV_TILE=keys, LANES=LANES, num_warps=1, **FUSED
    )
    return edges
