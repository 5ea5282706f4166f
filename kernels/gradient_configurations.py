"""The calls of ``gradient_bucket`` whose kernels ship: for ahead-of-time compilation, as in ``configurations.py``."""

import torch

from genfast.gradient_wire import WIRES, BucketLayout

DTYPES = {
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "fp16": (torch.float16,),
    "mixed": (torch.float32, torch.bfloat16),
}
"""Of the gradients, in turn."""

CASES = {
    f"bucket_{wire}{suffix}": dict(wire=wire, **options)
    for wire in WIRES
    for suffix, options in {
        "": {},
        "_residual": dict(residual=True, scale="tensor"),
        "_odd_size": dict(sizes=(1000, 3000, 37), ranks=3, residual=True),
    }.items()
}


def arguments(name: str, dtypes: str, device: str = "meta") -> dict[str, tuple[tuple, dict]]:
    """op -> the arguments of a backend's function for a case, uninitialised."""
    given = dict(CASES[name])
    kinds, sizes = DTYPES[dtypes], given.get("sizes", (1 << 20, 1 << 16, 1024))
    layout = BucketLayout(sizes, given.get("ranks", 8), given["wire"])

    def new(kind, *shape):
        return torch.empty(shape, dtype=kind, device=device)

    gradients = [new(kinds[k % len(kinds)], size) for k, size in enumerate(sizes)]
    bucket, chunk = new(torch.uint8, *layout.shape), new(torch.uint8, layout.chunk_bytes)
    square_norm, finite = new(torch.float64, len(sizes)), new(torch.bool, len(sizes))
    shared = dict(layout=layout, scale=new(torch.float32) if given.get("scale") else 0.5)

    def residual(numel):
        return new(torch.float32, numel) if given.get("residual") else None

    return dict(
        pack_gradients=(
            (gradients,), dict(shared, residual=residual(layout.numel), out=bucket, finite=finite)
        ),
        reduce_chunks=((bucket,), dict(shared, residual=residual(layout.chunk), out=chunk)),
        unpack_gradients=((bucket, gradients), dict(shared, square_norm=square_norm, finite=finite)),
    )  # fmt: skip
