"""``attention`` on the CPU: every instruction set against the oracle, gradients, determinism, refusals."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import AttentionMask, backends
from genfast.checks import attention as checks
from genfast.checks import compare

PLACES = backends.machine_isas()
F64 = torch.float64

pytestmark = pytest.mark.skipif(not PLACES, reason="needs a native module")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
def test_cases(isa, case):
    with backends.instruction_set(isa):
        error, allowed = checks.check(case, "cpu")
    assert error <= allowed


WINDOWS = {
    "one interval": lambda at, i: (at, at + 33, 0 * at, 0 * at),
    "one key": lambda at, i: (at, at + 1, 0 * at, 0 * at),
    "two intervals near each other": lambda at, i: (at + 12, at + 45, at, at + 9),
    "two intervals far from each other": lambda at, i: (at, at + 20, at + 57, at + 76),
    "rows that differ": lambda at, i: (at + i, at + i + 5 * (i % 3), at + 3 * i // 2, at + 3 * i // 2 + i % 17),
    "to the last key": lambda at, i: (150 - at, 0 * at + 150, 0 * at, 0 * at + 2),
}


@functools.cache
def windows(window: str, dtype: torch.dtype):
    """q, k, v, mask, and what plain PyTorch makes of them in float64 and in their own dtype."""
    at, i = torch.meshgrid(torch.arange(66), torch.arange(40), indexing="ij")
    mask = AttentionMask.intervals(*WINDOWS[window](at, i), kv_len=150)
    shapes = ((66, 7, 40, 24), (66, 1, 150, 24), (66, 1, 150, 20))  # 280 rows to a key head: not the kernel of few
    tensors = [randn(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    dense = mask.to_dense()[:, None]
    oracle = checks.plain(*(t.double() for t in tensors), dense, None)
    return (*tensors, mask, oracle, checks.plain(*tensors, dense, None))


@pytest.mark.parametrize("isa", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
def test_intervals_that_begin_anywhere_in_a_tile(isa, dtype, window):
    q, k, v, mask, oracle, theirs = windows(window, dtype)
    with backends.instruction_set(isa):
        got = genfast.attention(q, k, v, mask=mask, return_lse=True)
    for error, allowed in map(compare, got, oracle, theirs):
        assert error <= allowed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (3, 1), (8, 1)]),
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 40),
    st.sampled_from(["block causal", "window", "padding", "prefix"]),
    st.sampled_from(checks.LAYOUTS),
)
def test_any_shape(batch, heads, q_len, kv_len, size, value_size, block, kind, layout):
    shape = (batch, *heads, q_len, kv_len, size, value_size)
    mask = {
        "block causal": lambda: AttentionMask.block_causal(q_len, block, kv_len=kv_len, q_offset=kv_len - q_len),
        "window": lambda: AttentionMask.sliding_window(q_len, block, 2, kv_len=kv_len),
        "padding": lambda: AttentionMask.padding(torch.arange(batch) * block % (kv_len + 1), kv_len, q_len=q_len),
        "prefix": lambda: AttentionMask.intervals(
            torch.zeros(q_len, dtype=torch.int64), torch.arange(q_len) + block, kv_len=kv_len
        ),
    }[kind]()
    case = checks.AttentionCase(shape, layout=layout)
    q, k, v, _ = case.arguments()
    seen = mask.to_dense()[:, None]
    got = checks.results(
        lambda *t: genfast.attention(*t, mask=mask, return_lse=True), (q, k, v), case.gradients(), True
    )
    oracle = checks.results(
        lambda *t: checks.plain(*t, seen, None), tuple(t.double() for t in (q, k, v)), case.gradients(), True
    )
    for a, b in zip(got, oracle):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_gradients_of_the_reference():
    mask = AttentionMask.block_causal(9, 4) & AttentionMask.padding(torch.tensor([9, 6]), 9, start=torch.tensor([0, 5]))
    tensors = [randn(2, h, 9, d, dtype=F64, seed=h + d).requires_grad_() for h, d in ((4, 5), (2, 5), (2, 3))]

    def call(q, k, v):
        out, lse = genfast.attention(q, k, v, mask=mask, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, tensors)


def test_rows_that_see_nothing_are_zero_and_pass_nothing_on():
    mask = AttentionMask.padding(torch.tensor([0, 70]), 70)
    q, k, v = (randn(2, 2, 70, 16, seed=s).requires_grad_() for s in range(3))
    out, lse = genfast.attention(q, k, v, mask=mask, return_lse=True)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(not g[0].any() and g[1].abs().sum() > 0 and g.isfinite().all() for g in grads)


def test_nan_and_infinity_stay_where_they_are_seen():
    q, k, v = (randn(1, 1, 100, 16, seed=s) for s in range(3))
    k[0, 0, 70, 3] = torch.nan
    out = genfast.attention(q, k, v, mask=AttentionMask.block_causal(100, 10))
    assert out[0, 0, :70].isfinite().all() and out[0, 0, 70:].isnan().all()


def test_padding_may_hold_anything():
    mask = AttentionMask.padding(torch.tensor([77, 100]), 100, start=torch.tensor([5, 40]))
    clean = [randn(2, 2, 100, 16, seed=s) for s in range(3)]
    dirty = [t.clone() for t in clean]
    for t in dirty[1:]:
        t[0, :, :5], t[0, :, 77:], t[1, :, :40] = torch.nan, torch.inf, torch.nan
    found = []
    for tensors in (clean, dirty):
        inputs = [t.requires_grad_() for t in tensors]
        out = genfast.attention(*inputs, mask=mask)
        found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("shape", [(1, 8, 8, 300, 300, 64, 64), (2, 4, 1, 90, 700, 40, 24)])
def test_results_do_not_depend_on_threads_or_on_the_run(shape):
    case = checks.AttentionCase(shape, "window and first keys", backward=True)
    q, k, v, mask = case.arguments()

    def run():
        return checks.results(
            lambda *t: genfast.attention(*t, mask=mask, return_lse=True), (q, k, v), case.gradients(), True
        )

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_the_layout_of_q_is_that_of_the_result():
    q = randn(2, 50, 4, 16).transpose(1, 2)
    out = genfast.attention(q, q, q)
    assert out.stride() == q.stride() and out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, genfast.attention(*(q.contiguous(),) * 3))


def test_memory_grows_with_the_length_not_with_its_square():
    from benchmarks.timing import peak_bytes

    def peak(length):
        q = randn(1, 2, length, 32).requires_grad_()
        mask = AttentionMask.block_causal(length, 32)
        return peak_bytes(lambda: genfast.attention(q, q, q, mask=mask).sum().backward(), torch.device("cpu"))

    # The results, what the backward needs of them, and the threads' tiles: no multiple of the square.
    short, long = peak(2048), peak(8192)
    assert long < 4.5 * short and long < 20 * 2 * 8192 * 32 * 4


def test_merged_states_are_one_attention():
    q, k, v = randn(2, 4, 33, 24), randn(2, 2, 150, 24, seed=1), randn(2, 2, 150, 40, seed=2)
    mask = AttentionMask.sliding_window(33, 20, 10, kv_len=150, q_offset=50)
    whole, whole_lse = genfast.attention(q, k, v, mask=mask, return_lse=True)
    parts = []
    for first, last in ((0, 40), (40, 41), (41, 150)):
        seen = AttentionMask.from_dense(mask.to_dense()[..., first:last])
        parts.append(genfast.attention(q, k[:, :, first:last], v[:, :, first:last], mask=seen, return_lse=True))
    out, lse = genfast.merge_states(*zip(*parts))
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-6)
    nothing = torch.full_like(lse, -torch.inf)
    out, lse = genfast.merge_states([torch.zeros_like(whole)] * 2, [nothing] * 2)
    assert not out.any() and torch.equal(lse, nothing)
    for outs, lses in (([], []), ([whole], []), ([whole], [whole]), ([whole, whole[:1]], [lse, lse])):
        with pytest.raises(ValueError, match="outs"):
            genfast.merge_states(outs, lses)


def test_compiles_without_a_break():
    mask = AttentionMask.block_diffusion(20, 4)

    def step(q, k, v):
        return genfast.attention(2 * q, k, v, mask=mask).sin()

    inputs = [randn(1, 2, 40, 16, seed=s).requires_grad_() for s in range(3)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = step(*inputs), compiled(*inputs)
    assert torch.equal(got, expected)
    grads = [torch.autograd.grad(y.sum(), inputs) for y in (expected, got)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_opcheck():
    q, k, v = (randn(1, h, 12, 8).requires_grad_() for h in (4, 2, 2))
    ranges = AttentionMask.causal(12).ranges
    torch.library.opcheck(torch.ops.genfast.attention, (q, k, v, ranges, 0.3))
    out, lse = (t.detach() for t in genfast.attention(q, k, v, return_lse=True))
    arguments = (out, None, *(t.detach() for t in (q, k, v)), out, lse, None, 0.3)
    torch.library.opcheck(torch.ops.genfast.attention_backward, arguments)


Q, KV = randn(2, 4, 6, 8), randn(2, 2, 10, 8)


@pytest.mark.parametrize(
    "arguments, options, error",
    [
        ((Q, KV, KV.double()), {}, "v is torch.float64"),
        ((Q.long(), KV, KV), {}, "q is torch.int64"),
        (([1.0], KV, KV), {}, "q must be"),
        ((Q[0], KV, KV), {}, r"q is \[4, 6, 8\]"),
        ((Q, KV, KV[:, :, :5]), {}, "expected"),
        ((Q, KV[..., :7], KV), {}, "expected"),
        ((Q[:, :3], KV, KV), {}, "multiple"),
        ((randn(1, 1, 2, 257), randn(1, 1, 2, 257), randn(1, 1, 2, 8)), {}, "257"),
        ((Q, KV, KV), dict(mask=torch.ones(6, 10, dtype=torch.bool)), "mask must"),
        ((Q, KV, KV), dict(mask=AttentionMask.full(6, 9)), "mask is"),
        ((Q, KV, KV), dict(mask=AttentionMask.padding(torch.ones(3).long(), 10, q_len=6)), "mask is"),
        ((Q, KV, KV), dict(scale=float("nan")), "scale"),
    ],
)
def test_refusals(arguments, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        genfast.attention(*arguments, **options)
