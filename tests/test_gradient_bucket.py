"""The ops of ``gradient_bucket``: backends against the reference, wires against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import BucketLayout, backends, pack_gradients, reduce_chunks, unpack_gradients, unpack_sum
from genfast.checks import gradient_bucket as checks
from genfast.gradient_wire import WIRES

PLACES = backends.machine_isas()
ROUNDING = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11, "fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3}
"""Half the distance of two neighbours, relative to a value; int8's is relative to the largest of its block."""


@pytest.mark.parametrize("isa", PLACES)
def test_every_instruction_set(isa):
    with backends.instruction_set(isa):
        assert [case.name for case in checks.cases() if checks.check(case, "cpu") != (0, 0)] == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 700), max_size=6),
    st.integers(1, 5),
    st.sampled_from(list(WIRES)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_any_sizes(numels, ranks, wire, dtype, seed):
    layout = BucketLayout(numels, ranks, wire)
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(n, generator=generator).to(dtype) for n in numels]
    found = []
    for isa in ("reference", *PLACES):
        with backends.backend("reference") if isa == "reference" else backends.instruction_set(isa):
            residual = torch.full((layout.numel,), 0.25)
            packed = pack_gradients(gradients, layout, residual=residual)
            written = [torch.zeros_like(t) for t in gradients]
            _, finite = unpack_gradients(packed.wire, layout, written)
            assert finite.all() and packed.finite.all()
            found.append([packed.wire, residual, *written])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def exchange(per_rank, wire, residuals=None):
    """The average of every rank's gradients over the wire, and what the ranks' ops say."""
    ranks = len(per_rank)
    layout = BucketLayout([t.numel() for t in per_rank[0]], ranks, wire)
    residuals = residuals or [None] * ranks
    packed = [pack_gradients(g, layout, residual=r) for g, r in zip(per_rank, residuals)]
    reduced = torch.stack(
        [reduce_chunks(torch.stack([p.wire[c] for p in packed]), layout, scale=1 / ranks) for c in range(ranks)]
    )
    written = [torch.empty_like(t) for t in per_rank[0]]
    return written, packed, unpack_gradients(reduced, layout, written)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_sum_of_buckets(wire, count):
    """The bits of the reference on every instruction set, for tensors that share blocks, are strided, or of float16;
    for a wire that keeps float32, the bits of the sum itself."""
    sizes = [300, 0, 5000, 31, 256, 1]
    layout, generator = BucketLayout(sizes, 2, wire), torch.Generator().manual_seed(count)
    given = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(count)]
    given[-1][2][700] = torch.nan
    buckets = torch.stack([pack_gradients(g, layout).wire for g in given])
    found = []
    for isa in ("reference", *PLACES):
        with backends.backend("reference") if isa == "reference" else backends.instruction_set(isa):
            written = [torch.zeros(n) for n in sizes]
            written[3], written[4] = torch.zeros(31, 2)[:, 0], written[4].half()
            square_norm, finite = unpack_sum(buckets, layout, written, scale=1 / count)
            # Norms must not depend on where a rank keeps its gradients.
            apart = [torch.zeros(n, 2)[:, 0] for n in sizes]
            assert torch.equal(unpack_sum(buckets, layout, apart, scale=1 / count)[0][:2], square_norm[:2])
            found.append([*(t.nan_to_num(7.0) for t in written), finite])
    assert finite[:2].all() and not finite[2]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    if wire == "fp32":
        total = given[0][0].clone()
        for other in given[1:]:
            total += other[0]
        assert torch.equal(written[0], total * torch.tensor(1 / count))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_average_against_float64(wire, ranks):
    generator = torch.Generator().manual_seed(ranks)
    shapes = [(300, 5), (7,), (), (1025,)]
    per_rank = [
        [torch.randn(s, generator=generator) * 10.0 ** (-k) for k, s in enumerate(shapes)] for _ in range(ranks)
    ]
    written, _, unpacked = exchange(per_rank, wire)
    flat = [torch.cat([t.flatten() for t in g]).double() for g in per_rank]
    exact, got = sum(flat) / ranks, torch.cat([t.flatten() for t in written]).double()
    blocks = lambda t: torch.nn.functional.pad(t.abs(), (0, -len(t) % 256)).view(-1, 256).amax(1)  # noqa: E731
    if wire == "int8":
        # Half a step of the largest value: once on the way there for each rank, once on the way back.
        sent = sum(blocks(t) for t in flat) / ranks
        allowed = ((sent + sent + sent / 127) / 254).repeat_interleave(256)[: len(got)]
    else:
        # A rank's rounding is relative to what it sent. Below a quantised wire's smallest normal number it is absolute.
        floor = {"fp8_e4m3": 2.0**-9 / 448, "fp8_e5m2": 2.0**-16 / 57344, "fp16": 2.0**-24}.get(wire, 0.0)
        most = sum(blocks(t) for t in flat).repeat_interleave(256)[: len(got)] if wire != "fp16" else 1.0
        sent = sum(t.abs() for t in flat) / ranks
        allowed = ROUNDING[wire] * (2.01 * sent + ROUNDING[wire] * sent) + 2 * floor * most + ranks * 2.0**-23 * sent
    assert ((got - exact).abs() <= allowed * 1.001 + 1e-30).all()
    norm = got.square().sum().sqrt()
    assert torch.allclose(unpacked.square_norm.sum().sqrt(), norm, rtol=1e-6)


