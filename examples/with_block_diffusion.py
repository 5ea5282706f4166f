"""Block diffusion, fused: ``genfast.generate_block_diffusion`` with prompts of different lengths, and LLaDA2's name.

python examples/with_block_diffusion.py [--length 24] [--rows 500]
"""

import argparse

import torch
from chain import ALWAYS, LETTERS, MASK, STEP, Chain, report

import genfast
from genfast.dropin import llada2


class Blocks(Chain):
    """The letters up to the end of the active block are all that it sees, so the masks need not be looked at."""

    def __call__(self, ids, attention_mask=None, position_ids=None):
        # Padding is at the start of a row: what it holds is not a letter of the row, so it is no evidence.
        padding = (position_ids == 0).long().flip(1).cumsum(1).flip(1) > 1
        return super().__call__(torch.where(padding, MASK, ids))


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args(argv)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.multinomial(ALWAYS, 1, generator=draw) for _ in range(options.rows)]
    for b, row in enumerate(prompts):  # of 1 to 7 letters
        for _ in range(b % 7):
            row = torch.cat([row, torch.multinomial(STEP[row[-1]], 1, generator=draw)])
        prompts[b] = row
    common = dict(mask_id=MASK, gen_length=options.length, block_length=8, temperature=1.0, cache=False, seed=1)

    sample = genfast.generate_block_diffusion(Blocks(), prompts, remasking="random", **common)
    found = report("one letter per step in random order", sample.tokens[:, sample.start - 1 :])
    sample = genfast.generate_block_diffusion(
        Blocks(), prompts, remasking="entropy_bounded", eb_threshold=1.5, **common
    )
    report(f"within 1.5 nats of entropy, {sample.steps} steps", sample.tokens[:, sample.start - 1 :])
    text = llada2.generate(
        Blocks(), prompts[6][None], 0.0, 8, 8, options.length, threshold=0.6, eos_id=-1, mask_id=MASK
    )
    print("llada2.generate, the likeliest text:", "".join(LETTERS[i] for i in text[0]))
    return found


if __name__ == "__main__":
    main()
