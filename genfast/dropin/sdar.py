"""SDAR's ``block_diffusion_generate`` (its generate.py), fused, by its published name and arguments.

A model is called as published: ``model(ids, attention_mask=, position_ids=, past_key_values=, use_cache=True,
store_kv=)`` with a block-causal mask [1, n, m] of 0 and 1 and a ``DynamicCache`` of transformers; it returns an object
with ``logits``, and adds to the cache where ``store_kv`` says so.

What is fused, and whose random numbers are drawn:

* at temperature 0 (which the first releases divide by, and the later ones read as the largest logit) the kernel reads
  the masked positions of the block only, once; for float32 logits tokens are those of the later releases, except where
  two confidences tie or all but tie;
* above 0, with ``seed``, it draws in the same pass;
* above 0 without ``seed``, tokens are drawn with torch's default generator exactly as published, in eager PyTorch.

By default only masked positions are ever chosen. The first releases do not say so: where fewer positions are masked
than a step has to choose, as in a block that the prompt shares, they also overwrite tokens that were there, the
prompt's included. ``compat=True`` does that. As published, the mask itself may be drawn; it then stays.

Source: https://github.com/JetAstra/SDAR, generate.py; the entropy bound is that of its engine, JetEngine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.dropin.block_draws import fused_draw, probabilities, published_draw
from genfast.ops import token_sampling as ops
from genfast.ops.token_sampling import TokenSample
from genfast.samplers.text.block_diffusion import Decoder, block_layout, strategy
from genfast.samplers.text.cache import Recomputed
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run, even_counts

__all__ = ["block_diffusion_generate", "get_num_transfer_tokens", "sample_with_temperature_topk_topp"]

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")


def get_num_transfer_tokens(block_length: int, steps: int) -> Tensor:
    """How many tokens each step of a block commits: int64 [steps], even, the remainder to the first ones."""
    return even_counts(block_length, steps)


def sample_with_temperature_topk_topp(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(tokens, their probabilities) [B, n] of logits [B, n, V], drawn with torch's default generator.

    ``top_k`` comes before ``top_p``; 0 and 1 are none. Temperature 0 takes the largest of the logits as they are.
    """
    if temperature <= 0:
        found = ops.sample_tokens(logits)
        return found.tokens, found.confidence.to(logits.dtype)
    p = probabilities(logits, temperature, top_k, top_p)
    tokens = torch.multinomial(p, num_samples=1)
    return tokens.view(logits.shape[:-1]), p.gather(-1, tokens).view(logits.shape[:-1])


