"""Tile sizes of the kernels of ``attention`` by kind of GPU: nothing is tried at the first call.

Each is the largest of a few that compiles there without spills and fits the shared memory
(``python -m benchmarks.compile_report``); none has been timed, for want of a GPU.
"""

import functools

import torch

FORWARD = {
    # (padded size of a head, bytes of a number): {target: (query rows, keys, warps, stages)}; "" is for all others
    (64, 2): {"": (128, 64, 4, 3)},
    (128, 2): {"": (128, 64, 8, 3), "gfx942": (128, 32, 4, 1)},
    (256, 2): {"": (128, 32, 8, 2), "sm_80": (64, 32, 8, 2), "gfx942": (64, 32, 4, 2)},
    (64, 4): {"": (64, 32, 8, 2)},
    (128, 4): {"": (32, 16, 8, 1), "gfx942": (32, 32, 4, 1)},
    (256, 4): {"": (32, 16, 8, 1), "gfx942": (16, 16, 4, 1)},
}
BACKWARD_KEYS = {
    (64, 2): {"": (32, 128, 8, 2), "sm_90": (64, 128, 8, 2), "gfx942": (32, 64, 4, 2)},
    (128, 2): {"": (32, 64, 8, 2), "sm_100": (64, 64, 8, 1), "gfx942": (32, 64, 4, 1)},
    (256, 2): {"": (32, 32, 8, 2), "gfx942": (16, 32, 4, 2)},
    (64, 4): {"": (32, 32, 8, 1), "sm_80": (32, 64, 8, 1), "gfx942": (16, 32, 4, 1)},
    (128, 4): {"": (32, 32, 8, 1), "gfx942": (16, 32, 4, 1)},
    (256, 4): {"": (16, 16, 8, 1)},
}
"""Gradients of keys and values: a program holds a tile of keys and goes over rows."""

BACKWARD_QUERIES = {
    (64, 2): {"": (128, 64, 8, 2)},
    (128, 2): {"": (128, 64, 8, 2), "sm_80": (128, 32, 8, 2), "sm_100": (64, 64, 8, 2), "gfx942": (64, 64, 4, 2)},
    (256, 2): {"": (64, 32, 8, 2), "sm_80": (32, 32, 8, 2), "gfx942": (32, 32, 4, 2)},
    (64, 4): {"": (64, 32, 8, 1), "gfx942": (32, 32, 4, 1)},
    (128, 4): {"": (32, 32, 8, 1), "gfx942": (16, 32, 8, 1)},
    (256, 4): {"": (32, 16, 8, 1), "gfx942": (16, 16, 4, 1)},
}


def tile_sizes(table: dict, pad: int, item_size: int, target: str) -> tuple[int, int, int, int]:
    """The entry for heads padded to ``pad`` numbers; small heads take that of 64."""
    entry = table[max(pad, 64), item_size]
    return entry.get(target, entry[""])


@functools.cache
def target_of(device: torch.device) -> str:
    """The kind of GPU that a device is. A GPU between two kinds is taken for the older."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")
