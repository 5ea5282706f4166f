"""Ahead-of-time compilation of the Triton kernels for GPUs that this machine need not have."""

import re
from collections import defaultdict

import pytest
import torch

from genfast import backends
from genfast.step_table import StepTable

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("kernels cannot be compiled in a process that interprets them", allow_module_level=True)

from benchmarks import compile_report
from genfast.gradient_wire import BucketLayout
from genfast.kernels import (
    attention_configurations,
    configurations,
    gradient_bucket,
    gradient_configurations,
    gradient_table,
    vector_quantize_configurations,
)
from genfast.kernels.attention import attention
from genfast.kernels.gradient_bucket import pack_gradients
from genfast.kernels.guidance import moments_kernel, rescale_kernel
from genfast.kernels.sampler_step import sampler_step, step_kernel
from genfast.kernels.threshold import histogram_kernel, limit_kernel
from genfast.kernels.vector_quantize import nearest_code

SHARED_MEMORY = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes that a program may have; of sm_80 what its smaller relatives have."""


def compile_without_spills(cases, dtypes, targets=compile_report.TARGETS):
    rows = list(compile_report.triton_rows(targets, cases, dtypes))
    assert {row.target for row in rows} == set(targets)
    assert all(row.registers > 0 for row in rows)
    assert not [row for row in rows if row.spilled or row.shared > SHARED_MEMORY[row.target]]
    return rows


def test_a_few_configurations_on_every_target():
    rows = compile_without_spills(compile_report.QUICK_CASES, compile_report.QUICK_DTYPES)
    kernels = {"step_kernel", "moments_kernel", "rescale_kernel", "histogram_kernel", "limit_kernel"}
    assert {row.kernel for row in rows} == kernels


def test_a_few_configurations_of_token_sampling_on_every_target():
    rows = compile_without_spills(compile_report.QUICK_TOKEN_CASES, ["bf16"])
    assert {row.kernel for row in rows} == {"row_kernel", "part_largest_kernel", "part_sum_kernel", "finish_kernel"}


def test_the_transfer_kernels_on_every_target():
    names = ("transfer_hierarchy", "transfer_entropy_bound", "transfer_perturbed", "transfer_slack", "commit")
    rows = compile_without_spills(names, ["fp32"])
    assert {row.kernel for row in rows} == {"score_kernel", "rank_kernel", "decide_kernel", "commit_kernel"}


def test_the_masking_kernels_on_every_target():
    rows = compile_without_spills(("mask_blocks", "mask_count_uniform"), ["fp32"])
    assert {row.kernel for row in rows} == {"mask_kernel", "word_kernel", "count_kernel"}


def test_the_transition_kernel_on_every_target():
    names = ("transition_jump", "transition_uniform", "transition_posterior_top_p")
    rows = compile_without_spills(names, ["bf16"])
    assert {row.kernel for row in rows} == {"transition_kernel"} and len(rows) == 3 * len(compile_report.TARGETS)


def test_the_head_kernels_on_every_target():
    rows = compile_without_spills(compile_report.QUICK_HEAD_CASES, ["bf16"])
    assert {row.kernel for row in rows} == {"partial_kernel", "merge_kernel"}


def test_the_attention_kernels():
    # Two targets only: these take seconds each.
    rows = compile_without_spills(compile_report.QUICK_ATTENTION_CASES, ["bf16"], ("sm_90", "gfx942"))
    assert {row.kernel for row in rows} == {
        "forward_kernel", "merge_kernel", "delta_kernel", "bounds_kernel", "query_edges_kernel", "key_gradient_kernel",
        "query_gradient_kernel",
    }  # fmt: skip


def test_attention_has_matrix_instructions_and_wide_copies():
    launches = compile_report.triton_launches(compile_report.QUICK_ATTENTION_CASES, ["bf16"], "sm_90").values()
    large = [launch for _, launch in launches if "num_stages" in launch.options]
    assert len(large) == 3
    for launch in large:
        code = compile_report.compile_launch(launch, "sm_90").asm["ptx"]
        # Copies past the first-level cache are of 16 bytes: a row that is not known to be aligned has none.
        assert "wgmma.mma_async" in code and "cp.async.cg.shared.global" in code


def test_the_cached_attention_kernels():
    rows = compile_without_spills(("cached_rope_64", "cached_pages_128"), ["bf16"], ("sm_90", "gfx942"))
    assert {row.kernel for row in rows} == {"cached_kernel", "merge_kernel"}


def test_the_kernel_that_writes_a_cache_on_every_target():
    rows = compile_without_spills([f"write_{name}" for name in attention_configurations.WRITES], ["bf16"])
    assert {row.kernel for row in rows} == {"write_kernel"}


def test_the_code_kernels():
    rows = compile_without_spills(compile_report.QUICK_CODE_CASES, ["bf16"], ("sm_80", "gfx942"))
    assert {row.kernel for row in rows} == {"code_kernel", "screen_kernel", "select_kernel"}


def test_the_code_screen_has_matrix_instructions_and_wide_copies():
    """Of codes of 8 numbers too, whose rows are 16 bytes."""
    for dtype, case in (("fp32", "codes_8"), ("bf16", "codes_8"), ("bf16", "codes_256")):
        launches = compile_report.triton_launches([case], [dtype], "sm_90").values()
        (screen,) = [launch for _, launch in launches if launch.kernel.__name__ == "screen_kernel"]
        code = compile_report.compile_launch(screen, "sm_90").asm["ptx"]
        assert "wgmma.mma_async" in code and "cp.async.cg.shared.global" in code


@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
def test_no_code_kernel_contracts_or_approximates_float64(target):
    launches = compile_report.triton_launches(["codes_cosine_64", "codes_8"], ["fp32"], target).values()
    for _, launch in launches:
        if launch.kernel.__name__ != "screen_kernel":
            code = compile_report.compile_launch(launch, target).asm
            if target == "sm_90":
                assert "fma.rn.f64" not in code["ptx"] and ".approx.f64" not in code["ptx"]
            else:
                assert "llvm.fma.f64" not in code["llir"] and "llvm.fmuladd.f64" not in code["llir"]
                assert "contract" not in code["llir"]


def code_launches(rows, codes, **options):
    (z, codebook), defaults = vector_quantize_configurations.arguments("codes_64", "bf16")
    z, codebook = z[:, :1].expand(1, rows, 1, 64), codebook[:, :1].expand(1, codes, 64)
    # An expanded tensor has a stride of 0, which a real one has not.
    z, codebook = z.as_strided(z.shape, (rows * 64, 64, 64, 1)), codebook.as_strided(codebook.shape, (64, 64, 1))
    results = {name: defaults[name].new_empty((1, rows, 1, 1)) for name in ("indices", "distances")}
    with compile_report.recorded_launches() as launches:
        nearest_code(z, codebook, **{**defaults, **results, **options})
    return launches


def test_no_number_of_rows_compiles_a_new_code_kernel():
    expected = [launch.key() for launch in code_launches(4096, 16384)]
    assert len(expected) == 3
    for rows, codes in ((4095, 16384), (1, 16000), (2**14 + 1, 16383)):
        assert [launch.key() for launch in code_launches(rows, codes)] == expected


@pytest.mark.parametrize("case", ("codes_8", "codes_image_256", "codes_cosine_64"))
def test_memory_of_nearest_code_is_a_fraction_of_the_matrix(case, monkeypatch):
    """Below 2% of rows by codes in float32."""
    args, options = vector_quantize_configurations.arguments(case, "fp32")
    allocated, empty = [], torch.empty

    def counted(*shape, **kwargs):
        allocated.append(empty(*shape, **kwargs))
        return allocated[-1]

    monkeypatch.setattr(torch, "empty", counted)
    with compile_report.recorded_launches():
        nearest_code(*args, **options)
    assert 0 < sum(t.numel() * t.element_size() for t in allocated) < 0.02 * 4096 * 16384 * 4


def test_more_rows_than_bounds_fit_are_done_in_turns():
    names = [launch.kernel.__name__ for launch in code_launches(1000, 16384, most_bounds=400 * 256)]
    assert names == ["code_kernel"] + ["screen_kernel", "select_kernel"] * 3


def test_the_kernels_that_update_codes_on_every_target():
    names = ("quantize_256", "gradient_rotation_256", "gradient_to_codes_8", "average_256", "distance_64")
    rows = compile_without_spills(names, ["bf16"])
    assert {row.kernel for row in rows} == {
        "quantize_kernel", "backward_kernel", "piece_kernel", "sum_kernel", "average_kernel", "distance_kernel",
    }  # fmt: skip


def test_the_kernels_of_scalar_quantizers_on_every_target():
    names = ("fsq", "fsq_image_backward", "bsq_least_18", "bsq_least_18_backward")
    rows = compile_without_spills(names, ["bf16"])
    assert {row.kernel for row in rows} == {
        "fsq_kernel", "fsq_backward_kernel", "code_kernel", "bits_kernel", "mean_kernel", "code_entropy_kernel",
        "code_gradient_kernel", "row_gradient_kernel",
    }  # fmt: skip


def attention_launches(q_len, kv_len, **options):
    _, (q, k, v), defaults = attention_configurations.arguments("attention_few_queries_64", "bf16")
    q, out = (t.expand(1, 32, q_len, 64) for t in (q[:, :, :1], q[:, :, :1]))
    k, v = (t[:, :, :1].expand(1, 8, kv_len, 64) for t in (k, v))
    ranges, lse = defaults["ranges"].new_empty((1, q_len, 4)), defaults["lse"].new_empty((1, 32, q_len))
    with compile_report.recorded_launches() as launches:
        attention(q, k, v, **{**dict(ranges=ranges, scale=0.125, out=out, lse=lse), **options})
    return launches


def test_no_length_of_a_cache_compiles_a_new_attention_kernel():
    expected = [launch.key() for launch in attention_launches(32, 4096)]
    assert len(expected) == 2  # parts, and their merger
    for kv_len in (4095, 5000, 2**30):
        assert [launch.key() for launch in attention_launches(32, kv_len, scale=1.0)] == expected
    assert len(attention_launches(32, 100)) == 1


def test_the_bucket_kernels_on_every_target():
    rows = compile_without_spills(compile_report.QUICK_BUCKET_CASES, ["bf16"])
    assert {row.kernel for row in rows} == {
        "write_kernel", "locate_kernel", "pack_kernel", "reduce_kernel", "unpack_kernel", "finish_kernel",
    }  # fmt: skip
    rows = compile_without_spills(["bucket_int8_residual"], ["mixed"], ("sm_90", "gfx942"))
    assert "pack_kernel" in {row.kernel for row in rows}


def test_bucket_reads_and_writes_are_wide():
    launches = compile_report.triton_launches(["bucket_bf16"], ["bf16"]).values()
    code = {
        launch.kernel.__name__: compile_report.compile_launch(launch, "sm_90").asm["ptx"]
        for _, launch in launches
        if launch.kernel.__name__ in ("pack_kernel", "reduce_kernel", "unpack_kernel")
    }
    assert len(code) == 3
    for text in code.values():
        assert "ld.global.v4.b32" in text and "st.global.v4.b32" in text
    assert code["reduce_kernel"].count("ld.global.v4.b32") == 8  # of every rank, in flight together


def test_no_address_and_no_size_compiles_a_new_bucket_kernel():
    def keys(sizes, scale):
        gradient_table._tables.clear()
        layout = BucketLayout(sizes, 2, "bf16")
        gradients = [torch.empty(n, dtype=torch.bfloat16) for n in sizes]
        out, finite = torch.empty(layout.shape, dtype=torch.uint8), torch.empty(len(sizes), dtype=torch.bool)
        with compile_report.recorded_launches() as launches:
            pack_gradients(gradients, layout=layout, scale=scale, residual=None, out=out, finite=finite)
        return {launch.key() for launch in launches}

    expected = keys([4096, 32], 1.0)
    assert len(expected) == 3
    assert keys([64, 16], 0.5) == keys([7, 0, 9], 0.5) == keys([5120] + [16] * 99, 0.25) == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", configurations.DTYPES)
def test_every_configuration_on_every_target(dtypes):
    compile_without_spills(None, [dtypes])


def launch_keys(**options):
    (inputs, table), defaults = configurations.arguments(configurations.CASES[3], "fp32")
    table = StepTable([[0.5, 0.5]] * 40, noise=0.1).to("meta")
    with compile_report.recorded_launches() as launches:
        sampler_step(inputs, table, **{**defaults, **options})
    return [launch.key() for launch in launches]


def test_no_number_compiles_a_new_kernel():
    expected = launch_keys(step=0, seed=0, stream=0, offset=0)
    assert len(expected) == 1  # one launch per step
    for step in (1, 16, 39):
        assert launch_keys(step=step) == expected
    for seed in (1, 16, 2**31, 2**40, -1, 2**63 - 1):
        assert launch_keys(seed=seed) == expected
    for counter in (1, 16, 2**31, 2**32 - 1):
        assert launch_keys(stream=counter) == expected
        assert launch_keys(offset=counter) == expected


@pytest.mark.parametrize(
    "name, launches",
    [("ddim", 1), ("multistep_sde", 1), ("on_device", 1), ("guided_rescale", 3), ("ddim_threshold", 4 + 1 + 1)],
)
def test_launches_per_step(name, launches):
    case = next(case for case in configurations.CASES if case.name == name)
    (inputs, table), options = configurations.arguments(case, "fp32+bf16")
    with compile_report.recorded_launches() as recorded:
        sampler_step(inputs, table, **options)
    assert len(recorded) == launches


def test_loads_and_stores_are_wide():
    launch = next(launch for name, launch in compile_report.triton_launches(["ddim"], ["fp32"]).values())
    code = compile_report.compile_launch(launch, "sm_90").asm["ptx"]
    lines = [line for line in code.splitlines() if "global" in line and (".b32" in line or ".b64" in line)]
    wide = [line for line in lines if ".v4.b32" in line]
    # Besides the elements only the coefficients are read, as float64.
    assert wide and all(line in wide or "ld.global.b64" in line for line in lines)


def test_normals_are_not_contracted():
    """Bits agree between backends only if the compiler fuses nothing that the specification does not."""
    launch = next(launch for name, launch in compile_report.triton_launches(["randn"], ["fp32"]).values())
    assert launch.options["enable_fp_fusion"] is False
    code = compile_report.compile_launch(launch, "sm_90").asm["ptx"]
    assert "fma.rn.f32" in code and "sqrt.rn.f32" in code
    assert not [line for line in code.splitlines() if "mul.f32" in line or "add.f32" in line or "mad.f32" in line]


def test_extra_memory_is_a_few_kilobytes_per_sample():
    case = next(case for case in configurations.CASES if case.name == "guided_rescale_threshold_philox")
    (inputs, table), options = configurations.arguments(case, "fp32", (4, 1024, 1024), "cpu")
    allocated = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal allocated
            result = function(*args, **kwargs)
            allocated += result.numel() * result.element_size()
            return result

        return call

    empty, zeros = torch.empty, torch.zeros
    torch.empty, torch.zeros = counted(empty), counted(zeros)
    try:
        with compile_report.recorded_launches():
            sampler_step(inputs, table, **options)
    finally:
        torch.empty, torch.zeros = empty, zeros
    assert 0 < allocated <= 4 * 20_000


BUCKET_KERNELS = (
    gradient_table.write_kernel,
    gradient_table.locate_kernel,
    gradient_bucket.pack_kernel,
    gradient_bucket.reduce_kernel,
    gradient_bucket.unpack_kernel,
    gradient_bucket.finish_kernel,
)


class DriverWithoutGpu:
    """What Triton's launcher asks its driver before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def warm_up_only(monkeypatch):
    """Launches go through Triton's own path, argument binding and compilation, and stop before the GPU."""
    import triton

    run = triton.JITFunction.run
    compiled = []

    def warm_up(kernel, *args, grid, warmup, **kwargs):
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(triton.JITFunction, "run", warm_up)
    monkeypatch.setattr(triton.runtime.driver, "_active", DriverWithoutGpu())
    for kernel in (step_kernel, moments_kernel, rescale_kernel, histogram_kernel, limit_kernel, *BUCKET_KERNELS):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return compiled