def test_bfloat16_wire_beats_a_bfloat16_ring():
    """Of four ranks, in root mean square; the ring adds in bfloat16 hop by hop."""
    generator = torch.Generator().manual_seed(0)
    per_rank = [[torch.randn(100_000, generator=generator)] for _ in range(4)]
    exact = sum(g[0].double() for g in per_rank) / 4
    (got,), _, _ = exchange(per_rank, "bf16")
    chunks = [g[0].bfloat16().chunk(4) for g in per_rank]
    ring = []
    for c in range(4):
        total = chunks[(c + 1) % 4][c]
        for hop in range(2, 5):
            total = total + chunks[(c + hop) % 4][c]
        ring.append(total)
    ring = torch.cat(ring).float() / 4
    error = lambda t: (t.double() - exact).square().mean().sqrt()  # noqa: E731
    # Rounding what each rank sends, and the average, is all that is lost: with four ranks 0.75 of the ring's.
    rounded = (sum(g[0].bfloat16().float() for g in per_rank) / 4).bfloat16()
    assert torch.equal(got, rounded.float())
    assert error(got) <= 0.8 * error(ring)


@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3", "fp8_e5m2", "bf16"])
def test_error_feedback_loses_nothing(wire):
    """What is sent over many steps adds up to what was given, but for the last residual."""
    generator = torch.Generator().manual_seed(1)
    layout, given, got = BucketLayout([1000], 1, wire), torch.zeros(1000).double(), torch.zeros(1000).double()
    residual, written = torch.zeros(1000), torch.empty(1000)
    for _ in range(30):
        gradient = torch.randn(1000, generator=generator) * torch.logspace(-4, 0, 1000)
        unpack_gradients(pack_gradients([gradient], layout, residual=residual).wire, layout, [written])
        given, got = given + gradient.double(), got + written.double()
    assert torch.allclose(given, got + residual.double(), atol=1e-4)
    assert (given - got).abs().max() < 0.2


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_by_everybody(wire, bad):
    per_rank = [[torch.randn(600), torch.randn(600), torch.randn(600)] for _ in range(3)]
    per_rank[1][1][300] = bad
    residuals = [torch.ones(1800) for _ in range(3)]
    _, packed, unpacked = exchange(per_rank, wire, residuals)
    assert packed[1].finite.tolist() == [True, False, True]
    assert packed[0].finite.all() and packed[2].finite.all()
    assert unpacked.finite.tolist() == [True, False, True]
    assert all(r.isfinite().all() for r in residuals)
    assert residuals[1][900] == 1.0


def test_overflow_of_a_cast_is_found():
    layout = BucketLayout([4], 1, "fp16")
    assert pack_gradients([torch.tensor([1.0, 65519.0, 0, 0])], layout).finite.all()
    assert not pack_gradients([torch.tensor([1.0, 65520.0, 0, 0])], layout).finite.any()
    layout = BucketLayout([1], 1, "bf16")
    assert not pack_gradients([torch.tensor([3.4e38])], layout).finite.any()
    assert pack_gradients([torch.tensor([3.38e38])], layout).finite.all()


def test_squares_do_not_overflow():
    layout = BucketLayout([300], 1, "fp32")
    gradient = torch.full((300,), 3e38)
    square_norm, finite = unpack_gradients(pack_gradients([gradient], layout).wire, layout, [gradient])
    assert finite.all() and torch.allclose(square_norm, 300 * gradient[:1].double().square())


def test_blocks_of_tiny_values_are_zeros():
    layout = BucketLayout([256], 1, "int8")
    residual = torch.zeros(256)
    wire = pack_gradients([torch.full((256,), 2.0**-101)], layout, residual=residual).wire
    assert not wire.any() and (residual == 2.0**-101).all()


@pytest.mark.parametrize("isa", PLACES)
def test_any_number_of_threads(isa):
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(n, generator=generator) for n in (70_001, 5, 300_000, 99)]
    layout, found = BucketLayout([t.numel() for t in gradients], 2, "int8"), []
    before = torch.get_num_threads()
    try:
        with backends.instruction_set(isa):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                packed = pack_gradients(gradients, layout)
                reduced = reduce_chunks(packed.wire, layout)
                unpacked = unpack_gradients(packed.wire, layout, [torch.empty_like(t) for t in gradients])
                found.append((packed.wire, reduced, unpacked.square_norm))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_reduced_into_a_row_of_what_was_received():
    layout = BucketLayout([700], 2, "int8")
    received = torch.stack([pack_gradients([torch.randn(700)], layout).wire[0] for _ in range(2)])
    apart = reduce_chunks(received.clone(), layout)
    assert torch.equal(reduce_chunks(received, layout, out=received[1]), apart)


