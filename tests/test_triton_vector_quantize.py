"""The Triton kernels of ``nearest_code`` against the reference: on a GPU, or in Triton's interpreter.

The interpreter is slow, so shapes are small: a few blocks of codes, with a rest.
"""

import numpy as np
import pytest
import torch
from interpreter import DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast.checks import vector_quantize as checks
from genfast.checks.vector_quantize import BF16, F16, F32, KINDS, CodeCase

kernels = pytest.importorskip("genfast.kernels.vector_quantize")

SMALL = (16, 64, 16, 4, 1)
CASES = [
    *(CodeCase(4, 150, 3, kind) for kind in KINDS),
    *(
        CodeCase(3, 150, 4, kind, metric)
        for kind in ("duplicates", "zero", "nonfinite")
        for metric in ("cosine", "dot")
    ),
    *(CodeCase(3, 150, 3, kind, dtype=dtype) for kind in ("normal", "equal") for dtype in (BF16, F16)),
    CodeCase(3, 70, 3, metric="cosine", dtype=BF16, codes_dtype=F32),
    CodeCase(1, 1, 5),
    CodeCase(0, 7, 5),
    CodeCase(3, 130, 40),  # more numbers than a step takes
    CodeCase(2, 70, 130, metric="dot"),
    CodeCase(5, 130, 2, groups=2, k=4, channel_first=True),
    CodeCase(3, 150, 2, "duplicates", k=16),
    CodeCase(4, 70, 2, "nonfinite", k=5, metric="dot"),
    CodeCase(3, 9, 2, "nonfinite", k=9),
    CodeCase(17, 200, 1),
]


test_in_the_interpreter = in_the_interpreter(__file__)


def nearest(z, codebook, **options):
    """(indices, distances) of the kernels, after the reference's."""
    options = dict(nonfinite="index", return_distances=True) | options
    with genfast.backend("reference"):
        expected = genfast.nearest_code(z, codebook, **options)
    return genfast.nearest_code(z, codebook, **options), expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        monkeypatch.setitem(kernels.nearest_code.__kwdefaults__, "tiles", SMALL)
        with genfast.backend("triton"):
            yield

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_cases(self, case):
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("case", checks.cases() if HAS_GPU else [], ids=lambda case: case.name)
    def test_every_case_on_a_gpu(self, case, monkeypatch):
        monkeypatch.setitem(kernels.nearest_code.__kwdefaults__, "tiles", None)
        error, allowed = checks.check(case, DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
    def test_shipped_tiles(self, dtype, monkeypatch):
        monkeypatch.setitem(kernels.nearest_code.__kwdefaults__, "tiles", None)
        error, allowed = checks.check(CodeCase(5, 200, 6, dtype=dtype), DEVICE)
        assert error <= allowed

    @pytest.mark.parametrize("metric", ("l2", "cosine", "dot"))
    @pytest.mark.parametrize("scale", (1e-42, 1e-30, 1e-20, 1e20, 1e30))
    def test_numbers_that_the_screen_cannot_hold(self, scale, metric):
        generator = torch.Generator().manual_seed(3)
        z, codebook = (torch.randn(n, 3, generator=generator).to(DEVICE) for n in (2, 100))
        for a, b in ((scale, scale), (1.0, scale), (scale, 1.0)):
            ours, expected = nearest(z * a, codebook * b, metric=metric, return_distances=False)
            assert torch.equal(ours, expected)

    def test_near_ties(self):
        """Codes a rounding apart, and the same numbers in another order."""
        generator = torch.Generator().manual_seed(4)
        z = torch.randn(3, 6, generator=generator)
        codebook = torch.stack([z[0][torch.randperm(6, generator=generator)] for _ in range(64)] * 2)
        codebook[:64] = torch.from_numpy(np.nextafter(codebook[:64].numpy(), np.float32(9)))
        for metric in ("l2", "dot", "cosine"):
            ours, expected = nearest(z.to(DEVICE), codebook.to(DEVICE), metric=metric, k=3)
            assert torch.equal(ours[0], expected[0])

    def test_rows_in_turns_and_codes_in_parts(self, monkeypatch):
        case = CodeCase(18, 200, 2)
        whole = case.run(DEVICE)
        monkeypatch.setitem(kernels.nearest_code.__kwdefaults__, "fill", 1)
        together = case.run(DEVICE)
        monkeypatch.setitem(kernels.nearest_code.__kwdefaults__, "most_bounds", 40)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, together, case.run(DEVICE)))
        monkeypatch.setattr(kernels, "MOST_BLOCKS", 2)
        assert all(torch.equal(a, b) for a, b in zip(whole, case.run(DEVICE)))

    @pytest.mark.parametrize("metric", ("l2", "cosine", "dot"))
    def test_float32_alone(self, metric):
        z, codebook = CodeCase(4, 150, 3).arguments(DEVICE)
        (index, distance), (_, exact) = nearest(z, codebook, metric=metric, precision="fast", k=2)
        torch.testing.assert_close(distance, exact, rtol=1e-5, atol=1e-5)
        with genfast.backend("reference"):
            found = genfast.nearest_code(z, codebook, metric=metric, k=16, return_distances=True)
        assert all(i in row[:3] for i, row in zip(index[:, 0].tolist(), found[0].tolist()))
        huge = torch.tensor([[3e38, -3e38]], device=DEVICE)
        assert genfast.nearest_code(huge, -huge, metric=metric, precision="fast").tolist() == [0]

    def test_few_blocks_are_visited(self, monkeypatch):
        """The bounds rule most blocks out: this is what the screen is for, and only its effect on time shows it."""
        seen = {}
        launch = kernels.select_kernel

        class Spy:
            def __getitem__(self, grid):
                def run(*args, **options):
                    seen["bounds"] = args[4].clone()
                    return launch[grid](*args, **options)

                return run

        monkeypatch.setattr(kernels, "select_kernel", Spy())
        for dtype, share in ((F32, 0.1), (BF16, 0.1)):
            z, codebook = CodeCase(10, 2000, 8, dtype=dtype).arguments(DEVICE)
            distance = genfast.nearest_code(z, codebook, return_distances=True)[1].double()
            limit = (distance - z.double().square().sum(1)) / 2
            assert (seen["bounds"][0].double() <= limit[:, None]).double().mean() < share

    def test_cuda_graph_and_no_synchronisation(self, monkeypatch):
        monkeypatch.setitem(kernels.nearest_code.__kwdefaults__, "tiles", None)
        z, codebook = CodeCase(300, 5000, 64).arguments("cuda")
        call = lambda: genfast.nearest_code(z, codebook, k=3, return_distances=True)  # noqa: E731
        expected = call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        graph.replay()
        assert all(map(torch.equal, got, expected))