def instructions(kernel) -> str:
    """Without the source's path: Triton's cache may have the kernel of another copy of this repository."""
    return re.sub(r"\t\.file\t.*", "", kernel.asm["ptx"].partition("\t.section")[0])


@pytest.mark.parametrize("name", compile_report.QUICK_CASES + ("randn",))
def test_the_launcher_compiles_what_the_report_compiles(name, warm_up_only):
    case = next(case for case in configurations.CASES if case.name == name)
    (inputs, table), options = configurations.arguments(case, "fp32+bf16", device="cpu")
    sampler_step(inputs, table, **options)
    recorded = compile_report.triton_launches([name], ["fp32+bf16"]).values()
    reported = {instructions(compile_report.compile_launch(launch, "sm_90")) for _, launch in recorded}
    assert set(map(instructions, warm_up_only)) == reported


def test_the_launcher_compiles_the_bucket_kernels_of_the_report(warm_up_only):
    calls = gradient_configurations.arguments("bucket_int8_residual", "bf16", "cpu")
    for op, (args, options) in calls.items():
        getattr(gradient_bucket, op)(*args, **options)
    recorded = compile_report.triton_launches(["bucket_int8_residual"], ["bf16"]).values()
    reported = {instructions(compile_report.compile_launch(launch, "sm_90")) for _, launch in recorded}
    assert set(map(instructions, warm_up_only)) == reported
