"""A stack of codebooks in one call, beside vector-quantize-pytorch's ResidualVQ (forward in eval mode).

The work is Q lookups of N K D multiply-adds each.
"""

from __future__ import annotations

import functools

import torch

import genfast
from benchmarks import peers
from benchmarks.attention import bars
from benchmarks.harness import Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import backends

ROWS, STAGES, CODES, SIZE = 4096, 8, 1024, 128


def plans(settings: Settings) -> list[Plan]:
    """The cases of this part of the family, for the settings' device."""
    rows = ROWS // 16 if settings.quick else ROWS
    return [Plan("residual", functools.partial(residual_case, settings.device, rows))]


def residual_case(device, rows: int) -> Case:
    z = pool((rows, SIZE), torch.float32, device)
    codebooks = torch.stack([pool((CODES, SIZE), torch.float32, device, seed=1)[q] * 0.7**q for q in range(STAGES)])
    backend = backends.choose("vector_quantize", "residual_quantize", device)[0]

    def exact():
        with genfast.backend("reference"):
            return genfast.residual_quantize(z[0], codebooks)[1]

    return Case(
        "residual", (rows, STAGES, CODES, SIZE), "fp32", exact=exact,
        run=lambda i: genfast.residual_quantize(z[i], codebooks, return_errors=True)[1],
        peers=[residual_vq(z, codebooks, device)],
        backend=f"{backend} {backends.cpu_isa()}" if backend == "cpu" else backend,
    )  # fmt: skip


def residual_vq(z, codebooks, device) -> Peer:
    name = "ResidualVQ"
    try:
        package = peers.package("vector-quantize-pytorch", "vector_quantize_pytorch")
    except peers.Missing as missing:
        return Peer(name, missing=str(missing))
    module = package.ResidualVQ(dim=SIZE, num_quantizers=STAGES, codebook_size=CODES).to(device).eval()
    for layer, codebook in zip(module.layers, codebooks):
        layer._codebook.embed.copy_(codebook[None])
        layer._codebook.initted.fill_(True)
    version = peers.version("vector-quantize-pytorch")
    return Peer(name, version, lambda i: module(z[i][None])[0][0], bars=bars(10, device))
