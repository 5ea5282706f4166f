"""The GPU kernels of ``gradient_bucket`` against the reference: on a GPU, or Triton's in its interpreter."""

import pytest
import torch
from interpreter import BACKENDS, DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast import BucketLayout, pack_gradients, reduce_chunks, unpack_gradients
from genfast.checks import gradient_bucket as checks

tables = pytest.importorskip("genfast.kernels.gradient_table")


def anywhere_in_memory(device):
    """What the ops write where nothing begins at a multiple of 16 bytes, and a gradient is not contiguous."""
    layout = BucketLayout([700], 2, "int8")
    gradient = torch.linspace(-1, 1, 1401, device=device)[::2][:700]
    residual = torch.full((701,), 0.25, device=device)[1:]
    size = layout.shape[0] * layout.chunk_bytes
    out = torch.empty(size + 1, dtype=torch.uint8, device=device)[1:].view(layout.shape)
    pack_gradients([gradient], layout, residual=residual, out=out)
    reduced = torch.empty(layout.chunk_bytes + 4, dtype=torch.uint8, device=device)[4:]
    reduce_chunks(out, layout, out=reduced)
    written = torch.zeros(700, 2, dtype=torch.float16, device=device)
    return [out, residual, reduced, written, *unpack_gradients(out, layout, [written[:, 0]])]


test_in_the_interpreter = in_the_interpreter(__file__)


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

    def test_buckets_and_residuals_anywhere_in_memory(self, backend):
        found = []
        for name in ("reference", backend):
            with genfast.backend(name):
                found.append(anywhere_in_memory(DEVICE))
        assert all(map(torch.equal, *found))

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

    def test_more_values_than_32_bits_count(self, backend):
        """The last ones of a tensor of 4 GiB, on a wire of half of them."""
        tail = torch.randn(1000, device=DEVICE).bfloat16()
        layouts = [BucketLayout([before + 1000], 1, "fp8_e4m3") for before in (0, 2**31 + 2**20)]
        found = []
        for layout in layouts:
            gradient = torch.zeros(layout.numel, dtype=torch.bfloat16, device=DEVICE)
            gradient[-1000:] = tail
            with genfast.backend(backend):
                wire = pack_gradients([gradient], layout).wire
                square_norm, finite = unpack_gradients(wire, layout, [gradient.zero_()])
            found.append([gradient[-1000:].clone(), square_norm, finite])
        *expected, exact_norm, _ = found[0]
        assert torch.equal(found[1][0], expected[0]) and found[1][2].all()
        torch.testing.assert_close(found[1][1], exact_norm, rtol=1e-12, atol=0)

    test_more_values_than_32_bits_count.__test__ = HAS_GPU

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
