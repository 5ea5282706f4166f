"""Dream's ``sample_tokens`` and ``diffusion_generate`` (its generation_utils.py), fused, by their published names.

A model is called as published: ``model(x, attention_mask, tok_idx)``, with the mask "full" and no ``tok_idx`` where
nothing is padded, else a bool [B, 1, L, L] and the places of the tokens; it returns an object with ``logits``.
``diffusion_generate(model, input_ids, ...)`` takes the model first; as a method it comes with
:class:`DreamGenerationMixin`, or ``model.diffusion_generate = types.MethodType(diffusion_generate, model)``.

What is fused, and whose random numbers are drawn:

* at temperature 0 the kernel reads the masked positions only, once, without a softmax or a sort in memory. Tokens are
  the published ones for float32 logits, except where confidences tie or all but tie: ours takes the first of equal ones
  (a filter that leaves one token gives it the probability 1, so they are common), torch.topk an order it does not say;
* above 0, with ``seed``, it draws in the same pass (see :func:`genfast.sample_tokens`);
* above 0 without ``seed``, tokens, and with ``alg_temp`` or ``"origin"`` positions, are drawn with torch's default
  generator exactly as published, by the published arithmetic in eager PyTorch.

Two things are corrected by default and reproduced with ``compat=True``, which runs the published arithmetic throughout:
the number of positions a step unmasks is that of each row, not of the mean of the batch, and a row that has fewer masks
than that does not have other tokens, its prompt's included, replaced by the mask. (``compat=True`` also adds the
published 1e-10 inside the entropy's logarithm.) As published, the mask itself may be drawn; it then stays.

Source: https://github.com/DreamLM/Dream and generation_utils.py of Dream-org/Dream-v0-Instruct-7B on Hugging Face.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast.dropin.logit_filters import top_k_logits, top_p_logits
from genfast.ops import token_sampling as ops
from genfast.ops._checks import LOGIT_DTYPES, checked_seed
from genfast.ops.token_transfer import select_transfer
from genfast.samplers.text.dream import CONFIDENCES, uniforms
from genfast.samplers.text.output import Output

__all__ = ["DreamGenerationMixin", "DreamModelOutput", "diffusion_generate", "sample_tokens"]

DEFAULTS = dict(
    temperature=0.0,
    top_p=None,
    top_k=None,
    max_length=20,
    max_new_tokens=None,
    eps=1e-3,
    steps=512,
    alg="origin",
    alg_temp=None,
    num_return_sequences=1,
    return_dict_in_generate=False,
    output_history=False,
    mask_token_id=None,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
"""What a ``DreamGenerationConfig`` holds, and its defaults."""


@dataclass
class DreamModelOutput:
    """What :func:`diffusion_generate` returns with ``return_dict_in_generate``; also read by key or place."""

    sequences: Tensor
    """int64 [B, L]."""
    history: list[Tensor] | None = None
    """The tokens after every step, with ``output_history``."""

    def to_tuple(self) -> tuple:
        return tuple(value for value in (self.sequences, self.history) if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


def sample_tokens(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    margin_confidence: bool = False,
    neg_entropy: bool = False,
    *,
    seed: int | None = None,
    compat: bool = False,
) -> tuple[Tensor, Tensor]:
    """A token per row of logits, and how sure the model is of it.

    Args:
        logits: [N, V], any floating dtype.
        temperature: 0 takes the largest.
        top_p, top_k: filters, in that order; the token that crosses ``top_p`` stays.
        margin_confidence: confidence is the largest probability minus the second, not that of the token.
        neg_entropy: confidence is sum p log p.
        seed: draw inside the kernel; by default with torch's default generator, as published.
        compat: the published arithmetic in eager PyTorch, whatever the temperature.

    Returns:
        (confidence [N] in the logits' dtype, tokens int64 [N]).
    """
    if _fused(logits, temperature, seed, compat):
        kind = "entropy" if neg_entropy else "margin" if margin_confidence else "tempered"
        options = _draw_options(temperature, top_p, top_k)
        found = ops.sample_tokens(logits, **options, confidence=kind, seed=seed)
        return found.confidence.to(logits.dtype), found.tokens
    if seed is not None:
        raise TypeError(f"seed= needs dense logits in float32, bfloat16 or float16, and not compat; got {logits.dtype}")
    hot = temperature > 0
    lowest = torch.finfo(logits.dtype).min
    logits = logits / temperature if hot else logits
    if top_p is not None and top_p < 1:
        logits = top_p_logits(logits, top_p, lowest)
    if top_k is not None:
        logits = top_k_logits(logits, top_k, lowest)
    p = logits.softmax(-1)
    confidence, tokens = p.max(-1)
    if hot:
        try:
            tokens = torch.distributions.Categorical(probs=p).sample()
            confidence = p.gather(-1, tokens[..., None])[..., 0]
        except (ValueError, RuntimeError):
            pass  # rows with NaN: as published, all take the largest
    if margin_confidence:
        first, second = p.topk(2).values.unbind(-1)
        confidence = first - second
    if neg_entropy:
        confidence = (p * (p + 1e-10).log()).sum(-1)
    return confidence, tokens


@torch.no_grad()
def diffusion_generate(
    model,
    inputs: Tensor | None = None,
    generation_config=None,
    *,
    seed: int | Tensor | None = None,
    compat: bool = False,
    **kwargs,
) -> DreamModelOutput | Tensor:
    """Generate text as ``model.diffusion_generate(inputs, generation_config, **kwargs)`` does.

    Args:
        model: see above; its ``generation_config`` or ``config`` gives ``mask_token_id`` and ``pad_token_id`` where
            nothing else does.
        inputs: int64 [B, P], padded on the left.
        generation_config: any object with some of the attributes in ``DEFAULTS``.
        seed: draw inside the kernels: an int, or int64 [B] with one per row. A row's draws do not depend on padding.
        compat: reproduce the published oddities listed above.
        kwargs: those attributes, which come before the object's, and ``attention_mask`` [B, P],
            ``generation_tokens_hook_func(step, x, logits) -> x`` (first with None, x, None) and
            ``generation_logits_hook_func(step, x, logits) -> logits``, both with the shifted logits.

    Returns:
        int64 [B num_return_sequences, max_length], or :class:`DreamModelOutput` with ``return_dict_in_generate``.

    Raises:
        TypeError: an unknown option.
        ValueError: no mask id, an unknown ``alg``, a negative ``alg_temp``, or no room after the prompt.
    """
    if inputs is None:
        raise ValueError("inputs must be given: int64 [B, P]")
    attention_mask = kwargs.pop("attention_mask", None)
    tokens_hook = kwargs.pop("generation_tokens_hook_func", None)
    logits_hook = kwargs.pop("generation_logits_hook_func", None)
    config = _configured(model, generation_config, kwargs, inputs.shape[-1])
    if config["alg"] not in CONFIDENCES:
        raise ValueError(f"alg must be one of {', '.join(CONFIDENCES)}; got {config['alg']!r}")
    if (config["alg_temp"] or 0.0) < 0:
        raise ValueError(f"alg_temp must not be negative, got {config['alg_temp']}")
    pad_id, copies = config["pad_token_id"], config["num_return_sequences"]
    if attention_mask is None and pad_id is not None and bool((inputs == pad_id).any()):
        warnings.warn("the input holds padding and no attention_mask is given: rows will see their padding")
    if copies > 1:
        inputs = inputs.repeat_interleave(copies, dim=0)
        attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(copies, dim=0)

    x = torch.nn.functional.pad(inputs, (0, config["max_length"] - inputs.shape[1]), value=config["mask_token_id"])
    mask, places = _visible(attention_mask, x.shape[1])
    step = _Step(config, seed, compat, x, places)
    if tokens_hook is not None:
        x = tokens_hook(None, x, None)
    else:  # nothing puts masks back, so that columns without any need not be read
        masks = (x == config["mask_token_id"]).any(0).nonzero()
        step.first = int(masks[0, 0]) if len(masks) else 0
    times = torch.linspace(1, config["eps"], config["steps"] + 1, device=x.device)
    history = [] if config["return_dict_in_generate"] and config["output_history"] else None
    for i in range(config["steps"]):
        logits, shift = model(x, mask, places).logits, True
        if tokens_hook is not None or logits_hook is not None:
            logits, shift = torch.cat([logits[:, :1], logits[:, :-1]], dim=1), False
        if logits_hook is not None:
            logits = logits_hook(i, x, logits)
        share = 1 - times[i + 1] / times[i] if i < config["steps"] - 1 else None
        x = step(x, logits, shift, i, share)
        if tokens_hook is not None:
            x = tokens_hook(i, x, logits)
        if history is not None:
            history.append(x.clone())
    return DreamModelOutput(x, history) if config["return_dict_in_generate"] else x


class DreamGenerationMixin:
    """A model with this among its bases has :func:`diffusion_generate` as a method."""

    diffusion_generate = diffusion_generate


class _Step:
    """One step of the loop: (tokens, logits) to tokens; there are masks at columns from ``first`` on only."""

    first = 0

    def __init__(self, config: dict, seed, compat: bool, x: Tensor, places: Tensor | None):
        self.alg, self.alg_temp, self.mask_id = config["alg"], config["alg_temp"] or 0.0, config["mask_token_id"]
        self.filters = {name: config[name] for name in ("temperature", "top_p", "top_k")}
        self.compat = compat
        self.seed = None if seed is None else checked_seed(seed, len(x), x.device)
        if compat and seed is not None:
            raise ValueError("seed and compat exclude each other: the published code draws with torch's generator")
        sample = torch.arange(len(x), device=x.device)[:, None]
        if isinstance(self.seed, Tensor) and self.seed.dim():
            sample = torch.zeros_like(sample)
        self.ids = sample << 32 | (torch.arange(x.shape[1], device=x.device) if places is None else places)

    def __call__(self, x: Tensor, logits: Tensor, shift: bool, i: int, share: Tensor | None) -> Tensor:
        """``share`` of the masks is unmasked; all if None."""
        masked = x == self.mask_id
        if self.alg == "origin":
            chosen = self.some(masked, i, share)
            tokens, _ = self.draw(logits, shift, chosen, i)
            return torch.where(chosen, tokens, x)
        tokens, confidence = self.draw(logits, shift, masked, i)
        if self.compat:
            return self.published(x, tokens, confidence, masked, share)
        left = masked.sum(1)
        n = left if share is None else (left * share).long()
        if self.alg_temp > 0 and self.seed is None:
            # The race of torch.multinomial: probabilities over exponential draws, the largest first.
            p = torch.where(masked, confidence / self.alg_temp, -torch.inf).softmax(-1)
            confidence = p / torch.empty_like(p).exponential_(1)
            chosen = select_transfer(confidence, masked, n)
        elif self.alg_temp > 0:
            chosen = select_transfer(confidence, masked, n, temperature=self.alg_temp, seed=self.seed, stream=i)
        else:
            chosen = select_transfer(confidence, masked, n)
        return torch.where(chosen, tokens, x)

    def some(self, masked: Tensor, i: int, share: Tensor | None) -> Tensor:
        """Each masked position with probability ``share``."""
        limit = 1 if share is None else share
        if self.seed is not None:
            return masked & (uniforms(self.seed, self.ids, i) < limit)
        chosen = masked.clone()
        chosen[masked] = torch.rand(int(masked.sum()), device=masked.device) < limit
        return chosen

    def draw(self, logits: Tensor, shift: bool, where: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(tokens, confidence) [B, L] at the positions of ``where``."""
        kind = CONFIDENCES[self.alg]
        if _fused(logits, self.filters["temperature"], self.seed, self.compat):
            drawing = {} if self.seed is None else dict(seed=self.seed, stream=i)
            options = {**_draw_options(**self.filters), **drawing}
            first, last = self.first, where.shape[1]
            columns = where[:, first:], self.ids[:, first:]
            found = Output(logits, shift=shift).sample(first, last, *columns, confidence=kind, **options)
            whole = (None if t is None else torch.nn.functional.pad(t, (first, 0)) for t in found[:2])
            return tuple(whole)
        if self.seed is not None:
            raise TypeError(f"seed= needs dense logits in float32, bfloat16 or float16; got {logits.dtype}")
        rows, columns = where.nonzero(as_tuple=True)
        asked = dict(margin_confidence=kind == "margin", neg_entropy=kind == "entropy", compat=self.compat)
        picked = logits[rows, (columns - 1).clamp_min(0) if shift else columns]
        confidence, tokens = sample_tokens(picked, **self.filters, **asked)
        spread = torch.full(where.shape, -torch.inf, dtype=confidence.dtype, device=where.device)
        return torch.zeros_like(self.ids).masked_scatter(where, tokens), spread.masked_scatter(where, confidence)

    def published(self, x: Tensor, tokens: Tensor, confidence: Tensor, masked: Tensor, share: Tensor | None) -> Tensor:
        """The published choice: as many for every row, and the mask where a row has no more masks to give."""
        mean = masked.sum() / len(x)
        n = int(mean) if share is None else int(mean * share)
        if n <= 0:
            return x
        if self.alg_temp > 0:
            chosen = torch.multinomial((confidence / self.alg_temp).softmax(-1), n)
        else:
            chosen = confidence.topk(n).indices
        return x.scatter(1, chosen, torch.where(masked, tokens, self.mask_id).gather(1, chosen))


def _fused(logits: Tensor, temperature: float, seed, compat: bool) -> bool:
    dense = logits.dtype in LOGIT_DTYPES and logits.layout is torch.strided and logits.dim() > 1
    return dense and not compat and (temperature <= 0 or seed is not None)


def _draw_options(temperature: float, top_p: float | None, top_k: int | None) -> dict:
    """Options of :func:`genfast.sample_tokens`, which knows no ``top_p`` of 0 and below: the largest alone, as here."""
    top_p = None if top_p is None or top_p >= 1 else max(top_p, 1e-15)
    return dict(temperature=max(temperature, 0.0), top_p=top_p, top_k=top_k)


def _visible(attention_mask: Tensor | None, length: int) -> tuple[Tensor | str, Tensor | None]:
    """(mask, places) as the model takes them: padding neither sees nor is seen."""
    if attention_mask is None or not bool((attention_mask == 0).any()):
        return "full", None
    real = torch.nn.functional.pad(attention_mask, (0, length - attention_mask.shape[1]), value=1)
    places = (real.long().cumsum(-1) - 1).masked_fill(real == 0, 1)
    real = real != 0
    return real[:, None, None, :] & real[:, None, :, None], places


def _configured(model, generation_config, given: dict, prompt: int) -> dict:
    unknown = sorted(given.keys() - DEFAULTS)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(unknown)}; known are {', '.join(DEFAULTS)} and the hooks")
    config = {name: given.get(name, getattr(generation_config, name, value)) for name, value in DEFAULTS.items()}
    for name in ("mask_token_id", "pad_token_id"):
        for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            if config[name] is None:
                config[name] = getattr(source, name, None)
    if config["mask_token_id"] is None:
        raise ValueError("mask_token_id must be given, or be an attribute of the model's config")
    if config["max_new_tokens"] is not None:
        config["max_length"] = prompt + config["max_new_tokens"]
    elif given.get("max_length") is None and config["max_length"] == DEFAULTS["max_length"]:
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        config["max_length"] = min(prompt + config["max_length"], float("inf") if most is None else most)
        warnings.warn(f"neither max_new_tokens nor max_length is given: generating up to {config['max_length']} tokens")
    if prompt >= config["max_length"]:
        raise ValueError(f"the input has {prompt} tokens and max_length is {config['max_length']}: no room is left")
    return config
