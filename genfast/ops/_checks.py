"""Checks that several ops share. Each names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.random import signed64

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_TEMPERATURE = 1e30


def check_counters(stream: int, offset: int) -> None:
    if not -(2**31) <= stream < 2**32 or not 0 <= offset < 2**32:
        raise ValueError(f"stream and offset are 32-bit counters; got stream={stream}, offset={offset}")


def fresh_seed() -> int:
    return int(torch.randint(-(2**63), 2**63 - 1, ()))


def check_logits(name: str, t) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in LOGIT_DTYPES or t.layout is not torch.strided:
        raise TypeError(f"{name} must be dense float32, bfloat16 or float16; got {t.dtype}, {t.layout}")


def indices(name: str, t, count: int, device) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.dim() != 1:
        raise TypeError(f"{name} must be an int64 tensor of one dimension")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}; expected {device}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name} is out of range: {low} to {high} for {count} rows")
    return t.contiguous()


def joined(ids, extra: int):
    if isinstance(ids, Tensor):
        return torch.cat([ids.reshape(-1), ids.new_full((1,), extra)])
    return [*ids, extra]


def id_list(name: str, ids, size: int, device) -> Tensor | None:
    """Sorted int64 ids on the device, or None."""
    if ids is None:
        return None
    if isinstance(ids, Tensor):
        if ids.dtype != torch.int64 or ids.device != device:
            raise TypeError(f"{name} must be int64 on {device}, or a list; got {ids.dtype} on {ids.device}")
        ids = ids.reshape(-1)
        if device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            _check_ids(name, int(ids.min()), int(ids.max()), size)
        return ids.sort().values if ids.numel() else None
    ids = sorted(int(i) for i in ids)
    if not ids:
        return None
    _check_ids(name, ids[0], ids[-1], size)
    return _id_tensor(tuple(ids), device)


_id_tensors: dict = {}


def _id_tensor(ids: tuple[int, ...], device) -> Tensor:
    """Made once for a list and a device: on a GPU the copy would make the host wait for all that it has ordered."""
    found = None if torch.compiler.is_compiling() else _id_tensors.get((ids, device))
    if found is None:
        found = torch.tensor(ids, device=device)
        if not torch.compiler.is_compiling():
            if len(_id_tensors) >= 256:
                _id_tensors.clear()
            _id_tensors[ids, device] = found
    return found


def _check_ids(name: str, low: int, high: int, size: int) -> None:
    if low < 0 or high >= size:
        raise ValueError(f"{name} is out of range: {low} to {high} for {size} entries")


def uniform(shape, generator, device, dtype=torch.float64) -> Tensor:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    where = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=where, dtype=dtype).to(device)


def checked_seed(seed, batch: int, device):
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got {seed.dtype}")
        if seed.dim() > 1 or (seed.dim() == 1 and seed.shape[0] != batch):
            raise ValueError(f"seed has shape {list(seed.shape)}; expected a 0-d tensor or [{batch}]")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}; expected {device}")
        return seed.contiguous()
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return signed64(seed)


def dense_rows(t: Tensor) -> Tensor:
    """[B, L] whose rows are runs of neighbours; a copy only where strides leave no other way."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def row_numbers(name: str, value, batch: int, device):
    """A whole number, or int64 [B] on the device."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be whole numbers, got {value.dtype}")
        if value.dim() > 1 or value.numel() not in (1, batch) or value.device != device:
            raise ValueError(f"{name} is {list(value.shape)} on {value.device}; expected [{batch}] on {device}")
        return value.to(torch.int64).expand(batch).contiguous()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number or a tensor of them, got {type(value).__name__}")
    return value


def sequences(t: Tensor) -> Tensor:
    """[B, L, n] whose rows are runs of neighbours; a copy only where strides leave no other way."""
    if t.dim() < 3:
        t = t.reshape(-1, 1, t.shape[-1])
    elif t.dim() > 3:
        t = t.reshape(-1, *t.shape[-2:])
    t = t.detach()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def checked_temperature(temperature, rows: int, device):
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise TypeError(f"temperature must be a float or a floating tensor, got {temperature.dtype}")
        if temperature.numel() not in (1, rows) or temperature.device != device:
            raise ValueError(
                f"temperature is {list(temperature.shape)} on {temperature.device}; expected {rows} rows on {device}"
            )
        return temperature.detach().reshape(-1).expand(rows).contiguous()
    temperature = float(temperature)
    if not 0 <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(f"temperature must be in [0, {LARGEST_TEMPERATURE:g}], got {temperature}")
    return temperature
