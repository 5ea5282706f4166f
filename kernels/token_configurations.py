"""The calls of ``token_sampling`` whose kernels ship: for ahead-of-time compilation, as in ``configurations.py``."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_DEFAULTS = dict(
    temperature=0.0, top_k=0, top_p=1.0, keep_crossing=True, guidance=1.0, shift=False, confidence="probability",
    seed=None, stream=0, offset=0,
)  # fmt: skip
_TENSORS = ("uncond", "suppress", "suppress_confidence", "rows", "noise", "ids")
_OUTPUTS = ("confidences", "logsumexp", "entropy", "margin")

CASES = {
    "greedy": {},
    "greedy_few_rows": dict(count=4),
    "draw": dict(temperature=1.0, seed=0),
    "draw_few_rows": dict(temperature=1.0, seed=0, count=4, entropy=True, logsumexp=True),
    "draw_guided_rows": dict(temperature=0.7, seed=0, uncond=True, guidance=2.0, rows=True, suppress=True, ids=True),
    "guided_few_rows": dict(
        temperature=0.7, seed="tensor", uncond=True, guidance=2.0, rows=True, suppress=True, ids=True, count=4
    ),
    "per_row": dict(temperature="tensor", seed="tensor", shift=True, suppress_confidence=True, margin=True),
    "top_p": dict(temperature=1.0, seed=0, top_p=0.95, confidence="tempered"),
    "top_p_exclusive": dict(temperature=1.0, seed=0, top_p=0.95, keep_crossing=False, confidence="entropy"),
    "top_k_top_p": dict(temperature=1.0, seed=0, top_p=0.95, top_k=50, confidence="margin"),
    "gumbel": dict(temperature=0.7, noise=True),
    "random": dict(seed=0, confidence="random"),
}


def arguments(name: str, dtype: str, size: int = 126464, device: str = "meta") -> tuple[torch.Tensor, dict]:
    """The logits and the keyword arguments of a backend's ``sample_tokens`` for a case, uninitialised."""
    given = dict(CASES[name])
    count, length = given.pop("count", 512), 4
    logits = torch.empty((count // length, length, size), dtype=DTYPES[dtype], device=device)

    def new(kind, shape=(count,)):
        return torch.empty(shape, dtype=kind, device=device)

    made = dict(
        uncond=torch.empty_like(logits),
        suppress=new(torch.int64, (2,)),
        suppress_confidence=new(torch.int64, (3,)),
        rows=new(torch.int64),
        noise=new(torch.float64, logits.shape),
        ids=new(torch.int64),
    )
    options = {**_DEFAULTS, **dict.fromkeys(_TENSORS), **dict.fromkeys(_OUTPUTS)}
    options.update((k, made.get(k, v)) for k, v in given.items())
    if options["temperature"] == "tensor":
        options["temperature"] = new(torch.float32)
    if options["seed"] == "tensor":
        options["seed"] = new(torch.int64, (count // length,))
    options["tokens"] = new(torch.int64)
    options["confidences"] = True
    options.update((k, new(torch.float32)) for k in _OUTPUTS if options[k])
    return logits, options


TRANSFERS = {
    "transfer_top": dict(n="tensor"),
    "transfer_threshold": dict(strategy="threshold", threshold=0.9),
    "transfer_slack": dict(strategy="threshold", threshold=0.9, slack=1e-5),
    "transfer_factor": dict(strategy="factor", factor=0.5),
    "transfer_entropy_bound": dict(strategy="entropy_bound", bound=0.5),
    "transfer_hierarchy": dict(strategy="hierarchy", threshold=0.9, low_threshold=0.4),
    "transfer_perturbed": dict(temperature=0.5, seed="tensor", n="tensor"),
}


def transfer_arguments(name: str, shape=(8, 1024), device: str = "meta") -> tuple[tuple, dict]:
    """The arguments of a backend's ``select_transfer`` for a case, uninitialised."""
    per_row = torch.empty(shape[0], dtype=torch.int64, device=device)
    options = dict(
        n=1, strategy="top", threshold=0.0, low_threshold=0.0, slack=None, strict=False, factor=0.0, accept_last=False,
        bound=0.0, inclusive=False, start=0, end=shape[1], temperature=0.0, seed=None, stream=0, offset=0,
    )  # fmt: skip
    options.update((k, per_row if v == "tensor" else v) for k, v in TRANSFERS[name].items())
    options["out"] = torch.empty(shape, dtype=torch.bool, device=device)
    return (torch.empty(shape, device=device), torch.empty(shape, dtype=torch.bool, device=device)), options


def commit_arguments(shape=(8, 1024), device: str = "meta") -> tuple[tuple, dict]:
    """The same of ``commit_``."""
    ids = torch.empty(shape, dtype=torch.int64, device=device)
    selected = torch.empty(shape, dtype=torch.bool, device=device)
    left, finished = ids[:, 0].clone(), selected[:, 0].clone()
    return (ids, ids.clone(), selected), dict(mask_id=5, eos_id=6, left=left, finished=finished)


MASKS = {
    "mask_linear": {},
    "mask_blocks": dict(block_size=16, strata=128, by_time=True, maskable=True, seed="tensor"),
    "mask_given": dict(t=True, noise=True, drawn=False),
    "mask_uniform": dict(vocab_size=50257, block_size=16, t=True),
    "mask_uniform_given": dict(vocab_size=50257, noise=True, tokens=True, t=True),
    "mask_count": dict(count="tensor", maskable=True),
    "mask_count_uniform": dict(count=5, vocab_size=50257),
}


def mask_arguments(name: str, shape=(8, 1024), device: str = "meta") -> tuple[torch.Tensor, dict]:
    """The tokens and the keyword arguments of a backend's ``forward_mask`` for a case, uninitialised."""
    batch, length = shape
    given = dict(MASKS[name])
    blocks = -(-length // given.setdefault("block_size", length))

    def new(kind, *size):
        return torch.empty(size, dtype=kind, device=device)

    options = dict(
        mask_id=5, t=None, drawn=True, low=0.0, spread=1.0, slope=0.999, floor=0.001, by_time=False, strata=0,
        maskable=None, count=None, vocab_size=0, noise=None, tokens=None, seed=0, stream=0, offset=0,
    )  # fmt: skip
    made = dict(
        t=new(torch.float32, batch, blocks),
        noise=new(torch.float32, *shape),
        tokens=new(torch.int64, *shape),
        maskable=new(torch.bool, *shape),
    )
    options.update((k, made[k] if v is True and k in made else v) for k, v in given.items())
    options.update((k, new(torch.int64, batch)) for k in ("count", "seed") if options[k] == "tensor")
    if options["noise"] is not None:
        options["seed"] = None
    return new(torch.int64, *shape), dict(
        options,
        x=new(torch.int64, *shape),
        mask=new(torch.bool, *shape),
        weight=None if options["vocab_size"] else new(torch.float32, *shape),
        times_out=new(torch.float32, batch, blocks),
    )


TRANSITIONS = {
    "transition_jump": dict(),
    "transition_jump_per_sequence": dict(a="tensor", b="tensor", seed="tensor", active=True, ids=True),
    "transition_uniform": dict(law="uniform", mask_id=None),
    "transition_uniform_per_sequence": dict(law="uniform", mask_id=None, a="tensor", b="tensor", seed="tensor"),
    "transition_posterior": dict(law="posterior"),
    "transition_posterior_top_p": dict(law="posterior", top_p=0.9, keep_crossing=False),
    "transition_greedy": dict(law="posterior", temperature=0.0),
    "transition_jump_gumbel": dict(noise=torch.float32, seed=None),
    "transition_uniform_gumbel": dict(law="uniform", mask_id=None, noise=torch.float32, seed=None),
    "transition_posterior_gumbel": dict(law="posterior", top_p=0.9, noise=torch.float64, seed=None),
}


def transition_arguments(name: str, dtype: str, shape=(8, 128, 50258), device: str = "meta") -> tuple[tuple, dict]:
    """The arguments of a backend's ``discrete_transition`` for a case, uninitialised."""
    given = dict(TRANSITIONS[name])
    batch, length, _ = shape

    def new(kind, shape=(batch,)):
        return torch.empty(shape, dtype=kind, device=device)

    options = dict(
        law="jump", a=0.5, b=0.5, mask_id=50257, temperature=1.0, top_p=1.0, keep_crossing=True, active=None,
        noise=None, seed=0, stream=0, offset=0, ids=None, out=new(torch.int64, shape[:2]), changed=new(torch.bool),
    )  # fmt: skip
    kinds = dict(a=torch.float64, b=torch.float64, seed=torch.int64)
    options.update((k, new(kinds[k]) if v == "tensor" else v) for k, v in given.items())
    if given.get("active"):
        options["active"] = new(torch.bool, shape[:2])
    if given.get("ids"):
        options["ids"] = new(torch.int64, (batch * length,))
    if options["noise"] is not None:
        options["noise"] = new(options["noise"], shape)
    return (new(torch.int64, shape[:2]), new(DTYPES[dtype], shape)), options


HEADS = {
    "head_greedy": {},
    "head_greedy_few_rows": dict(count=16),
    "head_greedy_quiet": dict(quiet=True, bias=True, softcap=30.0, suppress=True),
    "head_draw": dict(scale=True, seed=0),
    "head_draw_all": dict(
        scale=True, seed="tensor", judged_scale=True, quiet=True, bias=True, softcap=30.0, suppress=True, rows=True,
        ids=True, exponentials=True,
    ),
}  # fmt: skip


def head_arguments(name: str, dtype: str, size: int = 126464, depth: int = 4096, device: str = "meta"):
    """Those of ``lm_head_partials`` and of ``merge_head_partials`` for a case: (tensors, options) each."""
    given = dict(HEADS[name])
    count, tiles = given.pop("count", 256), -(-size // 512)

    def new(kind=torch.float32, shape=(count, tiles)):
        return torch.empty(shape, dtype=kind, device=device)

    def if_given(key, made):
        return made if given.get(key) else None

    hidden, weight = new(DTYPES[dtype], (1, count, depth)), new(DTYPES[dtype], (size, depth))
    int64, row = torch.int64, (count,)
    scale, judged_scale = if_given("scale", new(shape=row)), if_given("judged_scale", new(shape=row))
    fields = dict(
        exponentials=new() if given.get("exponentials") or not given.get("quiet") else None,
        judged_largest=if_given("quiet", new()),
        judged_sum=if_given("quiet", new()),
        judged_logit=new() if given.get("scale") or given.get("quiet") else None,
        mass=if_given("scale", new(int64)),
        candidate=if_given("scale", new(torch.int32)),
        uniform=if_given("scale", new(int64, row)),
    )
    seed = given.get("seed")
    options = dict(
        fields,
        bias=if_given("bias", new(shape=(size,))),
        first=0,
        scale=scale,
        judged_scale=judged_scale,
        suppress=if_given("suppress", new(int64, (2,))),
        suppress_confidence=if_given("quiet", new(int64, (3,))),
        softcap=given.get("softcap", 0.0),
        rows=if_given("rows", new(int64, row)),
        seed=new(int64, (1,)) if seed == "tensor" else seed,
        stream=0,
        offset=0,
        ids=if_given("ids", new(int64, row)),
        largest=new(),
        index=new(torch.int32),
    )
    merged = dict(
        fields,
        judged_sum=fields["judged_sum"] if given.get("quiet") else fields["exponentials"],
        scale=scale,
        judged_scale=judged_scale,
        tokens=new(int64, row),
        confidences=new(shape=row),
        logsumexp=if_given("exponentials", new(shape=row)),
    )
    return ((hidden, weight), options), ((new(), new(torch.int32)), merged)
