"""The Triton kernels of ``lm_head_sample`` against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from interpreter import DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast.checks import token_head as checks

kernels = pytest.importorskip("genfast.kernels.token_head")
# The interpreter takes seconds for what is large.
CASES = [case for case in checks.cases() if HAS_GPU or torch.Size(case.shape).numel() * case.size < 2**20]


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_cases(self, case):
        with genfast.backend("triton"):
            error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    def test_more_rows_than_a_program_takes(self):
        for temperature in (0.0, 1.0):
            case = checks.HeadCase((37, 24), 530, dict(temperature=temperature))
            with genfast.backend("triton"):
                error, allowed = checks.check(case, DEVICE)
            assert error <= allowed

    def test_cuda_graph(self):
        hidden, weight = (
            torch.randn(8, 4, 64, device="cuda").bfloat16(),
            torch.randn(5000, 64, device="cuda").bfloat16(),
        )
        call = lambda: genfast.lm_head_sample(hidden, weight, temperature=1.0, seed=3)  # noqa: E731
        expected = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        graph.replay()
        assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.confidence, expected.confidence)

    test_cuda_graph.__test__ = HAS_GPU
