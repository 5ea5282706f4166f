"""Which tiles a program of ``attention`` visits, from the intervals of its rows.

The tiles that some row of a program sees lie in two runs of tiles; in each of them, those that every row sees form a
run of their own. Eight edges say it all,

    b1 <= f1 <= g1 <= e1 <= b2 <= f2 <= g2 <= e2,

tiles [b1, e1) and [b2, e2) to be visited, of which [f1, g1) and [f2, g2) need no mask. A program counts through its
masked tiles and then through its full ones, so that it holds two loops and no branch, and a share of either count is
as good as the whole: that is how keys are split between programs.
"""

import triton
import triton.language as tl


@triton.jit
def row_intervals(ranges, rows, inside):
    """(begin, end, begin2, end2) of rows; empty beyond the last."""
    at = ranges + rows.to(tl.int64) * 4
    return (
        tl.load(at, mask=inside, other=0),
        tl.load(at + 1, mask=inside, other=0),
        tl.load(at + 2, mask=inside, other=0),
        tl.load(at + 3, mask=inside, other=0),
    )


@triton.jit
def in_interval(keys, intervals, ROWS: tl.constexpr):
    """bool, rows along dimension ``ROWS`` and keys along the other: which keys a row sees."""
    other: tl.constexpr = 1 - ROWS
    at = tl.expand_dims(keys, ROWS)
    begin, end = tl.expand_dims(intervals[0], other), tl.expand_dims(intervals[1], other)
    begin2, end2 = tl.expand_dims(intervals[2], other), tl.expand_dims(intervals[3], other)
    return ((at >= begin) & (at < end)) | ((at >= begin2) & (at < end2))


@triton.jit
def interval_ends(begin, end, inside, kv_len):
    """(low, high, inner_low, inner_high): some row sees keys in [low, high), all rows [inner_low, inner_high).

    Where no row sees anything high is 0, and where any does not inner_high is 0.
    """
    some = begin < end
    low = tl.min(tl.where(some, begin, kv_len), 0)
    high = tl.max(tl.where(some, end, 0), 0)
    inner_low = tl.max(tl.where(inside, tl.where(some, begin, kv_len), 0), 0)
    inner_high = tl.min(tl.where(inside, tl.where(some, end, 0), kv_len), 0)
    return low, high, inner_low, inner_high


