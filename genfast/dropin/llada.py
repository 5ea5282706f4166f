"""LLaDA (Nie et al. 2025, arXiv:2502.09992) by its published names: generation and likelihood with fused steps.

Given the same draws of torch, tokens are those of the published code with float32 models, at any temperature: a
generator, or torch's default one, is drawn from in the same order. (Confidences are the same up to float32 rounding:
where two positions of a row are as close as that, or equal, their order may differ. Of equal ones the first goes first;
published is whatever ``torch.topk`` gives.) That costs a float64 number per logit; with ``seed=`` a number per row is
drawn inside the kernel instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.dropin.unmasking import check_remasking, default_generator, drawable, propose
from genfast.ops.token_masking import forward_mask
from genfast.ops.token_sampling import sample_tokens
from genfast.random import philox_words, signed64
from genfast.reference.token_sampling import guide
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.llada import evaluate_guided
from genfast.samplers.text.output import Output, call
from genfast.samplers.text.run import Run, even_counts

__all__ = ["add_gumbel_noise", "forward_process", "generate", "get_log_likelihood", "get_num_transfer_tokens"]

MASK_ID, EOS_ID, EOT_ID = 126336, 126081, 126348
"""Of LLaDA-8B; EOT ends a turn."""


def add_gumbel_noise(logits: Tensor, temperature: float) -> Tensor:
    """exp(logits) / (-log u)^temperature in float64, whose argmax is a draw from softmax(logits / temperature); the
    logits themselves at temperature 0.

    The samplers here do without: they take the argmax of logits - temperature log(-log u) at the rows they need.
    """
    if temperature == 0:
        return logits
    noise = torch.rand_like(logits, dtype=torch.float64)
    return logits.to(torch.float64).exp().div_(noise.log_().neg_().pow_(temperature))


def get_num_transfer_tokens(mask_index: Tensor, steps: int) -> Tensor:
    """int64 [B, steps]: how many of a row's masks (bool [B, L]) to unmask at each step; the remainder goes first."""
    return even_counts(mask_index.sum(dim=1), steps)


@torch.no_grad()
def generate(
    model,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK_ID,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    *,
    compat: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eos_id: int = EOS_ID,
    eot_id: int = EOT_ID,
) -> Tensor:
    """Text by blocks from left to right, in each the most confident masks first.

    Args:
        model: ``model(ids, attention_mask=...)`` returns an object with ``logits`` [B, L, V] (or them alone); the mask
            is passed where there is one.
        prompt: int64 [B, P], padded on the left where ``attention_mask`` [B, P] is 0. Masks in it are filled too.
        steps, gen_length, block_length, temperature, cfg_scale, mask_id: see :func:`genfast.generate_llada`.
        remasking: ``"low_confidence"`` or ``"random"``.
        logits_eos_inf: never draw ``eos_id``.
        confidence_eos_eot_inf: positions that drew ``eos_id`` or ``eot_id`` go last.
        compat: do as the published code does in these points: the mask token may be drawn, which leaves its position
            masked, perhaps for good; masks of the prompt are filled at the cost of the block's, some of which stay;
            above temperature 0 ``confidence_eos_eot_inf`` takes effect on ``eot_id`` only; guidance and confidences
            have the logits' own dtype, so that half-precision confidences near 1 are equal. By default the mask token
            is never drawn (its share counts in the others' confidence), the first block's steps fill the prompt's masks
            too, both ids go last, and arithmetic is float32. Without an ``attention_mask``, guidance fails in the
            published code; here it does not.
        seed: an int, or int64 [B], one per row: draw inside the kernel, see :func:`genfast.generate_llada`.
        generator: draw from it instead of torch's default one.
        eos_id, eot_id: ids that end a text and a turn.

    Returns:
        int64 [B, P + gen_length].

    Raises:
        AssertionError: lengths or steps that do not divide one another.
        NotImplementedError: an unknown ``remasking``, as the published code has it.
    """
    assert gen_length % block_length == 0, "gen_length must be a multiple of block_length"
    blocks = gen_length // block_length
    assert steps % blocks == 0, "steps must be a multiple of the number of blocks"
    check_remasking(remasking)
    device = getattr(model, "device", prompt.device)
    layout = Layout(prompt.to(device, torch.int64), gen_length, mask_id=mask_id)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device)
        layout.pad = (attention_mask.cumsum(1) == 0).sum(1)
        layout.attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompt), gen_length)], 1)
    if seed is None and generator is None:
        generator = default_generator(layout.x.device)
    run = Run(model, layout, mask_id=mask_id, seed=seed, generator=generator)

    given = run.x != mask_id
    everywhere = compat or not bool(given[:, : layout.start].all())
    last_ids = [eos_id, eot_id] if temperature == 0 or not compat else [eot_id]
    options = dict(
        temperature=temperature,
        mask_id=None if compat else mask_id,
        suppress=[eos_id] if logits_eos_inf else None,
        suppress_confidence=last_ids if confidence_eos_eot_inf else None,
    )
    for begin in range(layout.start, run.x.shape[1], block_length):
        end = begin + block_length
        first = 0 if everywhere else begin
        plan = get_num_transfer_tokens(run.masked(begin if compat else first, end), steps // blocks)
        for i in range(steps // blocks):
            output = evaluate_guided(run, cfg_scale, given)
            if compat:
                output = _in_own_dtype(output)
            if remasking == "random" and seed is not None:
                sample = dict(options, mask_id=drawable(output, options["mask_id"]))
                run.unmask(output, first, end, plan[:, i], sample=sample, select=dict(strategy="random"))
                continue
            candidates, ids = run.masked(first, end), run.ids(first, end)
            tokens, confidence = propose(
                output, first, end, candidates, ids, run.randomness, remasking=remasking, **options
            )
            if compat and remasking == "low_confidence":
                confidence = confidence.to(output.logits.dtype)
            run.commit(first, end, tokens, run.select(confidence, candidates, plan[:, i]))
    return run.x


def _in_own_dtype(output: Output) -> Output:
    """Guidance rounded to the logits' dtype at every operation."""
    if output.uncond is None or output.logits.dtype == torch.float32:
        return output
    return Output(guide(output.logits, output.uncond, output.guidance), first=output.first)


# --- likelihood ------------------------------------------------------------------------------------------------------


def forward_process(
    batch: Tensor,
    prompt_index: Tensor,
    mask_id: int,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mask an exact number of each row's answer tokens; over the rows the numbers are spread evenly over 1 .. n.

    Args:
        batch: int64 [B, L], a prompt and then an answer of n tokens.
        prompt_index: bool [L], the prompt.
        generator: by default torch's, of the batch's device for the numbers and of the CPU for the places.
        seed, stream: draw inside the kernel (:func:`genfast.forward_mask`) instead; ``stream`` is the batch's number.

    Returns:
        (the masked batch, the masked share of the answer, float32 [B, L]).

    Raises:
        ValueError: there is no answer, or two sources of randomness.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other: give one source of randomness")
    rows, n = len(batch), int((~prompt_index).sum())
    if n == 0:
        raise ValueError("there is no answer: prompt_index is True everywhere")
    where = batch.device if generator is None else generator.device
    if seed is None:
        k = torch.randint(1, n + 1, (), device=where, generator=generator).to(batch.device)
    else:
        # A block that forward_mask, which counts positions, does not draw from.
        counters = (torch.tensor(c, device=batch.device) for c in (signed64(seed), 1 << 32, 0, stream))
        k = 1 + (philox_words(*counters)[0] * n >> 32)
    # The sum is made as a float32 tensor, as published: the last bit decides how a half is rounded.
    top = k + (rows - 1) * (n / rows)
    masks = torch.round(torch.linspace(float(k), float(top), steps=rows, device=batch.device)).long()
    masks = (masks - 1) % n + 1
    share = (masks / n)[:, None].repeat(1, batch.shape[1])
    if seed is not None:
        x = forward_mask(batch, mask_id=mask_id, maskable=~prompt_index, count=masks, seed=seed, stream=stream).x
        return x, share
    places = "cpu" if generator is None else where
    order = torch.stack([torch.randperm(n, generator=generator, device=places) for _ in range(rows)])
    chosen = order.to(batch.device) < masks[:, None]
    return torch.where(torch.nn.functional.pad(chosen, (batch.shape[1] - n, 0)), mask_id, batch), share


@torch.no_grad()
def get_log_likelihood(
    model,
    prompt: Tensor,
    answer: Tensor,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    mask_id: int = MASK_ID,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> float:
    """A Monte Carlo estimate of the evidence lower bound of log p(answer | prompt), in nats.

    Args:
        model: ``model(ids)`` returns an object with ``logits`` (or them alone).
        prompt, answer: int64 [P] and [n].
        mc_num, batch_size: mc_num // batch_size batches of batch_size maskings.
        cfg_scale: w of classifier-free guidance, see :func:`genfast.generate_llada`.
        generator, seed: see :func:`forward_process`, which by default draws as the published code does.

    Returns:
        minus the mean of (n / masked) times the sum of the masked tokens' cross-entropies. Only the rows of masked
        positions are read, in float32, and no tensor of their probabilities is made.

    Raises:
        ValueError: no answer, or ``mc_num`` less than ``batch_size``.

    Source: Nie et al. 2025 (arXiv:2502.09992), equation 14 and algorithm 3.
    """
    if not 0 < batch_size <= mc_num:
        raise ValueError(f"mc_num must be at least batch_size, which must be positive; got {mc_num} and {batch_size}")
    device = getattr(model, "device", prompt.device)
    text = torch.cat([prompt, answer])[None].to(device).repeat(batch_size, 1)
    prompt_index = torch.arange(text.shape[1], device=device) < len(prompt)
    losses = []
    for number in range(mc_num // batch_size):
        x, share = forward_process(text, prompt_index, mask_id, generator=generator, seed=seed, stream=number)
        rows = (x == mask_id).flatten().nonzero()[:, 0]
        picked = text.flatten()[rows]
        if cfg_scale > 0:
            both = call(model, torch.cat([x, torch.where(prompt_index, mask_id, x)]))[0]
            logits, uncond = both.chunk(2)
            guided = dict(uncond=uncond, guidance=cfg_scale + 1)
            own = guide(*(part.flatten(0, 1)[rows, picked].float() for part in (logits, uncond)), cfg_scale + 1)
        else:
            logits, guided = call(model, x)[0], {}
            own = logits.flatten(0, 1)[rows, picked].float()
        found = sample_tokens(logits, rows=rows, confidence=None, statistics=("logsumexp",), **guided)
        loss = (found.logsumexp.double() - own.double()) / share.flatten()[rows]
        losses.append(float(loss.sum()) / batch_size)
    return -sum(losses) / len(losses)
