"""The public op ``sampler_step`` (and ``randn``, its noise alone): checks, choice of backend, torch.library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import HotPath, choose
from genfast.ops._checks import check_counters, checked_seed
from genfast.reference.sampler_step import sampler_step as reference_step
from genfast.step_table import StepTable

FAMILY = "sampler_step"
hot_path = HotPath(FAMILY, "sampler_step")
plain_path = HotPath(FAMILY, "plain_step")
"""``plain_path.run(table, row, clip, *inputs)``: the step that a scheduler takes hundreds of times, inputs of one dtype
and a row without noise; NotImplemented for anything else, and :func:`sampler_step` then."""
object_path = HotPath(FAMILY, "plain_object")
"""``object_path.run((cls, *names), table, row, clip, *inputs)``: the same, with the outputs as items and attributes of
a new object of ``cls``, which is derived from OrderedDict."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@export(FAMILY)
def sampler_step(
    inputs: Sequence[Tensor],
    table: StepTable | Tensor | Sequence[float],
    *,
    step: int | Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: float | Tensor | None = None,
    guidance_rescale: float = 0.0,
    clip: float | tuple[float, float] | None = None,
    threshold: tuple[float, float] | None = None,
    log_variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    second_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One fused step of any diffusion or flow sampler that is linear in its inputs.

    Computes, in one pass over memory, for every sample of the batch::

        x_1   <- uncond + guidance (x_1 - uncond), rescaled               if uncond is given
        x0     = to_x0[0] x_0 + to_x0[1] x_1, clipped or thresholded      if the table has x0
        out    = sum_i c_i x_i + c_x0 x0 + c_noise s z
        second = sum_i d_i x_i + d_x0 x0 + d_noise s z                    if the table has a second output

    where x_0 is the state, x_1 the model's output, the others are history, z is standard normal noise and every
    coefficient comes from a row of ``table`` (see :class:`genfast.StepTable`).

    Args:
        inputs: 1 to 8 tensors of one shape [B, ...] (any strides; a 0-d tensor is one sample), float32, bfloat16,
            float16 or float64, dtypes may differ.
        table: a :class:`StepTable`, or plain coefficients [n], [rows, n], with one more column for the noise if the
            step has noise.
        step: the row of the table: an int (checked), or an int32/int64 tensor, 0-d or [B], on the inputs' device. A CPU
            tensor is checked; on CUDA a check would synchronise, so a sample whose row is out of range becomes NaN.
            Without ``step`` the table has 1 row, or B rows, one per sample.
        uncond: the model's output without the condition, same shape; ``inputs[1]`` is then the conditional output.
        guidance: scale of classifier-free guidance, a float or a tensor, 0-d or [B].
        guidance_rescale: in [0, 1]: how far the guided output's per-sample standard deviation is moved back to that of
            the conditional output (Lin et al. 2023).
        clip: clamp x0 to [-clip, clip] or (low, high).
        threshold: ``(ratio, maximum)``: dynamic thresholding of x0 (Saharia et al. 2022): clip to the exact quantile of
            |x0| per sample, kept within [1, maximum], and divide by it.
        log_variance: elementwise input of the table's ``log_std``: the learned-range variance of improved DDPM.
        noise: the noise itself, same shape.
        generator: draw the noise with ``torch.randn`` in the dtype of the first input (on the generator's device).
            With neither ``noise``, ``generator`` nor ``seed``, a table with noise uses torch's default generator. No
            draw is made on a row (given as an int) whose noise weight is 0.
        seed: draw the noise inside the kernel with Philox (see :mod:`genfast.random`): the same numbers on every
            backend. An int, or an int64 tensor on the inputs' device: 0-d, or [B] with one seed per sample, each
            sample then being the same in whatever batch it stands.
        stream, offset: position in the random sequence: draws of one sample are told apart by ``stream + step``, and
            row b of the batch is sample ``offset + b``, so that two half batches give what the whole batch gives.
        dtype: of the result, by default that of the first input.
        out, second_out: write into these tensors (shape of the inputs; ``out`` may be one of the inputs).

    Returns:
        ``out``, or ``(out, second)`` if the table has a second output. Arithmetic is float32, or float64 if an input
        is.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, coefficients that are not finite,
            a step out of range, overlapping outputs; nothing has been written then.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Differentiable in ``inputs``, ``uncond``, ``noise`` and ``log_variance`` (the backward pass runs the reference).

    Source: the samplers' papers; the linear form is derived in ``genfast/samplers/table.py``.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        # One native call for the plain case; everything else, and every error, goes through the checks below.
        result = hot_path.run(
            inputs,
            table,
            step,
            uncond,
            guidance,
            guidance_rescale,
            clip,
            threshold,
            log_variance,
            noise,
            generator,
            seed,
            stream,
            offset,
            dtype,
            out,
            second_out,
        )
        if result is not NotImplemented:
            return result

    inputs = _checked_inputs(inputs, out)
    like = inputs[0] if inputs else out
    batch = like.shape[0] if like.dim() else 1
    device = like.device

    has_noise_source = noise is not None or generator is not None or seed is not None
    if not isinstance(table, StepTable):
        table = _plain_table(table, len(inputs), has_noise_source)
    if table.inputs != len(inputs):
        raise ValueError(f"inputs has {len(inputs)} tensors, but the table has coefficients for {table.inputs}")
    if table.data.device != device:
        raise ValueError(
            f"table is on {table.data.device}, inputs on {device}; move it once with table.to({str(device)!r})"
        )
    step = _checked_step(step, table.rows, batch, device, compiling)

    if uncond is None:
        if guidance is not None:
            raise ValueError("guidance is given without uncond: there is nothing to guide away from")
        if guidance_rescale != 0.0:
            raise ValueError("guidance_rescale is given without uncond")
        guidance = 1.0
    else:
        if len(inputs) < 2:
            raise ValueError("uncond needs inputs[1], the conditional model output; there is only one input")
        _check_like("uncond", uncond, like)
        if guidance is None:
            raise ValueError("uncond is given without guidance, the guidance scale")
        guidance = _checked_guidance(guidance, batch, device)
        if not 0.0 <= guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
    clip, threshold = _checked_limits(clip, threshold, table)

    if (log_variance is not None) != table.has_log_std:
        a, b = (
            ("a table with log_std", "no log_variance")
            if table.has_log_std
            else ("log_variance", "no log_std in the table")
        )
        raise ValueError(f"there is {a} but {b}")
    if log_variance is not None:
        _check_like("log_variance", log_variance, like)

    if sum(source is not None for source in (noise, generator, seed)) > 1:
        raise ValueError("noise, generator and seed exclude each other: give one source of noise")
    if has_noise_source and not table.has_noise:
        raise ValueError("a source of noise is given, but the table has no noise weights")
    if noise is not None:
        _check_like("noise", noise, like)
    elif seed is not None:
        seed = checked_seed(seed, batch, device)
        check_counters(stream, offset)
    elif table.has_noise and _row_is_noisy(table, step):
        noise = _draw(like, generator)
    dtype = _checked_dtype(dtype, out, like)

    options = dict(
        step=step,
        uncond=uncond,
        guidance=guidance,
        guidance_rescale=float(guidance_rescale),
        clip=clip,
        threshold=threshold,
        log_variance=log_variance if noise is not None or seed is not None else None,
        noise=noise,
        seed=seed,
        stream=stream,
        offset=offset,
    )
    # A lazily negated view (the imaginary part of a conjugate) would be read without its sign.
    options.update({k: v.resolve_neg() for k, v in options.items() if isinstance(v, Tensor) and v.is_neg()})
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*inputs, uncond, log_variance, noise)
    )
    if (out is not None or second_out is not None) and needs_grad:
        raise ValueError("out and second_out do not support gradients; call without them, or under torch.no_grad()")
    if second_out is not None and not table.has_second:
        raise ValueError("second_out is given, but the table has no second output")
    for name, tensor in (("out", out), ("second_out", second_out)):
        if tensor is not None:
            _check_output(name, tensor, like)

    if compiling or needs_grad:
        results = _custom_op(*_flat_arguments(inputs, table, dtype, options, like))
        results = [r if o is None else o.copy_(r) for r, o in zip(results, (out, second_out))]
        return tuple(results) if table.has_second else results[0]

    readers = [*inputs, *(t for t in (uncond, log_variance, noise) if t is not None)]
    staged = [out is not None and _needs_staging("out", out, readers), False]
    if second_out is not None:
        staged[1] = _needs_staging("second_out", second_out, readers)
        if out is not None:
            staged[1] |= _needs_staging("second_out", second_out, [out], same_allowed=False)
    outputs = [out, second_out]
    for k, target in enumerate(outputs[: 1 + table.has_second]):
        if target is None or staged[k]:
            outputs[k] = torch.empty_like(like, dtype=dtype if target is None else target.dtype)
    _run(inputs, table, options, outputs[0], outputs[1])
    if table._host is None:
        table.describe_to_host()
    if staged[0]:
        outputs[0] = out.copy_(outputs[0])
    if staged[1]:
        outputs[1] = second_out.copy_(outputs[1])
    return (outputs[0], outputs[1]) if table.has_second else outputs[0]


