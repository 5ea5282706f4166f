"""The calls of ``code_update`` whose kernels ship: for ahead-of-time compilation, as in ``configurations.py``."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (8, 64, 256, 1024)
"""Of a vector."""

OPS = {
    "quantize": ("quantize", {}),
    "quantize_channel_first": ("quantize", dict(channel_first=True, zeros=True)),
    "gradient_straight_through": ("quantize_backward", {}),
    "gradient_rotation": ("quantize_backward", dict(gradient="rotation", channel_first=True)),
    "gradient_to_codes": ("quantize_backward", dict(gradient="none", to_codes=True)),
    "average": ("ema_update", dict(threshold=2.0)),
    "average_cosine": ("ema_update", dict(cosine=True, threshold=0.0)),
    "distance": ("min_distance_update", {}),
}
CASES = {f"{name}_{size}": (name, size) for name in OPS for size in SIZES}


def arguments(name: str, dtype: str, device: str = "meta") -> tuple[str, tuple, dict]:
    """The op of a backend and the arguments for a case, uninitialised."""
    kind, size = CASES[name]
    op, given = OPS[kind]
    groups, codes = 1, 16384

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    def vectors(dtype=DTYPES[dtype]):
        if given.get("channel_first"):
            return new(8, groups, size, 1024, dtype=dtype).permute(0, 3, 1, 2)
        return new(8, 1024, groups, size, dtype=dtype)

    z, codebook = vectors(), new(groups, codes, size)
    indices = new(8, 1024, groups, dtype=torch.int64)
    valid = new(dtype=torch.int64)
    if op == "quantize":
        counts = new(groups, codes, dtype=torch.int64)
        made = dict(z_q=vectors(), losses=new(2), valid=valid, counts=counts, perplexity=new(groups))
        return op, (z, codebook, indices), dict(zeros=given.get("zeros", False), **made)
    if op == "quantize_backward":
        options = dict(gradient=given.get("gradient", "straight_through"), zeros=False, codes=codes)
        made = dict(grad_z=vectors(), grad_codebook=codebook if given.get("to_codes") else None)
        return op, (vectors(), new(2), z, vectors(), indices, valid), {**options, **made}
    if op == "ema_update":
        options = dict(decay=0.8, eps=1e-5, cosine=False, reset=2.0, seed=0, stream=0, offset=0)
        return op, (codebook, new(groups, codes), codebook, z, indices), {**options, **given}
    return op, (new(8192, size), new(1, size), new(8192)), {}
