"""Marshalling of ``vector_quantize`` to the native CPU modules."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import Tensor

from genfast.native.direct import DTYPE_CODES
from genfast.native.token_sampling import address

METRIC_CODES = {"l2": 0, "cosine": 1, "dot": 2}


@functools.cache
def bind(module, override: ContextVar) -> SimpleNamespace:
    """The ops of this part of the family over one native module."""
    return SimpleNamespace(
        nearest_code=functools.partial(_nearest_code, module), pack_codes=functools.partial(_pack_codes, module)
    )


def _codes(codebook: Tensor) -> tuple[int, int, int, int]:
    """[G, K, D], the numbers of a code adjacent."""
    return codebook.data_ptr(), DTYPE_CODES[codebook.dtype], codebook.stride(0), codebook.stride(1)


def _nearest_code(module, z, codebook, *, metric, exact, indices, distances, packed=None) -> None:
    if codebook.stride(-1) != 1:
        codebook = codebook.contiguous()
    module.nearest_code(
        (z.data_ptr(), DTYPE_CODES[z.dtype], *z.stride()),
        _codes(codebook),
        indices.data_ptr(),
        address(distances),
        sizes=(*z.shape, codebook.shape[1], indices.shape[-1]),
        metric=METRIC_CODES[metric],
        exact=exact,
        packed=address(packed),
    )


def _pack_codes(module, codebook: Tensor, metric: str) -> Tensor:
    """What ``nearest_code`` makes of contiguous codes [1, K, D] first, to pass with the same codes later."""
    _, count, size = codebook.shape
    packed = torch.empty(module.packed_floats(count, size), dtype=torch.float32)
    module.pack_codes(
        _codes(codebook), count=count, size=size, metric=METRIC_CODES[metric], packed=packed.data_ptr()
    )  # fmt: skip
    return packed
