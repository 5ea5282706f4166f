"""The Triton kernels of ``scalar_quantize`` against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from interpreter import DEVICE, RUNS_HERE, in_the_interpreter

import genfast
from genfast.checks import scalar_quantize as checks

pytest.importorskip("triton")
pytest.importorskip("genfast.kernels.scalar_quantize")


LEAST = dict(least_probability=1e-2, inv_temperature=1.0)
CASES = [
    *[c for c in checks.cases() if c.op == "fsq"][::3],
    *[c for c in checks.cases() if c.op == "bsq" and c.layout != "last"][::3],
    checks.ScalarCase("lfq", 40, 62),
    checks.ScalarCase("bsq", 300, 1, losses=True),
    checks.ScalarCase("lfq", 20, 13, options=dict(inv_temperature=1.0), losses=True),
    checks.ScalarCase("lfq", 24, 10, options=LEAST | dict(mask=True), losses=True, groups=2),
    checks.ScalarCase("bsq", 33, 6, options=LEAST | dict(entropy_bits=3, scale=0.5), losses=True),
]
"""Blocks of one bit, of one tile of codes, and of more than one; more rows than a tile has."""


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_cases(self, case):
        with genfast.backend("triton"):
            error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    def test_no_rows_count(self):
        z = torch.ones(3, 4, device=DEVICE, requires_grad=True)
        nobody = torch.zeros(3, dtype=torch.bool, device=DEVICE)
        with genfast.backend("triton"):
            for t, mask in ((z, nobody), (z[:0], None)):
                codes, indices, losses = genfast.lfq_quantize(t, mask=mask, return_losses=True, least_probability=1e-5)
                assert len(codes) == len(indices) == len(t) and all(x.isnan().all() for x in losses)
            grad = torch.autograd.grad(codes.sum() + losses.entropy_loss, z, allow_unused=True)[0]
        assert not grad.any()
