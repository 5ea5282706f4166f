"""``generate`` of LLaDA2.0 and LLaDA2.1 (modeling_llada2_moe.py), fused, by its published name and arguments.

A model is called as published: ``model(ids, attention_mask=, position_ids=)`` with all tokens up to the end of the
active block and an additive block-causal mask [1, 1, n, n], bfloat16; it returns an object with ``logits``. Use
``generate(model, input_ids, ...)``, or ``model.generate = types.MethodType(generate, model)``.

What is fused, and whose random numbers are drawn: at temperature 0 the kernel takes the likeliest token and reads the
masked positions of the block only; above 0 it draws in the same pass with ``seed``, and without, tokens are drawn with
torch's default generator exactly as published, in eager PyTorch.

``compat=True`` reproduces what LLaDA2.0 does and ours corrects: at temperature 0 it draws at temperature 1; a run that
``eos_early_stop`` ends returns the prompt too, which is otherwise left out, and takes an end of sequence in the prompt
for its own. As published, the mask itself may be drawn; it then stays.

Source: https://huggingface.co/inclusionAI/LLaDA2.0-mini and LLaDA2.1-mini, modeling_llada2_moe.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.dropin.block_draws import fused_draw, published_draw
from genfast.ops.token_sampling import TokenSample
from genfast.samplers.text.block_diffusion import Decoder, block_layout, strategy
from genfast.samplers.text.cache import Cached, Recomputed
from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run, even_counts

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model,
    inputs: Tensor,
    temperature: float = 0.0,
    block_length: int = 32,
    steps: int = 32,
    gen_length: int = 2048,
    top_p: float | None = None,
    top_k: int | None = None,
    eos_early_stop: bool = False,
    minimal_topk: int = 1,
    threshold: float = 0.95,
    eos_id: int = 156892,
    mask_id: int = 156895,
    *,
    editing_threshold: float | None = None,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    cache: bool = False,
    seed: int | None = None,
    compat: bool = False,
) -> Tensor:
    """Generate text block by block.

    Args:
        model: see above.
        inputs: int64 [1, P].
        temperature, top_p, top_k: of the draw; 0 takes the largest of the logits as they are.
        block_length, steps: tokens per block, and the steps that share them without editing; at most gen_length /
            minimal_topk.
        gen_length: how many tokens to generate.
        eos_early_stop: stop as soon as an end of sequence has no mask before it; with editing, after its block. Without
            it, LLaDA2.0 stops after the block, and LLaDA2.1 (editing) not at all.
        threshold: a step keeps all tokens whose probability exceeds it, and at least its share of the block.
        eos_id, mask_id: ids.
        editing_threshold: as LLaDA2.1: also replace tokens kept in the active block whose probability exceeds this, and
            revise a full block up to ``max_post_steps`` times; a step then keeps at least ``num_to_transfer``.
        cache: keep keys and values of decided blocks (see :func:`genfast.generate_block_diffusion`), which the
            published code does not.
        seed: draw inside the kernel.
        compat: reproduce the oddities of LLaDA2.0 listed above.

    Returns:
        int64 [1, n], the text up to and with its first end of sequence.

    Raises:
        ValueError: more than one row; compat with seed or with editing.
        RuntimeError: a block in which the mask itself is drawn, again and again.
    """
    if inputs.dim() != 2 or len(inputs) != 1:
        raise ValueError(
            f"inputs must be [1, P], got {list(inputs.shape)}; genfast.generate_block_diffusion takes batches"
        )
    if compat and (seed is not None or editing_threshold is not None):
        raise ValueError("compat reproduces LLaDA2.0, which draws with torch's generator and edits nothing")
    edits = editing_threshold is not None
    steps = max(min(steps, gen_length // minimal_topk), 1)
    size = inputs.shape[1]
    asked = Layout(inputs, gen_length, mask_id=mask_id, device=getattr(model, "device", None))
    layout, tails, blocks = block_layout(asked, block_length, mask_id)
    # Without a seed nothing is drawn in the kernel, and none may be taken from the generator that draws as published.
    run = Run(model, layout, mask_id=mask_id, seed=0 if seed is None else seed)
    kind, select = strategy("low_confidence_dynamic", threshold, 0.0)

    def draw(output: Output, first: int, last: int, where: Tensor) -> TokenSample:
        if seed is None and (compat or temperature > 0):
            return published_draw(output.logits, kind, temperature, top_k, top_p)
        return fused_draw(run, output, first, last, where, kind, temperature, top_k, top_p)

    decoder = (EarlyStop if compat and eos_early_stop else Decoder)(
        run,
        (Cached if cache else Recomputed)(run, block_length, additive),
        draw,
        select,
        counts=[num_to_transfer] if edits else even_counts(block_length, steps).tolist(),
        tails=tails,
        editing_threshold=editing_threshold,
        max_post_steps=max_post_steps,
        eos_ids=[eos_id] if eos_early_stop else [],
    )
    for k in range(blocks):
        first = layout.start + k * block_length
        last = first + block_length
        decoder.block(first, last, k)
        if bool(decoder.ended.all()):
            break
        if bool(run.masked(first, last).any()):
            raise RuntimeError(f"block {k} still holds masks: the model draws the mask token itself ({mask_id})")
        if not edits and bool((run.x[:, size:last] == eos_id).any()):
            break
    if isinstance(decoder, EarlyStop) and decoder.stop is not None:
        return run.x[:, : decoder.stop + 1]
    text = run.x[:, size : size + gen_length]
    ends = (text[0] == eos_id).nonzero()
    return text[:, : int(ends[0, 0]) + 1] if len(ends) else text


def additive(mask: Tensor) -> Tensor:
    """0 where attention is allowed, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device).masked_fill(~mask, -torch.inf)


class EarlyStop(Decoder):
    """LLaDA2.0's early stop: at the first end of sequence of the row, that of the prompt included."""

    stop: int | None = None

    def end_rows(self, last: int) -> None:
        """After a step: if it wrote an end of sequence, and no mask after the prompt lies before the row's first."""
        run = self.run
        ends = torch.isin(run.x[0], self.eos_ids)
        if not bool((ends & (run.order[0] == run.step)).any()):
            return
        place = int(ends.nonzero()[0, 0])
        if not bool((self.own[0] & (run.x[0] == run.mask_id))[:place].any()):
            self.stop = place
            self.ended |= True
