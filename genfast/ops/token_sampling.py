"""The public ops of the family ``token_sampling``: checks, choice of backend, torch.library.

There is no CUDA C++ in this family: a program per row, or per part of a row, is what Triton writes well, and no pointer
list or launch-bound step asks for more. A measurement on a GPU may say otherwise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.random import signed64

FAMILY = "token_sampling"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CONFIDENCES = ("probability", "tempered", "margin", "entropy", "random")
STATISTICS = ("logsumexp", "entropy", "margin")
LARGEST_TEMPERATURE, MOST_ENTRIES = 1e30, 2**31 - 1


@export(FAMILY)
class TokenSample(NamedTuple):
    """What :func:`sample_tokens` returns: one entry per row; None where it was not asked for."""

    tokens: Tensor
    """int64."""
    confidence: Tensor | None
    """float32."""
    logsumexp: Tensor | None = None
    """float32, of the logits as guided and suppressed, at temperature 1; so are the next two."""
    entropy: Tensor | None = None
    """float32, in nats."""
    margin: Tensor | None = None
    """float32, the largest probability minus the second largest."""


@export(FAMILY)
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    top_p_crossing: bool = True,
    uncond: Tensor | None = None,
    guidance: float | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    suppress_confidence: Sequence[int] | Tensor | None = None,
    mask_id: int | None = None,
    rows: Tensor | None = None,
    shift: bool = False,
    confidence: str | None = "probability",
    statistics: Sequence[str] = (),
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    row_ids: Tensor | None = None,
) -> TokenSample:
    """A token and a confidence per row of logits, in one pass over them.

    Nothing of the size of the logits is made, and only the rows asked for are read.

    Args:
        logits: [..., L, V], [R, V] or [V], float32, bfloat16 or float16; rows may have any stride. Arithmetic is
            float32. All dimensions before the last two count as the batch; [R, V] is R sequences of one position.
        temperature: 0 takes the largest logit (the lowest index among equals), otherwise a draw from
            softmax(logits / temperature). A float, or a tensor with one per row of the result.
        top_k: draw among the k largest only, and those equal to the k-th.
        top_p: in (0, 1]: draw among the largest whose probabilities add up to ``top_p``, equal logits by index. With
            both, top_k is taken of what top_p leaves.
        top_p_crossing: whether the token with which the sum passes ``top_p`` stays (Dream, Hugging Face) or goes
            (BD3-LM). The largest always stays.
        uncond: logits without the condition, same shape: classifier-free guidance in the same pass,
            ``uncond + guidance (logits - uncond)`` in float32. LLaDA's ``cfg_scale`` w is guidance w + 1.
        guidance: the scale; goes with ``uncond``.
        suppress: ids that are never taken and have no share in any probability.
        suppress_confidence: ids that may be taken, but count as probability 0 in the confidence.
        mask_id: the id of the mask token, suppressed too: taking it would leave a position masked.
        rows: int64 [M], the rows to read, counted over all dimensions but the last; by default all.
        shift: the logits at position i - 1 are those of position i (position 0 has its own), as in Dream.
        confidence: ``"probability"`` of the token at temperature 1, all ids counted (LLaDA); ``"tempered"``, its
            probability in the distribution drawn from, temperature and filters applied; ``"margin"``, the largest
            minus the second largest probability there, and ``"entropy"``, sum p log p there (both as in Dream; with
            temperature 0 they are taken at temperature 1); ``"random"``, uniform in [0, 1); or None.
        statistics: any of ``"logsumexp"``, ``"entropy"``, ``"margin"``: see :class:`TokenSample`.
        noise: uniform numbers in [0, 1), float32 or float64, the shape of the logits: the token is then
            argmax(logits - temperature log(-log noise)) over what the filters leave, in float64 (Gumbel-max, as LLaDA's
            published code draws).
        generator: draw ``noise`` with ``torch.rand`` in float64 from it. It and ``noise`` are for parity with a peer;
            they cost 8 bytes per logit.
        seed: draw one 64-bit uniform per row inside the kernel (Philox, :mod:`genfast.random`) and invert the
            distribution exactly. An int, or an int64 tensor on the logits' device: 0-d, or [B] with one per sequence.
            With no source of randomness, a seed is taken from torch's default generator.
        stream, offset: position in the random sequence: ``stream`` is the step, and sequence b of the batch is sample
            ``offset + b``, so that a batch drawn in parts is the batch drawn whole.
        row_ids: int64, one per row of the result: sample 2^32 + position, in place of the row's own.

    Returns:
        :class:`TokenSample`, tensors of shape logits.shape[:-1], or [M] with ``rows``. A row of nothing but -inf gives
        token 0 and confidence 0; one with a NaN or with +inf gives the place of the first one and NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
        BackendUnavailable: the backend ordered with ``genfast.backend`` cannot run.

    Source: LLaDA (arXiv:2502.09992), Dream, Fast-dLLM; the draw is exact in the tail where float32 Gumbel noise is not
    (arXiv:2409.02908). The algorithm, to the bit: ``genfast/reference/token_sampling.py``.
    """
    _check_logits("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; expected [..., V] with V of at least 1")
    size, device = logits.shape[-1], logits.device
    if size > MOST_ENTRIES:
        raise ValueError(f"logits has {size} entries per row; at most {MOST_ENTRIES}")
    shape = logits.shape[:-1]
    count = logits.numel() // size if logits.dim() > 1 else 1
    if rows is not None:
        rows = _indices("rows", rows, count, device)
        shape = rows.shape
    wanted = math.prod(shape)
    temperature = _checked_temperature(temperature, wanted, device)
    hot = isinstance(temperature, Tensor) or temperature > 0

    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a whole number of at least 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if (uncond is None) != (guidance is None):
        raise ValueError("uncond and guidance go together: the logits without the condition, and the scale")
    if uncond is not None:
        _check_logits("uncond", uncond)
        if uncond.shape != logits.shape or uncond.device != device:
            raise ValueError(
                f"uncond is {list(uncond.shape)} on {uncond.device}; expected {list(logits.shape)} on {device}"
            )
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite, got {guidance}")
    if mask_id is not None:
        suppress = [mask_id] if suppress is None else _joined(suppress, mask_id)
    suppress = _id_list("suppress", suppress, size, device)
    suppress_confidence = _id_list("suppress_confidence", suppress_confidence, size, device)
    if confidence is not None and confidence not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)} or None; got {confidence!r}")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"statistics must be among {', '.join(STATISTICS)}; got {name!r}")
    if shift and logits.dim() < 2:
        raise ValueError("shift needs positions: logits [..., L, V]")

    if sum(source is not None for source in (noise, generator, seed)) > 1:
        raise ValueError("noise, generator and seed exclude each other: give one source of randomness")
    _check_counters(stream, offset)
    batch = logits.numel() // (size * logits.shape[-2]) if logits.dim() > 2 and logits.numel() else count
    if generator is not None:
        noise = _uniform(logits.shape, generator, device) if hot else None
    if noise is not None:
        if noise.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"noise must be float32 or float64, got {noise.dtype}")
        if noise.shape != logits.shape or noise.device != device:
            raise ValueError(
                f"noise is {list(noise.shape)} on {noise.device}; expected {list(logits.shape)} on {device}"
            )
        noise = noise.contiguous()
    drawn_confidence = None
    if confidence == "random" and seed is None and (generator is not None or noise is not None):
        confidence, drawn_confidence = None, _uniform(shape, generator, device).float()
    if seed is not None:
        seed = _checked_seed(seed, batch, device)
    elif noise is None and (hot or confidence == "random"):
        seed = _fresh_seed()
    if row_ids is not None:
        if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64:
            raise TypeError("row_ids must be an int64 tensor")
        if row_ids.numel() != wanted or row_ids.device != device:
            raise ValueError(
                f"row_ids is {list(row_ids.shape)} on {row_ids.device}; expected {list(shape)} on {device}"
            )
        row_ids = row_ids.reshape(-1).contiguous()

    arguments = (
        _sequences(logits),
        None if uncond is None else _sequences(uncond),
        temperature if isinstance(temperature, Tensor) else None,
        0.0 if isinstance(temperature, Tensor) else temperature,
        top_k or 0,
        1.0 if top_p is None else float(top_p),
        bool(top_p_crossing),
        1.0 if guidance is None else float(guidance),
        suppress,
        suppress_confidence,
        rows,
        bool(shift),
        confidence or "",
        list(statistics),
        noise,
        seed if isinstance(seed, Tensor) else None,
        seed if isinstance(seed, int) else None,
        stream,
        offset,
        row_ids,
    )
    run = _sample_op if torch.compiler.is_compiling() else _sample
    tokens, confidences, *found = (t.reshape(shape) if t.numel() == wanted else None for t in run(*arguments))
    if drawn_confidence is not None:
        confidences = drawn_confidence
    if wanted == 0:  # an empty tensor says nothing about having been asked for
        found = [f if name in statistics else None for name, f in zip(STATISTICS, found)]
        confidences = None if confidence is None and drawn_confidence is None else confidences
    return TokenSample(tokens, confidences, *found)


@export(FAMILY)
def select_transfer(
    confidence: Tensor,
    mask: Tensor,
    n: int | Tensor = 1,
    *,
    strategy: str = "top",
    threshold: float | None = None,
    low_threshold: float | None = None,
    strict: bool = False,
    factor: float | None = None,
    accept_last: bool = False,
    bound: float | None = None,
    inclusive: bool = False,
    start: int | Tensor = 0,
    end: int | Tensor | None = None,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    """Which masked positions a step of a masked diffusion language model unmasks.

    Positions rank by falling confidence, equal ones by position; NaN ranks last. Whatever the strategy, the ``n`` best
    of a row are among those selected (all, where fewer are masked).

    Args:
        confidence: [B, L], float32 (others are converted).
        mask: bool [B, L], the positions that are masked.
        n: how many at the least, for all rows or int64 [B].
        strategy: ``"top"``, no more than those; ``"threshold"``, all with confidence >= ``threshold`` too (Fast-dLLM,
            SDAR, LLaDA2); ``"factor"``, the longest run of the ranking whose k-th has confidence
            >= 1 - ``factor`` / (k + 1), k from 1, the first in any case (Fast-dLLM); ``"entropy_bound"``, of
            confidences that are negative entropies, the run of the ranking while the sum of the entropies before a
            position is <= ``bound`` (diffusers, SGLang); ``"hierarchy"``, all that reach ``threshold``, and the best of
            each contiguous stretch of masked positions if it reaches ``low_threshold`` (dInfer); ``"sequential"``, the
            first ``n``; ``"random"``, any ``n``.
        threshold, low_threshold, factor, bound: see ``strategy``.
        strict: thresholds must be exceeded, not reached.
        accept_last: with ``"factor"``, accept a row's last position though it alone fails, as the published code does.
        inclusive: with ``"entropy_bound"``, the sum with the position itself must be below ``bound`` (JetEngine).
        start, end: only positions in [start, end), the active block; numbers or int64 [B].
        temperature: above 0, rank by confidence / temperature + Gumbel noise: positions are then drawn from
            softmax(confidence / temperature) without replacement (Dream's ``alg_temp``, LLaDA variants).
        seed, stream, offset: of that noise and of ``"random"``, as in :func:`sample_tokens`, which draws with other
            numbers of the same sequence. Without a seed, one is taken from torch's default generator.

    Returns:
        bool [B, L], new.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range, or one that the strategy
            needs and that is missing.
    """
    if not isinstance(confidence, Tensor) or not confidence.is_floating_point() or confidence.dim() != 2:
        raise TypeError("confidence must be a floating tensor [B, L]")
    batch, length = confidence.shape
    device = confidence.device
    _check_rows("mask", mask, torch.bool, confidence)
    if strategy not in NEEDS:
        raise ValueError(f"strategy must be one of {', '.join(NEEDS)}; got {strategy!r}")
    given = dict(threshold=threshold, low_threshold=low_threshold, factor=factor, bound=bound)
    for name, value in given.items():
        if (value is None) == (name in NEEDS[strategy]):
            verb = "needs" if value is None else "does not take"
            raise ValueError(f"strategy {strategy!r} {verb} {name}")
        if value is not None and math.isnan(value):
            raise ValueError(f"{name} must be a number, got {value}")
    if not 0 <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(f"temperature must be in [0, {LARGEST_TEMPERATURE:g}], got {temperature}")
    n, start, end = (
        _row_numbers(name, value, batch, device)
        for name, value in (("n", n), ("start", start), ("end", length if end is None else end))
    )
    _check_counters(stream, offset)
    if seed is not None:
        seed = _checked_seed(seed, batch, device)
    elif strategy == "random" or temperature > 0:
        seed = _fresh_seed()
    arguments = (
        _dense_rows(confidence.detach().float()),
        _dense_rows(mask),
        n if isinstance(n, Tensor) else None,
        0 if isinstance(n, Tensor) else n,
        strategy,
        *(0.0 if value is None else float(value) for value in given.values()),
        bool(strict),
        bool(accept_last),
        bool(inclusive),
        start if isinstance(start, Tensor) else None,
        0 if isinstance(start, Tensor) else start,
        end if isinstance(end, Tensor) else None,
        0 if isinstance(end, Tensor) else end,
        float(temperature),
        seed if isinstance(seed, Tensor) else None,
        seed if isinstance(seed, int) else None,
        stream,
        offset,
    )
    return (_select_op if torch.compiler.is_compiling() else _select)(*arguments)


NEEDS = {
    "top": (),
    "threshold": ("threshold",),
    "factor": ("factor",),
    "entropy_bound": ("bound",),
    "hierarchy": ("threshold", "low_threshold"),
    "sequential": (),
    "random": (),
}
"""Strategies of :func:`select_transfer` and the options that each needs."""


@export(FAMILY)
def commit_(
    x: Tensor, tokens: Tensor, selected: Tensor, *, mask_id: int, eos_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Write tokens to the selected positions, in place, and say what is left to do.

    Args:
        x: int64 [B, L], written.
        tokens: int64 [B, L]; only those of selected positions are read.
        selected: bool [B, L], of :func:`select_transfer`.
        mask_id: the id of the mask token.
        eos_id: the id that ends a sequence.

    Returns:
        (left, finished): int64 [B], the masks that a row still has; bool [B], whether it has none, or none before its
        first ``eos_id``. Both stay on the device.

    Raises:
        TypeError, ValueError: a tensor of the wrong shape, dtype or device, or an ``x`` that cannot be written.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 2:
        raise TypeError("x must be an int64 tensor [B, L]")
    _check_rows("tokens", tokens, torch.int64, x)
    _check_rows("selected", selected, torch.bool, x)
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride())):
        raise ValueError("x is an expanded tensor: several of its elements share one place in memory")
    run = _commit_op if torch.compiler.is_compiling() else _commit
    return run(x, tokens, selected, mask_id, eos_id)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_rows(name: str, t, dtype, like: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != dtype:
        raise TypeError(f"{name} must be a tensor of {dtype}")
    if t.shape != like.shape or t.device != like.device:
        raise ValueError(f"{name} is {list(t.shape)} on {t.device}; expected {list(like.shape)} on {like.device}")


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _row_numbers(name: str, value, batch: int, device):
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


def _check_counters(stream: int, offset: int) -> None:
    if not -(2**31) <= stream < 2**32 or not 0 <= offset < 2**32:
        raise ValueError(f"stream and offset are 32-bit counters; got stream={stream}, offset={offset}")


def _fresh_seed() -> int:
    return int(torch.randint(-(2**63), 2**63 - 1, ()))


def _check_logits(name: str, t) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS or t.layout is not torch.strided:
        raise TypeError(f"{name} must be dense float32, bfloat16 or float16; got {t.dtype}, {t.layout}")


def _sequences(logits: Tensor) -> Tensor:
    """[B, L, V] whose rows are runs of neighbours; a copy only where strides leave no other way."""
    if logits.dim() < 3:
        logits = logits.reshape(-1, 1, logits.shape[-1])
    elif logits.dim() > 3:
        logits = logits.reshape(-1, *logits.shape[-2:])
    logits = logits.detach()
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _indices(name: str, t, count: int, device) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.dim() != 1:
        raise TypeError(f"{name} must be an int64 tensor of one dimension")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}; expected {device}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name} is out of range: {low} to {high} for {count} rows")
    return t.contiguous()


def _checked_temperature(temperature, rows: int, device):
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


def _joined(ids, extra: int):
    if isinstance(ids, Tensor):
        return torch.cat([ids.reshape(-1), ids.new_full((1,), extra)])
    return [*ids, extra]


def _id_list(name: str, ids, size: int, device) -> Tensor | None:
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
    return torch.tensor(ids, device=device)


def _check_ids(name: str, low: int, high: int, size: int) -> None:
    if low < 0 or high >= size:
        raise ValueError(f"{name} is out of range: {low} to {high} for {size} entries")


def _uniform(shape, generator, device) -> Tensor:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    where = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=where, dtype=torch.float64).to(device)


def _checked_seed(seed, batch: int, device):
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got {seed.dtype}")
        if seed.dim() > 1 or (seed.dim() == 1 and seed.shape[0] != batch) or seed.device != device:
            raise ValueError(f"seed is {list(seed.shape)} on {seed.device}; expected 0-d or [{batch}] on {device}")
        return seed.contiguous()
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return signed64(seed)


# --- torch.library ---------------------------------------------------------------------------------------------------

_NOTHING = contextlib.nullcontext()


def _range(name: str, *shape: int):
    """The profiler's range of a call; nothing when profiling is off."""
    return profiling.range(f"{FAMILY}.{name} {'x'.join(map(str, shape))}") if profiling.enabled else _NOTHING


def _sample(
    logits, uncond, temperatures, temperature, top_k, top_p, keep_crossing, guidance, suppress, suppress_confidence,
    rows, shift, confidence, statistics, noise, seeds, seed, stream, offset, ids,
) -> list[Tensor]:  # fmt: skip
    """Tokens, confidence, log-sum-exp, entropy, margin; empty tensors where not asked for."""
    outputs = _allocate(logits, rows, confidence, statistics)
    name, function = choose(FAMILY, "sample_tokens", logits.device)
    options = dict(
        temperature=temperature if temperatures is None else temperatures,
        top_k=top_k,
        top_p=top_p,
        keep_crossing=keep_crossing,
        uncond=uncond,
        guidance=guidance,
        suppress=suppress,
        suppress_confidence=suppress_confidence,
        rows=rows,
        shift=shift,
        confidence=confidence or None,
        noise=noise,
        seed=seed if seeds is None else seeds,
        stream=stream,
        offset=offset,
        ids=ids,
        tokens=outputs[0],
        confidences=outputs[1] if confidence else None,
    )
    options.update((asked, outputs[2 + k] if asked in statistics else None) for k, asked in enumerate(STATISTICS))
    with _range(f"sample_tokens[{name}]", outputs[0].numel(), logits.shape[2]):
        function(logits, **options)
    return outputs


def _allocate(logits, rows, confidence, statistics) -> list[Tensor]:
    count = rows.numel() if rows is not None else logits.shape[0] * logits.shape[1]
    floats = [bool(confidence), *(name in statistics for name in STATISTICS)]
    return [
        logits.new_empty(count, dtype=torch.int64),
        *(logits.new_empty(count if asked else 0, dtype=torch.float32) for asked in floats),
    ]


_sample_op = torch.library.custom_op(
    "genfast::sample_tokens",
    _sample,
    mutates_args=(),
    schema="(Tensor logits, Tensor? uncond, Tensor? temperatures, float temperature, int top_k, float top_p, "
    "bool keep_crossing, float guidance, Tensor? suppress, Tensor? suppress_confidence, Tensor? rows, bool shift, "
    "str confidence, str[] statistics, Tensor? noise, Tensor? seeds, int? seed, int stream, int offset, Tensor? ids) "
    "-> Tensor[]",
)


@_sample_op.register_fake
def _sample_fake(logits, *arguments):
    return _allocate(logits, arguments[9], arguments[11], arguments[12])


def _select(
    confidence, mask, n_tensor, n, strategy, threshold, low_threshold, factor, bound, strict, accept_last, inclusive,
    start_tensor, start, end_tensor, end, temperature, seeds, seed, stream, offset,
) -> Tensor:  # fmt: skip
    out = torch.empty(confidence.shape, dtype=torch.bool, device=confidence.device)
    name, function = choose(FAMILY, "select_transfer", confidence.device)
    with _range(f"select_transfer[{name}]", *confidence.shape):
        function(
            confidence,
            mask,
            n=n if n_tensor is None else n_tensor,
            strategy=strategy,
            threshold=threshold,
            low_threshold=low_threshold,
            strict=strict,
            factor=factor,
            accept_last=accept_last,
            bound=bound,
            inclusive=inclusive,
            start=start if start_tensor is None else start_tensor,
            end=end if end_tensor is None else end_tensor,
            temperature=temperature,
            seed=seed if seeds is None else seeds,
            stream=stream,
            offset=offset,
            out=out,
        )
    return out


_select_op = torch.library.custom_op(
    "genfast::select_transfer",
    _select,
    mutates_args=(),
    schema="(Tensor confidence, Tensor mask, Tensor? n_tensor, int n, str strategy, float threshold, "
    "float low_threshold, float factor, float bound, bool strict, bool accept_last, bool inclusive, "
    "Tensor? start_tensor, int start, Tensor? end_tensor, int end, float temperature, Tensor? seeds, int? seed, "
    "int stream, int offset) -> Tensor",
)


@_select_op.register_fake
def _select_fake(confidence, *arguments):
    return torch.empty(confidence.shape, dtype=torch.bool, device=confidence.device)


def _commit(x, tokens, selected, mask_id, eos_id):
    left = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    finished = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    name, function = choose(FAMILY, "commit_", x.device)
    target = _dense_rows(x)
    with _range(f"commit_[{name}]", *x.shape):
        function(
            target,
            _dense_rows(tokens),
            _dense_rows(selected),
            mask_id=mask_id,
            eos_id=eos_id,
            left=left,
            finished=finished,
        )
    if target is not x:
        x.copy_(target)
    return left, finished


_commit_op = torch.library.custom_op(
    "genfast::commit_",
    _commit,
    mutates_args=("x",),
    schema="(Tensor(a!) x, Tensor tokens, Tensor selected, int mask_id, int? eos_id) -> (Tensor, Tensor)",
)


@_commit_op.register_fake
def _commit_fake(x, tokens, selected, mask_id, eos_id):
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.bool)
