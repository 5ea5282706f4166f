"""Attention of a block over a cache in tiles. ``genfast.reference.attention_cached`` is the specification.

As in ``attention``: the heads that share a key head are rows of one tile, keys are split between programs, and a last
kernel merges what the parts have found. A program goes over its share of the whole tiles of cached keys, of the last
tile of a row, and of the block. How long a row is the programs read from the device; the number of parts depends on the
capacity alone, so that a part may be empty.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast.kernels.attention import (
    _LOG2_E,
    FILL,
    FUSED,
    LEAST_KEYS,
    _chosen,
    _dot_add,
    _load,
    _products,
    _rows,
    _share,
    _sizes,
    _strides,
    _write,
    merge_kernel,
)
from genfast.kernels.attention_sizes import FORWARD, target_of

SIZES = {
    **FORWARD,
    (128, 2): {**FORWARD[128, 2], "sm_80": (128, 32, 8, 3)},
    (256, 2): {**FORWARD[256, 2], "sm_80": (32, 32, 8, 2), "sm_90": (64, 32, 8, 2)},
    (64, 4): {**FORWARD[64, 4], "": (32, 32, 8, 2), "gfx942": (64, 32, 8, 2)},
}
"""As in ``attention_sizes``: a third kind of tile, and rotations, need registers that full attention has to spare."""


@triton.jit
def _rotated(base, at, inside, positions, cos, sin, INTERLEAVED: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr):
    """Rows whose numbers begin at base + at, rotated by their positions, rounded to their dtype.

    Number d takes its partner in the pair, less it where d is the first of the two.
    """
    column = tl.arange(0, PAD)
    half: tl.constexpr = SIZE // 2
    if INTERLEAVED:
        partner, angle, first = column ^ 1, column // 2, column % 2 == 0
    else:
        first = column < half
        partner, angle = tl.where(first, column + half, column - half), tl.where(first, column, column - half)
    mask = inside[:, None] & (column < SIZE)[None, :]
    x = tl.load(base + at[:, None] + column[None, :], mask=mask, other=0.0)
    y = tl.load(base + at[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.where(first[None, :], -y, y)
    turn = positions[:, None] * half + angle[None, :]
    c, s = tl.load(cos + turn, mask=mask, other=0.0), tl.load(sin + turn, mask=mask, other=0.0)
    return (x.to(tl.float32) * c + y * s).to(x.dtype)


@triton.jit
def _attend(
    o, m, total, q, k_tile, v_tile, inside, scale, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running output, maximum and sum of a tile of rows."""
    s = _products(q, k_tile, False) * scale
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    finite = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - finite[:, None])
    fade = tl.exp2(m - finite)
    return _dot_add(p.to(v_tile.dtype), v_tile, o * fade[:, None]), top, total * fade + tl.sum(p, 1)


