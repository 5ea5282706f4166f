"""MDLM (Sahoo et al. 2024, arXiv:2406.07524): the sampling methods of its ``Diffusion`` class, with fused steps.

The functions take the published object first, under the published names and in the published order of arguments, so
that they can stand in for its methods::

    from genfast.dropin import mdlm
    Diffusion._sample = mdlm._sample  # or, drawing in the kernels:
    Diffusion._sample = functools.partialmethod(mdlm._sample, seed=torch.default_generator)

They use its ``backbone``, ``noise``, ``mask_index``, ``parameterization``, ``_process_sigma``, ``forward`` (where the
parameterisation is not ``"subs"``), ``time_conditioning``, ``sampler``, ``config`` and ``tokenizer`` where the
published ones do. A step with the SUBS parameterisation is one kernel over the backbone's logits at masked positions.

Random numbers come from ``torch.rand`` in the published order, so that a seeded run in float32 gives the published
tokens (but for ties within its rounding). With ``seed=`` they are drawn inside the kernel: that is what makes a step
cheap, a row's tokens then do not depend on its batch, and tokens with a share below 1e-8 are drawn as often as they
should be, which float32 noise cannot do.

One oddity is corrected, and comes back with ``compat=True``: the published loop takes a state for unchanged, and keeps
what the model said, where ``torch.allclose`` finds no difference. Of ids above 10^5 it misses a change by one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genfast.dropin.sedd import sample_categorical as _sample_categorical
from genfast.dropin.subs import (
    Prediction,
    likeliest,
    log_probabilities,
    logits_of,
    one_seed,
    published_noise,
    staying,
    step,
)
from genfast.ops.token_transition import Transition, discrete_transition

__all__ = [
    "Prediction",
    "_analytic_update",
    "_ddpm_caching_update",
    "_ddpm_update",
    "_denoiser_update",
    "_sample",
    "_sample_categorical",
    "_sample_prior",
    "_score_entropy",
    "_subs_parameterization",
    "nelbo_weight",
    "sample_subs_guidance",
]


def _subs_parameterization(self, logits: Tensor, xt: Tensor) -> Tensor:
    """log p(x0) [B, L, V] from logits: no mask, and certainty at positions that are not masked. New, not in place."""
    return log_probabilities(logits, xt, self.mask_index)


def _sample_prior(self, *batch_dims: int) -> Tensor:
    """Masks, int64."""
    return torch.full(batch_dims, self.mask_index, dtype=torch.int64)


def _logits(self, x: Tensor, sigma: Tensor) -> Tensor:
    """The backbone's logits: SUBS does not change the law of a masked position, and no other is read."""
    if self.parameterization != "subs":
        return self.forward(x, sigma)
    sigma = self._process_sigma(sigma)
    with torch.autocast(x.device.type, enabled=False):
        answer = self.backbone(x, sigma)
    return answer if isinstance(answer, Tensor) else answer.logits if hasattr(answer, "logits") else answer[0]


def _randomness(seed, stream: int, offset: int) -> dict | None:
    return None if seed is None else dict(seed=seed, stream=stream, offset=offset)


def _move(self, x: Tensor, p_x0, chance_t: Tensor, chance_s: Tensor, randomness: dict | None) -> Transition:
    if self.parameterization == "subs":
        return step(x, logits_of(p_x0), staying(chance_t, chance_s), self.mask_index, randomness)
    # Other parameterisations leave the mask a share of its own: the published arithmetic.
    if randomness is not None:
        raise ValueError(f"seed needs the parameterisation 'subs', not {self.parameterization!r}")
    p_x0 = logits_of(p_x0).exp() if isinstance(p_x0, Prediction) else p_x0
    weights = p_x0 * (chance_t - chance_s).reshape(-1, 1, 1)
    weights[:, :, self.mask_index] = chance_s.reshape(-1, 1)
    found = torch.where(x == self.mask_index, _sample_categorical(weights), x)
    return Transition(found, (found != x).any(1))


def _caching_step(self, x, t, dt, p_x0, randomness: dict | None):
    if self.config.noise.type != "loglinear":
        raise ValueError(f"the caching update needs loglinear noise, got {self.config.noise.type!r}")
    t = t.reshape(-1)
    if p_x0 is None:
        p_x0 = Prediction(_logits(self, x, self.noise(t)[0]), self.mask_index)
    return p_x0, _move(self, x, p_x0, t, t - dt, randomness)


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
) -> tuple[Prediction | Tensor, Tensor]:
    """A step from t ([B] or [B, 1]) to t - dt of the loglinear noise: (p_x0, x at t - dt).

    Args:
        p_x0: what an earlier call returned, for an x that has not changed since: the model is then not called.
            Probabilities [B, L, V] are taken as well.
        seed, stream, offset: of :func:`genfast.discrete_transition`.

    Raises:
        ValueError: another noise than loglinear.
    """
    p_x0, found = _caching_step(self, x, t, dt, p_x0, _randomness(seed, stream, offset))
    return p_x0, found.x


