"""Hugging Face transformers on :func:`genfast.attention`: ``attn_implementation="genfast"``.

::

    genfast.patch("transformers")
    model = AutoModel.from_pretrained(name, attn_implementation="genfast")
    model.set_attn_implementation("genfast")  # or so, for one that is there

The masks that a model asks transformers for (causal, bidirectional, sliding window, chunks, packed documents, padding
on either side, and their combinations) are made as an :class:`AttentionMask` once per call of the model: causal and
bidirectional ones from their lengths, any other by evaluating transformers' own mask function some rows at a time. A
caller's own mask, block causal say, is passed as a BlockMask, which models hand on as it is::

    model(ids, attention_mask=AttentionMask.block_causal(length, 32).to_block_mask())

or as a dense one [B, 1, Lq, Lk], bool or of 0 and the dtype's least number, which is read at its first layer.

On transformers' ``sdpa`` (``flex_attention`` for a BlockMask) runs what :mod:`genfast.dropin.attention` leaves to
PyTorch: masks of more than two runs per row, dropout in training, position biases, paged caches and float64. What
``sdpa`` does not compute (``softcap``, attention sinks) is refused; like it, this returns no attention weights. A
query that sees no key (padding before a causal text) has 0 here and under ``sdpa``, the mean of all values under
``eager``: what a model says at padding differs, and nothing else.

Under ``torch.compile`` and export, masks that depend on values (padding; packed documents, for which a decoder without
a cache is always searched) are dense, and run on PyTorch. A model that asks for a mask to compute with
(``allow_is_causal_skip=False``) is given a dense one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from genfast.attention_mask import AttentionMask
from genfast.dropin.attention import UNKNOWN, autocast, causal_mask, fits, of_block_mask, of_dense, takes
from genfast.ops.attention import attention

NAME = "genfast"
ROWS = 256
"""Of a mask function are evaluated at once."""


def register() -> tuple[str, ...]:
    """Make ``attn_implementation="genfast"`` known to transformers; what was added."""
    AttentionInterface.register(NAME, genfast_attention_forward)
    AttentionMaskInterface.register(NAME, genfast_mask)
    return (NAME,)


def unregister() -> None:
    """Forget it; models that still ask for it say that they do not know it."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)


class StructuredMask(BlockMask):
    """An AttentionMask in the clothes of a BlockMask, which is what transformers hands on without looking inside.

    Sliced as a dense mask [B, 1, Lq, Lk] would be, it is one.
    """

    def __init__(self, mask: AttentionMask):
        self.attention_mask = mask

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.attention_mask.batch, 1, self.attention_mask.q_len, self.attention_mask.kv_len)

    def __getitem__(self, index) -> Tensor:
        return self.to_dense()[index]

    def to_dense(self) -> Tensor:
        """bool [B, 1, Lq, Lk], made once for all layers."""
        return self._dense

    @functools.cached_property
    def _dense(self) -> Tensor:
        return self.attention_mask.to_dense()[:, None]

    def to(self, device) -> StructuredMask:
        mask = self.attention_mask.to(device)
        return self if mask is self.attention_mask else StructuredMask(mask)

    def contiguous(self) -> StructuredMask:
        """Itself: ``generate`` asks for it."""
        return self

    def __repr__(self) -> str:
        return f"StructuredMask({self.attention_mask!r})"

    __str__ = __repr__


# --- attention -------------------------------------------------------------------------------------------------------


