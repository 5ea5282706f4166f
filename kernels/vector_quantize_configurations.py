"""Tile sizes of the kernels of ``nearest_code`` by kind of GPU, and the calls whose kernels ship.

Tile sizes are the largest of a few that compile without spills and fit the shared memory
(``python -m benchmarks.compile_report``); none has been timed, for want of a GPU.
"""

import torch

GROUP = 64
"""Codes for which the screen keeps one number."""

LEAST_BYTES = 32
"""Of a vector that a matrix instruction takes, at least."""

SCREEN = {
    # (padded size of a vector, bytes of a number): {target: (rows, codes, depth, warps, stages)}; "" is for all others
    (64, 2): {"": (128, 128, 64, 8, 3), "gfx942": (128, 64, 64, 4, 1)},
    (128, 2): {"": (128, 128, 128, 8, 2), "gfx942": (128, 64, 64, 4, 1)},
    (256, 2): {"": (128, 128, 64, 8, 3), "gfx942": (128, 64, 64, 4, 1)},
    (64, 4): {"": (128, 128, 64, 8, 2), "gfx942": (128, 64, 32, 4, 1)},
    (128, 4): {"": (128, 128, 32, 8, 3), "gfx942": (128, 64, 32, 4, 1)},
    (256, 4): {"": (128, 128, 32, 8, 3), "sm_80": (128, 128, 32, 8, 2), "gfx942": (128, 64, 32, 4, 1)},
}
"""Where depth is less than the size, rows are read again for every tile of codes, as in any product of matrices."""


def tile_sizes(table: dict, size: int, item_size: int, target: str) -> tuple[int, int, int, int, int]:
    """The entry for vectors of ``size`` numbers."""
    entry = table[next((pad for pad in (64, 128) if size <= pad), 256), item_size]
    return entry.get(target, entry[""])


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CASES = {
    # (size, metric, k, groups, channel first)
    **{f"codes_{size}": (size, "l2", 1, 1, False) for size in (4, 8, 16, 32, 64, 128, 256, 512)},
    "codes_cosine_8": (8, "cosine", 1, 1, False),
    "codes_cosine_64": (64, "cosine", 1, 1, False),
    "codes_dot_64": (64, "dot", 1, 1, False),
    "codes_image_256": (256, "l2", 1, 1, True),
    "codes_groups_64": (64, "l2", 1, 8, False),
    "codes_top_16_64": (64, "l2", 16, 1, False),
}


def arguments(name: str, dtype: str, device: str = "meta") -> tuple[tuple, dict]:
    """The arguments of ``nearest_code`` of a backend for a case, uninitialised."""
    size, metric, k, groups, channel_first = CASES[name]
    rows, codes = 4096, 16384
    z = torch.empty((rows, groups * size), dtype=DTYPES[dtype], device=device)
    if channel_first:
        z = z.view(4, groups * size, rows // 4).movedim(1, -1)
    z = z.reshape(-1, rows // (4 if channel_first else 1), groups, size)
    codebook = torch.empty((groups, codes, size), dtype=DTYPES[dtype], device=device)
    indices = torch.empty((*z.shape[:3], k), dtype=torch.int64, device=device)
    distances = torch.empty(indices.shape, dtype=torch.float32, device=device)
    return (z, codebook), dict(metric=metric, exact=True, indices=indices, distances=distances)
