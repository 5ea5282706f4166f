"""The GPU backends of ``sampler_step`` against the reference: on a GPU, or Triton's in its interpreter."""

import pytest
import torch
from interpreter import BACKENDS, DEVICE, HAS_GPU, RUNS_HERE, in_the_interpreter

import genfast
from genfast import backends
from genfast.random import philox_words, reference_normal
from genfast.reference.sampler_step import sampler_step as reference
from genfast.step_table import StepTable

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
block_words = pytest.importorskip("genfast.kernels.philox").block_words
X0 = dict(x0=0.5, to_x0=[1.0, -0.5])


test_in_the_interpreter = in_the_interpreter(__file__)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def table_of(*args, **kwargs):
    return StepTable(*args, **kwargs).to(DEVICE)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def check(result, inputs, table, options, dtype=None):
    """Each result against the float64 reference: at most twice the error of the plain one, and a rounding floor."""

    def wide(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    exact = as_tuple(reference([wide(t) for t in inputs], table, **{k: wide(v) for k, v in options.items()}))
    plain = as_tuple(reference(inputs, table, dtype=dtype, **options))
    for ours, oracle, theirs in zip(as_tuple(result), exact, plain, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        # In float64 the oracle is no better than the kernel: leave room for the rounding of a handful of operations.
        floor = torch.finfo(ours.dtype).eps * (8 if ours.dtype == torch.float64 else 1)
        allowed = 2 * (theirs.double() - oracle).abs().max() + floor * oracle.abs().max()
        error = (ours.double() - oracle).abs().max()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.fixture(params=BACKENDS)
def backend(request):
    with genfast.backend(request.param):
        yield request.param


def run_direct(name, inputs, table, **options):
    """A backend's function without the checks of the public op, some of which need values on the CPU."""
    _, function = backends.choose("sampler_step", "sampler_step", torch.device(DEVICE))
    defaults = dict(
        step=None, uncond=None, guidance=1.0, guidance_rescale=0.0, clip=None, threshold=None, log_variance=None,
        noise=None, seed=None, stream=0, offset=0, second_out=None,
    )  # fmt: skip
    function(inputs, table, **{**defaults, **options})


class TestStep:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("dtypes", ["fp32", "fp32+bf16", "bf16", "fp16", "fp64"])
    @pytest.mark.parametrize("number", range(16))
    def test_every_shipped_configuration(self, backend, number, dtypes):
        from genfast.kernels import configurations

        case = configurations.CASES[number]
        (inputs, table), options = configurations.arguments(case, dtypes, (2, 3, 7, 11), DEVICE)
        second, out = options.pop("second_out"), options.pop("out")
        tensors = [*inputs, *(options[name] for name in case.tensors)]
        for i, t in enumerate(tensors):
            t.copy_(randn(*t.shape, seed=i))
        if case.per_sample:
            options["step"].copy_(torch.tensor([1, 0]))
            options["seed"].copy_(torch.tensor([5, 2**40 + 1]))
            options["guidance"].copy_(torch.tensor([1.5, 7.3]))
        if case.inputs:
            table = table_of(
                torch.linspace(-0.7, 0.9, 2 * case.inputs).view(2, -1).double(),
                **{k: v if k != "second" else [v] * case.inputs for k, v in case.table.items()},
            )
        result = genfast.sampler_step(inputs, table, out=out, **({"second_out": second} if second is not None else {}),
                                      **self._public(options))  # fmt: skip
        if not inputs:
            # Without an input the reference takes its shape from `out`.
            want = reference_normal(2, 231, 0, 1, device=DEVICE).view(out.shape).to(out.dtype)
            assert torch.equal(result, want)
            return
        check(result, inputs, table, options, dtype=out.dtype)

    @staticmethod
    def _public(options):
        if options["uncond"] is None:
            options = {k: v for k, v in options.items() if k != "guidance"}
        return options

    def test_the_list_of_cases_is_whole(self):
        from genfast.kernels import configurations

        assert len(configurations.CASES) == 16

    @pytest.mark.parametrize("inputs", range(1, 9))
    def test_number_of_inputs(self, backend, inputs):
        tensors = [randn(2, 65, seed=i) for i in range(inputs)]
        table = table_of([0.1 * (i + 1) for i in range(inputs)], second=[0.3 - 0.1 * i for i in range(inputs)])
        check(genfast.sampler_step(tensors, table), tensors, table, {})

    @pytest.mark.parametrize("inner", [1, 2, 63, 64, 65, 1023, 1025, 2047, 2049, 5000])
    @pytest.mark.parametrize("options", [{}, dict(seed=3), dict(guidance_rescale=0.7), dict(threshold=(0.9, 2.0))])
    def test_sizes(self, backend, inner, options):
        x = [randn(2, inner, seed=i) for i in range(2)]
        options = dict(options)
        if "guidance_rescale" in options:
            options.update(uncond=randn(2, inner, seed=2), guidance=4.0)
        table = table_of([0.5, 0.3], x0=0.5, to_x0=[1.0, -0.5], **(dict(noise=0.1) if "seed" in options else {}))
        check(genfast.sampler_step(x, table, **options), x, table, options)

    @pytest.mark.parametrize("options", [{}, dict(seed=3), dict(threshold=(0.9, 2.0))])
    def test_zero_dimensional_and_empty(self, backend, options):
        table = table_of([0.5, 0.3], **X0, **(dict(noise=0.1) if "seed" in options else {}))
        x = [randn(seed=1).reshape(()), randn(seed=2).reshape(())]
        check(genfast.sampler_step(x, table, **options), x, table, options)
        for shape in ((0,), (0, 5), (3, 0)):
            x = [torch.empty(shape, device=DEVICE)] * 2
            assert genfast.sampler_step(x, table, **options).shape == shape

    @pytest.mark.parametrize("options", [{}, dict(seed=3), dict(clip=0.8)])
    def test_layouts(self, backend, options):
        table = table_of([[0.5, 0.3, 0.1]] * 3, **X0, **(dict(noise=0.1) if "seed" in options else {}))
        wide = randn(3, 6, 4, 5, seed=1)
        plain = randn(3, 3, 4, 5, seed=2)
        layouts = {
            "slices of a wider tensor": [wide[:, :3], wide[:, 3:], plain],
            "the same tensor for every sample": [plain, plain[:1].expand(3, -1, -1, -1), plain],
            "channels last": [t.contiguous(memory_format=torch.channels_last) for t in (wide[:, :3], plain, plain)],
            "mixed orders": [plain, plain.contiguous(memory_format=torch.channels_last), wide[:, :3]],
            "transposed": [plain.transpose(2, 3).contiguous().transpose(2, 3), plain, plain],
            "every second element": [randn(3, 3, 4, 10, seed=3)[..., ::2], plain, plain],
        }
        for name, x in layouts.items():
            got = genfast.sampler_step(x, table, step=1, **options)
            want = reference(x, table, step=1, **{**options, **(dict(clip=(-0.8, 0.8)) if "clip" in options else {})})
            assert torch.equal(got, want), name
            out = torch.zeros(3, 4, 5, 3, device=DEVICE).permute(0, 3, 1, 2)
            genfast.sampler_step(x, table, step=1, out=out, **options)
            assert torch.equal(out, want), name

    def test_in_place(self, backend):
        table = table_of([0.5, 0.3], noise=0.2, second=[0.1, 0.9])
        x, m = randn(2, 300, seed=1), randn(2, 300, seed=2).bfloat16()
        want = reference([x, m], table, seed=1)
        got = genfast.sampler_step([x, m], table, seed=1, out=x)
        assert got[0] is x and torch.equal(x, want[0]) and torch.equal(got[1], want[1].to(got[1].dtype))

    @pytest.mark.parametrize("inputs, out", [("float32", "float64"), ("float64", "bfloat16"), ("float16", "float32")])
    def test_dtypes_of_out(self, backend, inputs, out):
        x = [randn(2, 100, dtype=getattr(torch, inputs), seed=i) for i in range(2)]
        table, out = table_of([0.5, 0.3]), getattr(torch, out)
        check(genfast.sampler_step(x, table, dtype=out), x, table, {}, dtype=out)

    def test_half_precision_rounds_to_nearest_even(self, backend):
        x = torch.arange(1, 4097, device=DEVICE, dtype=torch.float32)[None] / 256 + 1
        table = table_of([1.0])
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(genfast.sampler_step([x], table, dtype=dtype), x.to(dtype))

    def test_rows_per_sample_and_steps_from_the_device(self, backend):
        rows = torch.tensor([[0.5, 0.3], [0.1, -0.2], [1.0, 0.0]], dtype=torch.float64)
        x = [randn(3, 130, seed=i) for i in range(2)]
        table = table_of(rows)
        check(genfast.sampler_step(x, table), x, table, {})
        for step in (torch.tensor([2, 0, 1]), torch.tensor([1]), torch.tensor(1)):
            step = step.to(DEVICE)
            check(genfast.sampler_step(x, table, step=step), x, table, dict(step=step))
        assert torch.equal(genfast.sampler_step(x, table, step=1), genfast.sampler_step(x, table, step=step))

    def test_a_step_out_of_range_on_the_device_is_nan(self, backend):
        x = [randn(4, 70, seed=i) for i in range(2)]
        table = table_of([[0.5, 0.3]] * 3, **X0, noise=0.1, second=[0.1, 0.2])
        for options in (dict(seed=1), dict(threshold=(0.9, 2.0)), dict(clip=(-1.0, 1.0))):
            out, second = torch.zeros(4, 70, device=DEVICE), torch.zeros(4, 70, device=DEVICE)
            step = torch.tensor([1, 3, -1, 2**40], device=DEVICE)
            run_direct(backend, x, table, step=step, out=out, second_out=second, **options)
            for result in (out, second):
                assert result[0].isfinite().all() and result[1:].isnan().all()
        out = torch.zeros(4, 70, device=DEVICE)
        run_direct(
            backend, [], table_of([[]], noise=1.0), seed=1, step=torch.tensor([3], device=DEVICE), out=out
        )  # fmt: skip
        assert out.isnan().all()

    def test_nan_and_infinity_stay_where_they_are(self, backend):
        x, m = randn(3, 200, seed=1), randn(3, 200, seed=2)
        x[1, 7], x[2, 9] = float("nan"), float("inf")
        table = table_of([0.0, 0.0], x0=1.0, to_x0=[1.0, 0.5])
        clipped = genfast.sampler_step([x, m], table, clip=1.0)
        assert clipped[1].isnan().sum() == 1 and clipped[2].isnan().sum() == 1  # infinity times its coefficient 0
        for got, want in (
            (genfast.sampler_step([x, m], table), reference([x, m], table)),
            (clipped, reference([x, m], table, clip=(-1.0, 1.0))),
            (
                genfast.sampler_step([x, m], table, threshold=(0.5, 9.0)),
                reference([x, m], table, threshold=(0.5, 9.0)),
            ),
        ):
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.nan_to_num())

    def test_log_variance_over_its_whole_range(self, backend):
        log_variance = torch.linspace(-120, 100, 2001, device=DEVICE)[None]
        x, z = torch.zeros_like(log_variance), torch.ones_like(log_variance)
        table = table_of([1.0], noise=1.0, log_std=[0.0, 1.0])
        got = genfast.sampler_step([x], table, log_variance=log_variance, noise=z).double()
        want = log_variance.double().exp().float().double()
        finite = want.isfinite()
        assert torch.equal(got[~finite], want[~finite])
        error = ((got - want).abs()[finite] / (want[finite] * 2**-23 + 2**-149)).max()
        assert error <= 1.5, f"{error:.2f} units in the last place"
        log_variance[0, 3] = float("nan")
        assert genfast.sampler_step([x], table, log_variance=log_variance, noise=z).isnan().sum() == 1


class TestPhilox:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**32 + 5, -1, 2**63 + 12345, -(2**63)])
    def test_seeds(self, backend, seed):
        assert torch.equal(
            genfast.randn(2, 2100, seed=seed, device=DEVICE), reference_normal(2, 2100, seed, device=DEVICE)
        )

    @pytest.mark.parametrize("stream, offset", [(1, 0), (16, 1), (2**31, 2**31), (2**32 - 1, 2**32 - 1), (-(2**31), 7)])
    def test_streams_and_offsets(self, backend, stream, offset):
        got = genfast.randn(2, 130, seed=9, stream=stream, offset=offset, device=DEVICE)
        assert torch.equal(got, reference_normal(2, 130, 9, stream, offset, device=DEVICE))

    def test_a_batch_in_parts(self, backend):
        whole = genfast.randn(5, 3, 77, seed=3, device=DEVICE)
        parts = [genfast.randn(n, 3, 77, seed=3, offset=o, device=DEVICE) for o, n in ((0, 2), (2, 3))]
        assert torch.equal(whole, torch.cat(parts))

    def test_seeds_per_sample(self, backend):
        seeds = torch.tensor([5, 2**40, -7], device=DEVICE)
        got = genfast.randn(3, 200, seed=seeds, device=DEVICE)
        assert torch.equal(got, reference_normal(3, 200, seeds, device=DEVICE))
        for row, seed in enumerate(seeds.tolist()):
            assert torch.equal(got[row : row + 1], genfast.randn(1, 200, seed=seed, device=DEVICE))
        one = torch.tensor(5, device=DEVICE)
        assert torch.equal(genfast.randn(3, 200, seed=one, device=DEVICE), reference_normal(3, 200, 5, device=DEVICE))

    def test_streams_move_with_the_step(self, backend):
        x = [torch.zeros(2, 100, device=DEVICE)]
        table = table_of([[1.0]] * 4, noise=1.0)
        for step in (3, torch.tensor([3], device=DEVICE), torch.tensor([3, 3], device=DEVICE)):
            got = genfast.sampler_step(x, table, step=step, seed=1, stream=2**32 - 2)
            assert torch.equal(got, reference_normal(2, 100, 1, 2**32 + 1, device=DEVICE))
        step = torch.tensor([0, 2], device=DEVICE)
        got = genfast.sampler_step(x, table, step=step, seed=1, stream=5)
        assert torch.equal(got, reference_normal(2, 100, 1, step + 5, device=DEVICE))


