"""Reflow: the pairs of noise and sample that a rectified flow is trained on again (Liu et al. 2023, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from genfast._registry import export
from genfast.samplers.sampler import Sampler


@export("samplers")
def reflow_pairs(
    sampler: Sampler,
    model: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    batches: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    **options,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (noise, sample) of a trained flow: a straighter flow is trained on them, x_t = (1 - t) sample + t noise.

    Args:
        sampler: a sampler that draws no noise, so that the sample is a function of the noise.
        model: as for calling the sampler.
        shape: [B, ...] of a batch.
        batches: how many; batch k holds samples k B .. (k + 1) B - 1 of ``seed``, whatever B is.
        seed, device: of the noise.
        options: further options of the sampler's call.

    Yields:
        The noise and the sample, both [B, ...] float32, made as they are asked for.

    Raises:
        ValueError: a sampler that draws noise as it goes.
    """
    if sampler.stochastic:
        raise ValueError(f"{sampler!r} draws noise at its steps: its samples are not a function of the starting noise")
    for k in range(batches):
        noise = sampler.initial_noise(shape, seed=seed, offset=k * shape[0], device=device)
        yield noise, sampler(model, noise, **options)