@triton.jit
def _cached_tile(
    o, m, total, q, keys, values, table, tile, length, k_batch, k_row, v_batch, v_row, scale,
    MASKED: tl.constexpr, PAGE: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr,
    V_PAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of the cache; keys and values are the row's, or with pages of PAGE positions their head's."""
    at = tile * KEYS + tl.arange(0, KEYS)
    inside = at < length
    if PAGE:
        page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
        place = (at % PAGE).to(tl.int64)
        k_at, v_at = page * k_batch + place * k_row, page * v_batch + place * v_row
    else:
        k_at, v_at = at.to(tl.int64) * k_row, at.to(tl.int64) * v_row
    k_tile = _load(keys, k_at, 1, inside, SIZE, PAD, MASKED)
    v_tile = _load(values, v_at, 1, inside, V_SIZE, V_PAD, MASKED)
    return _attend(o, m, total, q, k_tile, v_tile, inside, scale, MASKED)


@triton.jit(
    do_not_specialize=["table_stride", "capacity", "positions", "heads", "group", "q_len", "block", "parts", "scale"]
)
def cached_kernel(
    q, k, v, keys, values, table, lengths, first, cos, sin, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, keys_batch, keys_head, keys_row,
    values_batch, values_head, values_row, out_batch, out_head, out_row,
    out_part, lse_part, table_stride, capacity, positions, heads, group, q_len, block, parts, scale,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, V_SIZE: tl.constexpr, V_PAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """With PACKED heads in a tile, row r is of query r // PACKED and of head r % PACKED among them."""
    tiles = tl.cdiv(q_len * PACKED, ROWS)
    tile = tl.program_id(0) % tiles
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
    at = batch * q_batch + heads_of * q_head + query.to(tl.int64) * q_row
    origin = tl.load(first + batch) if ROPE else batch
    if ROPE:
        turned = tl.minimum(tl.maximum(origin + query, 0), positions - 1)
        q_tile = _rotated(q, at, inside, turned, cos, sin, INTERLEAVED, SIZE, PAD)
    else:
        q_tile = _load(q, at, 1, inside, SIZE, PAD, True)

    length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), capacity).to(tl.int32)
    if PAGE:
        keys += kv_head * keys_head
        values += kv_head * values_head
        table += batch * table_stride
    else:
        keys += batch * keys_batch + kv_head * keys_head
        values += batch * values_batch + kv_head * values_head

    o = tl.zeros((ROWS, V_PAD), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    whole, cached = length // KEYS, tl.cdiv(length, KEYS)
    count = cached + tl.cdiv(block, KEYS)
    begin, end = _share(count, part, parts), _share(count, part + 1, parts)
    for n in range(begin, tl.minimum(end, whole)):
        o, m, total = _cached_tile(
            o, m, total, q_tile, keys, values, table, n, length, keys_batch, keys_row, values_batch, values_row, scale,
            False, PAGE, SIZE, PAD, V_SIZE, V_PAD, KEYS,
        )  # fmt: skip
    # At most one tile, and then few: copies ahead would only take shared memory.
    for n in tl.range(tl.maximum(begin, whole), tl.minimum(end, cached), num_stages=1):
        o, m, total = _cached_tile(
            o, m, total, q_tile, keys, values, table, n, length, keys_batch, keys_row, values_batch, values_row, scale,
            True, PAGE, SIZE, PAD, V_SIZE, V_PAD, KEYS,
        )  # fmt: skip
    if BLOCK:
        k += batch * k_batch + kv_head * k_head
        v += batch * v_batch + kv_head * v_head
        for n in tl.range(tl.maximum(begin, cached), end, num_stages=1):
            key = (n - cached) * KEYS + tl.arange(0, KEYS)
            present = key < block
            if ROPE:
                position = tl.minimum(tl.maximum(origin + key, 0), positions - 1)
                k_tile = _rotated(k, key.to(tl.int64) * k_row, present, position, cos, sin, INTERLEAVED, SIZE, PAD)
            else:
                k_tile = _load(k, key, k_row, present, SIZE, PAD, True)
            v_tile = _load(v, key, v_row, present, V_SIZE, V_PAD, True)
            o, m, total = _attend(o, m, total, q_tile, k_tile, v_tile, present, scale, True)

    lse += (batch * heads + heads_of) * q_len + query
    out += batch * out_batch + heads_of * out_head + query.to(tl.int64) * out_row
    _write(o, m, total, out, lse, inside, part, parts, out_part, lse_part, SPLIT, V_SIZE, V_PAD)


@triton.jit(do_not_specialize=["table_stride", "positions", "heads", "length"])
def write_kernel(
    k, v, keys, values, table, first, end, cos, sin,
    k_batch, k_head, k_row, v_batch, v_head, v_row, keys_batch, keys_head, keys_row, values_batch, values_head,
    values_row, table_stride, positions, heads, length,
    PAGE: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    V_SIZE: tl.constexpr, V_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS new positions of a sequence and head; what is beyond the row is not stored."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = tl.load(first + batch) + row
    inside = (row < length) & (at >= 0) & (at < tl.load(end + batch))
    row = row.to(tl.int64)
    k += batch * k_batch + head * k_head
    if ROPE:
        turned = tl.minimum(tl.maximum(at, 0), positions - 1)
        k_tile = _rotated(k, row * k_row, inside, turned, cos, sin, INTERLEAVED, SIZE, PAD)
    else:
        k_tile = _load(k, row, k_row, inside, SIZE, PAD, True)
    v_tile = _load(v + batch * v_batch + head * v_head, row, v_row, inside, V_SIZE, V_PAD, True)
    if PAGE:
        page = tl.load(table + batch * table_stride + at // PAGE, mask=inside, other=0).to(tl.int64)
        place = at % PAGE
    else:
        page, place = batch, at
    column, v_column = tl.arange(0, PAD), tl.arange(0, V_PAD)
    to = keys + (page * keys_batch + head * keys_head + place * keys_row)[:, None] + column[None, :]
    tl.store(to, k_tile, mask=inside[:, None] & (column < SIZE)[None, :])
    to = values + (page * values_batch + head * values_head + place * values_row)[:, None] + v_column[None, :]
    tl.store(to, v_tile, mask=inside[:, None] & (v_column < V_SIZE)[None, :])


WRITE_ROWS = 16


def cache_write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, first: Tensor, end: Tensor,
    cos: Tensor | None, sin: Tensor | None, *, interleaved: bool,
) -> None:  # fmt: skip
    """See :func:`genfast.cache_write.cache_write`."""
    batch, heads, length, _ = k.shape
    if not k.numel():
        return
    k, v = _rows(k), _rows(v)
    rope = cos is not None
    write_kernel[(batch * heads, triton.cdiv(length, WRITE_ROWS))](
        k, v, keys, values, first if table is None else table, first, end, cos if rope else first,
        sin if rope else first, *_strides(k, v, keys, values), 0 if table is None else table.stride(0),
        cos.shape[0] if rope else 0, heads, length, PAGE=0 if table is None else keys.shape[2], ROPE=rope,
        INTERLEAVED=interleaved, **_sizes(k, v), ROWS=WRITE_ROWS, num_warps=4,
    )  # fmt: skip


def attention_cached(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, table: Tensor | None, lengths: Tensor,
    first: Tensor | None, cos: Tensor | None, sin: Tensor | None, *, interleaved: bool, scale: float, out: Tensor,
    lse: Tensor, fill: int = FILL, tiles: tuple[int, int, int, int] | None = None, target: str | None = None,
) -> None:  # fmt: skip
    """See :func:`genfast.attention_cached`; ``fill``, ``tiles`` (rows, keys, warps, stages) and ``target`` are for
    tests."""
    if not lse.numel():
        return
    q = _rows(q)
    has_block = k is not None
    k, v = (_rows(k), _rows(v)) if has_block else (keys, values)
    batch, heads, q_len, _ = q.shape
    block = k.shape[2] if has_block else 0
    kv_heads, page_size = keys.shape[1], keys.shape[2]
    capacity = page_size if table is None else table.shape[1] * page_size
    sizes = _sizes(q, values)
    rows, tile_keys, options = _chosen(SIZES, tiles, sizes, q, target)
    group = heads // kv_heads
    packed = group if q_len < rows else 1
    rows = min(rows, next(n for n in (16, 64, rows) if n >= min(q_len * packed, rows)))
    if rows == 16:
        options["num_warps"] = 4
        if (target or target_of(q.device)) == "sm_80":
            # As in _chosen: there ptxas spills a few bytes so that one program more fits, elsewhere it does not.
            options["maxnreg"] = 255
    programs = triton.cdiv(q_len * packed, rows) * (heads // packed) * batch
    parts = max(min(fill // programs, triton.cdiv(capacity + block, max(LEAST_KEYS, tile_keys))), 1)
    found, found_lse, part_sizes = out, lse, (0, 0)
    if parts > 1:
        found = torch.empty((parts, *out.shape), dtype=torch.float32, device=q.device)
        found_lse = torch.empty((2, parts, *lse.shape), dtype=torch.float32, device=q.device)
        part_sizes = (out.numel(), lse.numel())
    rope = first is not None
    cached_kernel[(programs, parts)](
        q, k, v, keys, values, lengths if table is None else table, lengths, first if rope else lengths,
        cos if rope else lse, sin if rope else lse, found, found_lse,
        *_strides(q, k, v, keys, values, found[0] if parts > 1 else out), *part_sizes,
        0 if table is None else table.stride(0), capacity, cos.shape[0] if rope else 0, heads, group, q_len, block,
        parts, scale * _LOG2_E.value,
        PACKED=packed, SPLIT=parts > 1, BLOCK=has_block, PAGE=0 if table is None else page_size, ROPE=rope,
        INTERLEAVED=interleaved, **sizes, ROWS=rows, KEYS=tile_keys, **options,
    )  # fmt: skip
    if parts > 1:
        merged = 4
        merge_kernel[(triton.cdiv(lse.numel(), merged),)](
            found, found_lse, out, lse, *_strides(out), lse.numel(), heads, q_len, lse.numel(), parts,
            V_SIZE=sizes["V_SIZE"], V_PAD=sizes["V_PAD"], ROWS=merged, num_warps=2, **FUSED,
        )  # fmt: skip
