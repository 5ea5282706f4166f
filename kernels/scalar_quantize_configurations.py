"""The calls of ``scalar_quantize`` whose kernels ship: for ahead-of-time compilation, as in ``configurations.py``."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FSQ = {
    "fsq": {},
    "fsq_symmetric_noise": dict(symmetric=True, noise=True),
    "fsq_clamp": dict(clamp=True),
    "fsq_groups": dict(groups=4),
    "fsq_image": dict(channel_first=True, noise=True),
}
BINARY = {
    "lfq": {},
    "bsq_image": dict(radius=1.0, channel_first=True),
    "lfq_losses_10": dict(size=10, block=10),
    "lfq_losses_18": dict(size=18, block=18, mask=True),
    "lfq_least_14": dict(size=14, block=14, least=1e-5),
    "bsq_losses_36": dict(size=36, block=9, radius=1.0),
    "bsq_least_18": dict(size=18, block=18, radius=1.0, least=1e-5, mask=True, groups=2),
}
CASES = (*FSQ, *BINARY, *(f"{name}_backward" for name in (*FSQ, *BINARY)))


def arguments(name: str, dtype: str, device: str = "meta") -> tuple[str, tuple, dict]:
    """The op of a backend and the arguments for a case, uninitialised."""
    backward = name.endswith("_backward")
    name = name.removesuffix("_backward")
    given = dict(FSQ.get(name) or BINARY.get(name) or {})
    levels = (8, 5, 5, 5)
    size, groups = given.pop("size", 18) if name in BINARY else len(levels), given.pop("groups", 1)
    first = given.pop("channel_first", False)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    def vectors(dtype=DTYPES[dtype]):
        z = (
            new(8, groups * size, 1024, dtype=dtype).movedim(1, -1)
            if first
            else new(8, 1024, groups * size, dtype=dtype)
        )
        return z.unflatten(-1, (groups, size))

    indices = new(8, 1024, groups, dtype=torch.int64)
    if name in FSQ:
        noise = vectors(torch.float32) if given.pop("noise", False) else None
        options = dict(levels=levels, noise=noise) | dict(symmetric=False, clamp=False) | given
        if backward:
            return "fsq_backward", (vectors(), vectors()), options | dict(grad_z=vectors())
        return "fsq_quantize", (vectors(),), options | dict(quantized=vectors(), indices=indices)
    options = dict(radius=None, magnitude=1.0, sharpness=100.0, block=None, least=0.0) | given
    block = options["block"]
    options["mask"] = new(8, 1024, dtype=torch.bool) if given.get("mask") else None
    mean = None if block is None else new(groups, size // block, 2**block)
    scalars = [None if block is None else new() for _ in range(2)]
    if backward:
        args = (vectors(), scalars[0], mean, scalars[1], vectors())
        return "binary_backward", args, options | dict(grad_z=vectors())
    results = dict(entropies=scalars[0], mean=mean, commitment=scalars[1])
    return "binary_quantize", (vectors(),), options | dict(quantized=vectors(), indices=indices) | results
