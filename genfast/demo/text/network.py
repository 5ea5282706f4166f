"""The network of characters: one transformer that serves all four samplers.

It answers a partly masked text with log p(character) at every position, whatever the level of noise: LLaDA and MDLM
take that as it is, block diffusion sees only earlier blocks and its own, and SEDD's score of masked positions is the
same distribution over e^sigma - 1 (Ou et al. 2025; see :func:`log_score`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfast.demo.text.data import MASK
from genfast.demo.text.transformer import Transformer

LENGTH, BLOCK = 128, 16
"""Characters of a text, and of a block of block diffusion."""


class Network(Transformer):
    """Log probabilities of the characters under a mask, given those beside it."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4):
        super().__init__(MASK, width, layers, heads, longest=LENGTH)


def log_score(network: Network, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """SEDD's model of log p_sigma(y) / p_sigma(x) at masked positions: log p(y) - log(e^sigma - 1), 0 for the mask.

    At noise sigma a character is still y with probability p(y) e^-sigma, and masked with 1 - e^-sigma.
    """

    def model(ids: Tensor, sigma: Tensor, **options) -> Tensor:
        logits = network(ids, **options).logits
        score = (logits / temperature).log_softmax(-1) - torch.expm1(sigma).log()[:, None, None]
        score[..., MASK] = 0
        return score

    return model
