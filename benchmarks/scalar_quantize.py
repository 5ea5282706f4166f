"""FSQ, LFQ and BSQ beside the classes of vector-quantize-pytorch, forward and with the backward pass.

In training the peer makes the probabilities of all codes for every row; the figures of memory are of that. What is
compared is the quantised tensor, or the gradient of z.
"""

from __future__ import annotations

import functools
import importlib

import torch

from benchmarks.harness import Case, Peer, Plan, Settings
from benchmarks.rotation import pool
from genfast import backends
from genfast.dropin import patching

LEVELS = [8, 8, 8, 5, 5, 5]


def plans(settings: Settings) -> list[Plan]:
    """The cases of this part, for the settings' device."""
    rows = 64 if settings.quick else 1024
    fsq, lfq = dict(levels=LEVELS), dict(codebook_size=2**14, dim=14)
    build = functools.partial(case, settings.device)
    return [
        Plan("fsq", functools.partial(build, "FSQ", "FSQ", (8, rows, 6), fsq, False)),
        Plan("fsq image", functools.partial(build, "FSQ, channels first", "FSQ", (16, 6, 64, 64), fsq, False)),
        Plan("fsq training", functools.partial(build, "FSQ, backward", "FSQ", (16, 6, 64, 64), fsq, True)),
        Plan("lfq training", functools.partial(build, "LFQ, backward", "LFQ", (1, rows, 14), lfq, True)),
        Plan(
            "bsq training",
            functools.partial(build, "BSQ, backward", "LFQ", (1, rows, 14), lfq | dict(spherical=True), True),
        ),
    ]


def case(device, title, name, shape, options, backward) -> Case:
    """One class on one shape; what is exact is the peer's result, which is float32 whatever it is given."""
    peer_of = patching.PEERS["vector_quantize_pytorch"]
    x = pool(shape, torch.float32, device, seed=0, least=2)
    ours, theirs = (
        getattr(importlib.import_module(module), name)(**options).to(device).train(backward)
        for module in ("genfast.dropin.vector_quantize_pytorch", "vector_quantize_pytorch")
    )

    def step(module, i):
        if not backward:
            return module(x[i])[0]
        with torch.enable_grad():
            z = x[i].detach().requires_grad_()
            found = module(z)
            loss = found[0].square().sum() + (found[2] if len(found) > 2 else 0)
            return torch.autograd.grad(loss, z)[0]

    chosen = backends.choose("vector_quantize", "fsq_quantize" if name == "FSQ" else "binary_quantize", device)[0]
    return Case(
        title, shape, "fp32", run=functools.partial(step, ours), exact=lambda: step(theirs, 0),
        peers=[Peer("vector-quantize-pytorch", peer_of.releases_named(), functools.partial(step, theirs))],
        backend=f"{chosen} {backends.cpu_isa()}" if chosen == "cpu" else chosen,
        allowed=1e-4,  # of a gradient out of the peer's logits in float32
    )  # fmt: skip
