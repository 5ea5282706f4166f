"""LLaDA's sampler, fused: ``generate(model, prompt)`` as in its generate.py, and Fast-dLLM's beside it.

python examples/with_llada.py [--length 24] [--rows 500]
"""

import argparse

import torch
from chain import ALWAYS, MASK, Chain, report

import genfast
from genfast.dropin import fast_dllm, llada


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    prompt = torch.multinomial(ALWAYS, options.rows, replacement=True)[:, None]
    sizes = dict(gen_length=options.length, block_length=options.length)
    common = dict(temperature=1.0, mask_id=MASK, **sizes)

    text = llada.generate(Chain(), prompt, steps=options.length, remasking="random", **common)
    found = report("llada.generate, one letter per step in random order", text)
    text = llada.generate(Chain(), prompt, steps=options.length, remasking="random", seed=1, **common)
    report("the same, drawn in the kernel", text)
    text = llada.generate(Chain(), prompt, steps=options.length // 4, remasking="random", seed=1, **common)
    report("four letters per step, drawn apart from one another", text)
    text, calls = fast_dllm.generate(Chain(), prompt, steps=options.length, factor=2.0, seed=1, **common)
    report(f"fast_dllm.generate, the surest letters first, {calls} calls of the model", text)
    sample = genfast.generate_fast_dllm(Chain(), prompt, threshold=0.3, seed=1, **common)
    report(f"genfast.generate_fast_dllm, all letters of at least 0.3, {sample.evaluations} calls", sample.tokens)
    return found


if __name__ == "__main__":
    main()
