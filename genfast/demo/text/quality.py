"""How well text is modelled: bits per character, with the figures of simpler models beside it; and words that exist."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from genfast.demo.text.data import MASK, Corpus, decode
from genfast.demo.text.network import BLOCK, LENGTH, Network
from genfast.demo.text.train import cross_entropy
from genfast.ops.token_masking import forward_mask


@torch.no_grad()
def bits_per_character(
    net: Network, text: Tensor, blocks: bool, *, windows: int = 256, draws: int = 4, seed: int = 0
) -> float:
    """Upper bound of the bits that a character of ``text`` [N] costs: the negative ELBO by Monte Carlo.

    A text of L characters costs at most the mean, over n uniform in 1..L and masks of n characters, of L / n times
    their summed -log p. With ``blocks`` the same holds of every block, given those before it. The numbers n are spread
    evenly over windows and draws.
    """
    starts = torch.linspace(0, len(text) - LENGTH, windows).long()
    x0 = text[starts[:, None] + torch.arange(LENGTH)]
    length = BLOCK if blocks else LENGTH
    rows = x0.numel() // length
    total = 0.0
    for draw in range(draws):
        shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + draw))
        count = 1 + (shuffled * draws + draw) * length // (rows * draws)
        noisy = forward_mask(x0.view(rows, length), mask_id=MASK, count=count, seed=seed, stream=draw)
        x, mask, weight = (part.view_as(x0) for part in noisy[:3])
        for part in torch.arange(windows).split(64):
            found = cross_entropy(net, x0[part], x[part], mask[part], blocks)
            total += (found * weight[part][mask[part]]).double().sum().item()
    return total / (draws * x0.numel() * math.log(2))


def simpler_models(corpus: Corpus) -> dict[str, float]:
    """Bits per held-out character of models without a network, trained on the same text."""
    text, bits = corpus.held_out, {}
    counts = [torch.zeros(MASK ** (n + 1)) for n in range(3)]
    for n, table in enumerate(counts):
        table += torch.bincount(_grams(corpus.train, n), minlength=len(table))
    # Each order's counts, smoothed by what the order below says (Witten and Bell 1991).
    p = torch.full((len(text) - 2,), 1 / MASK)
    for n, name in enumerate(("characters' frequencies", "one character before", "two characters before")):
        grams = _grams(text, n)[2 - n :]
        context = counts[n].view(-1, MASK)
        seen, kinds = context.sum(1)[grams // MASK], (context > 0).sum(1)[grams // MASK]
        p = torch.where(seen > 0, (counts[n][grams] + kinds * p) / (seen + kinds).clamp_min(1), p)
        bits[name] = -p.log2().mean().item()
    bits["gzip"] = 8 * len(zlib.compress(decode(text).encode(), 9)) / len(text)
    return bits


def known_words(texts: Iterable[str], corpus: Corpus) -> float:
    """Share of the letters of ``texts`` that stand in words of the training text; the last word of a text, which may
    have been cut, is left out."""
    known = set(re.findall(r"[a-z]+", decode(corpus.train)))
    words = [word for text in texts for word in re.findall(r"[a-z]+", text)[:-1]]
    return sum(len(word) for word in words if word in known) / max(1, sum(map(len, words)))


def _grams(ids: Tensor, n: int) -> Tensor:
    """int64 [N - n]: characters together with the n before each, as one number."""
    grams = ids[n:].clone()
    for k in range(1, n + 1):
        grams += ids[n - k : len(ids) - k] * MASK**k
    return grams