@torch.no_grad()
def block_diffusion_generate(
    model,
    prompt: dict,
    mask_id: int,
    gen_length: int = 128,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    eb_threshold: float = 0.35,
    stopping_criteria_idx: Sequence[int] | None = None,
    *,
    seed: int | Tensor | None = None,
    compat: bool = False,
) -> Tensor:
    """Generate text block by block with a cache of keys and values.

    Args:
        model: see above; put in evaluation mode.
        prompt: a tokenizer's answer: ``prompt["input_ids"]`` int64 [B, P], without padding. (Published: B = 1.)
        mask_id: the id of the mask token.
        gen_length: rounded up so that prompt and text fill whole blocks.
        block_length, denoising_steps: tokens per block, and steps that share them evenly.
        temperature, top_k, top_p: of the draw.
        remasking_strategy, confidence_threshold, eb_threshold: see :func:`genfast.generate_block_diffusion`.
        stopping_criteria_idx: ids that end a text after the block that holds one.
        seed: draw inside the kernel: an int, or int64 [B].
        compat: choose positions as the first releases do.

    Returns:
        int64 [B, L], the prompt and whole blocks; those after the end are masks.

    Raises:
        ValueError: an unknown strategy; a prompt with padding; seed with compat.
        RuntimeError: a block in which the mask itself is drawn, again and again.
    """
    if remasking_strategy not in STRATEGIES:
        raise ValueError(f"remasking_strategy must be one of {', '.join(STRATEGIES)}; got {remasking_strategy!r}")
    if seed is not None and compat:
        raise ValueError("seed and compat exclude each other: the published code draws with torch's generator")
    if compat and remasking_strategy == "entropy_bounded":
        raise ValueError("compat is of the first releases, which have no entropy_bounded")
    ids, padding = prompt["input_ids"], prompt.get("attention_mask")
    if padding is not None and bool((padding == 0).any()):
        raise ValueError("the prompt is padded; genfast.generate_block_diffusion takes prompts of different lengths")
    model.eval()
    asked = Layout(ids, gen_length, mask_id=mask_id, device=getattr(model, "device", None))
    layout, tails, blocks = block_layout(asked, block_length, mask_id)
    # Without a seed nothing is drawn in the kernel, and none may be taken from the generator that draws as published.
    run = Run(model, layout, mask_id=mask_id, seed=0 if seed is None else seed)
    kind, select = strategy(remasking_strategy, confidence_threshold, eb_threshold)
    counts = [1] if "bound" in select else even_counts(block_length, denoising_steps).tolist()
    fused = temperature <= 0 or seed is not None

    def draw(output: Output, first: int, last: int, where: Tensor) -> TokenSample:
        if fused:
            return fused_draw(run, output, first, last, where, kind, temperature, top_k, top_p)
        return published_draw(output.logits, kind, temperature, top_k, top_p)

    logits = Stored(run, block_length, cache())
    decoder = (FirstRelease if compat else Decoder)(run, logits, draw, select, counts=counts, tails=tails)
    for k in range(blocks):
        first = layout.start + k * block_length
        last = first + block_length
        decoder.block(first, last, k)
        if bool((run.masked(first, last) & ~decoder.ended[:, None]).any()):
            raise RuntimeError(f"block {k} still holds masks: the model draws the mask token itself ({mask_id})")
        if stopping_criteria_idx is not None:
            stops = torch.tensor(list(stopping_criteria_idx), device=run.x.device)
            decoder.ended |= (torch.isin(run.x, stops) & decoder.own).any(1)
            if bool(decoder.ended.all()):
                break
    return run.x


def cache():
    """What transformers keeps keys and values in; SDAR's model asks for it."""
    try:
        from transformers.cache_utils import DynamicCache
    except ImportError as error:
        raise ImportError(
            "SDAR's model keeps its cache in transformers' DynamicCache: pip install transformers"
        ) from error
    return DynamicCache()


class Stored(Recomputed):
    """Logits of a block from a model that is told when to keep keys and values (``store_kv``)."""

    def __init__(self, run: Run, block_length: int, cache):
        super().__init__(run, block_length, lambda mask: mask[0].float())
        self.cache, self.length = cache, 0

    def __call__(self, first: int, last: int) -> Output:
        if first > self.length:
            self.call(self.length, first, store_kv=True)
            self.length = first
        return self.call(first, last, store_kv=False)

    def call(self, first: int, last: int, *, store_kv: bool) -> Output:
        run = self.run
        output, _ = run.evaluate(
            run.x[:, first:last],
            first=first,
            **self.options(first, last),
            past_key_values=self.cache,
            use_cache=True,
            store_kv=store_kv,
        )
        return output


class FirstRelease(Decoder):
    """Choices of the first releases, which may fall on positions that are not masked."""

    def step(self, first: int, last: int, masked: Tensor, alive: Tensor, step: int) -> None:
        run = self.run
        found = self.draw(self.logits(first, last), first, last, torch.ones_like(masked))
        n = self.counts[min(step, len(self.counts) - 1)]
        chosen = torch.zeros_like(masked)
        for b in alive.nonzero()[:, 0].tolist():
            if self.select["strategy"] == "sequential":
                place = int(masked[b].nonzero()[0, 0])
                chosen[b, place : place + n] = True
                continue
            confidence = torch.where(masked[b], found.confidence[b], -torch.inf)
            if self.select["strategy"] == "threshold":
                chosen[b] = confidence > self.select["threshold"]
            if int(chosen[b].sum()) < n:
                chosen[b] = False
                chosen[b, confidence.topk(n).indices] = True
        run.commit(first, last, found.tokens, chosen)
