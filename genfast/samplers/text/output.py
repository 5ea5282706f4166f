"""What a model answered for some columns of the batch: logits, or hidden states and the head that makes logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfast.ops.token_head import lm_head_sample
from genfast.ops.token_sampling import TokenSample, sample_tokens
from genfast.reference.token_sampling import guide


def call(model: Callable, ids: Tensor, **options) -> tuple[Tensor, object]:
    """(logits or hidden states [B, n, .], the whole answer) of a model that returns them as Hugging Face's do: the
    tensor itself, an object with ``logits`` or ``last_hidden_state``, or a tuple that begins with it."""
    answer = model(ids, **{name: value for name, value in options.items() if value is not None})
    found = answer
    if not isinstance(answer, Tensor):
        names = [name for name in ("logits", "last_hidden_state") if hasattr(answer, name)]
        found = getattr(answer, names[0]) if names else answer[0]
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != ids.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the model returned {shape} for ids {list(ids.shape)}; expected [B, L, V]")
    return found, answer


class Output:
    """Logits [B, n, V] of the columns [first, first + n), from which tokens are drawn at some of them.

    Args:
        logits: float32, bfloat16 or float16.
        first: the column of the batch that logits[:, 0] belong to.
        uncond, guidance: classifier-free guidance, see :func:`genfast.sample_tokens`.
        shift: the logits at position i - 1 are those of position i (Dream).
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        first: int = 0,
        uncond: Tensor | None = None,
        guidance: float | None = None,
        shift: bool = False,
    ):
        self.logits, self.first, self.uncond, self.guidance, self.shift = logits, first, uncond, guidance, shift

    def sample(self, first: int, last: int, where: Tensor | None, ids: Tensor, **options) -> TokenSample:
        """Tokens at columns [first, last): [B, last - first], of which only those of ``where`` mean something.

        Args:
            where: bool [B, last - first], the positions that are needed; None for all. On a CPU no other is read; on
                a GPU all are, because finding out how many there are would make the host wait.
            ids: [B, last - first], the positions' identities (:meth:`Layout.row_ids`).
            options: of :func:`genfast.sample_tokens`.
        """
        batch, columns = self.logits.shape[:2]
        if not self.first <= first <= last <= self.first + columns:
            raise ValueError(f"columns {first} to {last} are not among {self.first} to {self.first + columns}")
        shape = (batch, last - first)
        picked = rows = None
        if where is not None and ids.device.type == "cpu":
            rows = picked = where.reshape(-1).nonzero()[:, 0]
            ids = ids.reshape(-1)[picked]
        if picked is None or shape[1] != columns:
            places = torch.arange(first - self.first, last - self.first, device=ids.device)
            rows = (places + columns * torch.arange(batch, device=ids.device)[:, None]).reshape(-1)
            rows = rows if picked is None else rows[picked]
        seeded = options.get("generator") is None and options.get("noise") is None
        found = self.draw(rows, row_ids=ids.reshape(-1) if seeded else None, **options)

        def spread(values):
            if values is None:
                return None
            if picked is not None:
                values = values.new_zeros(shape[0] * shape[1]).index_copy_(0, picked, values)
            return values.reshape(shape)

        return TokenSample(*map(spread, found))

    def draw(self, rows: Tensor, **options) -> TokenSample:
        """:func:`genfast.sample_tokens` at the rows of logits flattened to [B n, V]."""
        return sample_tokens(
            self.logits, uncond=self.uncond, guidance=self.guidance, shift=self.shift, rows=rows, **options
        )

    def guided(self, guidance: float) -> Output:
        """The first half of the batch, guided by its second half, which is without the condition."""
        cond, uncond = self.logits.chunk(2)
        return Output(cond, first=self.first, uncond=uncond, guidance=guidance, shift=self.shift)


class HeadOutput(Output):
    """Hidden states [B, n, d] and the head that makes logits of them: only the positions that are needed are projected.

    Args:
        hidden: the last hidden states after the final norm, in the dtype of the head.
        head: the weight [V, d], or (weight, bias [V]).
        first, shift: as for :class:`Output`.
    """

    def __init__(
        self, hidden: Tensor, head: Tensor | tuple[Tensor, Tensor | None], *, first: int = 0, shift: bool = False
    ):
        super().__init__(hidden, first=first, shift=shift)
        self.head = head

    def draw(self, rows: Tensor, **options) -> TokenSample:
        """:func:`genfast.lm_head_sample` at the rows of hidden states flattened to [B n, d]."""
        if self.shift:
            rows = torch.where(rows % self.logits.shape[1] > 0, rows - 1, rows)
        weight, bias = self.head if isinstance(self.head, tuple) else (self.head, None)
        return lm_head_sample(self.logits, weight, bias=bias, rows=rows, **options)

    def guided(self, guidance: float) -> HeadOutput:
        """As of logits, because a head is linear; the states are rounded to their dtype afterwards."""
        cond, uncond = self.logits.chunk(2)
        hidden = guide(cond.float(), uncond.float(), guidance).to(cond.dtype)
        return HeadOutput(hidden, self.head, first=self.first, shift=self.shift)
