"""The Triton kernels of ``token_sampling`` against the reference: on a GPU, or in Triton's interpreter.

As in ``test_triton_sampler_step.py``, the interpreter needs a process of its own.
"""

import pytest
import torch
from test_triton_sampler_step import DEVICE, HAS_GPU, RUNS_HERE, run_in_the_interpreter

import genfast
from genfast.checks import token_masking, token_transfer, token_transition
from genfast.checks import token_sampling as checks

kernels = pytest.importorskip("genfast.kernels.token_sampling")
LONG = [case for case in checks.cases() if case.shape[-1] > kernels.TILE]


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


test_in_the_interpreter.__test__ = not RUNS_HERE


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("case", checks.cases(), ids=lambda case: case.name)
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
            assert [c.name for c in token_transfer.cases() if token_transfer.check(c, DEVICE) != (0, 0)] == []

    def test_masking(self):
        with genfast.backend("triton"):
            assert [c.name for c in token_masking.cases() if token_masking.check(c, DEVICE) != (0, 0)] == []

    def test_transition(self):
        cases = token_transition.cases(quick=not HAS_GPU)
        with genfast.backend("triton"):
            assert [c.name for c in cases if token_transition.check(c, DEVICE) != (0, 0)] == []

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
