"""What the drop-ins of LLaDA and Fast-dLLM share: tokens and confidences with the draws of the published code."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops._checks import uniform
from genfast.reference.token_sampling import guide
from genfast.samplers.text.output import Output

REMASKING = ("low_confidence", "random")


def check_remasking(remasking: str) -> None:
    if remasking not in REMASKING:
        raise NotImplementedError(f"remasking must be one of {', '.join(REMASKING)}; got {remasking!r}")


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that ``torch.rand(..., device=device)`` draws from."""
    if device.type == "cpu":
        return torch.default_generator
    module = getattr(torch, device.type)
    module.init()
    return module.default_generators[module.current_device() if device.index is None else device.index]


def drawable(output: Output, mask_id: int | None) -> int | None:
    """The mask's id if the model has a logit for it."""
    return mask_id if mask_id is not None and mask_id < output.logits.shape[-1] else None


def propose(
    output: Output,
    first: int,
    last: int,
    where: Tensor,
    ids: Tensor,
    randomness: dict,
    *,
    temperature: float,
    remasking: str,
    random_dtype: torch.dtype = torch.float32,
    mask_id: int | None = None,
    suppress: list[int] | None = None,
    suppress_confidence: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(tokens, confidence) [B, last - first] of columns [first, last), meant where ``where``.

    With ``randomness`` of a generator the numbers are those of the published code in its order: float64 of the size of
    all logits where the temperature is not 0, then, with remasking "random", one of ``random_dtype`` per position.

    Args:
        ids: see :meth:`Output.sample`.
        randomness: ``generator``, or ``seed``, ``stream`` and ``offset``.
        mask_id: never drawn, though its share counts in confidences.
    """
    mask_id = drawable(output, mask_id)
    generator = randomness.get("generator")
    confidence = "probability"
    if remasking == "random":
        confidence = None if generator is not None else "random"
    found = output.sample(
        first,
        last,
        where,
        ids,
        temperature=temperature,
        confidence=confidence,
        mask_id=mask_id,
        suppress=suppress,
        suppress_confidence=suppress_confidence,
        **randomness,
    )
    if remasking == "random":
        if generator is None:
            return found.tokens, found.confidence
        shape = output.logits.shape[:2]
        drawn = torch.rand(shape, generator=generator, device=generator.device, dtype=random_dtype)
        return found.tokens, drawn[:, first - output.first : last - output.first].to(where.device)
    if mask_id is None:
        return found.tokens, found.confidence
    return found.tokens, _with_share(output, first, last, found.tokens, found.confidence, mask_id)


def burn(output: Output, temperature: float, generator: torch.Generator | None) -> None:
    """Draw the noise of a step and forget it."""
    if generator is not None and temperature > 0:
        uniform(output.logits.shape, generator, output.logits.device)


def _with_share(output: Output, first: int, last: int, tokens: Tensor, confidence: Tensor, mask_id: int) -> Tensor:
    """Confidences p = e_token / S as if ``mask_id`` had not been left out of S: p / (1 + p e_mask / e_token)."""

    def columns(logits):
        part = logits[:, first - output.first : last - output.first]
        return part.gather(-1, tokens[..., None])[..., 0].float(), part[..., mask_id].float()

    own, mask = columns(output.logits)
    if output.uncond is not None:
        pairs = zip((own, mask), columns(output.uncond))
        own, mask = (guide(cond, uncond, output.guidance) for cond, uncond in pairs)
    p = confidence.double()
    whole = p / (1 + p * (mask.double() - own.double()).exp())
    return torch.where(p > 0, whole, p).float()
