"""The GPU kernels of ``gradient_bucket`` against the reference: on a GPU, or Triton's in its interpreter.

As in ``test_triton_sampler_step.py``, the interpreter needs a process of its own.
"""

import pytest
import torch
from test_triton_sampler_step import BACKENDS, DEVICE, HAS_GPU, RUNS_HERE, run_in_the_interpreter

import genfast
from genfast import BucketLayout, pack_gradients, reduce_chunks, unpack_gradients
from genfast.checks import gradient_bucket as checks

tables = pytest.importorskip("genfast.kernels.gradient_table")


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


test_in_the_interpreter.__test__ = not RUNS_HERE


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
class TestKernels:
    __test__ = RUNS_HERE

    def test_cases(self, backend):
        with genfast.backend(backend):
            cases = checks.cases(quick=not HAS_GPU)
            assert [case.name for case in cases if checks.check(case, DEVICE) != (0, 0)] == []

    def test_more_tensors_than_one_list_holds(self, backend):
        """150 tensors of every dtype, none of whose values lie at a multiple of 16 bytes of the bucket."""
        kinds = (torch.float32, torch.bfloat16, torch.float16)
        gradients = [torch.randn(7 + k % 3, device=DEVICE).to(kinds[k % 3]) for k in range(150)]
        layout, found = BucketLayout([t.numel() for t in gradients], 2, "int8"), []
        for name in ("reference", backend):
            with genfast.backend(name):
                packed = pack_gradients(gradients, layout)
                written = [torch.empty_like(t) for t in gradients]
                unpacked = unpack_gradients(packed.wire, layout, written)
                found.append([packed.wire, packed.finite, *written, unpacked.finite, unpacked.square_norm])
        *expected, exact = found[0]
        *got, square_norm = found[1]
        assert all(map(torch.equal, got, expected))
        torch.testing.assert_close(square_norm, exact, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("wire, ranks", [("fp32", 11), ("fp8_e4m3", 12)])
    def test_many_ranks_into_a_row_of_what_was_received(self, backend, wire, ranks):
        layout, found = BucketLayout([ranks * 256 * 5], ranks, wire), []
        with genfast.backend("reference"):
            sent = [pack_gradients([torch.randn(layout.numel, device=DEVICE)], layout).wire[0] for _ in range(ranks)]
        for name in ("reference", backend):
            received = torch.stack(sent)
            with genfast.backend(name):
                found.append(reduce_chunks(received, layout, out=received[3]).clone())
        assert torch.equal(*found)

    def test_a_sum_keeps_the_sign_of_zero(self, backend):
        layout = BucketLayout([256], 1, "fp32")
        received = torch.full((1, 256), -0.0, device=DEVICE).view(torch.uint8)
        with genfast.backend(backend):
            assert torch.equal(reduce_chunks(received, layout), received[0])

    def test_squares_do_not_overflow(self, backend):
        layout = BucketLayout([3000], 1, "fp32")
        large = torch.full((3000,), 1e30, device=DEVICE)
        with genfast.backend(backend):
            square_norm, finite = unpack_gradients(pack_gradients([large], layout).wire, layout, [large])
        assert finite.all() and abs(square_norm.item() / 3e63 - 1) < 1e-6

    def test_cuda_graph(self, backend):
        gradients = [torch.randn(n, device="cuda") for n in (70_001, 5, 300_000)]
        layout = BucketLayout([t.numel() for t in gradients], 1, "bf16")

        def there_and_back():
            return unpack_gradients(pack_gradients(gradients, layout).wire, layout, gradients)

        with genfast.backend(backend):
            expected = there_and_back()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = there_and_back()
            graph.replay()
        assert torch.equal(got.square_norm, expected.square_norm)

    test_cuda_graph.__test__ = HAS_GPU


class TestTable:
    __test__ = RUNS_HERE

    def test_of_the_same_tensors_is_made_once(self):
        layout = BucketLayout([300, 0, 2000], 1, "bf16")
        gradients = [torch.randn(n, device=DEVICE) for n in layout.numels]
        table = tables.table_of(gradients, layout)
        assert tables.table_of(list(gradients), layout) is table
        others = [torch.randn(n, device=DEVICE) for n in layout.numels]
        assert tables.table_of(others, layout) is not table
        assert tables.table_of(gradients, BucketLayout(layout.numels, 2, "bf16")) is not table
        addresses = [word % (1 << tables.DTYPE_SHIFT) for word in table[:3].tolist()]
        assert addresses == [t.data_ptr() for t in gradients]
        assert table[3:].tolist() == [0, 300, 300, 2300, 0, 2, 2, 3]

    def test_kept_tables_are_few(self, monkeypatch):
        monkeypatch.setattr(tables, "_KEPT", 2)
        layout = BucketLayout([4], 1, "bf16")
        gradients = [torch.randn(4, device=DEVICE) for _ in range(4)]
        for t in gradients:
            tables.table_of([t], layout)
        assert len(tables._tables) == 2
