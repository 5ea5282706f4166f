"""The ops of the family ``token_sampling`` that choose positions and write to them: checks, choice of backend.

There is no CUDA C++, as in :mod:`genfast.ops.token_sampling`; `benchmarks/token_sampling.py` times these ops too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast import profiling
from genfast._registry import export
from genfast.backends import HotPath, choose
from genfast.ops._checks import (
    LARGEST_TEMPERATURE,
    check_counters,
    checked_seed,
    dense_rows,
    fresh_seed,
    row_numbers,
)

FAMILY = "token_sampling"
select_path = HotPath(FAMILY, "select_transfer")
commit_path = HotPath(FAMILY, "commit")


@export(FAMILY)
def select_transfer(
    confidence: Tensor,
    mask: Tensor,
    n: int | Tensor = 1,
    *,
    strategy: str = "top",
    threshold: float | None = None,
    low_threshold: float | None = None,
    slack: float | None = None,
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
        slack: with ``"threshold"``, a row whose best position does not reach the threshold takes those within
            ``slack`` of it: all with confidence >= min(``threshold``, best - ``slack``) (dInfer, with 1e-5).
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
    compiling = torch.compiler.is_compiling()
    if not compiling and slack is None:
        # One native call for the plain case; everything else, and every error, goes through the checks below.
        result = select_path.run(
            confidence, mask, n, strategy, threshold, low_threshold, strict, factor, accept_last, bound, inclusive,
            start, end, temperature, seed, stream, offset,
        )  # fmt: skip
        if result is not NotImplemented:
            return result
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
    if slack is not None and (strategy != "threshold" or not 0 <= slack < math.inf):
        raise ValueError(f"slack must be a number of at least 0, and goes with strategy 'threshold'; got {slack}")
    if not 0 <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(f"temperature must be in [0, {LARGEST_TEMPERATURE:g}], got {temperature}")
    n, start, end = (
        row_numbers(name, value, batch, device)
        for name, value in (("n", n), ("start", start), ("end", length if end is None else end))
    )
    check_counters(stream, offset)
    if seed is not None:
        seed = checked_seed(seed, batch, device)
    elif strategy == "random" or temperature > 0:
        seed = fresh_seed()
    arguments = (
        dense_rows(confidence.detach().float()),
        dense_rows(mask),
        n if isinstance(n, Tensor) else None,
        0 if isinstance(n, Tensor) else n,
        strategy,
        *(0.0 if value is None else float(value) for value in given.values()),
        None if slack is None else float(slack),
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
    return (_select_op if compiling else _select)(*arguments)


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
    compiling = torch.compiler.is_compiling()
    if not compiling:
        result = commit_path.run(x, tokens, selected, mask_id, eos_id)
        if result is not NotImplemented:
            return result
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 2:
        raise TypeError("x must be an int64 tensor [B, L]")
    _check_rows("tokens", tokens, torch.int64, x)
    _check_rows("selected", selected, torch.bool, x)
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride())):
        raise ValueError("x is an expanded tensor: several of its elements share one place in memory")
    return (_commit_op if compiling else _commit)(x, tokens, selected, mask_id, eos_id)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_rows(name: str, t, dtype, like: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != dtype:
        raise TypeError(f"{name} must be a tensor of {dtype}")
    if t.shape != like.shape or t.device != like.device:
        raise ValueError(f"{name} is {list(t.shape)} on {t.device}; expected {list(like.shape)} on {like.device}")


# --- torch.library ---------------------------------------------------------------------------------------------------


def _select(
    confidence, mask, n_tensor, n, strategy, threshold, low_threshold, factor, bound, slack, strict, accept_last,
    inclusive, start_tensor, start, end_tensor, end, temperature, seeds, seed, stream, offset,
) -> Tensor:  # fmt: skip
    out = torch.empty(confidence.shape, dtype=torch.bool, device=confidence.device)
    name, function = choose(FAMILY, "select_transfer", confidence.device)
    with profiling.op_range(FAMILY, f"select_transfer[{name}]", *confidence.shape):
        function(
            confidence,
            mask,
            n=n if n_tensor is None else n_tensor,
            strategy=strategy,
            threshold=threshold,
            low_threshold=low_threshold,
            slack=slack,
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
    "float low_threshold, float factor, float bound, float? slack, bool strict, bool accept_last, bool inclusive, "
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
    target = dense_rows(x)
    with profiling.op_range(FAMILY, f"commit_[{name}]", *x.shape):
        function(
            target,
            dense_rows(tokens),
            dense_rows(selected),
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