@export(FAMILY)
def randn(
    *shape: int,
    seed: int | Tensor,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise [B, ...] from Philox: the draws that ``sampler_step(..., seed=seed)`` makes in its kernel.

    Args:
        shape: the sizes, the first being the batch.
        seed, stream, offset: as in :func:`sampler_step`: the same numbers on every backend, for any number of threads,
            and for a batch drawn whole or in parts (part two with ``offset`` = the size of part one).
        dtype: float32, bfloat16, float16 or float64 (float32 draws, converted).
        device: where to draw (the seed's device if it is a tensor, else the CPU).
        out: write into this tensor instead; ``shape`` and ``dtype`` are then its own.

    Raises:
        TypeError, ValueError: a seed, shape or dtype of the wrong kind.
    """
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    if out is None:
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {_names(FLOATS)}; got {dtype}")
        if device is None and isinstance(seed, Tensor):
            device = seed.device
        out = torch.empty(shape, dtype=dtype, device=device)
    elif shape and tuple(shape) != tuple(out.shape):
        raise ValueError(f"out has shape {list(out.shape)}, but {list(shape)} was asked for")
    return sampler_step([], _unit_noise(out.device), seed=seed, stream=stream, offset=offset, out=out)


_unit_noise_tables: dict[torch.device, StepTable] = {}


def _unit_noise(device: torch.device) -> StepTable:
    if device not in _unit_noise_tables:
        _unit_noise_tables[device] = StepTable([[]], noise=1.0, device=device)
    return _unit_noise_tables[device]


def _run(inputs, table, options, out, second_out) -> None:
    name, function = choose(FAMILY, "sampler_step", out.device)
    if profiling.enabled:
        with profiling.range(f"{FAMILY}.sampler_step[{name}] {'x'.join(map(str, out.shape))}"):
            function(inputs, table, out=out, second_out=second_out, **options)
    else:
        function(inputs, table, out=out, second_out=second_out, **options)


# --- checks ----------------------------------------------------------------------------------------------------------


def _names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _checked_inputs(inputs, out) -> list[Tensor]:
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs must be a list or tuple of tensors, got {type(inputs).__name__}")
    inputs = list(inputs)
    if not inputs and out is None:
        raise ValueError("inputs is empty: give at least one tensor")
    for i, t in enumerate(inputs):
        if not isinstance(t, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor, got {type(t).__name__}")
        _check_like(f"inputs[{i}]", t, inputs[0])
    return [t.resolve_neg() for t in inputs]


def _check_like(name: str, t, like: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {_names(FLOATS)}; got {str(t.dtype).removeprefix('torch.')}")
    if t.shape != like.shape:
        raise ValueError(f"{name} has shape {list(t.shape)}; expected {list(like.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}; expected {like.device}")


def _check_output(name: str, t, like: Tensor) -> None:
    _check_like(name, t, like)
    if t.is_neg():
        raise ValueError(f"{name} is a lazily negated view; nothing can be written through it")
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride())):
        raise ValueError(f"{name} is an expanded tensor: several of its elements share one place in memory")


def _plain_table(coefficients, inputs: int, has_noise: bool) -> StepTable:
    values = coefficients if isinstance(coefficients, Tensor) else torch.as_tensor(coefficients, dtype=torch.float64)
    if values.dim() == 0:
        raise ValueError("table is a scalar; expected a StepTable or coefficients [n] or [rows, n]")
    columns = values.shape[-1]
    if columns != inputs + has_noise:
        extra = " and one for the noise" if has_noise else ""
        raise ValueError(f"table has {columns} columns; expected {inputs}, one per input{extra}")
    if has_noise:
        return StepTable(values[..., :-1], noise=values[..., -1])
    return StepTable(values)


def _checked_step(step, rows: int, batch: int, device: torch.device, compiling: bool):
    if step is None:
        if rows not in (1, batch):
            raise ValueError(f"step is missing: the table has {rows} rows for a batch of {batch}")
        return None
    if isinstance(step, Tensor):
        if step.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"step must be an int, or an int64 or int32 tensor; got {step.dtype}")
        if step.dim() > 1 or (step.dim() == 1 and step.shape[0] not in (1, batch)):
            raise ValueError(f"step has shape {list(step.shape)}; expected a 0-d tensor or [{batch}]")
        if step.device != device:
            raise ValueError(f"step is on {step.device}; expected {device}")
        if device.type == "cpu" and not compiling and step.numel() and not (step.min() >= 0 and step.max() < rows):
            raise ValueError(f"step is out of range: {step.tolist()} for a table of {rows} rows")
        return step.reshape(-1).to(torch.int64).contiguous()
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int or an integer tensor, got {type(step).__name__}")
    if not 0 <= step < rows:
        raise ValueError(f"step is out of range: {step} for a table of {rows} rows")
    return step


def _checked_guidance(guidance, batch: int, device: torch.device):
    if isinstance(guidance, Tensor):
        if not guidance.is_floating_point():
            raise TypeError(f"guidance must be a float or a floating tensor, got {guidance.dtype}")
        if guidance.dim() > 1 or (guidance.dim() == 1 and guidance.shape[0] not in (1, batch)):
            raise ValueError(f"guidance has shape {list(guidance.shape)}; expected a 0-d tensor or [{batch}]")
        if guidance.device != device:
            raise ValueError(f"guidance is on {guidance.device}; expected {device}")
        return guidance.detach().reshape(-1).to(torch.float64).contiguous()
    guidance = float(guidance)
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    return guidance


def _checked_limits(clip, threshold, table: StepTable):
    if clip is None and threshold is None:
        return None, None
    if clip is not None and threshold is not None:
        raise ValueError("clip and threshold exclude each other")
    name = "clip" if clip is not None else "threshold"
    if not table.has_x0:
        raise ValueError(f"{name} is given, but the table makes no x0 (give StepTable its to_x0)")
    if clip is not None:
        low, high = (-clip, clip) if isinstance(clip, (int, float)) else clip
        if not low <= high:
            raise ValueError(f"clip must be a range with low <= high, got ({low}, {high})")
        return (float(low), float(high)), None
    ratio, maximum = threshold
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"threshold's ratio must be in [0, 1], got {ratio}")
    if not maximum >= 1.0:
        raise ValueError(f"threshold's maximum must be at least 1, got {maximum}")
    return None, (float(ratio), float(maximum))


def _row_is_noisy(table: StepTable, step) -> bool:
    if table.noisy is None or isinstance(step, Tensor):
        return True
    return any(table.noisy) if step is None else table.noisy[step]


def _draw(like: Tensor, generator) -> Tensor:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    device = generator.device if generator is not None else like.device
    if device.type not in ("cpu", like.device.type):
        raise ValueError(f"generator is on {device}; expected one on {like.device} or on the cpu")
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _checked_dtype(dtype, out, like: Tensor) -> torch.dtype:
    if dtype is None:
        return like.dtype if out is None else out.dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {_names(FLOATS)}; got {dtype}")
    if out is not None and out.dtype != dtype:
        raise ValueError(f"dtype is {dtype}, but out has {out.dtype}")
    return dtype


def _span(t: Tensor) -> tuple[int, int]:
    start = t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return start, start + (last + 1) * t.element_size()


def _needs_staging(name: str, target: Tensor, others: list[Tensor], same_allowed: bool = True) -> bool:
    """Whether ``target`` must be filled through a temporary because it is interleaved with another tensor in memory."""
    if target.numel() == 0:
        return False
    low, high = _span(target)
    staging = False
    for t in others:
        a, b = _span(t)
        if b <= low or high <= a:
            continue
        same = t.data_ptr() == target.data_ptr() and t.stride() == target.stride() and t.dtype == target.dtype
        if same and same_allowed:
            continue
        if same or (target.is_contiguous() and t.is_contiguous()):
            raise ValueError(f"{name} overlaps another tensor of the step in memory")
        staging = True
    return staging


# --- torch.library ---------------------------------------------------------------------------------------------------


def _flat_arguments(inputs, table: StepTable, dtype, options, like) -> tuple:
    """The arguments of the registered operator, whose schema has neither tables nor tensor-or-number."""
    step, seed, guidance = options["step"], options["seed"], options["guidance"]
    return (
        inputs,
        table.data,
        table.inputs,
        table.has_x0,
        table.has_noise,
        table.has_second,
        table.has_log_std,
        list(like.shape),
        dtype,
        step if isinstance(step, Tensor) else None,
        step if isinstance(step, int) else None,
        options["uncond"],
        guidance if isinstance(guidance, Tensor) else None,
        1.0 if isinstance(guidance, Tensor) else guidance,
        options["guidance_rescale"],
        options["clip"],
        options["threshold"],
        options["log_variance"],
        options["noise"],
        seed if isinstance(seed, Tensor) else None,
        None if isinstance(seed, Tensor) else seed,
        options["stream"],
        options["offset"],
    )


@torch.library.custom_op(
    "genfast::sampler_step",
    mutates_args=(),
    schema="(Tensor[] inputs, Tensor table, int n, bool has_x0, bool has_noise, bool has_second, bool has_log_std, "
    "int[] shape, ScalarType dtype, Tensor? step, int? row, Tensor? uncond, Tensor? guidance, float guidance_scale, "
    "float guidance_rescale, float[]? clip, float[]? threshold, Tensor? log_variance, Tensor? noise, Tensor? seed, "
    "int? seed_value, int stream, int offset) -> Tensor[]",
)
def _custom_op(inputs, data, n, has_x0, has_noise, has_second, has_log_std, shape, dtype, *rest):
    table, options = _unpack(data, n, has_x0, has_noise, has_second, has_log_std, rest)
    outputs = _allocate(inputs, data, shape, dtype, has_second)
    _run(inputs, table, options, outputs[0], outputs[1] if has_second else None)
    return outputs


@_custom_op.register_fake
def _fake(inputs, data, n, has_x0, has_noise, has_second, has_log_std, shape, dtype, *rest):
    return _allocate(inputs, data, shape, dtype, has_second)


def _allocate(inputs, data, shape, dtype, has_second) -> list[Tensor]:
    def new():
        if inputs:
            return torch.empty_like(inputs[0], dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=data.device)

    return [new() for _ in range(1 + has_second)]


def _unpack(data, n, has_x0, has_noise, has_second, has_log_std, rest):
    table = object.__new__(StepTable)
    table.__dict__.update(
        _data=data,
        rows=data.shape[0],
        inputs=n,
        has_x0=has_x0,
        has_noise=has_noise,
        has_second=has_second,
        has_log_std=has_log_std,
        noisy=None,
    )
    (
        step,
        row,
        uncond,
        guidance,
        scale,
        rescale,
        clip,
        threshold,
        log_variance,
        noise,
        seed,
        seed_value,
        stream,
        offset,
    ) = rest
    options = dict(
        step=row if step is None else step,
        uncond=uncond,
        guidance=scale if guidance is None else guidance,
        guidance_rescale=rescale,
        clip=None if clip is None else tuple(clip),
        threshold=None if threshold is None else tuple(threshold),
        log_variance=log_variance,
        noise=noise,
        seed=seed_value if seed is None else seed,
        stream=stream,
        offset=offset,
    )
    return table, options


def _setup_context(ctx, inputs, output):
    tensors, static = [], []
    for value in inputs[1:]:
        is_tensor = isinstance(value, Tensor)
        static.append(None if is_tensor else value)
        tensors.append(value if is_tensor else None)
    ctx.save_for_backward(*inputs[0], *tensors)
    ctx.count, ctx.static = len(inputs[0]), static


def _backward(ctx, grads):
    # The reference is plain PyTorch: run it again with gradients, Philox noise and all. Its cost is that of an eager
    # step, paid only when someone differentiates through a sampler.
    saved = ctx.saved_tensors
    values = [t if t is not None else s for t, s in zip(saved[ctx.count :], ctx.static)]
    needed = ctx.needs_input_grad
    with torch.enable_grad():
        wanted = needed[0] if isinstance(needed[0], (list, tuple)) else [needed[0]] * ctx.count
        inputs = [t.detach().requires_grad_(bool(w)) for t, w in zip(saved[: ctx.count], wanted)]
        places = [k for k, v in enumerate(values) if isinstance(v, Tensor) and needed[k + 1]]
        for k in places:
            values[k] = values[k].detach().requires_grad_()
        data, n, has_x0, has_noise, has_second, has_log_std, _, dtype, *rest = values
        table, options = _unpack(data, n, has_x0, has_noise, has_second, has_log_std, rest)
        results = reference_step(inputs, table, dtype=dtype, **options)
        results = results if has_second else (results,)
        leaves = [t for t in inputs if t.requires_grad] + [values[k] for k in places]
        pairs = [(r, g) for r, g in zip(results, grads) if g is not None and r.requires_grad]
        found = iter(
            torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
            if pairs
            else [None] * len(leaves)
        )
    list_grads = [next(found) if t.requires_grad else None for t in inputs]
    others = [next(found) if k in places else None for k in range(len(values))]
    return list_grads, *others


_custom_op.register_autograd(_backward, setup_context=_setup_context)
