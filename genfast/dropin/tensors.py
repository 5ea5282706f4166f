"""What every drop-in asks of its tensors before it calls a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops.sampler_step import FLOATS


def plain(*tensors) -> bool:
    """Whether the kernels take these tensors as they are: dense floating tensors of one shape and device, no gradient
    asked of any. If not, the step is the peer's arithmetic."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.device.type not in ("cpu", "cuda"):
        return False
    shape, device = first.shape, first.device
    grad = torch.is_grad_enabled()
    for t in tensors:
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
        if t.dtype not in FLOATS or t.shape != shape or t.device != device or t.layout is not torch.strided:
            return False
        if (grad and t.requires_grad) or torch._C._functorch.is_functorch_wrapped_tensor(t):
            return False
    return True


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of eager arithmetic on these tensors with 0-d coefficients."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype
