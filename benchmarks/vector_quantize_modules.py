"""The quantisers of ``genfast.dropin.vector_quantize_pytorch`` beside vector-quantize-pytorch's own classes.

Both start from the same state, and every training step moves both codebooks. Errors are those of the first call: of the
vectors in eval, of their gradient in training.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

import genfast
from benchmarks import peers
from benchmarks.attention import bars
from benchmarks.harness import Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import backends

PEER = "vector_quantize_pytorch"


def plans(settings: Settings) -> list[Plan]:
    """The cases of this part of the family, for the settings' device."""
    # class, train, rows, codes, size, options, bar
    wanted = [
        ("VectorQuantize", False, (4096, 16384, 256), {}, 20),
        ("VectorQuantize", True, (4096, 16384, 256), {}, 15),
        ("ResidualVQ", False, (4096, 1024, 128), dict(num_quantizers=8), 10),
        ("ResidualVQ", True, (4096, 1024, 128), dict(num_quantizers=8), None),
    ]
    found = []
    for name, train, (rows, codes, size), options, bar in wanted:
        shape = (rows // 16, codes // 16, size) if settings.quick else (rows, codes, size)
        case = functools.partial(module_case, settings.device, name, train, shape, options, bar)
        found.append(Plan(f"{name} {'train' if train else 'eval'} {rows}x{codes}x{size}", case))
    return found


@torch.enable_grad()
def in_float64(quantiser, z: Tensor, train: bool) -> Tensor:
    """What the first call returns."""
    x = z.double().requires_grad_(train)
    residual, total, loss = x, 0, 0
    for layer in getattr(quantiser, "layers", [quantiser]):
        codes = layer._codebook.embed[0].double()
        rows = residual.detach()[0].split(256)
        indices = torch.cat([(codes.square().sum(1) / 2 - part @ codes.T).argmin(1) for part in rows])[None]
        out = genfast.quantize(
            residual, codes, gradient="rotation", commitment_weight=1.0, codebook_weight=0.0, indices=indices
        )
        residual, total, loss = residual - out.z_q.detach(), total + out.z_q, loss + out.loss
    if not train:
        return total
    (total.sum() + loss).backward()
    return x.grad


def module_case(device, name: str, train: bool, shape, options: dict, bar) -> Case:
    try:
        package = peers.package(PEER)
    except peers.Missing as missing:
        raise RuntimeError(str(missing)) from None
    from genfast.dropin.vector_quantize_pytorch import adopt

    rows, codes, size = shape
    torch.manual_seed(0)
    theirs = getattr(package, name)(dim=size, codebook_size=codes, **options).to(device)
    generator = torch.Generator().manual_seed(1)
    for layer in getattr(theirs, "layers", [theirs]):
        book = torch.randn(layer._codebook.embed.shape, generator=generator).to(device)
        layer._codebook.embed.copy_(book)
        layer._codebook.embed_avg.copy_(book)
    mine = adopt(copy.deepcopy(theirs))
    z = pool((1, rows, size), torch.float32, device)

    def runner(quantiser):
        quantiser.train(train)

        def run(i):
            with torch.set_grad_enabled(train):
                x = z[i].detach().requires_grad_(train)
                out, _, loss = quantiser(x)
                if not train:
                    return out
                (out.sum() + loss.sum()).backward()
            return x.grad

        return run

    state = "train" if train else "eval"
    label = backends.choose("vector_quantize", "nearest_code", device)[0]
    return Case(
        f"{name} {state}",
        (rows, codes, size),
        "fp32",
        run=runner(mine),
        exact=functools.partial(in_float64, copy.deepcopy(mine), z[0], train),
        peers=[
            Peer(PEER, peers.version("vector-quantize-pytorch"), runner(theirs), bars=bars(bar, device) if bar else ())
        ],
        backend=f"{label} {backends.cpu_isa()}" if device.type == "cpu" else label,
    )
