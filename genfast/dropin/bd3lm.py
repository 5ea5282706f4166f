"""BD3-LM (Arriola et al. 2025, arXiv:2503.09573): the sampling methods of its ``Diffusion`` class, with fused steps.

The functions take the published object first, under the published names and in the published order of arguments, so
that they can stand in for its methods::

    from genfast.dropin import bd3lm
    Diffusion._semi_ar_sampler = bd3lm._semi_ar_sampler  # or, drawing in the kernels:
    Diffusion._semi_ar_sampler = functools.partialmethod(bd3lm._semi_ar_sampler, seed=torch.default_generator)

They use its ``backbone`` (with its own cache of keys and values: ``reset_kv_cache``, ``store_kv``), ``noise``,
``mask_index``, ``block_size``, ``_process_sigma``, ``_sigma_from_p``, ``forward`` (where the algorithm is not
``"bd3lm"``), ``config`` and ``tokenizer`` where the published ones do. A step is one kernel over the logits of the
block's masked positions, nucleus included, instead of float64 probabilities of all.

Random numbers come from ``torch.rand`` (float64), ``torch.randint`` and ``numpy.random`` in the published order, so
that a seeded run of one row gives the published tokens (but for ties within the rounding of float32); with ``seed=``
they are drawn inside the kernels, which is what makes a step cheap, and a row's tokens then do not depend on its batch.

Corrected, and back with ``compat=True``:

* Without first hitting the published steps are at N even times from 1 to 0, both included, with steps of 1/N: the last
  one divides by 0 and writes the first id of the vocabulary (of those that the nucleus leaves out) to whatever is still
  masked. Here they are at 1, 1 - 1/N, ..., 1/N, and the last one draws.
* With blocks of one token the published sampler gives up where it should end a text of variable length.
* ``torch.allclose`` misses a change by one of ids above 10^5, and keeps a stale p(x0).

Batches: first hitting is published for one row; here every row has its own time and position. A text of variable
length ends when all rows have ended, and what follows a row's end is filled with the end of sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genfast.dropin.sedd import sample_categorical as _sample_categorical
from genfast.dropin.subs import Prediction, logits_of, one_seed, published_noise, staying, step
from genfast.ops.token_transfer import select_transfer
from genfast.samplers.text.bd3lm import entropy
from genfast.samplers.text.transition import row_numbers

__all__ = [
    "Prediction",
    "_check_stop_conds",
    "_compute_entropy",
    "_ddpm_caching_update",
    "_nucleus_sample",
    "_sample_categorical",
    "_sample_prior",
    "_semi_ar_sampler",
]

WINDOW = 256
"""Tokens of which the entropy is taken, and with more of which a text may end."""
LEAST_ENTROPY = 4
"""Below this (nats) a text is degenerate."""


def _sample_prior(self, *batch_dims: int) -> Tensor:
    """Masks, int64."""
    return torch.full(batch_dims, self.mask_index, dtype=torch.int64, device=self.device)


def _nucleus_sample(self, p_x0: Tensor) -> Tensor:
    """Probabilities [B, L, V] whose last block keeps, of every row, the likeliest ids that add up to at most
    ``config.sampling.nucleus_p`` (the first always), scaled to 1; written in place, as published."""
    p = self.config.sampling.nucleus_p
    if p == 1.0:
        return p_x0
    block = p_x0[:, -self.block_size :]
    ordered, order = block.sort(dim=-1, descending=True)
    keep = ordered.cumsum(dim=-1) <= p
    keep[..., 0] = True
    block = torch.empty_like(block).scatter_(-1, order, ordered * keep)
    p_x0[:, -self.block_size :] = block / block.sum(-1, keepdim=True)
    return p_x0


def _logits(self, x: Tensor, sigma: Tensor, store_kv: bool = False) -> Tensor:
    """Logits, or log-probabilities, which serve as well."""
    options = dict(sample_mode=True, store_kv=store_kv)
    if self.parameterization != "subs" or self.config.algo.name != "bd3lm":
        return self.forward(x, sigma, **options)
    sigma = self._process_sigma(sigma)
    with torch.autocast(x.device.type, enabled=False):
        answer = self.backbone(x, sigma, **options)
    return answer if isinstance(answer, Tensor) else answer.logits if hasattr(answer, "logits") else answer[0]


def _chosen(masked: Tensor, seed, stream: int, offset: int) -> Tensor:
    """bool [B, n]: one masked position of every row that has any."""
    if seed is not None:
        scores = torch.zeros(masked.shape, device=masked.device)
        return select_transfer(scores, masked, 1, strategy="random", seed=seed, stream=stream, offset=offset)
    counts = masked.sum(-1).tolist()
    ranks = torch.cat([torch.randint(0, max(n, 1), (1,)) for n in counts]).to(masked.device)
    return masked & (masked.cumsum(-1) - 1 == ranks[:, None])


def _division_by_zero(self, x: Tensor, logits: Tensor, mask_prob: Tensor, randomness: dict) -> Tensor:
    """The published weights of a step whose mask_prob [B, 1] is not a probability: infinite, or 0 times that."""
    if "noise" not in randomness:
        raise ValueError("compat=True without first_hitting draws as published: leave out seed")
    p_x0 = _nucleus_sample(self, Prediction(logits, self.mask_index).probabilities(x, torch.float64))
    weights = p_x0 * (1 - mask_prob[:, None])
    weights[:, :, self.mask_index] = mask_prob
    exponential = 1e-10 - (randomness["noise"] + 1e-10).log()
    return torch.where(x == self.mask_index, (weights / exponential).argmax(-1), x)


@torch.no_grad()
def _ddpm_caching_update(
    self,
    x: Tensor,
    t: Tensor,
    dt: float,
    p_x0: Prediction | Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    compat: bool = False,
) -> tuple[Prediction | Tensor | None, Tensor]:
    """A step of the last block of x [B, L] from t [B, 1] to t - dt, or with ``config.sampling.first_hitting`` the
    unmasking of one of its positions: (p_x0, x), p_x0 None where x has changed.

    With ``config.sampling.kv_cache`` the backbone is called with the block alone, and once more to store it when it
    holds no mask.

    Args:
        p_x0: what an earlier call returned, of the block; probabilities [B, block_size, V] are taken as well.
        seed, stream, offset: of :func:`genfast.discrete_transition`.
        compat: see the module.
    """
    options, size = self.config.sampling, self.block_size
    chance_t, chance_s = self.noise(t)[1], self.noise(t - dt)[1]
    sigma = self._sigma_from_p(chance_t)
    block = x[:, -size:]
    if p_x0 is None:
        logits = _logits(self, block if options.kv_cache else x, sigma)
        p_x0 = Prediction(logits[:, -size:], self.mask_index)
    logits = logits_of(p_x0)
    # The published order of draws: tokens of all positions, in float64, then the position.
    randomness = dict(seed=seed, stream=stream, offset=offset)
    if seed is None:
        randomness = dict(noise=published_noise(logits, torch.float64))
    stay, active = staying(chance_t, chance_s), None
    if options.first_hitting:
        stay, active = 0.0, _chosen(block == self.mask_index, seed, stream, offset)
    if not options.first_hitting and compat and not bool((chance_t > 0).all() and (chance_s >= 0).all()):
        found = _division_by_zero(self, block, logits, chance_s / chance_t, randomness)
    else:
        nucleus = dict(top_p=float(options.nucleus_p), top_p_crossing=False)
        found = step(block, logits, stay, self.mask_index, randomness, active=active, **nucleus).x
    x_new = torch.cat((x[:, :-size], found), dim=-1)
    if options.kv_cache and not bool((found == self.mask_index).any()):
        _logits(self, found, sigma, store_kv=True)
    same = torch.allclose(x_new, x) if compat else torch.equal(x_new, x)
    return p_x0 if same else None, x_new


@torch.no_grad()
def _semi_ar_sampler(
    self,
    n_samples: int,
    num_steps: int,
    num_strides: int,
    seqlen: int,
    context_size: int = 1024,
    *,
    seed: int | Tensor | torch.Generator | None = None,
    offset: int = 0,
    compat: bool = False,
) -> tuple[Tensor | None, int | None]:
    """Block after block: (text [n_samples, up to num_strides * block_size], steps that changed something), or
    (None, None) where a text of fixed length is degenerate and has to be drawn again.

    The text begins with the tokenizer's begin-of-sequence token. ``config.sampling``: ``first_hitting``, ``nucleus_p``,
    ``kv_cache``, ``var_length``.

    Args:
        num_steps: of a block; with first hitting at least ``block_size``.
        seqlen: not used, as published.
        context_size: how many columns the model sees at most.
        seed, offset: draw inside the kernels. Of a generator a seed is drawn at every call.
        compat: see the module.
    """
    options, size, seed = self.config.sampling, self.block_size, one_seed(seed)
    # MDLM in this code base slides half a window of 1024.
    sliding = self.config.algo.name == "mdlm" and self.config.model.length > size
    new = 512 if sliding else size
    if sliding:
        num_strides = self.config.model.length // new - 1
    ones = torch.ones((n_samples, 1), dtype=self.dtype, device=self.device)
    if options.kv_cache:
        self.backbone.reset_kv_cache(eval_batch_size=self.config.loader.eval_batch_size)
    sampling_steps, dt = 0, 1 / num_steps
    times = torch.linspace(1, 0, num_steps) if compat else 1 - torch.arange(num_steps) / num_steps
    text = _sample_prior(self, n_samples, size)
    text[:, 0] = self.tokenizer.bos_token_id
    for stride in range(num_strides):
        if stride:
            text = torch.cat((text, _sample_prior(self, n_samples, new)), dim=1)
        last = (stride + 1) * size
        first = max(last - context_size, 0)
        if sliding and stride:
            first, last = new * stride, new * stride + size
        p_x0, time = None, 1.0
        for i in range(num_steps):
            window = text[:, first:last]
            left = (window == self.mask_index).sum(-1, keepdim=True)
            if not bool(left.any()):
                break
            stream = stride * num_steps + i
            t = times[i].to(self.device) * ones
            if options.first_hitting:
                time = time * _uniforms(n_samples, seed, stream, offset, self.device) ** (1 / left.clamp_min(1))
                t = time.to(ones.dtype)
            # The last step's must be t itself: a difference of roundings would leave a mask now and then.
            span = dt if compat or i < num_steps - 1 else float(times[i])
            randomness = dict(seed=seed, stream=stream, offset=offset)
            p_x0, found = _ddpm_caching_update(self, window, t, span, p_x0, **randomness, compat=compat)
            sampling_steps += p_x0 is None
            text[:, first:last] = found
        if text.shape[1] > WINDOW:
            stop, text = _check_stop_conds(self, text)
            gone = size == 1 and stride > 0 if compat else text.shape[1] <= 1
            if stop and (gone or not options.var_length):
                return None, None
            if stop:
                break
    return text, sampling_steps


def _uniforms(count: int, seed, stream: int, offset: int, device) -> Tensor:
    """[count, 1], float64: how far the time of the next unmasking is."""
    if seed is not None:
        return row_numbers(seed, count, offset, stream, device)[:, None]
    return torch.from_numpy(np.random.rand(count, 1)).to(device)


def _compute_entropy(self, x: Tensor) -> Tensor:
    """The entropy (nats) of the frequencies of all tokens of x."""
    return entropy(x.reshape(1, -1))[0].float()


def _check_stop_conds(self, x: Tensor) -> tuple[bool, Tensor]:
    """Whether a text [B, L] ends here, and the text: cut off, with ``config.sampling.var_length``.

    A row ends at its second end of sequence (published texts begin with one), or before its last 256 tokens where the
    entropy of these is below 4. A text ends when all its rows do; without ``var_length``, when a row is degenerate.
    """
    poor = entropy(x[:, -WINDOW:]) < LEAST_ENTROPY
    if not self.config.sampling.var_length:
        return bool(poor.any()), x
    length, eos = x.shape[1], self.tokenizer.eos_token_id
    places = torch.arange(length, device=x.device)
    second = (x == eos) & ((x == eos).cumsum(1) == 2)
    ends = torch.where(second, places + 1, length + 1).amin(1)
    # As published, low entropy decides where both hold.
    ends = torch.where(poor, length - WINDOW, ends)
    if bool((ends > length).any()):
        return False, x
    longest = int(ends.max())
    return True, torch.where(places[:longest] < ends[:, None], x[:, :longest], eos)
