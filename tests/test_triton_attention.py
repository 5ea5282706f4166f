"""The Triton kernels of ``attention`` against the reference: on a GPU, or in Triton's interpreter.

The interpreter is slow, so there shapes and tiles are small: several tiles of queries and keys, with a rest.
"""

import pytest
import torch
from interpreter import DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast import AttentionMask
from genfast.checks import attention as checks
from genfast.checks.attention import BF16, F16, F32, AttentionCase

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("genfast.kernels.attention")
tiles = pytest.importorskip("genfast.kernels.attention_tiles")

SMALL = (16, 16, 4, 1)
ONE_HEAD = (1, 1, 1, 40, 40, 16, 16)
GROUP = (1, 2, 1, 24, 24, 16, 16)
BATCH = (3, 1, 1, 20, 20, 16, 16)
FEW_QUERIES = (1, 4, 2, 3, 300, 16, 24)
OF_A_BATCH = ("right padding", "left padding", "one sequence is padding", "block causal, offsets", "prefix")
CASES = [
    *(AttentionCase(BATCH if mask in OF_A_BATCH else ONE_HEAD, mask, backward=True) for mask in checks.MASKS),
    *(
        AttentionCase(GROUP, mask, dtype, backward=True)
        for mask in ("block diffusion", "window and first keys")
        for dtype in (BF16, F16)
    ),
    *(AttentionCase(GROUP, "causal", BF16, layout, backward=True) for layout in checks.LAYOUTS[1:]),
    *(AttentionCase((1, 2, 1, 12, 20, d, dv), "varlen", F32, backward=True) for d, dv in ((8, 40), (80, 64), (128, 1))),
    AttentionCase((1, 1, 1, 64, 64, 16, 16), "window and first keys", backward=True),  # with a gap between tiles
    AttentionCase((1, 1, 1, 20, 20, 40, 80), "block causal", BF16, backward=True),
    *(AttentionCase(GROUP, "causal", BF16, scale=scale, backward=True) for scale in (-0.3, 0.0)),
    *(AttentionCase(FEW_QUERIES, "intervals, rows without keys", dtype) for dtype in (F32, BF16)),
    *(AttentionCase(shape, backward=True) for shape in ((0, 2, 1, 5, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16))),
]
MANY = {
    **{name: (make, 90, 90) for name, make in checks.MASKS.items() if name != "none"},
    "cross": (lambda b, q, k: AttentionMask.varlen(torch.tensor([0, 70, q]), torch.tensor([0, 20, k])), 90, 150),
    "one key": (lambda b, q, k: AttentionMask.full(q, k), 33, 1),
}


test_in_the_interpreter = in_the_interpreter(__file__)


def identify(case):
    return case.name


