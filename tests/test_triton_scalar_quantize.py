"""The Triton kernels of ``fsq_quantize`` against the reference: on a GPU, or in Triton's interpreter."""

import pytest
from test_triton_sampler_step import DEVICE, RUNS_HERE, run_in_the_interpreter

import genfast
from genfast.checks import scalar_quantize as checks

pytest.importorskip("triton")
pytest.importorskip("genfast.kernels.scalar_quantize")


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


test_in_the_interpreter.__test__ = not RUNS_HERE


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("case", [c for c in checks.cases() if c.op == "fsq"][::2], ids=lambda case: case.name)
    def test_cases(self, case):
        with genfast.backend("triton"):
            error, allowed = checks.check(case, DEVICE)
        assert error <= allowed
