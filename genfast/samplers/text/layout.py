"""Prompts of different lengths in one batch: how rows lie in the tensor that a text sampler works on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """Rows of ``padding | prompt | room for what is generated``, so that the generated columns are those of every row.

    A row's positions are counted from its first real token, so that what a row draws does not depend on how much
    padding its neighbours ask for.

    Attributes:
        x: int64 [B, L], the start: the prompts, padding before them, the mask id after them.
        pad: int64 [B], how many columns of a row are padding.
        start: the first generated column; L - start of them.
        attention_mask: int64 [B, L], 0 at padding; None where there is none.
    """

    def __init__(
        self,
        prompt: Tensor | Sequence[Tensor] | int,
        length: int,
        *,
        mask_id: int,
        pad_id: int | None = None,
        prompt_lengths: Tensor | None = None,
        device: torch.device | str | None = None,
    ):
        """
        Args:
            prompt: int64 [B, P]; or a list of B one-dimensional tensors; or B, for no prompt at all.
            length: how many tokens to generate.
            mask_id, pad_id: ids of the mask token and of padding (by default the mask's; attention leaves it out).
            prompt_lengths: int64 [B]: of a tensor of prompts, how many of a row's first tokens are the prompt.
            device: where x lives, by default where the prompt does.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ValueError(f"the number of tokens to generate must be a whole number, got {length!r}")
        rows = _rows(prompt, prompt_lengths, device)
        device = device if device is not None else rows[0].device if rows else "cpu"
        longest = max((len(row) for row in rows), default=0)
        pads = [longest - len(row) for row in rows]
        self.x = torch.full((len(rows), longest + length), mask_id, dtype=torch.int64, device=device)
        for b, row in enumerate(rows):
            self.x[b, : pads[b]] = mask_id if pad_id is None else pad_id
            self.x[b, pads[b] : longest] = row
        self.start = longest
        self.pad = torch.tensor(pads, dtype=torch.int64, device=device)
        self.attention_mask = None
        if any(pads):
            self.attention_mask = (torch.arange(longest + length, device=device) >= self.pad[:, None]).to(torch.int64)

    def row_ids(self, columns: Tensor, offset: int, per_row_seed: bool) -> Tensor:
        """Identities [B, n] of the positions at ``columns`` [n]: ``row_ids`` of :func:`genfast.sample_tokens`."""
        sample = torch.arange(len(self.pad), device=self.pad.device) * (0 if per_row_seed else 1) + offset
        return (sample[:, None] << 32) | (columns - self.pad[:, None]).clamp_min(0)


def _rows(prompt, lengths, device) -> list[Tensor]:
    if lengths is not None and not isinstance(prompt, Tensor):
        raise ValueError("prompt_lengths goes with a tensor of prompts; a list says its lengths itself")
    if isinstance(prompt, int) and not isinstance(prompt, bool):
        if prompt < 0:
            raise ValueError(f"the number of rows must not be negative, got {prompt}")
        return [torch.empty(0, dtype=torch.int64, device=device or "cpu") for _ in range(prompt)]
    if isinstance(prompt, Tensor):
        if prompt.dtype != torch.int64 or prompt.dim() != 2:
            raise ValueError(f"prompt must be int64 [B, P], got {prompt.dtype} {list(prompt.shape)}")
        if lengths is None:
            return list(prompt)
        if not isinstance(lengths, Tensor) or lengths.shape != prompt.shape[:1] or lengths.is_floating_point():
            raise ValueError(f"prompt_lengths must be whole numbers [{prompt.shape[0]}]")
        counts = lengths.tolist()
        if any(not 0 <= n <= prompt.shape[1] for n in counts):
            raise ValueError(f"prompt_lengths must be between 0 and {prompt.shape[1]}, got {counts}")
        return [row[:n] for row, n in zip(prompt, counts)]
    rows = list(prompt)
    for row in rows:
        if not isinstance(row, Tensor) or row.dtype != torch.int64 or row.dim() != 1:
            raise TypeError("prompt must be int64 [B, P], a list of int64 tensors [P], or a number of rows")
    return rows
