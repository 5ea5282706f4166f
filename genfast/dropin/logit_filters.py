"""Top-k and top-p in eager PyTorch, where a drop-in has to draw with torch's own random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_logits(logits: Tensor, k: int, fill: float) -> Tensor:
    """``fill`` in place of the logits below the k-th largest of a row."""
    return logits.masked_fill(logits < logits.topk(min(k, logits.shape[-1])).values[..., -1:], fill)


def top_p_logits(logits: Tensor, p: float, fill: float) -> Tensor:
    """``fill`` in place of the logits after the one with which the probabilities, in falling order, pass ``p``."""
    falling, order = logits.sort(descending=True)
    over = falling.softmax(-1).cumsum(-1) > p
    over = torch.nn.functional.pad(over[..., :-1], (1, 0))
    return logits.masked_fill(torch.zeros_like(over).scatter(-1, order, over), fill)
