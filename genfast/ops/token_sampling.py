"""The public ops of the family ``token_sampling``: checks, choice of backend, torch.library.

There is no CUDA C++ in this family: a program per row, or per part of a row, is what Triton writes well, and no pointer
list or launch-bound step asks for more. A measurement on a GPU may say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import choose
from genfast.ops._checks import (
    check_counters,
    check_logits,
    checked_seed,
    checked_temperature,
    fresh_seed,
    id_list,
    indices,
    joined,
    sequences,
    uniform,
)

FAMILY = "token_sampling"
CONFIDENCES = ("probability", "tempered", "margin", "entropy", "random")
STATISTICS = ("logsumexp", "entropy", "margin")
MOST_ENTRIES = 2**31 - 1


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
    check_logits("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; expected [..., V] with V of at least 1")
    size, device = logits.shape[-1], logits.device
    if size > MOST_ENTRIES:
        raise ValueError(f"logits has {size} entries per row; at most {MOST_ENTRIES}")
    shape = logits.shape[:-1]
    count = logits.numel() // size if logits.dim() > 1 else 1
    if rows is not None:
        rows = indices("rows", rows, count, device)
        shape = rows.shape
    wanted = math.prod(shape)
    temperature = checked_temperature(temperature, wanted, device)
    hot = isinstance(temperature, Tensor) or temperature > 0

    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a whole number of at least 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if (uncond is None) != (guidance is None):
        raise ValueError("uncond and guidance go together: the logits without the condition, and the scale")
    if uncond is not None:
        check_logits("uncond", uncond)
        if uncond.shape != logits.shape or uncond.device != device:
            raise ValueError(
                f"uncond is {list(uncond.shape)} on {uncond.device}; expected {list(logits.shape)} on {device}"
            )
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite, got {guidance}")
    if mask_id is not None:
        suppress = [mask_id] if suppress is None else joined(suppress, mask_id)
    suppress = id_list("suppress", suppress, size, device)
    suppress_confidence = id_list("suppress_confidence", suppress_confidence, size, device)
    if confidence is not None and confidence not in CONFIDENCES:
        raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)} or None; got {confidence!r}")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"statistics must be among {', '.join(STATISTICS)}; got {name!r}")
    if shift and logits.dim() < 2:
        raise ValueError("shift needs positions: logits [..., L, V]")

    if sum(source is not None for source in (noise, generator, seed)) > 1:
        raise ValueError("noise, generator and seed exclude each other: give one source of randomness")
    check_counters(stream, offset)
    batch = logits.numel() // (size * logits.shape[-2]) if logits.dim() > 2 and logits.numel() else count
    if generator is not None:
        noise = uniform(logits.shape, generator, device) if hot else None
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
        confidence, drawn_confidence = None, uniform(shape, generator, device).float()
    if seed is not None:
        seed = checked_seed(seed, batch, device)
    elif noise is None and (hot or confidence == "random"):
        seed = fresh_seed()
    if row_ids is not None:
        if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64:
            raise TypeError("row_ids must be an int64 tensor")
        if row_ids.numel() != wanted or row_ids.device != device:
            raise ValueError(
                f"row_ids is {list(row_ids.shape)} on {row_ids.device}; expected {list(shape)} on {device}"
            )
        row_ids = row_ids.reshape(-1).contiguous()

    arguments = (
        sequences(logits),
        None if uncond is None else sequences(uncond),
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


# --- torch.library ---------------------------------------------------------------------------------------------------


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
    with profiling.op_range(FAMILY, f"sample_tokens[{name}]", outputs[0].numel(), logits.shape[2]):
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
