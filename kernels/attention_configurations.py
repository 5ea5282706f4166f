"""The calls of ``attention`` whose kernels ship: for ahead-of-time compilation, as in ``configurations.py``."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (64, 80, 96, 128, 256)
"""Of a head."""

SHAPES = {
    # (B, H, Hkv, Lq, Lk)
    "attention": (2, 16, 16, 4096, 4096),
    "attention_masked": (2, 16, 4, 4096, 4096),
    "attention_few_queries": (1, 32, 8, 32, 4096),
    "attention_one_query": (1, 32, 8, 1, 4096),
    "attention_backward": (2, 16, 4, 4096, 4096),
    "attention_backward_all": (2, 16, 16, 4096, 4096),
}
_WITHOUT_MASK = ("attention", "attention_one_query", "attention_backward_all")

CASES = {
    f"{name}_{size}": (name, size)
    for name in SHAPES
    for size in SIZES
    if name not in _WITHOUT_MASK or size in (64, 128)
}
"""Without a mask there is less of everything, so two sizes stand for all."""


def arguments(name: str, dtype: str, device: str = "meta") -> tuple[str, tuple, dict]:
    """The op of a backend and the arguments for a case, uninitialised."""
    kind, size = CASES[name]
    batch, heads, kv_heads, q_len, kv_len = SHAPES[kind]

    def new(*shape, dtype=DTYPES[dtype]):
        return torch.empty(shape, dtype=dtype, device=device)

    q, out = (new(batch, heads, q_len, size) for _ in range(2))
    k, v = (new(batch, kv_heads, kv_len, size) for _ in range(2))
    lse = new(batch, heads, q_len, dtype=torch.float32)
    ranges = None if kind in _WITHOUT_MASK else new(1, q_len, 4, dtype=torch.int32)
    if "backward" not in kind:
        return "attention", (q, k, v), dict(ranges=ranges, scale=0.125, out=out, lse=lse)
    grad_lse = None if ranges is None else torch.empty_like(lse)
    grads = dict(grad_q=torch.empty_like(q), grad_k=torch.empty_like(k), grad_v=torch.empty_like(v))
    options = dict(ranges=ranges, scale=0.125, **grads)
    return "attention_backward", (torch.empty_like(out), grad_lse, q, k, v, out, lse), options


CACHED = {
    # of attention_cached: (queries, whether there is a block, page size, style of rotation)
    f"{name}_{size}": (*options, size)
    for name, options in {
        "cached": (32, False, None, None),
        "cached_block": (32, True, None, None),
        "cached_rope": (32, True, None, "half"),
        "cached_pages": (32, True, 64, "interleaved"),
        "cached_one_query": (1, True, 16, "half"),
    }.items()
    for size in SIZES
    if "rope" in name or "pages" in name or size in (64, 128)
}


def cached_arguments(name: str, dtype: str, device: str = "meta") -> tuple[tuple, dict]:
    """The arguments of ``attention_cached`` for a case of ``CACHED``, uninitialised."""
    queries, block, page_size, rope, size = CACHED[name]
    heads, kv_heads, capacity = 32, 8, 4096

    def new(*shape, dtype=DTYPES[dtype]):
        return torch.empty(shape, dtype=dtype, device=device)

    q, out = (new(1, heads, queries, size) for _ in range(2))
    k, v = (new(1, kv_heads, queries, size) if block else None for _ in range(2))
    if page_size is None:
        keys, values = (new(1, kv_heads, capacity + 1, size)[:, :, :capacity] for _ in range(2))
        table = None
    else:
        pages = capacity // page_size
        keys, values = (new(pages + 1, kv_heads, page_size, size) for _ in range(2))
        table = new(1, pages + 1, dtype=torch.int32)[:, :pages]
    lengths = new(1, dtype=torch.int64)
    first = None if rope is None else lengths
    cos, sin = (None if rope is None else new(capacity, size // 2, dtype=torch.float32) for _ in range(2))
    lse = new(1, heads, queries, dtype=torch.float32)
    options = dict(interleaved=rope == "interleaved", scale=0.125, out=out, lse=lse)
    return (q, k, v, keys, values, table, lengths, first, cos, sin), options


WRITES = ("cached_rope_64", "cached_rope_128", "cached_pages_96", "cached_block_128")
"""Cases of ``CACHED`` whose block is written."""


def write_arguments(name: str, dtype: str, device: str = "meta") -> tuple[tuple, dict]:
    """The arguments of ``cache_write`` for a case of ``WRITES``, uninitialised."""
    (_, k, v, keys, values, table, lengths, _, cos, sin), options = cached_arguments(name, dtype, device)
    return (k, v, keys, values, table, lengths, lengths, cos, sin), dict(interleaved=options["interleaved"])
