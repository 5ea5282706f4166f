"""sampler_step on the CPU: every instruction set of this machine against the reference, and the promises of the op."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genfast
from genfast import backends
from genfast.checks.sampler_step import FEATURES, LAYOUTS, StepCase, build, cases, check
from genfast.ops.sampler_step import _custom_op, _flat_arguments
from genfast.reference.sampler_step import dynamic_threshold
from genfast.reference.sampler_step import sampler_step as reference
from genfast.step_table import StepTable, x0_coefficients

ISAS = backends.machine_isas() or ("none",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param == "none":
        pytest.skip(backends.cpu_missing())
    with backends.instruction_set(request.param):
        yield request.param


def within(error_and_allowed):
    error, allowed = error_and_allowed
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


# --- against the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_listed_case(case, isa):
    within(check(case))


@st.composite
def step_cases(draw):
    features = set(draw(st.lists(st.sampled_from(FEATURES), max_size=7, unique=True)))
    for together in (("clip", "threshold"), ("noise", "philox", "seeds"), ("step", "steps", "rows")):
        for extra in [f for f in together if f in features][1:]:
            features.discard(extra)
    if features & {"clip", "threshold"}:
        features.add("x0")
    if "rescale" in features:
        features.add("cfg")
    if "log_variance" in features and not features & {"noise", "philox", "seeds"}:
        features.add("philox")
    shape = draw(st.sampled_from([(2, 3, 5, 7), (1, 513), (5, 1), (3, 2, 64), (2, 1025), (4, 17, 3), (1, 4, 16, 17)]))
    dtypes = tuple(draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)))
    layout = draw(st.sampled_from(LAYOUTS))
    return StepCase(shape, draw(st.integers(1, 8)), tuple(sorted(features)), dtypes, layout, draw(st.integers(0, 99)))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(step_cases())
def test_any_case(case):
    within(check(case))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 511, 512, 513, 4097, 100_003])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.995, 1.0])
def test_threshold_is_the_exact_quantile(count, ratio, isa):
    g = torch.Generator().manual_seed(count)
    x = torch.randn(3, count, generator=g) * 2
    x[1] = torch.randint(-2, 3, (count,), generator=g) * 0.75  # ties
    table = StepTable([0, 0], x0=1, to_x0=[1, 0])
    got = genfast.sampler_step([x, x], table, threshold=(ratio, 100.0))
    torch.testing.assert_close(got, dynamic_threshold(x, ratio, 100.0), rtol=3e-7, atol=0)


def test_threshold_agrees_with_torch_quantile():
    x = torch.randn(4, 3, 32, 32) * 3
    s = torch.quantile(x.abs().flatten(1), 0.995, dim=1).clamp(1, 2.5).view(-1, 1, 1, 1)
    got = genfast.sampler_step([x, x], StepTable([0, 0], x0=1, to_x0=[1, 0]), threshold=(0.995, 2.5))
    torch.testing.assert_close(got, torch.clamp(x, -s, s) / s, rtol=2e-7, atol=0)


# --- odd values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{}, {"clip": 1.0}, {"threshold": (0.9, 2.0)}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_go_through_as_in_torch(bad, limit, isa):
    x, m = torch.randn(3, 700), torch.randn(3, 700)
    x[1, 5] = bad
    table = StepTable([0.0, 0.3], x0=0.5, to_x0=[1.5, -0.5])
    got = genfast.sampler_step([x, m], table, **limit)
    canonical = {"clip": (-1.0, 1.0)} if "clip" in limit else limit
    want = reference([x, m], table, **canonical)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_sample_of_infinities_does_not_touch_its_neighbours(isa):
    x, m = torch.randn(3, 100), torch.randn(3, 100)
    u = torch.randn(3, 100)
    x[1], m[1], u[1] = math.inf, -math.inf, math.nan
    table = StepTable([0.1, 0.3], x0=0.5, to_x0=[1.5, -0.5])
    options = dict(uncond=u, guidance=3.0, guidance_rescale=0.5, threshold=(0.9, 2.0))
    got, want = genfast.sampler_step([x, m], table, **options), reference([x, m], table, **options)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-5, atol=1e-6)
    assert got[1].isnan().all()


def test_constant_guided_output_keeps_its_value(isa):
    m = torch.full((2, 64), 0.25)
    out = genfast.sampler_step([m, m], StepTable([0.0, 1.0]), uncond=m, guidance=5.0, guidance_rescale=0.7)
    torch.testing.assert_close(out, m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_like_torch(dtype, isa):
    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    same = genfast.sampler_step([every], [1.0])
    assert torch.equal(same.isnan(), every.isnan())
    assert torch.equal(same[~every.isnan()], every[~every.isnan()])
    g = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(2**31), 2**31, (200_000,), generator=g, dtype=torch.int64).to(torch.int32)
    edges = torch.tensor([65519.9, 65520.0, 65504.0, 5.9e-8, 2.9e-8, 6.1e-5, 6.097e-5, 3.4e38, 0.0, -0.0, math.inf])
    x = torch.cat([pattern.view(torch.float32), edges])
    got, want = genfast.sampler_step([x], [1.0], dtype=dtype), x.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


# --- random numbers --------------------------------------------------------------------------------------------------


def test_threads_do_not_change_a_bit(isa):
    case = StepCase((3, 70_001), 3, ("x0", "threshold", "cfg", "rescale", "seeds", "second"))
    inputs, table, options = build(case)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(genfast.sampler_step(inputs, table, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_splitting_the_batch_changes_nothing(isa):
    x = torch.randn(7, 3, 11, 5)
    table = StepTable([0.9], noise=0.4)
    whole = genfast.sampler_step([x], table, seed=11, stream=5)
    parts = [genfast.sampler_step([x[a:b]], table, seed=11, stream=5, offset=a) for a, b in ((0, 1), (1, 5), (5, 7))]
    assert torch.equal(whole, torch.cat(parts))


def test_a_seed_per_sample_makes_it_independent_of_its_batch(isa):
    x = torch.randn(4, 130)
    table, seeds = StepTable([0.9], noise=0.4), torch.tensor([5, 2**62, -3, 5])
    whole = genfast.sampler_step([x], table, seed=seeds)
    for b in range(4):
        alone = genfast.sampler_step([x[b : b + 1]], table, seed=seeds[b : b + 1])
        assert torch.equal(whole[b : b + 1], alone)
        assert torch.equal(alone, genfast.sampler_step([x[b : b + 1]], table, seed=int(seeds[b])))


def test_each_step_draws_its_own_noise(isa):
    x = torch.zeros(2, 64)
    table = StepTable(torch.zeros(3, 1), noise=torch.ones(3))
    draws = [genfast.sampler_step([x], table, seed=1, step=i) for i in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[2], genfast.randn(2, 64, seed=1, stream=2))
    by_sample = genfast.sampler_step([x], table, seed=1, step=torch.tensor([2, 0]))
    assert torch.equal(by_sample, torch.stack([draws[2][0], draws[0][1]]))


def test_memory_order_does_not_change_the_draws(isa):
    x = torch.zeros(2, 4, 6, 5)
    table = StepTable([1.0], noise=1.0)
    plain = genfast.sampler_step([x], table, seed=3)
    last = genfast.sampler_step([x.contiguous(memory_format=torch.channels_last)], table, seed=3)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_generator_gives_torch_draws():
    x = torch.randn(2, 50)
    got = genfast.sampler_step([x], StepTable([1.0], noise=0.5), generator=torch.Generator().manual_seed(4))
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(got, x + 0.5 * z)


def test_default_generator_and_no_draw_on_a_quiet_row():
    x = torch.randn(2, 50)
    table = StepTable([[1.0], [1.0]], noise=[0.5, 0.0])
    torch.manual_seed(9)
    got = genfast.sampler_step([x], table, step=0)
    torch.manual_seed(9)
    torch.testing.assert_close(got, x + 0.5 * torch.randn(x.shape))
    state = torch.get_rng_state()
    assert torch.equal(genfast.sampler_step([x], table, step=1), x)
    assert torch.equal(torch.get_rng_state(), state)


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_in_place_and_preallocated(isa):
    x, m = torch.randn(3, 1000), torch.randn(3, 1000)
    table = StepTable([0.5, 0.25], x0=0.3, to_x0=[1, -1], second=[0, 0], second_x0=1)
    want, want_x0 = genfast.sampler_step([x, m], table, clip=1.0)
    y, x0 = x.clone(), torch.empty_like(x)
    got = genfast.sampler_step([y, m], table, clip=1.0, out=y, second_out=x0)
    assert got[0] is y and got[1] is x0
    assert torch.equal(y, want) and torch.equal(x0, want_x0)


def test_output_in_another_dtype_and_layout(isa):
    x = torch.randn(2, 6, 4, 5)
    want = genfast.sampler_step([x], [0.5])
    out = torch.empty(2, 5, 4, 6, dtype=torch.bfloat16).transpose(1, 3)
    assert torch.equal(genfast.sampler_step([x], [0.5], out=out), want.bfloat16())
    buffer = torch.zeros(2, 12, 4, 5)
    half = buffer[:, 6:]
    genfast.sampler_step([x], [0.5], out=half)
    assert torch.equal(half, want) and not buffer[:, :6].any()
    # Interleaved in memory with its input, yet apart from it.
    buffer[:, :6] = x
    genfast.sampler_step([buffer[:, :6]], [0.5], out=buffer[:, 6:])
    assert torch.equal(buffer[:, 6:], want) and torch.equal(buffer[:, :6], x)


def test_memory_is_the_outputs_and_nothing_else():
    inputs, table, options = build(
        StepCase((4, 3, 64, 64), 3, ("x0", "threshold", "cfg", "rescale", "philox", "second"))
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    genfast.sampler_step(inputs, table, **options)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        results = genfast.sampler_step(inputs, table, **options)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profiler.events())
    outputs = sum(t.numel() * t.element_size() for t in results)
    assert outputs <= allocated <= outputs + 4096


def test_more_than_two_to_the_31_elements():
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    n = 2**31 + 4099
    if available < 2.5 * 2 * n:
        pytest.skip("needs 11 GB of free memory")
    x = torch.ones(n, dtype=torch.bfloat16).view(1, n)
    x[0, -5:] = torch.tensor([1, 2, 3, 4, 5])
    genfast.sampler_step([x], [[2.0]], out=x)
    assert x[0, -5:].tolist() == [2, 4, 6, 8, 10] and x[0, 2**31 - 3 : 2**31 + 3].tolist() == [2] * 6


@pytest.mark.parametrize("size", [1, 5])
def test_negated_views_keep_their_sign(size, isa):
    negated = torch.complex(torch.zeros(size), torch.ones(size)).conj().imag
    assert negated.is_neg()
    for t in (negated, negated[None], negated[:, None]):
        assert (genfast.sampler_step([t, torch.zeros_like(t)], [2.0, 0.0]) == -2).all()
    with pytest.raises(ValueError, match="out is a lazily negated view"):
        genfast.sampler_step([torch.ones(size)], [1.0], out=negated)


# --- torch ------------------------------------------------------------------------------------------------------------


def test_custom_op_passes_opcheck():
    case = StepCase((2, 3, 5), 3, ("x0", "clip", "cfg", "philox", "second", "steps"))
    inputs, table, options = build(case)
    canonical = dict(guidance_rescale=0.0, threshold=None, log_variance=None, noise=None)
    arguments = _flat_arguments(inputs, table, torch.float32, {**canonical, **options}, inputs[0])
    torch.library.opcheck(_custom_op, arguments)
    inputs[0].requires_grad_()
    torch.library.opcheck(_custom_op, arguments)


def test_compiles_without_a_graph_break():
    inputs, table, options = build(StepCase((2, 3, 8), 3, ("x0", "clip", "philox", "second", "step")))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(inputs, i):
        out, second = genfast.sampler_step(inputs, table, **{**options, "step": i})
        return out * 2, second

    for i in (3, 1):
        want, want_second = genfast.sampler_step(inputs, table, **{**options, "step": i})
        got, got_second = step(inputs, i)
        assert torch.equal(got, want * 2) and torch.equal(got_second, want_second)


@pytest.mark.parametrize(
    "features", [(), ("x0", "clip"), ("cfg", "rescale"), ("philox", "log_variance", "second"), ("x0", "threshold")]
)
def test_gradients(features):
    inputs, table, options = build(StepCase((2, 6), 2, features, (torch.float64,)))
    tensors = {
        k: v.requires_grad_() for k, v in options.items() if isinstance(v, torch.Tensor) and v.dtype.is_floating_point
    }

    def step(*values):
        given = dict(options, **dict(zip(tensors, values[len(inputs) :])))
        return genfast.sampler_step(list(values[: len(inputs)]), table, **given)

    leaves = [t.requires_grad_() for t in inputs] + list(tensors.values())
    assert torch.autograd.gradcheck(step, leaves)


def test_gradients_survive_compilation():
    inputs, table, options = build(StepCase((2, 6), 2, ("x0", "clip")))
    leaves = [t.requires_grad_() for t in inputs]

    def loss(a, b):
        return genfast.sampler_step([a, b], table, **options).square().sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)


# --- bad input: a sentence that names the argument, and nothing written -----------------------------------------------

X = torch.randn(2, 3)
M = torch.randn(2, 3)
TWO = StepTable([0.5, 0.5])
NOISY = StepTable([0.5, 0.5], noise=0.1)
WITH_X0 = StepTable([0.5, 0.5], x0=0.2, to_x0=[1, -1])
ROWS = StepTable([[0.5, 0.5]] * 4)
SECOND = StepTable([0.5, 0.5], second=[1, 0])

BAD = {
    "inputs is a tensor": (TypeError, "inputs", dict(inputs=X)),
    "no inputs": (ValueError, "inputs", dict(inputs=[])),
    "an input is an array": (TypeError, r"inputs\[1\]", dict(inputs=[X, M.numpy()])),
    "shape of an input": (ValueError, r"inputs\[1\].*\[2, 4\].*\[2, 3\]", dict(inputs=[X, torch.randn(2, 4)])),
    "integers": (TypeError, r"inputs\[0\].*int64", dict(inputs=[X.long(), M])),
    "complex": (TypeError, r"inputs\[1\].*complex64", dict(inputs=[X, M + 1j])),
    "sparse": (TypeError, r"inputs\[1\] must be a dense tensor", dict(inputs=[X, M.to_sparse()])),
    "device": (ValueError, r"inputs\[1\] is on meta", dict(inputs=[X, M.to("meta")])),
    "count": (ValueError, "inputs has 1 tensors", dict(inputs=[X])),
    "step missing": (ValueError, "step is missing", dict(table=ROWS)),
    "step too large": (ValueError, "step is out of range: 4", dict(table=ROWS, step=4)),
    "step negative": (ValueError, "step is out of range: -1", dict(table=ROWS, step=-1)),
    "step tensor": (ValueError, "step is out of range", dict(table=ROWS, step=torch.tensor([0, 9]))),
    "step float": (TypeError, "step must be an int", dict(table=ROWS, step=1.0)),
    "step float tensor": (TypeError, "step must be an int", dict(table=ROWS, step=torch.tensor(1.0))),
    "step shape": (ValueError, r"step has shape \[3\]", dict(table=ROWS, step=torch.tensor([0, 1, 2]))),
    "guidance alone": (ValueError, "guidance is given without uncond", dict(guidance=2.0)),
    "rescale alone": (ValueError, "guidance_rescale is given without uncond", dict(guidance_rescale=0.5)),
    "uncond alone": (ValueError, "uncond is given without guidance", dict(uncond=X)),
    "guidance nan": (ValueError, "guidance must be finite", dict(uncond=X, guidance=math.nan)),
    "guidance shape": (ValueError, r"guidance has shape \[3\]", dict(uncond=X, guidance=torch.ones(3))),
    "guidance integers": (TypeError, "guidance", dict(uncond=X, guidance=torch.ones(2, dtype=torch.int64))),
    "rescale range": (ValueError, "guidance_rescale must be in", dict(uncond=X, guidance=2.0, guidance_rescale=1.5)),
    "uncond shape": (ValueError, "uncond has shape", dict(uncond=X[:1], guidance=2.0)),
    "clip without x0": (ValueError, "clip is given, but the table makes no x0", dict(clip=1.0)),
    "clip inverted": (ValueError, "clip must be a range", dict(table=WITH_X0, clip=(1.0, -1.0))),
    "clip nan": (ValueError, "clip must be a range", dict(table=WITH_X0, clip=math.nan)),
    "clip and threshold": (ValueError, "exclude each other", dict(table=WITH_X0, clip=1.0, threshold=(0.9, 2.0))),
    "threshold ratio": (ValueError, "threshold's ratio", dict(table=WITH_X0, threshold=(1.5, 2.0))),
    "threshold maximum": (ValueError, "threshold's maximum", dict(table=WITH_X0, threshold=(0.9, 0.5))),
    "log_variance": (ValueError, "log_variance", dict(table=NOISY, log_variance=X, seed=1)),
    "two sources": (ValueError, "exclude each other", dict(table=NOISY, seed=1, noise=X)),
    "noise without weights": (ValueError, "no noise weights", dict(seed=1)),
    "noise shape": (ValueError, "noise has shape", dict(table=NOISY, noise=X[0])),
    "seed kind": (TypeError, "seed must be an int", dict(table=NOISY, seed=1.5)),
    "seed size": (ValueError, "seed must fit in 64 bits", dict(table=NOISY, seed=2**64)),
    "seed dtype": (TypeError, "seed must be an int", dict(table=NOISY, seed=torch.ones(2))),
    "seed shape": (ValueError, "seed has shape", dict(table=NOISY, seed=torch.ones(3, dtype=torch.int64))),
    "stream": (ValueError, "stream", dict(table=NOISY, seed=1, stream=2**32)),
    "offset": (ValueError, "offset", dict(table=NOISY, seed=1, offset=-1)),
    "generator kind": (TypeError, "generator must be", dict(table=NOISY, generator=3)),
    "dtype": (TypeError, "dtype must be one of", dict(dtype=torch.int32)),
    "out shape": (ValueError, "out has shape", dict(out=torch.empty(3, 2))),
    "out dtype": (TypeError, "out must be one of", dict(out=torch.empty(2, 3, dtype=torch.int32))),
    "out and dtype": (
        ValueError,
        "dtype is torch.bfloat16, but out has",
        dict(out=torch.empty(2, 3), dtype=torch.bfloat16),
    ),
    "out expanded": (ValueError, "out is an expanded tensor", dict(out=torch.empty(1, 3).expand(2, 3))),
    "second_out": (ValueError, "second_out is given, but", dict(second_out=torch.empty(2, 3))),
    "plain table columns": (ValueError, "table has 3 columns; expected 2", dict(table=[0.1, 0.2, 0.3])),
    "plain table nan": (ValueError, "coefficients must be finite", dict(table=[0.1, math.nan])),
    "plain table scalar": (ValueError, "table is a scalar", dict(table=torch.tensor(1.0))),
    "table device": (ValueError, "table is on meta", dict(table=TWO.to("meta"))),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, sentence, options = BAD[name]
    options = dict(options)
    inputs, table = options.pop("inputs", [X, M]), options.pop("table", TWO)
    before, out = (X.clone(), M.clone()), options.get("out")
    if out is None:
        options["out"] = out = torch.full((2, 3), 7.0)
    snapshot = out.clone()
    with pytest.raises(error, match=sentence):
        genfast.sampler_step(inputs, table, **options)
    assert torch.equal(X, before[0]) and torch.equal(M, before[1])
    assert torch.equal(out.nan_to_num(), snapshot.nan_to_num())


class _Elsewhere(torch.Generator):
    """A generator that says it is on a GPU, for machines without one."""

    device = property(lambda self: torch.device("cuda"))


def test_a_generator_on_another_device_is_refused():
    out = torch.full((2, 3), 7.0)
    with pytest.raises(ValueError, match="generator is on cuda; expected one on cpu"):
        genfast.sampler_step([X, M], NOISY, generator=_Elsewhere(), out=out)
    assert (out == 7).all()


def test_overlapping_outputs_are_refused():
    buffer = torch.randn(10)
    with pytest.raises(ValueError, match="out overlaps"):
        genfast.sampler_step([buffer[:8]], [0.5], out=buffer[2:])
    x, both = torch.randn(2, 3), torch.empty(2, 3)
    with pytest.raises(ValueError, match="second_out overlaps"):
        genfast.sampler_step([x, x], SECOND, out=both, second_out=both)


def test_out_does_not_take_gradients():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="out and second_out do not support gradients"):
        genfast.sampler_step([x, M], TWO, out=torch.empty(2, 3))


BAD_TABLES = {
    "nan": (ValueError, "noise must be finite; row 1", dict(coefficients=[[1.0], [1.0]], noise=[0.1, math.nan])),
    "infinite": (ValueError, "coefficients must be finite", dict(coefficients=[math.inf])),
    "nine inputs": (ValueError, "at most 8 inputs", dict(coefficients=[0.1] * 9)),
    "rows": (ValueError, "noise has shape", dict(coefficients=[[1.0]] * 3, noise=[0.1, 0.2])),
    "columns": (ValueError, "second has shape", dict(coefficients=[1.0, 2.0], second=[1.0])),
    "x0 without to_x0": (ValueError, "x0 needs to_x0", dict(coefficients=[1.0, 2.0], x0=1.0)),
    "to_x0 unused": (ValueError, "neither x0 nor second_x0", dict(coefficients=[1.0, 2.0], to_x0=[1, 1])),
    "to_x0 with one input": (ValueError, "needs two inputs", dict(coefficients=[1.0], x0=1, to_x0=[1, 1])),
    "log_std without noise": (ValueError, "log_std needs noise", dict(coefficients=[1.0], log_std=[0, 1])),
    "second_noise alone": (ValueError, "second_noise needs noise", dict(coefficients=[1.0], second_noise=1.0)),
    "nothing": (ValueError, "nothing to compute", dict(coefficients=[[]])),
    "text": (TypeError, "coefficients must hold numbers", dict(coefficients="abc")),
    "dimensions": (ValueError, "coefficients has shape", dict(coefficients=torch.ones(2, 2, 2))),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table(name):
    error, sentence, parts = BAD_TABLES[name]
    with pytest.raises(error, match=sentence):
        StepTable(**parts)


def test_tables_survive_copying_and_pickling():
    x = torch.randn(2, 3)
    table = StepTable([[2.0], [3.0]], noise=[0.0, 0.0])
    genfast.sampler_step([x], table, step=1)
    genfast.sampler_step([x], table, step=1)
    copies = [copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))]
    del table
    for other in copies:
        for _ in range(2):
            assert torch.equal(genfast.sampler_step([x], other, step=1), 3 * x)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, sigma", [(0.8, 0.6), (1.0, 3.0), (0.3, 0.7), (1e-3, 1.0)])
def test_every_prediction_gives_the_same_x0(alpha, sigma):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(50, generator=g, dtype=torch.float64), torch.randn(50, generator=g, dtype=torch.float64)
    x, data = alpha * x0 + sigma * eps, 0.5
    y, s = x / alpha, sigma / alpha
    skip, scale = data**2 / (s**2 + data**2), s * data / math.sqrt(s**2 + data**2)
    outputs = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
        "score": -eps / sigma,
        "edm": (x0 - skip * y) / scale,
    }
    for prediction, output in outputs.items():
        k = x0_coefficients(prediction, alpha, sigma)
        torch.testing.assert_close(k[0] * x + k[1] * output, x0, rtol=1e-9, atol=1e-9, msg=prediction)


def test_predictions_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        x0_coefficients("epsilon", 0.0, 1.0)
    with pytest.raises(ValueError, match="prediction must be one of"):
        x0_coefficients("noise", 1.0, 1.0)
    with pytest.raises(ValueError, match="sigma must not be negative"):
        x0_coefficients("epsilon", 1.0, -1.0)
    with pytest.raises(ValueError, match="must be finite"):
        x0_coefficients("sample", math.nan, 1.0)
