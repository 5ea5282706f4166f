"""``residual_quantize`` on the Triton kernels against the reference: on a GPU, or in Triton's interpreter, which needs
a process of its own."""

import pytest
import torch
from interpreter import DEVICE, RUNS_HERE, in_the_interpreter

import genfast
from genfast.checks.residual_quantize import ResidualCase, check

pytest.importorskip("genfast.kernels.vector_quantize")

CASES = [
    ResidualCase(3, 2, 70, 4),
    ResidualCase(3, 2, 70, 4, torch.bfloat16, "cosine"),
    ResidualCase(3, 2, 20, 3, groups=2, channel_first=True),
    ResidualCase(4, 2, 20, 3, nonfinite=True),
    ResidualCase(0, 2, 5, 3),
]


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_cases(self, case):
        with genfast.backend("triton"):
            error, allowed = check(case, DEVICE)
        assert error <= allowed
