"""SEDD's sampler, fused: ``get_pc_sampler`` as in its sampling.py; and MDLM's on the same model.

python examples/with_sedd.py [--steps 96] [--length 24] [--rows 500]
"""

import argparse

import torch
from chain import MASK, Chain, report

import genfast
from genfast.dropin.sedd import Absorbing, LogLinearNoise, get_pc_sampler


def log_scores(x, sigma):
    """log p_sigma(x with another letter in place) - log p_sigma(x): at a mask, log p(letter) - log(e^sigma - 1)."""
    scores = Chain()(x).logits - torch.expm1(sigma)[:, None, None].log()
    return scores.scatter(-1, x[..., None], 0.0)


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args(argv)
    sizes = dict(batch_dims=(options.rows, options.length), predictor="analytic", steps=options.steps)
    torch.manual_seed(0)

    text = get_pc_sampler(Absorbing(MASK), LogLinearNoise(), **sizes)(log_scores)
    found = report(f"get_pc_sampler, {options.steps} analytic steps", text)
    text = get_pc_sampler(Absorbing(MASK), LogLinearNoise(), **sizes, seed=1)(log_scores)
    report("the same, drawn in the kernel", text)
    common = dict(length=options.length, mask_id=MASK, seed=1)
    sample = genfast.generate_mdlm(Chain(), options.rows, predictor="first_hitting", **common)
    report(f"genfast.generate_mdlm, first hitting, {sample.evaluations} calls of the model", sample.tokens)
    sample = genfast.generate_mdlm(Chain(), 1, steps=1000, **common)
    print(f"genfast.generate_mdlm, 1000 steps of one row: {sample.evaluations} calls of the model")
    return found


if __name__ == "__main__":
    main()
