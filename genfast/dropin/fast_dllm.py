"""Fast-dLLM v1 (Wu et al. 2025, arXiv:2505.22618) for LLaDA by its published names, with fused steps, for any batch.

Given the same draws of torch, tokens are those of the published code with float32 models, at any temperature; see
:mod:`genfast.dropin.llada`. Published confidences are float64, here they are float32 roundings of exact figures: two
that round to the same count as equal, and of equal ones the first goes first; a threshold is compared with the rounded
figure. (Published is whatever order ``torch.topk`` or ``torch.sort`` gives to equal ones.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfast.dropin.llada import MASK_ID, add_gumbel_noise, get_num_transfer_tokens
from genfast.dropin.unmasking import burn, check_remasking, default_generator, propose
from genfast.ops.token_transfer import select_transfer
from genfast.samplers.text.fast_dllm import Block
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run

__all__ = [
    "add_gumbel_noise",
    "generate",
    "generate_with_dual_cache",
    "generate_with_prefix_cache",
    "get_num_transfer_tokens",
    "get_transfer_index",
    "get_transfer_index_dynamic",
]


def get_transfer_index(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | None,
    threshold: float | None = None,
    *,
    mask_id: int | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens for masked positions, and which of them to write in this step.

    Args:
        logits: [B, L, V], float32, bfloat16 or float16; only rows of masked positions are read.
        temperature: see :func:`genfast.generate_llada`.
        remasking: ``"low_confidence"`` or ``"random"``.
        mask_index: bool [B, L], the masked positions that may be written.
        x: int64 [B, L].
        num_transfer_tokens: int64 [B] or [B, 1], how many; not looked at with a threshold.
        threshold: take all positions of at least this confidence, the most confident one in any case.
        mask_id: never draw this; by default it may be drawn, as published.
        seed, stream: draw inside the kernel: an int, or int64 [B], and the number of the step.
        generator: draw from it instead of torch's default one.

    Returns:
        (int64 [B, L], x with the tokens drawn at all of ``mask_index``; bool [B, L], those to write).

    Raises:
        ValueError: neither a threshold nor a number.
        NotImplementedError: an unknown ``remasking``, as the published code has it.
    """
    if threshold is None and num_transfer_tokens is None:
        raise ValueError("num_transfer_tokens must be a tensor where there is no threshold")
    check_remasking(remasking)
    tokens, confidence = _propose(
        logits, mask_index, seed, stream, generator,
        temperature=temperature, remasking=remasking, random_dtype=torch.float64, mask_id=mask_id,
    )  # fmt: skip
    if threshold is None:
        n, rule = num_transfer_tokens.reshape(-1).to(logits.device), {}
    else:
        n, rule = 1, dict(strategy="threshold", threshold=threshold)
    return torch.where(mask_index, tokens, x), select_transfer(confidence, mask_index, n, **rule)