if not HAS_GPU:  # an attribute of a method does not keep pytest from collecting it
    del TestKernels.test_cuda_graph_and_no_synchronisation


def cut(x):
    """float32 with 10 bits behind the point, as matrix units cut it for TF32."""
    return (x.numpy().view(np.int32) & -8192).view(np.float32).astype(np.float64)


@pytest.mark.skipif(not RUNS_HERE, reason="needs the interpreter or a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("metric", ("l2", "cosine", "dot"))
@pytest.mark.parametrize("size", (1, 7, 64))
def test_the_bound_holds_where_matrix_units_cut(size, metric):
    """Numbers whose lower bits are all set, of one sign, so that no error cancels another."""
    generator = torch.Generator().manual_seed(size)
    z, codes = (torch.rand(n, size, generator=generator) + 1.0 for n in (8, 64))
    z, codes = (torch.from_numpy(t.numpy().view(np.int32) | 8191).view(torch.float32) for t in (z, codes))
    codebook = codes.to(DEVICE)[None]
    arrays = [torch.zeros(1, 1, 64, device=DEVICE) for _ in range(2)]
    length = torch.zeros(1, 1, 64, dtype=torch.float64, device=DEVICE)
    slope, floor = torch.zeros(1, 1, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    kernels.code_kernel[(1, 1)](
        codebook, *codebook.stride(), *arrays, length, slope, floor, 64, 1,
        METRIC=metric, CUT=kernels._TF32.value, SIZE=size, num_warps=2,
    )  # fmt: skip
    offset, inverse = (t.flatten().double().cpu().numpy() for t in arrays)
    products = cut(z) @ cut(codes).T
    # Every addition cuts as much again.
    products *= 1 - 2.0**-23 * size
    z64, e64 = z.double().numpy(), codes.double().numpy()
    if metric == "cosine":
        screen, real = -products * inverse, -(z64 @ e64.T) / np.linalg.norm(e64, axis=1)
    else:
        screen, real = -products - offset, -(z64 @ e64.T) + ((e64**2).sum(1) / 2 if metric == "l2" else 0)
    allowed = np.linalg.norm(z64, axis=1)[:, None] * slope.item() + floor.item()
    assert (np.abs(screen - real) <= allowed).all()
    assert np.abs(screen - real).max() > allowed.min() / 4, "the bound would be loose"
