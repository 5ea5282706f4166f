"""Nearest codes beside faiss, ``torch.cdist`` and the compiled argmin of |e|^2 / 2 - z . e.

The work is N K D multiply-adds, and a comparison for each of N K scores. The error that is given of a peer is the share
of rows for which it returns another code than float64 does; ours must be 0. faiss has its index built beforehand, ours
packs the codes in every call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import genfast
from benchmarks import code_update, peers, residual_quantize, scalar_quantize, vector_quantize_modules
from benchmarks.attention import bars, names
from benchmarks.harness import Bar, Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import backends

BF16 = torch.bfloat16


def plans(settings: Settings) -> list[Plan]:
    """The cases of the family, for the settings' device."""
    # rows, codes, size, bar of faiss, bar of the others
    wanted = [
        ("normal", (4096, 16384, 8), torch.float32, 8, 10),
        ("normal", (4096, 16384, 256), torch.float32, 3, 4),
        ("normal", (4096, 1024, 256), torch.float32, 2.5, 2.5),
        ("normal", (1024, 65536, 64), torch.float32, 4, 4),
        ("clustered", (4096, 16384, 256), torch.float32, 2, 2),
        ("normal", (65536, 16384, 8), BF16, 8, 8),
    ]
    found = []
    for kind, (rows, codes, size), *rest in wanted:
        shape = (rows // 16, codes // 16, size) if settings.quick else (rows, codes, size)
        case = functools.partial(nearest_case, settings.device, not settings.quick, kind, shape, *rest)
        found.append(Plan(f"nearest {kind} {rows}x{codes}x{size} {names(rest[0])}", case))
    return [
        *found,
        *vector_quantize_modules.plans(settings),
        *residual_quantize.plans(settings),
        *code_update.plans(settings),
        *scalar_quantize.plans(settings),
    ]


def codes_and_rows(kind: str, shape, dtype, device) -> tuple[Tensor, object]:
    """A codebook, and rows to rotate."""
    rows, codes, size = shape
    codebook = pool((codes, size), dtype, device, seed=1)[0]
    z = pool((rows, size), dtype, device)
    if kind == "clustered":
        # 512 clusters; the codes are samples that k-means has moved.
        generator = torch.Generator(device).manual_seed(2)
        centres = torch.randn(512, size, generator=generator, device=device)

        def samples(n: int) -> Tensor:
            chosen = torch.randint(0, 512, (n,), generator=generator, device=device)
            return centres[chosen] + 0.3 * torch.randn(n, size, generator=generator, device=device)

        codebook, data = samples(codes), samples(4 * codes)
        for _ in range(2):
            nearest = genfast.nearest_code(data, codebook)
            count = torch.bincount(nearest, minlength=codes)[:, None]
            mean = torch.zeros_like(codebook).index_add_(0, nearest, data) / count.clamp_min(1)
            codebook = torch.where(count > 0, mean, codebook)
        z = [samples(rows) for _ in range(len(z))]
    return codebook, z


def nearest_case(device, compiled, kind, shape, dtype, faiss_bar, bar) -> Case:
    rows, codes, _ = shape
    codebook, z = codes_and_rows(kind, shape, dtype, device)
    wide = codebook.float()

    def ours(i):
        return genfast.nearest_code(z[i % len(z)], codebook)

    def expanded(rows, codes):
        return (codes.square().sum(1) / 2 - rows @ codes.T).argmin(1)

    @functools.cache
    def exact():
        return torch.cat([expanded(part.double(), codebook.double()) for part in z[0].split(256)]).double()

    def peer(name, version, run, bar):
        def check():
            differing = (run(0) != exact()).double().mean()
            return exact() + exact().max() * differing

        return Peer(name, version, run, check=check, bars=bars(bar, device))

    compared = torch.compile(expanded, dynamic=False) if compiled else expanded
    version = torch.__version__
    found = [
        peer("cdist, argmin", version, lambda i: torch.cdist(z[i % len(z)].float(), wide).argmin(1), bar),
        peer("compiled argmin", version, lambda i: compared(z[i % len(z)], codebook), bar),
    ]
    if device.type == "cpu":
        found.insert(0, faiss_peer(peer, z, wide, faiss_bar))
    name = backends.choose("vector_quantize", "nearest_code", device)[0]
    return Case(
        f"nearest {kind}", shape, names(dtype), run=ours, exact=exact, copy_dtype=dtype, peers=found,
        backend=f"{name} {backends.cpu_isa()}" if name == "cpu" else name, allowed=1e-12,
        counts=functools.partial(workspace, ours),
        bars=(Bar("workspace_bytes", at_most=0.02 * rows * codes * 4),) if device.type == "cpu" else (),
    )  # fmt: skip


def faiss_peer(peer, z, codebook: Tensor, bar: float) -> Peer:
    try:
        faiss = peers.package("faiss-cpu", "faiss")
    except peers.Missing as missing:
        return Peer("faiss IndexFlatL2", missing=str(missing))
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())

    def run(i):
        return torch.from_numpy(index.search(z[i % len(z)].float().numpy(), 1)[1][:, 0])

    return peer("faiss IndexFlatL2", peers.version("faiss-cpu"), run, bar)


def workspace(call) -> dict[str, float]:
    """The most that the kernel took from genfast's pool in one call, where torch's profiler does not see it."""
    genfast.release_memory()
    call(0)
    return {"workspace_bytes": genfast.release_memory()}