@triton.jit
def words_kernel(out, tile, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    key = tl.full((), 7, tl.uint32)
    words = block_words(key, key, tile.to(tl.int64) * LANES, lane, key, key)
    for i in tl.static_range(4):
        tl.store(out + i * LANES + lane, words[i].to(tl.int64))


def test_blocks_past_32_bits():
    """Elements past 2^34 of one sample, which no test can afford to hold in memory."""
    for block in (0, 2**31, 2**32 - 64, 2**32, 5 * 2**32 + 128):
        out = torch.empty(4, 64, dtype=torch.int64, device=DEVICE)
        words_kernel[(1,)](out, block // 64, LANES=64)
        blocks = torch.arange(block, block + 64)
        want = philox_words(torch.tensor(7 + (7 << 32)), blocks, torch.tensor(7), torch.tensor(7))
        assert torch.equal(out.cpu(), torch.stack(want))


test_blocks_past_32_bits.__test__ = RUNS_HERE


class TestThreshold:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("ratio", [0.0, 0.31, 0.5, 0.9, 0.995, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_exact(self, backend, ratio, dtype):
        table = table_of([0.0, 0.0], x0=1.0, to_x0=[1.0, -0.5])
        # Where a ratio falls differs between sizes; the interpreter is slow, and is shown them all for one ratio.
        for inner in (1, 2, 3, 17, 1500) if HAS_GPU or ratio == 0.31 else (3, 1500):
            x = [randn(2, inner, dtype=dtype, seed=inner + i) * 3 for i in range(2)]
            options = dict(threshold=(ratio, 100.0))
            assert torch.equal(genfast.sampler_step(x, table, **options), reference(x, table, **options))

    def test_ties_and_extremes(self, backend):
        table = table_of([0.0, 0.0], x0=1.0, to_x0=[0.0, 1.0])
        x0 = torch.zeros(6, 400, device=DEVICE)
        x0[1] = 5.0
        x0[2] = randn(400, seed=1).mul(4).round()
        x0[3] = torch.cat([torch.full((200,), 2.0), torch.full((200,), 3.0)])
        x0[4] = torch.linspace(-1e-40, 1e-40, 400)
        x0[5] = torch.linspace(-1.5e38, 1.5e38, 400)
        for ratio in (0.25, 0.4987, 0.5, 0.75):
            options = dict(threshold=(ratio, 1e38))
            x = [torch.zeros_like(x0), x0]
            assert torch.equal(genfast.sampler_step(x, table, **options), reference(x, table, **options))

    def test_with_guidance_and_rescale(self, backend):
        x = [randn(2, 3000, seed=i) for i in range(2)]
        options = dict(uncond=randn(2, 3000, seed=2), guidance=6.0, guidance_rescale=0.6, threshold=(0.9, 5.0))
        table = table_of([0.2, 0.1], **X0)
        check(genfast.sampler_step(x, table, **options), x, table, options)


class TestRescale:
    __test__ = RUNS_HERE

    def test_a_constant_sample_keeps_its_guidance(self, backend):
        x = [randn(2, 500, seed=1), torch.full((2, 500), 0.3, device=DEVICE)]
        uncond = torch.full((2, 500), 0.1, device=DEVICE)
        uncond[1] = randn(500, seed=3)
        table = table_of([0.0, 1.0])
        options = dict(uncond=uncond, guidance=3.0, guidance_rescale=1.0)
        got = genfast.sampler_step(x, table, **options)
        assert torch.equal(got[0], reference(x, table, **options)[0])
        assert got[0].isfinite().all() and got[1].abs().max() == 0  # a constant output has standard deviation 0

    def test_a_mean_far_from_zero(self, backend):
        x = [randn(2, 5000, seed=i) + 1000 for i in range(2)]
        options = dict(uncond=randn(2, 5000, seed=2) - 500, guidance=2.0, guidance_rescale=0.5)
        table = table_of([0.5, 0.5])
        check(genfast.sampler_step(x, table, **options), x, table, options)

    def test_a_nan_does_not_spread(self, backend):
        x = [randn(2, 100, seed=i) for i in range(2)]
        x[1][0, 5] = float("nan")
        options = dict(uncond=randn(2, 100, seed=2), guidance=2.0, guidance_rescale=0.5)
        table = table_of([0.5, 0.5])
        got, want = genfast.sampler_step(x, table, **options), reference(x, table, **options)
        assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 1

    def test_the_company_of_a_sample_does_not_matter(self, backend):
        x = [randn(3, 9000, seed=i) for i in range(2)]
        uncond, table = randn(3, 9000, seed=2), table_of([0.5, 0.5])
        whole = genfast.sampler_step(x, table, uncond=uncond, guidance=5.0, guidance_rescale=0.7)
        alone = genfast.sampler_step([t[1:2] for t in x], table, uncond=uncond[1:2], guidance=5.0, guidance_rescale=0.7)
        assert torch.equal(whole[1:2], alone)
