"""What is known of the gradients once they are reduced: their norm, whether they are finite, how to clip them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfast._registry import export


@export("distributed")
class Finished:
    """What ``finish()`` of a reducer returns. Its tensors are the same on every rank, to the bit.

    ``norm`` (float32 [], on the device) is the norm of all gradients, without the loss scale of a GradScaler;
    ``finite`` (bool []) whether all of them are; ``clip_coefficient`` (float32 []) is min(1, max_norm / (norm + 1e-6)).
    """

    def __init__(
        self, norm: Tensor, finite: Tensor, max_norm: float | None, scaled: bool,
        find_bad: Callable[[], dict[str, list[int]]],
    ):  # fmt: skip
        self.norm, self.finite = norm, finite
        self.clip_coefficient = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._scaled, self._find_bad, self._bad = scaled, find_bad, None

    def __repr__(self) -> str:
        return f"Finished(norm={self.norm}, finite={self.finite}, clip_coefficient={self.clip_coefficient})"

    def bad_parameters(self) -> dict[str, list[int]]:
        """Names of the parameters whose gradient is not finite, and the ranks on which it was not before the sum.

        It reads ``finite`` on the host, and if that is False the ranks tell each other: all of them must call it.
        """
        if self._bad is None:
            self._bad = {} if bool(self.finite) else self._find_bad()
        return self._bad

    def apply_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients of ``optimizer``, and let its next step do nothing if they are not finite.

        A fused optimizer does both itself while it steps. Otherwise the gradients are multiplied here and, if they are
        not finite, dropped, for which ``finite`` is read on the host. Under a GradScaler, call ``scaler.step`` as usual
        afterwards: it does the skipping.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale = self.clip_coefficient.reciprocal()
            optimizer.found_inf = (~self.finite).float()
            if not self._scaled:  # a GradScaler takes them away itself
                _forget_after_step(optimizer)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self._scaled and not bool(self.finite):
            for p in parameters:
                p.grad = None
        elif parameters:
            torch._foreach_mul_([p.grad for p in parameters], self.clip_coefficient)


def _forget_after_step(optimizer: torch.optim.Optimizer) -> None:
    def forget(*_):
        handle.remove()
        for name in ("grad_scale", "found_inf"):
            optimizer.__dict__.pop(name, None)

    handle = optimizer.register_step_post_hook(forget)
