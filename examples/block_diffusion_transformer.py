"""A small transformer on ``genfast.attention``: trained by block diffusion, decoded block by block.

The language is a Markov chain of four letters, so that the text can be told right from wrong.

python examples/block_diffusion_transformer.py [--steps 300] [--rows 500]
"""

import argparse
import time
from types import SimpleNamespace

import torch
from chain import ALWAYS, MASK, STEP, report
from torch import nn

import genfast
from genfast import AttentionMask

LENGTH, BLOCK = 32, 8


class Layer(nn.Module):
    """Attention and an MLP, each before its sum."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)

    def forward(self, h, turn, mask):
        batch, length, width = h.shape
        # [B, L, H, D], seen as [B, H, L, D]: nothing is copied for the attention, nor after it.
        q, k, v = self.qkv(self.norm(h)).view(batch, length, 3, self.heads, -1).transpose(1, 3).unbind(2)
        found = genfast.attention(rotated(q, turn), rotated(k, turn), v, mask=mask)
        h = h + self.out(found.transpose(1, 2).reshape(batch, length, width))
        return h + self.mlp(h)


def rotated(x, turn):
    """Rotary positions: pairs of numbers, turned by angles that grow with the position."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Transformer(nn.Module):
    """Which letter is at a position, given those that its mask lets it see."""

    device = torch.device("cpu")

    def __init__(self, width: int = 48, layers: int = 2, heads: int = 3):
        super().__init__()
        self.embedding = nn.Embedding(MASK + 1, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, MASK + 1))
        self.register_buffer("frequencies", 100 ** -torch.linspace(0, 1, width // heads // 2))

    def logits(self, ids, positions, mask: AttentionMask):
        angles = positions[:, None, :, None] * self.frequencies  # [B or 1, 1, L, D / 2]
        h, turn = self.embedding(ids), (angles.cos(), angles.sin())
        for layer in self.layers:
            h = layer(h, turn, mask)
        return self.head(h)

    def forward(self, ids, attention_mask, position_ids):
        """As ``genfast.generate_block_diffusion`` calls it: attention_mask bool [B or 1, 1, n, n]."""
        mask = AttentionMask.from_dense(attention_mask[:, 0])
        return SimpleNamespace(logits=self.logits(ids, position_ids, mask))


def text(rows, length, draw):
    """int64 [rows, length], of the chain."""
    ids = [torch.multinomial(ALWAYS, rows, True, generator=draw)]
    while len(ids) < length:
        ids.append(torch.multinomial(STEP[ids[-1]], 1, generator=draw)[:, 0])
    return torch.stack(ids, 1)


def loss_of(model, clean, mask, step):
    """The bound of block diffusion, nats per letter: noised letters are seen within a block, clean ones before it."""
    noised = genfast.forward_mask(
        clean, mask_id=MASK, schedule="loglinear", eps=0.0, block_size=BLOCK, antithetic=True, seed=1, stream=step
    )
    positions = torch.arange(LENGTH).repeat(2)[None]
    logits = model.logits(torch.cat([noised.x, clean], 1), positions, mask)[:, :LENGTH, :MASK]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
    return (losses * noised.weight.flatten()).mean()


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model = Transformer()
    mask = AttentionMask.block_diffusion(LENGTH, BLOCK)
    print(mask, mask.plot(32), sep="\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, options.steps, pct_start=0.1)
    start, losses = time.perf_counter(), []
    for step in range(options.steps):
        loss = loss_of(model, text(48, LENGTH, draw), mask, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: {sum(losses[-100:]) / 100:.3f} nats per letter, {seconds:.1f} s")
    prompts = [text(1, 1 + b % 7, draw)[0] for b in range(options.rows)]
    common = dict(mask_id=MASK, gen_length=24, block_length=BLOCK, temperature=1.0, cache=False, seed=1)
    sample = genfast.generate_block_diffusion(model.eval(), prompts, remasking="random", **common)
    found = report(f"{options.rows} texts in {sample.steps} steps", sample.tokens[:, sample.start - 1 :])
    return {"loss": sum(losses[-50:]) / len(losses[-50:]), **found}


if __name__ == "__main__":
    main()