def _ddpm_update(
    self, x: Tensor, t: Tensor, dt: float, *, seed: int | Tensor | None = None, stream: int = 0, offset: int = 0
) -> Tensor:
    """A step from t ([B] or [B, 1]) to t - dt: x [B, L] at t - dt.

    Args:
        seed, stream, offset: of :func:`genfast.discrete_transition`.
    """
    sigma_t, sigma_s = (self.noise(time)[0].reshape(-1) for time in (t, t - dt))
    p_x0 = Prediction(_logits(self, x, sigma_t), self.mask_index)
    chance_t, chance_s = 1 - torch.exp(-sigma_t), 1 - torch.exp(-sigma_s)
    return _move(self, x, p_x0, chance_t, chance_s, _randomness(seed, stream, offset)).x


def _score_step(self, x: Tensor, log_score: Tensor, rule: str, amount: Tensor, randomness: dict | None) -> Tensor:
    """A step of a model of log scores."""
    if randomness is None:
        noise = published_noise(log_score)
        last = rule == "denoise" and self.mask_index == log_score.shape[-1] - 1
        randomness = dict(noise=noise[..., :-1] if last else noise)
    return discrete_transition(x, log_score, amount.reshape(-1), rule=rule, mask_id=self.mask_index, **randomness).x


def _analytic_update(
    self, x: Tensor, t: Tensor, step_size: float, *, seed: int | Tensor | None = None, stream: int = 0, offset: int = 0
) -> Tensor:
    """SEDD's analytic step from t to t - step_size. With SUBS it has the same law as :func:`_ddpm_update`."""
    sigma_t, sigma_s = (self.noise(time)[0] for time in (t, t - step_size))
    randomness = _randomness(seed, stream, offset)
    if self.parameterization != "subs":
        log_score = self.forward(x, sigma_t)
        return _score_step(self, x, log_score, "analytic", sigma_t - sigma_s, randomness)
    stay = staying(-torch.expm1(-sigma_t), -torch.expm1(-sigma_s))
    return step(x, _logits(self, x, sigma_t), stay, self.mask_index, randomness).x


def _denoiser_update(
    self, x: Tensor, t: Tensor, *, seed: int | Tensor | None = None, stream: int = 0, offset: int = 0
) -> Tensor:
    """SEDD's last step: a token for every mask."""
    sigma, randomness = self.noise(t)[0], _randomness(seed, stream, offset)
    if self.parameterization != "subs":
        return _score_step(self, x, self.forward(x, sigma), "denoise", sigma, randomness)
    return step(x, _logits(self, x, sigma), 0.0, self.mask_index, randomness).x


def _unchanged(compat: bool, x_next: Tensor, x: Tensor, changed: Tensor) -> bool:
    return torch.allclose(x_next, x) if compat else not bool(changed.any())


@torch.no_grad()
def _sample(
    self,
    num_steps: int | None = None,
    eps: float = 1e-5,
    *,
    seed: int | Tensor | torch.Generator | None = None,
    offset: int = 0,
    compat: bool = False,
) -> Tensor:
    """Text [B, L]: B is ``config.loader.eval_batch_size``, L ``config.model.length``, steps ``config.sampling.steps``.

    ``self.sampler`` is ``"ddpm"``, ``"ddpm_cache"`` or ``"analytic"``. With ``config.sampling.noise_removal`` what is
    still masked at ``eps`` takes its likeliest token (of ``"analytic"``, a draw).

    Args:
        seed, offset: draw inside the kernels; the step is the stream. Of a generator a seed is drawn at every call.
        compat: see the module.
    """
    batch, seed = self.config.loader.eval_batch_size, one_seed(seed)
    if self.parameterization == "ar":
        return self._ar_sampler(batch)
    steps = self.config.sampling.steps if num_steps is None else num_steps
    x = _sample_prior(self, batch, self.config.model.length).to(self.device)
    timesteps = torch.linspace(1, eps, steps + 1, device=self.device)
    dt = (1 - eps) / steps
    p_x0 = None
    for i in range(steps):
        t = timesteps[i] * torch.ones(batch, 1, device=self.device)
        randomness = dict(seed=seed, stream=i, offset=offset)
        if self.sampler == "ddpm":
            x = _ddpm_update(self, x, t, dt, **randomness)
        elif self.sampler == "ddpm_cache":
            p_x0, found = _caching_step(self, x, t, dt, p_x0, _randomness(**randomness))
            if self.time_conditioning or not _unchanged(compat, found.x, x, found.changed):
                p_x0 = None
            x = found.x
        else:
            x = _analytic_update(self, x, t, dt, **randomness)
    if self.config.sampling.noise_removal:
        t = timesteps[-1] * torch.ones(batch, 1, device=self.device)
        if self.sampler == "analytic":
            x = _denoiser_update(self, x, t, seed=seed, stream=steps, offset=offset)
        elif self.parameterization == "subs":
            x = likeliest(x, _logits(self, x, self.noise(t)[0]), self.mask_index)
        else:
            x = self.forward(x, self.noise(t)[0]).argmax(dim=-1)
    return x


