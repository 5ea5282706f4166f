"""Keys and values of what is already decided, in Hugging Face's protocol, and block-causal attention over them.

A cache is an object that grows in place and has ``crop(length)`` (``DynamicCache``), or a tuple with keys and values
[B, heads, L, d] per layer, which a model answers anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfast.samplers.text.layout import Layout
from genfast.samplers.text.output import Output
from genfast.samplers.text.run import Run


def cropped(cache, length: int):
    """The first ``length`` positions of a cache; an object is cropped in place."""
    if hasattr(cache, "crop"):
        cache.crop(length)
        return cache
    return tuple(tuple(t[..., :length, :] for t in layer) for layer in cache)


def block_causal(layout: Layout, first: int, last: int, block_length: int) -> Tensor:
    """bool [B or 1, 1, last - first, last]: whether the query at a column may see the key at a column.

    A position sees its own block and those before it; B is 1 where no row has padding. Padding is seen only by padding,
    which sees something so that its softmax is defined. Padding must be a whole number of blocks.
    """
    columns = torch.arange(last, device=layout.x.device)
    block = columns // block_length
    allowed = (block[first:, None] >= block)[None, None]
    if layout.attention_mask is not None:
        real = columns >= layout.pad[:, None]
        allowed = allowed & (real[:, None, None, :] | ~real[:, None, first:, None])
    return allowed


def positions(layout: Layout, first: int, last: int) -> Tensor:
    """int64 [B, last - first]: places in the row, counted from its first token; 0 at padding."""
    columns = torch.arange(first, last, device=layout.x.device)
    return (columns - layout.pad[:, None]).clamp_min(0)


class Recomputed:
    """Logits of a block from a pass over everything up to its end.

    Args:
        form: what the model takes in place of :func:`block_causal`'s mask.
    """

    def __init__(self, run: Run, block_length: int, form: Callable[[Tensor], Tensor] = lambda mask: mask):
        self.run, self.block_length, self.form = run, block_length, form
        self._columns, self._options = None, {}

    def options(self, first: int, last: int) -> dict[str, Tensor]:
        """What the model is told about the columns [first, last); the steps of a block share it."""
        if self._columns != (first, last):
            layout, self._columns = self.run.layout, (first, last)
            mask = self.form(block_causal(layout, first, last, self.block_length))
            self._options = dict(attention_mask=mask, position_ids=positions(layout, first, last))
        return self._options

    def __call__(self, first: int, last: int) -> Output:
        output, _ = self.run.evaluate(self.run.x[:, :last], **self.options(0, last))
        return Output(output.logits[:, first:], first=first)


class Cached(Recomputed):
    """Logits of a block from a pass over it alone, given the cached keys and values of what is before it.

    What has been decided since the last pass goes into the cache together with the first pass over the next block; the
    keys and values of the block itself, which still changes, are dropped after every pass.
    """

    def __init__(self, run: Run, block_length: int, form: Callable[[Tensor], Tensor] = lambda mask: mask):
        super().__init__(run, block_length, form)
        self.cache, self.length = None, 0

    def __call__(self, first: int, last: int) -> Output:
        run, start = self.run, self.length
        output, answer = run.evaluate(
            run.x[:, start:last],
            first=start,
            **self.options(start, last),
            past_key_values=self.cache,
            use_cache=True,
        )
        grown = answer.past_key_values if hasattr(answer, "past_key_values") else answer[1]
        if grown is None:
            raise ValueError("the model returned no past_key_values: it keeps no cache; pass cache=False")
        if first == 0:
            self.cache = None
        elif first > start or hasattr(grown, "crop"):
            self.cache = cropped(grown, first)
        self.length = first
        return Output(output.logits[:, first - start :], first=first)