@triton.jit
def key_tile_edges(intervals, inside, kv_len, TILE: tl.constexpr):
    """The edges of the key tiles that a tile of rows visits.

    An interval comes before the other in every row, so no tile that all rows see through the first is touched by the
    second. Where a tile is touched by both it goes to the second run, which then ends where the last of them does.
    """
    low, high, inner_low, inner_high = interval_ends(intervals[0], intervals[1], inside, kv_len)
    low2, high2, inner_low2, inner_high2 = interval_ends(intervals[2], intervals[3], inside, kv_len)
    last = tl.cdiv(high, TILE)
    b1 = tl.minimum(low // TILE, last)
    b2 = tl.where(high2 > 0, low2 // TILE, last)
    e2 = tl.maximum(tl.cdiv(high2, TILE), last)
    f1, g1 = tl.cdiv(inner_low, TILE), inner_high // TILE
    f2, g2 = tl.cdiv(inner_low2, TILE), inner_high2 // TILE
    f1, g1 = tl.where(f1 < g1, f1, b1), tl.where(f1 < g1, g1, b1)
    f2, g2 = tl.where(f2 < g2, f2, b2), tl.where(f2 < g2, g2, b2)
    return b1, f1, g1, tl.minimum(last, b2), b2, f2, g2, e2


@triton.jit
def all_tile_edges(length, TILE: tl.constexpr):
    """The edges where everything is seen: only the last tile may need a mask."""
    whole, tiles = length // TILE, tl.cdiv(length, TILE)
    return 0 * whole, 0 * whole, whole, tiles, tiles, tiles, tiles, tiles


@triton.jit
def masked_count(edges):
    return (edges[1] - edges[0]) + (edges[3] - edges[2]) + (edges[5] - edges[4]) + (edges[7] - edges[6])


@triton.jit
def full_count(edges):
    return (edges[2] - edges[1]) + (edges[6] - edges[5])


@triton.jit
def masked_tile(edges, number):
    """The tile that is the ``number``-th of the masked ones: it jumps over both full runs and over the gap."""
    tile = edges[0] + number
    tile += tl.where(tile >= edges[1], edges[2] - edges[1], 0)
    tile += tl.where(tile >= edges[3], edges[4] - edges[3], 0)
    return tile + tl.where(tile >= edges[5], edges[6] - edges[5], 0)


@triton.jit
def full_tile(edges, number):
    tile = edges[1] + number
    return tile + tl.where(tile >= edges[2], edges[5] - edges[2], 0)


@triton.jit(do_not_specialize=["ranges_stride", "q_len", "kv_len", "q_tiles"])
def bounds_kernel(ranges, ranges_stride, bounds, q_len, kv_len, q_tiles, TILE: tl.constexpr):
    """int32 [B, q_tiles, 8]: ``interval_ends`` of both intervals of every tile of rows."""
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile * TILE + tl.arange(0, TILE)
    inside = rows < q_len
    intervals = row_intervals(ranges + batch * ranges_stride, rows, inside)
    out = bounds + (batch * q_tiles + tile) * 8
    for k in tl.static_range(2):
        ends = interval_ends(intervals[2 * k], intervals[2 * k + 1], inside, kv_len)
        for e in tl.static_range(4):
            tl.store(out + 4 * k + e, ends[e])


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_tiles", "kv_tiles"])
def query_edges_kernel(
    bounds, edges, q_len, kv_len, q_tiles, kv_tiles,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """int32 [B, kv_tiles, 8]: the edges of the tiles of rows that see a tile of keys; a lane for each tile of keys.

    Tiles of rows come in order. A third run closes the narrower of two gaps, and of several full runs in one run the
    longest is kept: what that adds or misses costs time, not correctness.
    """
    tile, batch = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.program_id(1).to(tl.int64)
    begin, end = tile * KV_TILE, tl.minimum(tile * KV_TILE + KV_TILE, kv_len)
    bounds += batch * q_tiles * 8
    b1 = tl.full((LANES,), -1, tl.int32)
    e1, f1, g1 = b1, b1, b1
    b2, e2, f2, g2 = b1, b1, b1, b1
    run, run_end = b1, b1  # the last of the runs of full tiles
    for t in range(q_tiles):
        at = bounds + t * 8
        some = ((begin < tl.load(at + 1)) & (end > tl.load(at))) | ((begin < tl.load(at + 5)) & (end > tl.load(at + 4)))
        full = ((begin >= tl.load(at + 2)) & (end <= tl.load(at + 3))) | (
            (begin >= tl.load(at + 6)) & (end <= tl.load(at + 7))
        )
        full = full & some & ((t + 1) * Q_TILE <= q_len)
        opens_1 = some & (b1 < 0)
        third = some & (b2 >= 0) & (e2 < t)
        closes = third & (b2 - e1 < t - e2)
        e1 = tl.where(closes, e2, e1)
        better = closes & (g2 - f2 > g1 - f1)
        f1, g1 = tl.where(better, f2, f1), tl.where(better, g2, g1)
        opens_2 = (some & (b1 >= 0) & (b2 < 0) & (e1 < t)) | closes
        b1 = tl.where(opens_1, t, b1)
        b2 = tl.where(opens_2, t, b2)
        f2, g2 = tl.where(opens_2, -1, f2), tl.where(opens_2, -1, g2)
        run = tl.where(full & (run_end < t), t, run)
        run_end = tl.where(full, t + 1, run_end)
        e1 = tl.where(some & (b2 < 0), t + 1, e1)
        e2 = tl.where(some & (b2 >= 0), t + 1, e2)
        longer_1 = full & (b2 < 0) & (run_end - run > g1 - f1)
        longer_2 = full & (b2 >= 0) & (run_end - run > g2 - f2)
        f2, g2 = tl.where(longer_2, run, f2), tl.where(longer_2, run_end, g2)
        f1, g1 = tl.where(longer_1, run, f1), tl.where(longer_1, run_end, g1)
    none_1, none_2 = b1 < 0, b2 < 0
    b1, e1 = tl.where(none_1, 0, b1), tl.where(none_1, 0, e1)
    b2, e2 = tl.where(none_2, e1, b2), tl.where(none_2, e1, e2)
    f1, g1 = tl.where(f1 < 0, b1, f1), tl.where(f1 < 0, b1, g1)
    f2, g2 = tl.where(f2 < 0, b2, f2), tl.where(f2 < 0, b2, g2)
    found = (b1, f1, g1, e1, b2, f2, g2, e2)
    out = edges + (batch * kv_tiles + tile) * 8
    for e in tl.static_range(8):
        tl.store(out + e, found[e], mask=tile < kv_tiles)
