"""``attention_cached`` and ``KVCache`` on the CPU: every instruction set, decoding against recomputation, pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import KVCache, attention, attention_cached, backends
from genfast.checks import attention_cached as checks
from genfast.checks.attention_cached import turned
from genfast.native import attention_cached as native
from genfast.reference import attention_cached as reference

PLACES = backends.machine_isas()
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(not PLACES, reason="needs a native module")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(positions, size):
    angles = torch.arange(positions)[:, None] * 0.8 ** torch.arange(size // 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
def test_cases(isa, case):
    with backends.instruction_set(isa):
        error, allowed = checks.check(case, "cpu")
    assert error <= allowed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(1, 70),
    st.integers(70, 200),
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from([None, "append", "rewrite"]),
    st.sampled_from([None, "half", "interleaved"]),
    st.sampled_from([None, 1, 13, 64, 500]),
    st.sampled_from([torch.float32, BF16]),
)
def test_any_shape(batch, heads, n, cached, half, value_size, write, rope, page_size, dtype):
    case = checks.CachedCase(
        (batch, *heads, n, cached, 2 * half, value_size), dtype, write, rope=rope, page_size=page_size
    )
    error, allowed = checks.check(case, "cpu")
    # Plain PyTorch, which sets the bound, can be exact by chance where there are few numbers.
    assert error <= max(allowed, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("style", [None, "half", "interleaved"])
def test_decoding_block_by_block_is_recomputation(dtype, page_size, style):
    """Three denoising passes a block, then its commit; the last of them against block-causal attention over it all."""
    batch, heads, kv_heads, block, blocks, size = 2, 4, 2, 12, 5, 32
    length = block * blocks
    cos, sin = tables(length, size)
    rope = None if style is None else (cos, sin, style)
    q, k, v = (
        randn(batch, h, length, size, dtype=dtype, seed=h + s) for s, h in enumerate((heads, kv_heads, kv_heads))
    )
    cache = KVCache(batch, kv_heads, length, size, dtype=dtype, page_size=page_size)
    outs = []
    for first in range(0, length, block):
        at = slice(first, first + block)
        for step in range(3):
            noisy = randn(batch, kv_heads, block, size, dtype=dtype, seed=100 * step + first)
            attention_cached(q[:, :, at], cache, k=noisy, v=noisy, rope=rope)
        left = attention_cached(q[:, :, at], cache, k=k[:, :, at], v=v[:, :, at], rope=rope)
        outs.append(attention_cached(q[:, :, at], cache, k=k[:, :, at], v=v[:, :, at], rope=rope, write="append"))
        # The block is the same keys whether it lies in the cache or not.
        assert torch.equal(left, outs[-1]) and cache.lengths.tolist() == [first + block] * batch
    if style is not None:
        zero = torch.zeros(batch, dtype=torch.int64)
        q, k = (turned(t, zero, (cos, sin), style) for t in (q, k))
    whole = attention(q, k, v, mask=genfast.AttentionMask.block_causal(length, block))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=4 * rounding, atol=4 * rounding)


@pytest.mark.parametrize("page_size", [None, 8])
def test_dual_cache_is_attention_over_the_edited_sequences(page_size):
    batch, length, n, size = 3, 50, 8, 16
    lengths = torch.tensor([50, 31, 8])
    cos, sin = tables(length, size)
    keys, values = randn(batch, 2, length, size), randn(batch, 2, length, size, seed=1)
    cache = KVCache(batch, 2, length, size, page_size=page_size)
    cache.append(keys, values, lengths)
    for step, start in enumerate((torch.tensor([42, 5, 0]), 0, torch.tensor([16, 23, 0]))):
        q, k, v = (randn(batch, h, n, size, seed=10 * step + h + i) for i, h in enumerate((4, 2, 2)))
        out = attention_cached(q, cache, k=k, v=v, write="rewrite", start=start, rope=(cos, sin, "half"))
        first = torch.as_tensor(start).expand(batch)
        turned_q, turned_k = (turned(t, first, (cos, sin), "half") for t in (q, k))
        for b in range(batch):
            at = slice(int(first[b]), int(first[b]) + n)
            keys[b, :, at], values[b, :, at] = turned_k[b], v[b]
        mask = genfast.AttentionMask.padding(lengths, length, q_len=n)
        expected = attention(turned_q, keys, values, mask=mask)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(cache.lengths, lengths)
    for b, filled in enumerate(lengths.tolist()):
        torch.testing.assert_close(cache.keys(b), keys[b, :, :filled])
        assert torch.equal(cache.values(b), values[b, :, :filled])


def test_pages_hold_what_a_contiguous_cache_holds_whatever_their_order():
    batch, capacity, size = 3, 40, 8
    draw = torch.Generator().manual_seed(0)
    plain = KVCache(batch, 2, capacity, size)
    paged = KVCache(batch, 2, capacity, size, page_size=7, pages=12)
    for step in range(60):
        room = int(min(capacity - plain.lengths.max(), 84 - 7 * sum(-(-n // 7) for n in plain.lengths.tolist())))
        kind = int(torch.randint(4, (), generator=draw))
        n = int(torch.randint(1, 12, (), generator=draw))
        k, v = randn(batch, 2, n, size, seed=step), randn(batch, 2, n, size, seed=step + 1000)
        counts = torch.randint(0, n + 1, (batch,), generator=draw)
        rows = torch.randint(0, 2, (batch,), generator=draw).bool()
        new = torch.randint(0, capacity, (batch,), generator=draw)
        for cache in (plain, paged):
            if kind <= 1 and room >= 3 * (n + 7):
                cache.append(k, v, counts)
            elif kind == 1 and plain.lengths.min() >= n:
                cache.rewrite(k, v, plain.lengths - n)
            elif kind == 2:
                cache.crop(new)
            elif kind == 3:
                cache.reset(rows)
        assert torch.equal(plain.lengths, paged.lengths)
        used = sum(-(-length // 7) for length in plain.lengths.tolist())
        assert int(paged._free_count) == 12 - used
        taken = [
            p for b, length in enumerate(plain.lengths.tolist()) for p in paged.table[b, : -(-length // 7)].tolist()
        ]
        assert sorted(taken + paged._free[: 12 - used].tolist()) == list(range(12))
        for b in range(batch):
            assert torch.equal(plain.keys(b), paged.keys(b)) and torch.equal(plain.values(b), paged.values(b))
        q = randn(batch, 4, 5, size, seed=step)
        assert torch.equal(attention_cached(q, plain), attention_cached(q, paged))


def test_crop_and_reset():
    cache = KVCache(3, 1, 10, 4)
    k = randn(3, 1, 6, 4)
    cache.append(k, k)
    cache.crop(torch.tensor([2, 9, 0]))
    assert cache.lengths.tolist() == [2, 6, 0] and torch.equal(cache.keys(1), k[1])
    cache.append(k[:, :, :1], k[:, :, :1])
    assert torch.equal(cache.keys(0), torch.cat([k[0, :, :2], k[0, :, :1]], 1))
    cache.reset([0])
    assert cache.lengths.tolist() == [0, 7, 1]
    cache.reset([])
    cache.reset(torch.tensor([False, True, False]))
    assert cache.lengths.tolist() == [0, 0, 1]
    cache.crop(0)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0] and "lengths [0, 0, 0]" in repr(cache)
    assert "5 pages of 4" in repr(KVCache(1, 1, 18, 4, page_size=4))


def test_rows_that_see_nothing_are_zero():
    cache = KVCache(2, 1, 8, 4)
    k = randn(2, 1, 3, 4)
    cache.append(k, k, torch.tensor([0, 3]))
    out, lse = attention_cached(randn(2, 2, 5, 4), cache, return_lse=True)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all() and out[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("page_size", [None, 16])
def test_what_lies_beyond_a_row_may_be_anything(dtype, page_size):
    q, k = randn(2, 2, 3, 8, dtype=dtype), randn(2, 1, 33, 8, dtype=dtype)
    outs = []
    for fill in (0.0, torch.nan):
        cache = KVCache(2, 1, 100, 8, dtype=dtype, page_size=page_size)
        for memory in cache._memory:
            memory.fill_(fill)
        cache.append(k, k, torch.tensor([33, 7]))
        outs.append(attention_cached(q, cache, k=k[:, :, :3], v=k[:, :, :3]))
    assert torch.equal(*outs) and outs[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_nan_and_infinity_reach_their_row_alone(dtype):
    cache = KVCache(2, 1, 100, 8, dtype=dtype)
    k = randn(2, 1, 80, 8, dtype=dtype)
    k[1, 0, 70, 2] = torch.nan
    cache.append(k, k)
    out = attention_cached(randn(2, 2, 3, 8, dtype=dtype), cache)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_results_do_not_depend_on_threads_or_on_the_batch():
    batch, heads, kv_heads, n, cached, size = 3, 8, 2, 20, 3000, 64
    k, q = randn(batch, kv_heads, cached, size, dtype=BF16), randn(batch, heads, n, size, dtype=BF16, seed=1)
    block = randn(batch, kv_heads, n, size, dtype=BF16, seed=2)
    lengths = torch.tensor([3000, 1711, 40])

    def run(rows):
        cache = KVCache(len(rows), kv_heads, cached, size, dtype=BF16)
        cache.append(k[rows], k[rows], lengths[rows])
        return attention_cached(q[rows], cache, k=block[rows], v=block[rows], return_lse=True)

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            found.append(run([0, 1, 2]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    for row in range(batch):
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(found[0], run([row])))


def test_memory_grows_with_the_queries_not_with_the_keys():
    from benchmarks.timing import peak_bytes

    def peak(cached):
        cache = KVCache(1, 4, cached, 32)
        k = randn(1, 4, cached, 32)
        cache.append(k, k)
        return peak_bytes(lambda: attention_cached(k[:, :, :16], cache), torch.device("cpu"))

    few, many = (
        peak(8192),
        peak(40000),
    )  # a thread of the pool that came too late has taken no memory: not equal to the byte
    keys = 4 * 32 * 4 * (40000 - 8192)
    assert 0 < few < keys / 20
    assert abs(many - few) < keys / 100


def test_what_does_not_fit_is_dropped_where_it_cannot_be_checked(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(KVCache, "_checks", lambda self: False)
    k, v = randn(3, 1, 6, 4), randn(3, 1, 6, 4, seed=1)
    cache = KVCache(3, 1, 8, 4)
    cache.append(k, v, torch.tensor([6, 2, 9]))
    cache.append(k, v)
    assert cache.lengths.tolist() == [8, 8, 8]
    assert torch.equal(cache.keys(0), torch.cat([k[0], k[0, :, :2]], 1))
    assert torch.equal(cache.keys(1), torch.cat([k[1, :, :2], k[1]], 1))
    cache.rewrite(v, v, torch.tensor([-3, 5, 100]))
    assert torch.equal(cache.keys(0), torch.cat([v[0, :, 3:], k[0, :, 3:], k[0, :, :2]], 1))
    assert torch.equal(cache.keys(1), torch.cat([k[1, :, :2], k[1, :, :3], v[1, :, :3]], 1))
    assert torch.equal(cache.keys(2), torch.cat([k[2], k[2, :, :2]], 1))
    paged = KVCache(3, 1, 8, 4, page_size=2, pages=5)
    paged.append(k, v, torch.tensor([3, 5, 4]))
    assert paged.lengths.tolist() == [3, 5, 0]
    paged.crop(1)
    paged.append(k, v)
    assert paged.lengths.tolist() == [7, 2, 0]
    assert torch.equal(paged.keys(0), torch.cat([k[0, :, :1], k[0]], 1))
    assert torch.equal(paged.keys(1), torch.cat([k[1, :, :1], k[1, :, :1]], 1))


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("style", [None, "half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_write_is_the_reference_to_the_bit(isa, page_size, style, dtype):
    """Rows that begin before 0 or end beyond what they may write, and k and v in another order of strides."""
    first, end = torch.tensor([0, -3, 17]), torch.tensor([30, 12, 20])
    k, v = randn(3, 21, 2, 36, dtype=dtype).transpose(1, 2), randn(3, 2, 20, 21, dtype=dtype, seed=1).mT
    turn = (None, None) if style is None else tables(40, 36)
    found = []
    for module in (native.bind(backends.native_module(f"cpu_{isa}"), None), reference):
        cache = KVCache(3, 2, 30, 36, value_dim=20, dtype=dtype, page_size=page_size)
        cache.append(*(torch.full((3, 2, 30, n), 7.0, dtype=dtype) for n in (36, 20)))
        module.cache_write(
            k, v, *cache._memory, cache.table, first, end, *turn, interleaved=style == "interleaved"
        )  # fmt: skip
        found.append([store(b) for b in range(3) for store in (cache.keys, cache.values)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33])
def test_every_number_of_rows(isa, dtype, rows):
    """Of queries per head of keys: each has lanes of its own, and 90 keys do not fill the last tile."""
    case = checks.CachedCase((1, rows, 1, 1, 90, 24, 40), dtype)
    wide = checks.CachedCase((1, 1, 1, rows, 700, 64, 64), dtype)
    with backends.instruction_set(isa):
        for error, allowed in (checks.check(case, "cpu"), checks.check(wide, "cpu")):
            assert error <= allowed


def test_compiles_without_a_break():
    cos, sin = tables(64, 16)

    def step(q, k, cache):
        out = attention_cached(2 * q, cache, k=k, v=k, write="append", rope=(cos, sin, "half"))
        out = out + attention_cached(q, cache, k=k, v=k, write="rewrite", start=3)
        return out.sin(), attention_cached(q, cache, k=k, v=k)

    q, k = randn(2, 4, 6, 16), randn(2, 2, 6, 16, seed=1)
    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        for page_size in (None, 8):
            cache = KVCache(2, 2, 40, 16, page_size=page_size)
            cache.append(randn(2, 2, 9, 16, seed=2), randn(2, 2, 9, 16, seed=3), torch.tensor([9, 4]))
            found.append([*run(q, k, cache), cache.lengths, cache.keys(0), cache.values(1)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_opcheck():
    case = checks.CachedCase((2, 4, 2, 3, 20, 8, 8), page_size=4)
    t = case.tensors()
    cache = case.cache(t)
    arguments = (t["q"], t["k"], t["v"], cache.key_store, cache.value_store, cache.table, cache.lengths)
    torch.library.opcheck(torch.ops.genfast.attention_cached, (*arguments, cache.lengths, *case.tables(), True, 0.3))
    torch.library.opcheck(torch.ops.genfast.attention_cached, (*arguments, None, None, None, False, 0.3))
    writes = (t["k"], t["v"], *cache._memory, cache.table, cache.lengths, cache.lengths + 2)
    torch.library.opcheck(torch.ops.genfast.cache_write, (*writes, *case.tables(), True))


def test_what_a_backend_lacks_is_said(monkeypatch):
    """CUDA tensors of an op without a kernel go through the reference, an order for one is refused."""
    function = backends._function
    monkeypatch.setattr(backends, "missing", lambda name, device: None)
    monkeypatch.setattr(
        backends, "_function", lambda name, *names: None if name == "triton" else function(name, *names)
    )
    backends.reset()
    try:
        with pytest.warns(UserWarning, match="triton: it has no attention_cached"):
            name, _ = backends.choose("attention", "attention_cached", torch.device("cuda"))
        assert name == "reference"
        with pytest.raises(backends.BackendUnavailable, match="no attention_cached"), backends.backend("triton"):
            backends.choose("attention", "attention_cached", torch.device("cuda"))
    finally:
        monkeypatch.undo()
        backends.reset()


Q, K = randn(2, 4, 6, 8), randn(2, 2, 6, 8)
COS, SIN = tables(16, 8)


def filled():
    cache = KVCache(2, 2, 12, 8)
    cache.append(K, K, torch.tensor([6, 3]))
    return cache


@pytest.mark.parametrize(
    "q, options, error",
    [
        ([1.0], {}, "q must be"),
        (Q.to(BF16), {}, "q is torch.bfloat16"),
        (Q[0], {}, r"q is \[4, 6, 8\]"),
        (Q[..., :7], {}, "expected"),
        (Q[:, :3], {}, "multiple"),
        (Q, dict(cache=K), "cache must be a KVCache"),
        (Q, dict(k=K), "v is missing"),
        (Q, dict(k=K, v=K.to(BF16)), "v is torch.bfloat16"),
        (Q, dict(k=K, v=K[:, :1]), r"v is \[2, 1, 6, 8\]"),
        (Q, dict(k=K[:, :, :5], v=K), "as many"),
        (Q, dict(k=K[:, :, :5], v=K[:, :, :5]), "of one block"),
        (Q, dict(k=K, v=K, write="store"), "write must be"),
        (Q, dict(write="append"), "missing"),
        (Q, dict(k=K, v=K, start=0), "start goes with"),
        (Q, dict(k=K, v=K, write="rewrite"), "start goes with"),
        (Q, dict(k=K, v=K, write="rewrite", start=0), "within the rows"),
        (Q, dict(k=K, v=K, write="rewrite", start=0.0), "start must be"),
        (Q, dict(k=K, v=K, write="rewrite", start=torch.zeros(3).long()), r"start is \[3\]"),
        (Q, dict(scale=float("inf")), "scale"),
        (Q, dict(rope=(COS, SIN)), "rope must be"),
        (Q, dict(rope=(COS, SIN, "neox")), "style must be"),
        (Q, dict(rope=(COS.double(), SIN, "half")), "cos must be a float32"),
        (Q, dict(rope=(COS, SIN[:5], "half")), "sin is"),
        (Q, dict(rope=(COS[:, :3], SIN[:, :3], "half")), "cos is"),
        (Q, dict(rope=(COS[:11], SIN[:11], "half")), "the last query is at 11"),
    ],
)
def test_refusals(q, options, error):
    cache = filled()
    before = [t.clone() for t in (*cache._memory, cache.lengths)]
    with pytest.raises((TypeError, ValueError), match=error):
        attention_cached(q, **{"cache": cache, **options})
    assert all(torch.equal(a, b) for a, b in zip(before, (*cache._memory, cache.lengths)))


@pytest.mark.parametrize("page_size, pages, n, error", [(None, None, 8, "capacity is 12"), (4, 3, 6, "out of pages")])
def test_an_append_that_does_not_fit_changes_nothing(page_size, pages, n, error):
    cache = KVCache(2, 2, 12, 8, page_size=page_size, pages=pages)
    cache.append(K, K, torch.tensor([5, 2]))
    state = [t for t in (*cache._memory, cache.lengths, cache.table) if t is not None]
    before = [t.clone() for t in state]
    long, many = randn(2, 2, n, 8), randn(2, 4, n, 8)
    with pytest.raises(ValueError, match=error):
        cache.append(long, long)
    with pytest.raises(ValueError, match=error):
        attention_cached(many, cache, k=long, v=long, write="append")
    assert all(torch.equal(a, b) for a, b in zip(before, state))


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda c: c.append(K, K, torch.tensor([7, 0])), "counts must be from 0 to 6"),
        (lambda c: c.append(K, K, torch.tensor([0.5, 0])), "counts must be whole"),
        (lambda c: c.append(K, None), "v must be a tensor"),
        (lambda c: c.rewrite(K, K, torch.tensor([0, -1])), "within the rows"),
        (lambda c: c.crop(-1), "lengths must be at least 0"),
        (lambda c: c.crop(True), "lengths must be a whole number"),
        (lambda c: c.reset([2]), "rows must be from 0 to 1"),
        (lambda c: c.reset([0.5]), "rows must be"),
        (lambda c: c.reset(torch.ones(3, dtype=torch.bool)), r"rows is bool \[3\]"),
    ],
)
def test_refusals_of_the_cache(call, error):
    cache = filled()
    with pytest.raises((TypeError, ValueError), match=error):
        call(cache)
    assert cache.lengths.tolist() == [6, 3]


@pytest.mark.parametrize(
    "arguments, options, error",
    [
        ((2, 2, 12, 0), {}, "head_dim must be"),
        ((2, 2, 12, 257), {}, "head_dim must be"),
        ((2, 0, 12, 8), {}, "kv_heads must be"),
        ((2.0, 2, 12, 8), {}, "batch must be"),
        ((2, 2, 0, 8), {}, "capacity must be"),
        ((2, 2, 12, 8), dict(dtype=torch.int8), "dtype must be"),
        ((2, 2, 12, 8), dict(page_size=0), "page_size must be"),
        ((2, 2, 12, 8), dict(pages=3), "page_size is missing"),
    ],
)
def test_refusals_of_sizes(arguments, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        KVCache(*arguments, **options)