@triton.jit
def visits_kernel(ranges, edges, visits, q_len, kv_len, kv_tiles, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Adds 1 for every masked and 2 for every full tile of keys that a tile of rows visits; and writes its edges."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < q_len
    found = tiles.key_tile_edges(tiles.row_intervals(ranges, rows, inside), inside, kv_len, KEYS)
    for e in tl.static_range(8):
        tl.store(edges + tl.program_id(0) * 8 + e, found[e])
    visits += tl.program_id(0) * kv_tiles
    for n in range(tiles.masked_count(found)):
        at = visits + tiles.masked_tile(found, n)
        tl.store(at, tl.load(at) + 1)
    for n in range(tiles.full_count(found)):
        at = visits + tiles.full_tile(found, n)
        tl.store(at, tl.load(at) + 2)


def visits_of(edges, count):
    """The same from edges alone, [rows, count]."""
    assert bool((edges.diff(dim=-1) >= 0).all())
    visits = torch.zeros(len(edges), count, dtype=torch.int64)
    for row, (b1, f1, g1, e1, b2, f2, g2, e2) in zip(visits, edges.tolist()):
        for begin, end, kind in ((b1, f1, 1), (g1, e1, 1), (b2, f2, 1), (g2, e2, 1), (f1, g1, 2), (f2, g2, 2)):
            row[begin:end] += kind
    return visits


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def few_programs(self, monkeypatch):
        """Small tiles, and no keys split between programs unless a test asks for it."""
        monkeypatch.setitem(kernels.attention.__kwdefaults__, "tiles", SMALL)
        monkeypatch.setitem(kernels.attention_backward.__kwdefaults__, "tiles", (SMALL, SMALL))
        monkeypatch.setitem(kernels.attention.__kwdefaults__, "fill", 1)
        with genfast.backend("triton"):
            yield

    @pytest.fixture
    def shipped_tiles(self, few_programs, monkeypatch):
        monkeypatch.setitem(kernels.attention.__kwdefaults__, "tiles", None)
        monkeypatch.setitem(kernels.attention_backward.__kwdefaults__, "tiles", None)

    @pytest.mark.parametrize("case", CASES, ids=identify)
    def test_cases(self, case):
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
    def test_shipped_tiles(self, dtype, shipped_tiles):
        case = AttentionCase((1, 1, 1, 150, 150, 64, 64), "block diffusion", dtype, backward=True)
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("case", checks.cases() if HAS_GPU else [], ids=identify)
    def test_every_case_on_a_gpu(self, case, shipped_tiles, monkeypatch):
        monkeypatch.setitem(kernels.attention.__kwdefaults__, "fill", kernels.FILL)
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("mask", ("none", "right padding", "intervals, rows without keys"))
    def test_keys_split_between_programs(self, mask, monkeypatch):
        case = AttentionCase(FEW_QUERIES, mask)
        q, k, v, mask = case.arguments(DEVICE)
        out, lse = genfast.attention(q, k, v, mask=mask, return_lse=True)
        monkeypatch.setitem(kernels.attention.__kwdefaults__, "fill", 1000)
        split, split_lse = genfast.attention(q, k, v, mask=mask, return_lse=True)
        torch.testing.assert_close(split, out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(split_lse, lse, rtol=1e-6, atol=1e-6)
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    def test_heads_of_a_group_share_a_tile(self, monkeypatch):
        case = AttentionCase((1, 6, 2, 3, 20, 16, 16), "block causal")
        grids = []
        launch = kernels.forward_kernel
        monkeypatch.setattr(
            kernels, "forward_kernel", type("Grids", (), {"__getitem__": lambda _, g: grids.append(g) or launch[g]})()
        )
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed and grids == [(2, 1)]

    def test_gradients_of_the_output_alone(self):
        q, k, v, mask = AttentionCase(GROUP, "block causal").arguments(DEVICE)
        inputs = [t.requires_grad_() for t in (q, k, v)]
        found = torch.autograd.grad(genfast.attention(*inputs, mask=mask).sum(), inputs)
        with genfast.backend("reference"):
            expected = torch.autograd.grad(genfast.attention(*inputs, mask=mask).sum(), inputs)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_rows_without_keys(self):
        q, k, v, _ = AttentionCase(GROUP).arguments(DEVICE)
        inputs = [t.requires_grad_() for t in (q, k, v)]
        mask = AttentionMask.block_causal(24, 4, q_offset=-12).to(DEVICE)
        out, lse = genfast.attention(*inputs, mask=mask, return_lse=True)
        dq, dk, dv = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
        assert not out[:, :, :12].any() and bool((lse[:, :, :12] == -torch.inf).all()) and not dq[:, :, :12].any()
        assert out[:, :, 12:].any() and dq[:, :, 12:].any()
        assert not dk[:, :, 12:].any() and not dv[:, :, 12:].any()
        assert all(bool(t.isfinite().all()) for t in (out, dq, dk, dv))

    def test_the_same_to_the_bit(self):
        case = AttentionCase(GROUP, "block diffusion", BF16, backward=True)
        q, k, v, mask = case.arguments(DEVICE)
        call = lambda *x: genfast.attention(*x, mask=mask, return_lse=True)  # noqa: E731
        runs = [checks.results(call, (q, k, v), case.gradients(DEVICE), True) for _ in range(2)]
        assert all(map(torch.equal, *runs))

    @pytest.mark.parametrize("name", MANY)
    def test_tiles_of_keys(self, name):
        make, q_len, kv_len = MANY[name]
        mask = make(1, q_len, kv_len).to(DEVICE)
        rows, keys = 32, 16
        expected = mask.tiles(rows, keys)[0].long().cpu()
        short = -(-kv_len // keys) * keys > kv_len
        if short:  # a tile beyond the last key is always masked
            expected[:, -1].clamp_(max=1)
        edges = torch.empty(len(expected), 8, dtype=torch.int32, device=DEVICE)
        visits = torch.zeros(expected.shape, dtype=torch.int32, device=DEVICE)
        visits_kernel[(len(expected),)](
            mask.ranges, edges, visits, q_len, kv_len, expected.shape[1], ROWS=rows, KEYS=keys
        )
        assert torch.equal(visits.cpu().long(), expected)
        assert torch.equal(visits_of(edges.cpu(), expected.shape[1]), expected)

    @pytest.mark.parametrize("name", MANY)
    def test_tiles_of_queries(self, name):
        make, q_len, kv_len = MANY[name]
        mask = make(2, q_len, kv_len).to(DEVICE)
        rows, keys = 16, 32
        edges = kernels._query_edges(mask.ranges, q_len, kv_len, rows, keys).cpu()
        expected = mask.tiles(rows, keys).mT.long().cpu()
        if q_len % rows:  # a tile beyond the last row is always masked
            expected[..., -1].clamp_(max=1)
        for ours, wanted in zip(edges, expected, strict=True):
            visits = visits_of(ours, wanted.shape[1])
            full = visits == 2
            assert bool((visits >= (wanted > 0).long()).all()) and bool((wanted[full] == 2).all())
            if name not in ("intervals, rows without keys", "block diffusion, interleaved", "cross"):
                assert torch.equal(visits, wanted)

    def test_cuda_graph_and_no_synchronisation(self, shipped_tiles):
        case = AttentionCase((2, 4, 2, 300, 300, 64, 64), "block diffusion", BF16, backward=True)
        *inputs, mask = case.arguments("cuda")
        gradients = case.gradients("cuda")

        def call():
            return checks.results(lambda *x: genfast.attention(*x, mask=mask, return_lse=True), inputs, gradients, True)

        expected = call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        graph.replay()
        assert all(map(torch.equal, got, expected))

    test_cuda_graph_and_no_synchronisation.__test__ = HAS_GPU


if not HAS_GPU:  # an attribute of a method does not keep pytest from collecting it
    del TestKernels.test_cuda_graph_and_no_synchronisation