def test_layout():
    layout = BucketLayout([300, 0, 213], 2, "int8")
    assert (layout.numel, layout.offsets, layout.chunk) == (513, (0, 300, 300), 512)
    assert layout.chunk_bytes == 512 + 2 * 4 + 8 and layout.shape == (2, 528)
    assert BucketLayout([300], 1, "bf16").chunk_bytes == 1024
    assert BucketLayout([], 3, "fp32").shape == (3, 0)
    assert BucketLayout((300, 0, 213), 2, "int8") == layout


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "wire must be", lambda: BucketLayout([1], 1, "int4")),
        (ValueError, "ranks must be", lambda: BucketLayout([1], 0, "bf16")),
        (ValueError, "negative", lambda: BucketLayout([-1], 1, "bf16")),
        (TypeError, "layout must be", lambda: pack_gradients([torch.ones(4)], "bf16")),
        (ValueError, "has 2 tensors", lambda: pack_gradients([torch.ones(2)] * 2, LAYOUT)),
        (ValueError, "has 3 values", lambda: pack_gradients([torch.ones(3)], LAYOUT)),
        (TypeError, "float64", lambda: pack_gradients([torch.ones(4).double()], LAYOUT)),
        (TypeError, "must be a tensor", lambda: pack_gradients([[1.0] * 4], LAYOUT)),
        (TypeError, "residual must be", lambda: pack_gradients([torch.ones(4)], LAYOUT, residual=torch.ones(4).half())),
        (ValueError, "residual is", lambda: pack_gradients([torch.ones(4)], LAYOUT, residual=torch.ones(5))),
        (ValueError, "out is", lambda: pack_gradients([torch.ones(4)], LAYOUT, out=torch.empty(3, dtype=torch.uint8))),
        (ValueError, "scale is", lambda: pack_gradients([torch.ones(4)], LAYOUT, scale=torch.ones(2))),
        (TypeError, "received must be", lambda: reduce_chunks(torch.ones(LAYOUT.shape), LAYOUT)),
        (TypeError, "reduced must be", lambda: unpack_gradients(None, LAYOUT, [torch.ones(4)])),
        (ValueError, "expanded", lambda: unpack_gradients(WIRE, LAYOUT, [torch.ones(1).expand(4)])),
        (ValueError, "buckets is", lambda: unpack_sum(WIRE, LAYOUT, [torch.ones(4)])),
        (ValueError, "buckets is", lambda: unpack_sum(WIRE[None][:0], LAYOUT, [torch.ones(4)])),
        (ValueError, "expanded", lambda: unpack_sum(WIRE[None], LAYOUT, [torch.ones(1).expand(4)])),
    ],
)
def test_refusals(error, match, call):
    with pytest.raises(error, match=match):
        call()


LAYOUT = BucketLayout([4], 1, "bf16")
WIRE = torch.zeros(LAYOUT.shape, dtype=torch.uint8)


def test_torch_library():
    gradients = [torch.randn(37, 5), torch.randn(400)]
    sizes = [185, 400], 2, "int8"
    layout = BucketLayout(*sizes)
    out, chunk = torch.empty(layout.shape, dtype=torch.uint8), torch.empty(layout.chunk_bytes, dtype=torch.uint8)
    ops = torch.ops.genfast
    torch.library.opcheck(ops.pack_gradients, (gradients, *sizes, None, 0.5, torch.zeros(585), out))
    wire = pack_gradients(gradients, layout).wire
    torch.library.opcheck(ops.reduce_chunks, (wire, *sizes, torch.tensor(0.5), 1.0, None, chunk))
    torch.library.opcheck(ops.unpack_gradients, (wire, gradients, *sizes, None, 0.5))
    torch.library.opcheck(ops.unpack_sum, (torch.stack([wire, wire]), gradients, *sizes, None, 0.5))


def test_compiled():
    layout = BucketLayout([37, 400], 1, "fp8_e4m3")

    def there_and_back(a, b):
        packed = pack_gradients([a, b], layout, scale=2.0)
        return unpack_gradients(packed.wire, layout, [a, b], scale=0.5).square_norm

    a, b = torch.randn(37), torch.randn(400)
    given = a.clone(), b.clone()
    expected = there_and_back(a, b)
    got = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(got, expected) and torch.equal(given[0], a) and torch.equal(given[1], b)


def test_profiled_and_ordered_calls_take_the_checked_path():
    layout = BucketLayout([300], 1, "int8")
    gradient = torch.randn(300)
    plain = pack_gradients([gradient], layout).wire
    with genfast.backend("reference"):
        assert torch.equal(pack_gradients([gradient], layout).wire, plain)
    with genfast.backend("cpu"):
        assert torch.equal(pack_gradients((gradient,), layout).wire, plain)
