"""The Triton kernel of ``attention_cached`` against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from interpreter import DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast.checks import attention_cached as checks
from genfast.checks.attention_cached import BF16, F16, F32, CachedCase
from genfast.reference import attention_cached as reference

pytest.importorskip("triton")
kernels = pytest.importorskip("genfast.kernels.attention_cached")

SMALL = (16, 16, 4, 1)
SHAPE = (3, 2, 1, 5, 36, 16, 24)
CASES = [
    *(CachedCase(SHAPE, F32, write, rope="half") for write in ("append", "rewrite")),
    *(CachedCase(SHAPE, F32, rope=rope, page_size=p) for rope, p in (("half", None), ("interleaved", 7))),
    *(CachedCase((2, 4, 2, 3, 20, 16, 16), dtype, page_size=16) for dtype in (BF16, F16)),
    # Not bfloat16: the interpreter cuts off where a rotation is rounded.
    *(CachedCase((1, 1, 1, 40, 20, 24, 16), dtype, rope="interleaved") for dtype in (F32, F16)),
    CachedCase(SHAPE, block=False),
    *(CachedCase(SHAPE, layout=layout, rope="half") for layout in ("BLHD", "wide", "columns")),
    *(CachedCase(SHAPE, BF16, scale=scale) for scale in (-0.3, 0.0)),
    *(CachedCase(shape) for shape in ((0, 2, 1, 5, 5, 16, 16), (2, 2, 1, 0, 5, 16, 16), (2, 2, 1, 5, 0, 16, 16))),
]


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def few_programs(self, monkeypatch):
        """Small tiles, and no keys split between programs unless a test asks for it."""
        monkeypatch.setitem(kernels.attention_cached.__kwdefaults__, "tiles", SMALL)
        monkeypatch.setitem(kernels.attention_cached.__kwdefaults__, "fill", 1)
        with genfast.backend("triton"):
            yield

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_cases(self, case):
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("case", checks.cases() if HAS_GPU else [], ids=lambda case: case.name)
    def test_every_case_on_a_gpu(self, case, monkeypatch):
        monkeypatch.setitem(kernels.attention_cached.__kwdefaults__, "tiles", None)
        monkeypatch.setitem(kernels.attention_cached.__kwdefaults__, "fill", kernels.FILL)
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("page_size", (None, 16))
    def test_keys_split_between_programs(self, page_size, monkeypatch):
        monkeypatch.setitem(kernels.attention_cached.__kwdefaults__, "fill", 1000)
        error, allowed = checks.check(CachedCase((2, 2, 1, 3, 290, 16, 16), page_size=page_size), DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("page_size", (None, 4))
    @pytest.mark.parametrize("rope", (False, True))
    def test_a_write_leaves_the_rest_alone(self, page_size, rope):
        """Rows that begin before 0 or end beyond what they may write."""
        first, end = (torch.tensor(t, device=DEVICE) for t in ([0, -3, 17], [30, 12, 20]))
        k, v = torch.randn(3, 2, 21, 12, device=DEVICE), torch.randn(3, 2, 21, 20, device=DEVICE)
        angles = torch.arange(40.0, device=DEVICE)[:, None] * 0.5 ** torch.arange(6.0, device=DEVICE)
        found = []
        for module in (kernels, reference):
            cache = genfast.KVCache(3, 2, 30, 12, value_dim=20, device=DEVICE, page_size=page_size)
            cache.append(*(torch.full((3, 2, 30, n), 7.0, device=DEVICE) for n in (12, 20)))
            turn = (angles.cos(), angles.sin()) if rope else (None, None)
            module.cache_write(k, v, *cache._memory, cache.table, first, end, *turn, interleaved=True)
            found.append([store(b) for b in range(3) for store in (cache.keys, cache.values)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)

    def test_what_lies_beyond_a_row_may_be_anything(self):
        q, k = torch.randn(2, 2, 3, 16, device=DEVICE), torch.randn(2, 1, 33, 16, device=DEVICE)
        outs = []
        for fill in (0.0, torch.nan):
            cache = genfast.KVCache(2, 1, 60, 16, device=DEVICE)
            for memory in cache._memory:
                memory.fill_(fill)
            cache.append(k, k, torch.tensor([33, 7], device=DEVICE))
            outs.append(genfast.attention_cached(q, cache, k=k[:, :, :3], v=k[:, :, :3]))
        assert torch.equal(*outs) and bool(outs[0].isfinite().all())
