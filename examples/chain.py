"""A masked language model that needs no training: the exact answers for text from a Markov chain."""

import functools
from types import SimpleNamespace

import torch

LETTERS, MASK = "abcd", 4
STEP = torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7], [0.4, 0.2, 0.2, 0.2]]).double()
"""p(next letter | letter)."""
ALWAYS = torch.linalg.matrix_power(STEP, 1000)[0]
"""How often each letter comes up."""


@functools.cache
def powers_of_step(length):
    return torch.stack([torch.linalg.matrix_power(STEP, k) for k in range(length + 1)])


class Chain:
    """``Chain()(ids).logits``: log p(letter at a position | all letters that are not masked), [B, L, 5].

    Given the nearest letter on the left, a steps away, and on the right, b steps away, the posterior of a masked letter
    y is proportional to STEP^a[left, y] STEP^b[y, right]; where there is none on the left, ALWAYS[y] stands for it.
    """

    device = torch.device("cpu")

    def __call__(self, ids, attention_mask=None):
        batch, length = ids.shape
        powers = powers_of_step(length)
        places = torch.arange(length).expand(batch, length)
        seen = ids != MASK
        left = torch.where(seen, places, -1).cummax(1).values
        right = torch.where(seen, places, length).flip(1).cummin(1).values.flip(1)
        letter = torch.where(seen, ids, 0)
        before = powers[places - left.clamp_min(0), letter.gather(1, left.clamp_min(0))]
        before = torch.where(left[..., None] >= 0, before, ALWAYS)
        nearest = right.clamp_max(length - 1)
        after = powers[nearest - places, :, letter.gather(1, nearest)]
        after = torch.where(right[..., None] < length, after, 1.0)
        logits = torch.full((batch, length, 5), -torch.inf)
        logits[..., :4] = (before * after).log()
        return SimpleNamespace(logits=logits)


def report(name, ids):
    """Print a text and how far its pairs of letters are from the chain's; return that, total variation."""
    pairs = (ids[:, :-1] * 4 + ids[:, 1:]).flatten().bincount(minlength=16) / ids[:, 1:].numel()
    error = float((pairs - (ALWAYS[:, None] * STEP).flatten()).abs().sum() / 2)
    print(f"{name}: pairs of letters off by {error:.3f}, e.g. {''.join(LETTERS[i] for i in ids[0])}")
    return {"error": error}