def get_transfer_index_dynamic(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | None,
    factor: float = 1,
    *,
    compat: bool = False,
    mask_id: int | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens for masked positions, and which of them to write: the k most confident ones, the largest k with every
    n-th of them, n from 2 to k, of confidence >= 1 - factor / (n + 1).

    Args:
        num_transfer_tokens: not looked at, as published.
        factor: see above.
        compat: accept a row's last position though it alone fails, as the published code does.
        logits, temperature, remasking, mask_index, x, mask_id, seed, stream, generator: as for
            :func:`get_transfer_index`.

    Returns:
        As :func:`get_transfer_index`. A row without masks gets none written.

    Raises:
        NotImplementedError: an unknown ``remasking``, as the published code has it.
    """
    check_remasking(remasking)
    tokens, confidence = _propose(
        logits, mask_index, seed, stream, generator, temperature=temperature, remasking=remasking, mask_id=mask_id
    )
    chosen = select_transfer(confidence, mask_index, strategy="factor", factor=factor, accept_last=compat)
    return torch.where(mask_index, tokens, x), chosen


def _propose(logits, mask_index, seed, stream, generator, **options) -> tuple[Tensor, Tensor]:
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other: give one source of randomness")
    randomness = dict(seed=seed, stream=stream)
    if seed is None:
        randomness = dict(generator=generator or default_generator(logits.device))
    batch, length = mask_index.shape
    per_row = isinstance(seed, Tensor) and seed.dim() == 1
    sample = torch.arange(batch, device=logits.device) * (0 if per_row else 1)
    ids = (sample[:, None] << 32) | torch.arange(length, device=logits.device)
    return propose(Output(logits), 0, length, mask_index, ids, randomness, **options)


# --- whole loops -----------------------------------------------------------------------------------------------------


def generate(
    model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK_ID,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], None] | None = None,
    *,
    compat: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """Text by blocks, perhaps several tokens per step; the model sees everything at every step.

    Args:
        model: ``model(ids)`` returns an object with ``logits`` [B, L, V].
        prompt: int64 [B, P]. Masks in it are filled too.
        steps, gen_length, block_length, temperature, mask_id: see :func:`genfast.generate_llada`. Where a threshold or
            a factor decides, ``steps`` only has to divide.
        remasking: ``"low_confidence"`` or ``"random"``.
        threshold, factor: see :func:`get_transfer_index` and :func:`get_transfer_index_dynamic`; the factor goes first.
        step_callback: called with the number of every step, from 0.
        compat: do as the published code does in these points: with a factor accept a row's last position though it
            alone fails; with the dual cache make no more than the planned steps per block, so that a threshold may
            leave masks behind. By default blocks are finished. Either way the mask token is never drawn (its share
            counts in confidences): published loops then end in an error, or not at all.
        seed, generator: see :func:`genfast.dropin.llada.generate`.

    Returns:
        (int64 [B, P + gen_length], how many times the model was called).

    Raises:
        AssertionError: lengths or steps that do not divide one another.
        NotImplementedError: an unknown ``remasking``, as the published code has it.
    """
    return _generate(
        None, model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor,
        step_callback, compat, seed, generator,
    )  # fmt: skip


def generate_with_prefix_cache(
    model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK_ID,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], None] | None = None,
    *,
    compat: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """As :func:`generate`, keeping keys and values of what comes before the block while it is written.

    The published code draws a step's noise twice and forgets the first; so that texts stay the same, so does this one
    (without ``seed``).

    Args:
        model: as for :func:`genfast.generate_fast_dllm`.
        prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, step_callback,
        compat, seed, generator: as for :func:`generate`.

    Returns:
        As :func:`generate`.
    """
    return _generate(
        "prefix", model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor,
        step_callback, compat, seed, generator,
    )  # fmt: skip


def generate_with_dual_cache(
    model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK_ID,
    threshold: float | None = None,
    factor: float | None = None,
    step_callback: Callable[[int], None] | None = None,
    *,
    compat: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """As :func:`generate`, keeping all keys and values while a block is written, of which only its own are renewed.

    Args:
        model: as for :func:`genfast.generate_fast_dllm`.
        prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, step_callback,
        compat, seed, generator: as for :func:`generate`.

    Returns:
        As :func:`generate`.
    """
    return _generate(
        "dual", model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor,
        step_callback, compat, seed, generator,
    )  # fmt: skip


@torch.no_grad()
def _generate(
    cache, model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor,
    step_callback, compat, seed, generator,
) -> tuple[Tensor, int]:  # fmt: skip
    assert gen_length % block_length == 0, "gen_length must be a multiple of block_length"
    blocks = gen_length // block_length
    assert steps % blocks == 0, "steps must be a multiple of the number of blocks"
    check_remasking(remasking)
    per_block = steps // blocks
    rule = {}
    if factor is not None:
        rule = dict(strategy="factor", factor=factor, accept_last=compat)
    elif threshold is not None:
        rule = dict(strategy="threshold", threshold=threshold)
    device = getattr(model, "device", prompt.device)
    layout = Layout(prompt.to(device, torch.int64), gen_length, mask_id=mask_id)
    if seed is None and generator is None:
        generator = default_generator(layout.x.device)
    run = Run(model, layout, mask_id=mask_id, seed=seed, generator=generator)
    holes = bool((run.x[:, : layout.start] == mask_id).any())
    options = dict(
        temperature=temperature,
        remasking=remasking,
        random_dtype=torch.float32 if factor is not None else torch.float64,
        mask_id=mask_id,
    )

    for begin in range(layout.start, run.x.shape[1], block_length):
        end = begin + block_length
        plan = get_num_transfer_tokens(run.masked(begin, end), per_block)
        block, i = Block(run, begin, end, cache), 0
        while True:
            run.stream = begin - layout.start + i
            output = block.evaluate()
            # The first evaluation of a block, and every one without a cache, sees what comes before it.
            first = begin if i and cache else 0
            if not (holes or compat):
                first = begin
            if i and cache == "prefix":
                burn(output, temperature, generator)
            candidates, ids = run.masked(first, end), run.ids(first, end)
            tokens, confidence = propose(output, first, end, candidates, ids, run.randomness, **options)
            n = 1 if rule or i >= per_block else plan[:, i]
            run.commit(first, end, tokens, run.select(confidence, candidates, n, **rule))
            if step_callback is not None:
                step_callback(run.step - 1)
            i += 1
            if i == per_block and (not (rule or holes) or (compat and cache == "dual")):
                break
            if (rule or holes or per_block > block_length) and not bool(run.masked(begin, end).any()):
                break
    return run.x, run.evaluations
