"""Time and memory of a call: interleaved rounds, medians of pairs, peak of what was allocated."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

import genfast

SHORTEST_SAMPLE = 200e-6
"""Seconds: shorter calls are timed several at once, so that the clock's own cost is below a permille."""

Run = Callable[[int], object]
"""A call under test. Its argument counts calls: it picks the next inputs of a rotation with it. One whose work is
done in other processes has a method ``seconds`` of the same argument, which does it and returns how long that took."""


def keep_freed_memory() -> bool:
    """Make the C library keep the memory of freed tensors (up to 32 MiB each) for the next ones; False if it cannot.

    Otherwise it gives large blocks back to the system and asks for them again at the next operation, until it has seen
    enough of them to stop. The page faults, which can cost more than the work, would then fall on the first cases. With
    this nobody pays them, which favours those who allocate most: the peers.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 2**25)) and bool(mallopt(trim_threshold, 2**31 - 1))


def interleave(
    runs: Sequence[Run], device: torch.device, *, seconds: float, least: int, most: int
) -> tuple[np.ndarray, int]:
    """Time calls in turn, A B C A B C ..., in one process, until ``seconds`` are over.

    Every call gets a number of its own, so no run finds in the cache what another has just read.

    Returns:
        Seconds per call, float64 [runs, rounds], with ``least`` <= rounds <= ``most``; and the next unused number.
    """
    turn, calls = 0, []
    for run in runs:
        run(turn)
        once = _sample(run, device, turn + 1, 1)
        turn += 2
        if once < 100 * SHORTEST_SAMPLE:
            # One reading can be a hundred times too long, when other work was let in between.
            once = min(once, *(_sample(run, device, turn + j, 1) for j in range(4)))
            turn += 4
        calls.append(max(1, math.ceil(SHORTEST_SAMPLE / max(once, 1e-7))))
    rounds: list[list[float]] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(rounds) < least or (len(rounds) < most and time.perf_counter() < end):
            samples = []
            for run, count in zip(runs, calls):
                samples.append(_sample(run, device, turn, count) / count)
                turn += count
            rounds.append(samples)
    finally:
        if collecting:
            gc.enable()
    return np.array(rounds).T, turn


def _sample(run: Run, device: torch.device, first: int, count: int) -> float:
    prepare = getattr(run, "prepare", None)  # what a call needs and what is not to be timed
    if prepare is not None:
        prepare(first, count)
    if hasattr(run, "seconds"):
        return sum(run.seconds(i) for i in range(first, first + count))
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for i in range(first, first + count):
            run(i)
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    for i in range(first, first + count):
        run(i)
    return time.perf_counter() - begin


def paired_ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float, float]:
    """Median, first and third quartile of the ratios of samples taken in the same round."""
    low, middle, high = np.percentile(numerator / denominator, (25, 50, 75))
    return float(middle), float(low), float(high)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that torch's allocator had handed out during ``call``, beyond what there was before, and what
    the call took from the pool of genfast's CPU kernels, up to what that keeps.

    What the call returns is counted, what it was given is not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    genfast.release_memory()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    pooled = genfast.release_memory()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([0] + [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max()) + pooled


def captured(call: Callable[[], object], device: torch.device) -> tuple[torch.cuda.CUDAGraph, object]:
    """``call`` as a CUDA graph, and what it returned. A call that synchronises with the host raises."""
    before = torch.cuda.get_sync_debug_mode()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()  # kernels are compiled and chosen
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def kernel_launches(call: Callable[[], object]) -> int:
    """How many kernels ``call`` launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events()
    )
