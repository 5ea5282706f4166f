"""Draws of the drop-ins of block diffusion: by the kernel, or with torch's own random numbers as published."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.dropin.logit_filters import top_k_logits, top_p_logits
from genfast.ops.token_sampling import TokenSample
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """[B n, V], tempered and filtered."""
    logits = logits.reshape(-1, logits.shape[-1])
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_k:
        logits = top_k_logits(logits, top_k, -torch.inf)
    if top_p is not None and top_p < 1:
        logits = top_p_logits(logits, top_p, -torch.inf)
    return logits.softmax(-1)


def fused_draw(run: Run, output: Output, first: int, last: int, where: Tensor, kind, temperature, top_k, top_p):
    """Tokens and confidences by the kernel. It takes top-k of what top-p leaves, so top-k comes before it here."""
    if temperature <= 0:
        return run.sample(output, first, last, where, confidence=kind)
    top_p = None if top_p is None or top_p >= 1 else max(top_p, 1e-15)
    if top_k and top_p is not None:
        output = Output(top_k_logits(output.logits, top_k, -torch.inf), first=output.first)
        top_k = None
    return run.sample(
        output, first, last, where, temperature=temperature, top_k=top_k or None, top_p=top_p, confidence=kind
    )


def published_draw(logits: Tensor, kind: str | None, temperature: float, top_k: int, top_p: float) -> TokenSample:
    """Tokens at all positions with torch's default generator, and their probabilities or negative entropies."""
    p = probabilities(logits, temperature, top_k, top_p)
    tokens = torch.multinomial(p, num_samples=1)
    confidence = torch.special.xlogy(p, p).sum(-1) if kind == "entropy" else p.gather(-1, tokens)
    return TokenSample(tokens.view(logits.shape[:-1]), confidence.float().view(logits.shape[:-1]))
