"""SEDD's sampler, fused: ``get_pc_sampler`` as in its sampling.py, on text whose exact scores are known.

python examples/with_sedd.py [--steps 64]
"""

import argparse

import torch

from genfast.dropin.sedd import Absorbing, LogLinearNoise, get_pc_sampler

LETTERS, LENGTH, ROWS = 6, 24, 800
CHAIN = torch.rand(LETTERS, LETTERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
CHAIN = CHAIN / CHAIN.sum(1, keepdim=True)
START = torch.matrix_power(CHAIN, 200)[0]
"""The text: a Markov chain of letters, which follow each other with probabilities CHAIN[before, after]."""


def log_scores(x, sigma):
    """log p(x with another letter) - log p(x) at every mask, exact: messages along the chain, both ways."""
    seen = torch.nn.functional.one_hot(x, LETTERS + 1)[..., :LETTERS].double()
    seen = torch.where((x == LETTERS)[..., None], 1.0, seen)
    left, right = [START.expand(len(x), -1)], [torch.ones(len(x), LETTERS, dtype=torch.float64)]
    for i in range(LENGTH - 1):
        left.append(left[-1] * seen[:, i] @ CHAIN)
        right.append(right[-1] * seen[:, -1 - i] @ CHAIN.T)
    found = torch.stack(left, 1) * torch.stack(right[::-1], 1)
    found = (found / found.sum(-1, keepdim=True)).log() - torch.expm1(sigma.double()).log()[:, None, None]
    return torch.nn.functional.pad(found, (0, 1)).float()


def report(name, x):
    """How far the frequencies of pairs of letters are from the exact ones (half the sum of differences)."""
    pairs = torch.bincount((x[:, :-1] * LETTERS + x[:, 1:]).flatten(), minlength=LETTERS**2)
    distance = float((pairs / pairs.sum() - (START[:, None] * CHAIN).flatten()).abs().sum() / 2)
    print(f"{name}: {''.join(chr(97 + k) for k in x[0].tolist())}, distance of pairs {distance:.4f}")
    return distance


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args(argv)
    common = dict(graph=Absorbing(LETTERS), noise=LogLinearNoise(), batch_dims=(ROWS, LENGTH), steps=options.steps)
    torch.manual_seed(0)
    found = {}
    found["published"] = report("analytic, torch.rand", get_pc_sampler(**common, predictor="analytic")(log_scores))
    found["analytic"] = report("analytic, seed=1", get_pc_sampler(**common, predictor="analytic", seed=1)(log_scores))
    found["euler"] = report("euler, seed=1", get_pc_sampler(**common, predictor="euler", seed=1)(log_scores))
    return found


if __name__ == "__main__":
    main()
