"""A small transformer on genfast's attention: trained by block diffusion, decoded block by block with a cache.

The language is a Markov chain of four letters, so that the text can be told right from wrong. The transformer's layers
(``genfast/demo/text/transformer.py``, as in ``genfast demo --text``) are told how to attend: ``training_pass`` does it
with ``genfast.attention`` and the block-diffusion mask, ``written_by_hand`` with ``genfast.attention_cached``. At the
end ``genfast.generate_block_diffusion`` decodes the same network, with and without its cache.

python examples/block_diffusion_transformer.py [--steps 300] [--rows 500]
"""

import argparse
import time
from functools import partial

import torch
from chain import ALWAYS, LETTERS, MASK, STEP, report
from torch import nn

import genfast
from genfast import AttentionMask, KVCache
from genfast.demo.text.transformer import Transformer, rotated, turns

LENGTH, BLOCK = 32, 8


def training_pass(model, noised, clean, mask):
    """Scores of the noised letters x_t: one pass over x_t and then x_0, in which ``mask`` lets a noised letter see its
    own block of x_t and the blocks of x_0 before it."""
    by = turns(model.rope, torch.arange(LENGTH).repeat(2))  # a letter is at the same place in both

    def attend(layer, q, k, v):
        return genfast.attention(rotated(q, by), rotated(k, by), v, mask=mask)

    return model.logits(torch.cat([noised, clean], 1), attend)[:, :LENGTH]


def loss_of(model, clean, mask, step):
    """The bound of block diffusion, nats per letter."""
    noised = genfast.forward_mask(
        clean, mask_id=MASK, schedule="loglinear", eps=0.0, block_size=BLOCK, antithetic=True, seed=1, stream=step
    )
    logits = training_pass(model, noised.x, clean, mask)
    losses = nn.functional.cross_entropy(logits[noised.mask], clean[noised.mask], reduction="none")
    return (losses * noised.weight[noised.mask]).sum() / clean.numel()


@torch.no_grad()
def written_by_hand(model, rows, length):
    """int64 [rows, length]: a block begins as masks, of which every step decides one at random."""
    heads = model.layers[0].heads
    caches = [KVCache(rows, heads, length, model.embedding.embedding_dim // heads) for _ in model.layers]

    def attend(write, layer, q, k, v):
        # Rotated within, by places that go on from what is in the cache.
        return genfast.attention_cached(q, caches[layer], k=k, v=v, write=write, rope=model.rope)

    text = []
    for number in range(length // BLOCK):
        block = torch.full((rows, BLOCK), MASK)
        for step in range(BLOCK):
            draw = dict(seed=2, stream=number * BLOCK + step)
            # The block sees all that is stored and itself; it still changes, so nothing of it is stored.
            logits = model.logits(block, partial(attend, None))
            chosen = genfast.select_transfer(torch.zeros(rows, BLOCK), block == MASK, 1, strategy="random", **draw)
            found = genfast.sample_tokens(logits, temperature=1.0, mask_id=MASK, **draw)
            genfast.commit_(block, found.tokens, chosen, mask_id=MASK)
        # It is finished: one pass more stores its keys and values, for all blocks to come.
        model.logits(block, partial(attend, "append"))
        text.append(block)
    return torch.cat(text, 1)


def chain_text(rows, length, draw):
    """int64 [rows, length], of the chain."""
    ids = [torch.multinomial(ALWAYS, rows, True, generator=draw)]
    while len(ids) < length:
        ids.append(torch.multinomial(STEP[ids[-1]], 1, generator=draw)[:, 0])
    return torch.stack(ids, 1)


def trained(steps, draw):
    """(the model, its losses)."""
    model = Transformer(len(LETTERS), width=48, layers=2, heads=3, longest=LENGTH)
    mask = AttentionMask.block_diffusion(LENGTH, BLOCK)
    print(mask, mask.plot(32), sep="\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.1)
    start, losses = time.perf_counter(), []
    for step in range(steps):
        loss = loss_of(model, chain_text(48, LENGTH, draw), mask, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: {sum(losses[-100:]) / 100:.3f} nats per letter, {seconds:.1f} s")
    return model.eval(), losses


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model, losses = trained(options.steps, draw)

    found = {"loss": sum(losses[-50:]) / len(losses[-50:]), "first": losses[0]}
    found["by_hand"] = report("by hand", written_by_hand(model, options.rows, LENGTH))["error"]
    prompts = [chain_text(1, 1 + b % 7, draw)[0] for b in range(options.rows)]
    common = dict(mask_id=MASK, gen_length=24, block_length=BLOCK, temperature=1.0, remasking="random", seed=1)
    texts = []
    for cache in (True, False):
        start = time.perf_counter()
        sample = genfast.generate_block_diffusion(model, prompts, cache=cache, **common)
        seconds = time.perf_counter() - start
        name = f"{'cached' if cache else 'recomputed'}, {sample.steps} steps in {seconds:.2f} s"
        error = report(name, sample.tokens[:, sample.start - 1 :])["error"]
        found["error"] = max(error, found.get("error", 0.0))
        texts.append(sample.tokens)
    found["same"] = float((texts[0] == texts[1]).float().mean())
    print(f"{found['same']:.2%} of the letters are the same with the cache and without")
    return found


if __name__ == "__main__":
    main()
