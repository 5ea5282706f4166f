"""What the native calls that take tensors themselves must know of Python, told to a module once."""

from __future__ import annotations

import functools
from contextvars import ContextVar

import torch

from genfast.step_table import StepTable

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@functools.cache
def prepare(module, override: ContextVar) -> None:
    """``override`` holds the backend that was ordered, or None."""
    module.direct_setup(torch.Tensor, StepTable, torch.empty_like, override, [*DTYPE_CODES, torch.int64, torch.bool])
