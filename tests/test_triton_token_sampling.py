"""The Triton kernels of ``token_sampling`` against the reference: on a GPU, or in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast.checks import token_masking, token_transfer, token_transition
from genfast.checks import token_sampling as checks

kernels = pytest.importorskip("genfast.kernels.token_sampling")
CASES, TRANSFERS, MASKS = checks.cases(), token_transfer.cases(), token_masking.cases()
LONG = [case for case in CASES if case.shape[-1] > kernels.TILE]
TRANSITIONS = token_transition.cases()
if not HAS_GPU:
    # The interpreter takes a tenth of a second for a row, so what it has seen in one case it is not shown in another:
    # odd rows have plain ones among them; a filter sees float32, whatever the logits are; rows of one, of a part of a
    # tile and of tiles are all there is to a length; what is drawn at a place depends on its tile where there are
    # counts, pairs or words of torch's.
    ODD = [case for case in CASES if case.odd]
    CASES = [case for case in CASES if case.odd or replace(case, odd=True) not in ODD]
    CASES = [case for case in CASES if case.dtype == torch.float32 or "top_p" not in case.options]
    TRANSFERS = [case for case in TRANSFERS if (case.length, case.kind) in ((1, "plain"), (37, "odd"), (300, "ties"))]
    TILED = ("counts", "count", "antithetic", "generator")
    MASKS = [case for case in MASKS if case.shape != (4, 1500) or {*case.options, *case.tensors} & {*TILED}]
    TRANSITIONS = token_transition.cases(quick=True)


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_cases(self, case):
        with genfast.backend("triton"):
            error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
    def test_rows_that_fill_the_device(self, case, monkeypatch):
        monkeypatch.setitem(kernels.sample_tokens.__kwdefaults__, "fill", 1)
        with genfast.backend("triton"):
            error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    def test_any_split_draws_the_same(self, monkeypatch):
        x = torch.randn(3, 20000, device=DEVICE)
        found = []
        for fill in (1, 7, 13, 1000):
            monkeypatch.setitem(kernels.sample_tokens.__kwdefaults__, "fill", fill)
            with genfast.backend("triton"):
                found.append(genfast.sample_tokens(x, temperature=1.0, seed=3, statistics=("logsumexp", "entropy")))
        assert all(torch.equal(found[0].tokens, f.tokens) for f in found)
        for f in found:
            torch.testing.assert_close(found[0].confidence, f.confidence, rtol=1e-6, atol=0)
            torch.testing.assert_close(found[0].logsumexp, f.logsumexp, rtol=1e-6, atol=0)

    def test_transfer(self):
        with genfast.backend("triton"):
            assert [c.name for c in TRANSFERS if token_transfer.check(c, DEVICE) != (0, 0)] == []

    def test_masking(self):
        with genfast.backend("triton"):
            assert [c.name for c in MASKS if token_masking.check(c, DEVICE) != (0, 0)] == []

    def test_transition(self):
        with genfast.backend("triton"):
            assert [c.name for c in TRANSITIONS if token_transition.check(c, DEVICE) != (0, 0)] == []

    def test_cuda_graph(self):
        x = torch.randn(8, 4, 5000, device="cuda").bfloat16()
        call = lambda: genfast.sample_tokens(x, temperature=1.0, seed=3)  # noqa: E731
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        graph.replay()
        assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.confidence, expected.confidence)

    test_cuda_graph.__test__ = HAS_GPU
