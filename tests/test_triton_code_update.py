"""The Triton kernels of ``quantize`` and ``ema_update_`` against the reference, on a GPU or in the interpreter."""

import pytest
import torch
from interpreter import DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast.checks import code_update as checks

kernels = pytest.importorskip("genfast.kernels.code_update")


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("case", checks.cases(quick=not HAS_GPU), ids=lambda case: case.name)
    def test_cases(self, case):
        with genfast.backend("triton"):
            error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    def test_a_code_of_many_pieces(self):
        case = checks.AverageCase(3 * kernels.PIECE + 5, 3, 4, skewed=True)
        with genfast.backend("triton"):
            error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    def test_distances(self):
        z = torch.randn(130, 7, device=DEVICE)
        centre, before = z[3:4] + 1, torch.rand(130, device=DEVICE) * 20
        got, expected = before.clone(), torch.minimum(before, (z - centre).square().sum(1))
        kernels.min_distance_update(z, centre, got)
        assert torch.allclose(got, expected, rtol=1e-6)

    def test_cuda_graph(self):
        z, codebook = torch.randn(64, 8, device="cuda"), torch.randn(32, 8, device="cuda")
        state, seed = (codebook, torch.ones(32, device="cuda"), codebook.clone()), torch.tensor(3, device="cuda")
        before = [t.clone() for t in state]

        def step():
            found = genfast.quantize(z, codebook)
            genfast.ema_update_(*state, z, found.indices, threshold=0.9, seed=seed)
            return found.z_q

        def again():
            for t, old in zip(state, before):
                t.copy_(old)

        expected = step()
        after = [t.clone() for t in state]
        again()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        again()
        graph.replay()
        assert torch.equal(got, expected) and all(map(torch.equal, state, after))

    test_cuda_graph.__test__ = HAS_GPU
