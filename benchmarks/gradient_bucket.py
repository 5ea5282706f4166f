"""Gradients on the wire beside what PyTorch does: one rank's kernels, two ranks over loopback, and the errors of four.

5M parameters in 400 tensors: weights and biases of 200 linear layers.

* One rank: pack and unpack with average, unscaling, norm and finite check, beside the eager sequence of DDP with its
  bf16 hook, AMP and ``clip_grad_norm_``: copied into the bucket, cast, divided, cast back, copied out, unscaled with a
  check, norm, clipped. That moves about 52 bytes per value. Ours reads 4 and writes w to pack, reads w and writes 4 to
  unpack: the floor is 8 + 2w bytes at the speed of a copy, w bytes being a value on the wire, and 8 more with error
  feedback (int8, fp8). Ours leaves the last step, the multiplication by the clip coefficient, to the optimizer; "then
  clipped" does it here too.
* Two ranks of one thread each, on this machine's loopback interface: a backward pass with its reduction, and clipping.
  The peers are DDP as it comes, for which the bars are, and with ``gradient_as_bucket_view``, which spares it a copy
  and under which our hook runs too. Ours gives the clip coefficient to a fused optimizer; its step, which is
  not timed for anybody, applies it. There is no floor: the two ranks and Gloo's threads share the machine's cores.
* Errors of four ranks, played by one process, in root mean square against float64: as a multiple of those of a ring
  all-reduce in bfloat16, which rounds after every hop. Times of these rows mean nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from benchmarks import gradient_bucket_gpu
from benchmarks.gradient_bucket_ranks import DDP, DDP_VIEW, Layers, Ranks, Step
from benchmarks.harness import Bar, Case, Peer, Plan, Row, Settings
from genfast import backends
from genfast.gradient_wire import WIRES, BucketLayout
from genfast.ops.gradient_bucket import pack_gradients, reduce_chunks, unpack_gradients

LAYERS, WIDTH = 200, 158
ONE_RANK_BAR, TWO_RANK_BARS, RING_BAR = 3.0, {"bf16": 1.3, "int8": 1.5}, 0.5
ALLOWED = {"fp32": 1e-6, "bf16": 2.0**-7, "fp16": 2.0**-10, "int8": 1 / 100, "fp8_e4m3": 2.0**-3, "fp8_e5m2": 2.0**-2}
"""Errors relative to the largest value: two roundings."""


def plans(settings: Settings) -> list[Plan]:
    """The cases, for the settings' device."""
    if settings.device.type != "cpu":
        return gradient_bucket_gpu.plans(settings)
    layers = 6 if settings.quick else LAYERS
    found = [Plan(f"one rank {wire}", functools.partial(one_rank, layers, wire)) for wire in WIRES]
    found.append(Plan("one rank bf16, then clipped", functools.partial(one_rank, layers, "bf16", clipped=True)))
    for kind in ("hook", "reducer"):
        for wire in ("fp32", "bf16", "int8", "fp8_e4m3") if kind == "hook" else ("bf16", "int8"):
            found.append(Plan(f"two ranks {kind} {wire}", functools.partial(two_ranks, layers, kind, wire)))
    numel = 10_000 if settings.quick else 1_000_000
    found += [Plan(f"error {wire}", functools.partial(error, numel, wire, 1)) for wire in WIRES]
    found.append(Plan("error bf16 feedback", functools.partial(error, numel, "bf16", 8)))
    return found


def closing(rows: list[Row]) -> str:
    """Ends the two ranks."""
    if _ranks.cache_info().currsize:
        _ranks.cache_clear()
    if rows and not rows[0].backend.startswith(("cpu", "reference")):
        return "eight ranks are played by one GPU: 186M values in 248 tensors"
    return "one rank and two ranks: 5M parameters in 400 tensors; errors: of four ranks, against a bfloat16 ring's"


def _backend(device) -> str:
    name = backends.choose("gradient_bucket", "pack_gradients", device)[0]
    return f"{name} {backends.cpu_isa()}" if name == "cpu" else name


# --- one rank --------------------------------------------------------------------------------------------------------