def genfast_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """([B, Lq, H, D], None), as every function of transformers' ``AttentionInterface``.

    Args:
        query: [B, H, Lq, D]; key, value: [B, Hkv, Lk, D].
        attention_mask: of :func:`genfast_mask`, a BlockMask, a dense mask [B, 1, Lq, Lk], an :class:`AttentionMask`, or
            None: causal if ``is_causal`` (by default ``module.is_causal``) and there are several queries.

    Raises:
        ValueError: ``softcap`` or ``s_aux`` (attention sinks) is given.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f'attn_implementation="genfast" does not compute {name}; use "eager", or another that does'
            )
    mask = _structure(module, attention_mask, is_causal, query, key)
    own = kwargs.get("position_bias") is None and kwargs.get("cache") is None and dropout == 0
    q, k, v = autocast(query, key, value)
    if mask is not UNKNOWN and own and takes(q, k, v, True):
        out = attention(q, k, v, mask=mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
    if isinstance(attention_mask, StructuredMask):
        attention_mask = attention_mask.to(query.device).to_dense()
    elif isinstance(mask, AttentionMask) and not isinstance(attention_mask, (Tensor, type(None))):
        attention_mask = mask.to_dense()[:, None]
    if isinstance(attention_mask, BlockMask):  # of no structure that is known
        return flex_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _structure(module, given, is_causal: bool | None, q: Tensor, k: Tensor):
    """The AttentionMask, None where all keys are seen, UNKNOWN where there is neither."""
    if given is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal or q.shape[2] <= 1:
            return None
        return causal_mask(q.shape[2], k.shape[2], q.device)
    if isinstance(given, Tensor):
        return UNKNOWN if torch.compiler.is_compiling() or q.dim() != 4 else of_dense(given, q, k)
    mask = of_block_mask(given)
    if mask is UNKNOWN:
        return mask
    mask = mask.to(q.device)
    if not fits(mask, q, k):
        raise ValueError(f"attention_mask is {mask!r}; query is {list(q.shape)}, key {list(k.shape)}")
    return mask


# --- masks -----------------------------------------------------------------------------------------------------------


def genfast_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device="cpu",
    **kwargs,
) -> StructuredMask | Tensor:
    """A function of transformers' ``AttentionMaskInterface``: the mask as structure, or dense, [B, 1, Lq, Lk], bool.

    Args:
        mask_function: (batch, head, position of the query, position of the key) -> seen.
        attention_mask: bool [B, Lk], False at padding.
        allow_is_causal_skip, allow_is_bidirectional_skip: a mask that has to be there is a dense one.
    """
    wanted = (batch_size, q_length, kv_length)
    options = dict(
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, device=device,
    )  # fmt: skip
    causal = mask_function is masking_utils.causal_mask_function
    full = mask_function is masking_utils.bidirectional_mask_function
    to_compute_with = (causal and not allow_is_causal_skip) or (full and not allow_is_bidirectional_skip)
    # A tensor's values are not there while a graph is made of the model.
    traced = masking_utils.is_tracing(attention_mask) and not (attention_mask is None and (causal or full))
    if to_compute_with or traced:
        return masking_utils.sdpa_mask(*wanted, q_offset=q_offset, **options)
    try:
        if causal or full:
            mask = _from_lengths(causal, q_length, kv_length, q_offset, kv_offset, device)
            if attention_mask is not None:
                mask = mask & _from_padding(attention_mask, q_length, kv_length, kv_offset)
        else:
            mask = _from_function(wanted, q_offset, options)
    except ValueError:  # more than two runs of keys
        return masking_utils.sdpa_mask(*wanted, q_offset=q_offset, **options)
    return StructuredMask(mask)


def _from_lengths(causal: bool, q_length, kv_length, q_offset, kv_offset: int, device) -> AttentionMask:
    if not causal:
        return AttentionMask.full(q_length, kv_length, device=device)
    offset = q_offset - kv_offset
    if isinstance(offset, Tensor):
        offset = offset.reshape(1).to(device)
    return AttentionMask.causal(q_length, kv_length, q_offset=offset, device=device)


def _from_padding(padding: Tensor, q_length: int, kv_length: int, kv_offset: int) -> AttentionMask:
    padding = masking_utils.prepare_padding_mask(padding.bool(), kv_length, kv_offset)
    rows = AttentionMask.from_dense(padding[:, None, kv_offset : kv_offset + kv_length])
    return AttentionMask(rows.ranges.expand(-1, q_length, -1), kv_length, "padding")


def _from_function(wanted, q_offset, options) -> AttentionMask:
    batch, q_length, kv_length = wanted
    ranges = []
    for first in range(0, q_length, ROWS):
        count = min(ROWS, q_length - first)
        rows = masking_utils.sdpa_mask(batch, count, kv_length, q_offset=q_offset + first, **options)
        one = rows.stride(0) == 0  # nothing in it is a sequence's own
        ranges.append(AttentionMask.from_dense(rows[: 1 if one else None, 0]).ranges)
    return AttentionMask(torch.cat(ranges, 1), kv_length, "from a mask function")
