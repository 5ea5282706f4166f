"""Dream's sampler, fused: ``diffusion_generate(model, ids)`` as in its generation_utils.py.

python examples/with_dream.py [--length 24] [--rows 500]
"""

import argparse
from types import SimpleNamespace

import torch
from chain import ALWAYS, MASK, Chain, report

import genfast
from genfast.dropin.dream import diffusion_generate


class Shifted(Chain):
    """As Dream's models: a position's logits speak of the token after it."""

    def __call__(self, ids, attention_mask="full", position_ids=None):
        logits = super().__call__(ids).logits
        return SimpleNamespace(logits=torch.cat([logits[:, 1:], logits[:, -1:]], 1))


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    prompt = torch.multinomial(ALWAYS, options.rows, replacement=True)[:, None]
    common = dict(temperature=1.0, max_new_tokens=options.length, mask_token_id=MASK)

    text = diffusion_generate(Shifted(), prompt, steps=options.length, alg="entropy", **common)
    found = report("diffusion_generate, the letter of the lowest entropy at every step", text)
    text = diffusion_generate(Shifted(), prompt, steps=options.length, alg="entropy", seed=1, **common)
    report("the same, drawn in the kernel", text)
    text = diffusion_generate(Shifted(), prompt, steps=options.length // 4, alg="origin", seed=1, **common)
    report("any four letters per step, drawn apart from one another", text)
    sizes = dict(gen_length=options.length, steps=4 * options.length)
    sample = genfast.generate_dream(Shifted(), prompt, **sizes, temperature=1.0, mask_id=MASK, seed=1)
    report(f"genfast.generate_dream, {sizes['steps']} steps, {sample.evaluations} calls of the model", sample.tokens)
    return found


if __name__ == "__main__":
    main()