@torch.no_grad()
def sample_subs_guidance(
    self,
    n_samples: int,
    stride_length: int,
    num_strides: int,
    dt: float = 0.001,
    *,
    seed: int | Tensor | torch.Generator | None = None,
    offset: int = 0,
    compat: bool = False,
):
    """Semi-autoregressive text: windows of ``config.model.length``, each ``stride_length`` columns past the last.

    Args:
        dt: the step; a window takes 1 / dt of them.
        seed, offset, compat: as for :func:`_sample`.

    Returns:
        (steps that changed something, the texts after every stride, decoded, and their lengths up to the first end
        of sequence), as published.
    """
    ones = torch.ones(n_samples, dtype=self.dtype, device=self.device)
    num_steps, sampling_steps, pieces, kept = int(1 / dt), 0, [], None
    seed = one_seed(seed)
    for stride in range(num_strides + 1):
        x = _sample_prior(self, n_samples, self.config.model.length).to(self.device)
        if kept is not None:
            x[:, :-stride_length] = kept
        p_x0 = None
        for i in range(num_steps + 1):
            randomness = _randomness(seed, stride * (num_steps + 1) + i, offset)
            p_x0, found = _caching_step(self, x, (1 - i * dt) * ones, dt, p_x0, randomness)
            if self.time_conditioning or not _unchanged(compat, found.x, x, found.changed):
                p_x0 = None
                sampling_steps += 1
            x = found.x
        if self.parameterization == "subs":
            x = likeliest(x, _logits(self, x, 0 * ones), self.mask_index)
        else:
            x = self.forward(x, 0 * ones).argmax(dim=-1)
        pieces.append(x[:, :stride_length].cpu().numpy())
        kept = x[:, stride_length:]
    pieces.append(kept.cpu().numpy())
    texts = [self.tokenizer.batch_decode(np.concatenate(pieces[:count], axis=1)) for count in range(2, len(pieces) + 1)]
    ended = (np.concatenate(pieces, axis=1)[:, 1:] == self.tokenizer.eos_token_id).cumsum(-1) > 0
    return sampling_steps, texts, (~ended).sum(-1)


# --- losses ----------------------------------------------------------------------------------------------------------


def nelbo_weight(sigma: Tensor, dsigma: Tensor) -> Tensor:
    """What -log p(x0) at masked positions is weighted with: dsigma / expm1(sigma), 1/t for loglinear noise with eps 0.

    The expected weighted sum bounds -log p(x0) of the text from above (continuous time).
    """
    return dsigma / torch.expm1(sigma)


def _score_entropy(self, log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
    """SEDD's loss on the absorbing graph, to be weighted with dsigma: [B, L], 0 where xt is not masked.

    It is 0 at the log scores log p(y) - log expm1(sigma) of a certain x0, and nowhere below.

    Args:
        log_score: [B, L, V].
        sigma: [B, 1].
        xt, x0: int64 [B, L], the masked text and the text.
    """
    masked = xt == self.mask_index
    ratio = (1 / torch.expm1(sigma)).expand_as(xt)[masked]
    rows = log_score[masked]
    scores = rows.exp()
    scores[:, self.mask_index] = 0
    negative = ratio * rows.gather(-1, x0[masked][..., None])[..., 0]
    found = scores.sum(dim=-1) - negative + ratio * (ratio.log() - 1)
    return torch.zeros(*xt.shape, device=xt.device).masked_scatter(masked, found.float())