def one_rank(layers: int, wire: str, clipped: bool = False) -> Case:
    """Pack and unpack without anything between them."""
    sizes = [p.shape for p in Layers(layers, WIDTH).parameters()]
    layout = BucketLayout([s.numel() for s in sizes], 1, wire)
    start = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    flat, gradients = _gradients(start, sizes)
    residual = torch.zeros(layout.numel) if layout.quantised else None
    out = torch.empty(layout.shape, dtype=torch.uint8)
    most, inverse_scale = 1e9, 1.0  # numbers that let every round have the same work, and the same gradients

    def ours(i: int) -> Tensor:
        pack_gradients(gradients, layout, residual=residual, out=out)
        square_norm, finite = unpack_gradients(out, layout, gradients, scale=inverse_scale)
        norm, _ = square_norm.sum().sqrt().float(), finite.all()
        coefficient = (most / (norm + 1e-6)).clamp(max=1.0)
        if clipped:
            torch._foreach_mul_(gradients, coefficient)
        return flat

    bytes_per_value = 8 + 2 * WIRES[wire].dtype.itemsize + (8 if layout.quantised else 0)
    return Case(
        f"one rank {wire}{', then clipped' * clipped}",
        (len(sizes), layout.numel // len(sizes)),
        "fp32",
        run=ours,
        exact=lambda: start.double(),
        copy_shape=(layout.numel,),
        peers=[Peer("copy, bf16, unscale, clip", torch.__version__, _eager(start, sizes, most, inverse_scale),
                    bars=() if clipped else (Bar("ratio", at_least=ONE_RANK_BAR),))],
        bytes=layout.numel * bytes_per_value,
        output_bytes=0,
        backend=_backend(start.device),
        allowed=ALLOWED[wire],
    )  # fmt: skip


def _gradients(start: Tensor, sizes) -> tuple[Tensor, list[Tensor]]:
    flat = start.clone()
    return flat, [t.view(s) for t, s in zip(flat.split([s.numel() for s in sizes]), sizes)]


def _eager(start: Tensor, sizes, most: float, inverse_scale: float):
    """What DDP, ``bf16_compress_hook``, ``GradScaler.unscale_`` and ``clip_grad_norm_`` do, on one rank."""
    flat, gradients = _gradients(start, sizes)
    bucket, views = _gradients(start, sizes)
    parameters = [nn.Parameter(torch.empty(s)) for s in sizes]
    for p, g in zip(parameters, gradients):
        p.grad = g
    found, inverse = torch.zeros(()), torch.tensor(inverse_scale)

    def run(i: int) -> Tensor:
        torch._foreach_copy_(views, gradients)
        bucket.copy_(bucket.to(torch.bfloat16).div_(1))
        torch._foreach_copy_(gradients, views)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
        nn.utils.clip_grad_norm_(parameters, most)
        return flat

    return run


# --- two ranks -------------------------------------------------------------------------------------------------------


@functools.cache
def _ranks(layers: int) -> Ranks:
    return Ranks(layers, WIDTH)


def two_ranks(layers: int, kind: str, wire: str) -> Case:
    """A step of ours beside steps of DDP, in turn, in the same two processes."""
    ranks = _ranks(layers)
    bars = (Bar("ratio", at_least=TWO_RANK_BARS[wire]),) if wire in TWO_RANK_BARS else ()
    return Case(
        f"two ranks {kind} {wire}",
        (2 * layers, WIDTH * (WIDTH + 1) // 2),
        "fp32",
        run=Step(ranks, f"{kind} {wire}"),
        exact=ranks.exact,
        peers=[Peer(name, torch.__version__, Step(ranks, name), bars=bars if name == DDP else ())
               for name in (DDP, DDP_VIEW)],
        backend=_backend(torch.device("cpu")),
        allowed=ALLOWED[wire],
    )  # fmt: skip


# --- errors ----------------------------------------------------------------------------------------------------------


def error(numel: int, wire: str, steps: int) -> Case:
    """The average of four ranks' gradients; of several steps, the mean over them with error feedback."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(numel, generator=generator) for _ in range(4)]
    exact = torch.stack(given).double().mean(0)

    def ours(i: int) -> Tensor:
        kept = [None] * 4, [None] * 4
        layout = BucketLayout([numel], 4, wire)
        if steps > 1:
            kept = [torch.zeros(layout.numel) for _ in range(4)], [torch.zeros(layout.chunk) for _ in range(4)]
        return torch.stack([_exchanged(given, layout, *kept).double() for _ in range(steps)]).mean(0)

    def to_ring() -> dict[str, float]:
        mine, theirs = ((t.double() - exact).square().mean().sqrt() for t in (ours(0), ring(given)))
        return {"error_to_ring": float(mine / theirs)}

    return Case(
        f"error {wire}" + (f" with feedback, mean of {steps} steps" if steps > 1 else ""),
        (4, numel),
        "fp32",
        run=ours,
        exact=lambda: exact,
        peers=[Peer("bf16 ring all-reduce", torch.__version__, lambda i: ring(given))],
        bars=(Bar("error_to_ring", at_most=RING_BAR),) if wire == "bf16" and steps == 1 else (),
        counts=to_ring,
        backend=_backend(exact.device),
        allowed=ALLOWED[wire],
    )


def _exchanged(given: list[Tensor], layout: BucketLayout, kept, sum_kept) -> Tensor:
    packed = [pack_gradients([g], layout, residual=r).wire for g, r in zip(given, kept)]
    chunks = [
        reduce_chunks(torch.stack([p[c] for p in packed]), layout, scale=1 / 4, residual=sum_kept[c]) for c in range(4)
    ]
    found = torch.empty(layout.numel)
    unpack_gradients(torch.stack(chunks), layout, [found])
    return found


def ring(given: list[Tensor]) -> Tensor:
    """A ring of four: each chunk goes from rank to rank, which adds its own to it in bfloat16."""
    parts = [g.bfloat16().chunk(4) for g in given]
    found = []
    for c in range(4):
        total = parts[(c + 1) % 4][c]
        for hop in range(2, 5):
            total = total + parts[(c + hop) % 4][c]
        found.append(total)
    return torch.cat(found).float() / 4
