"""Ranges that show each op under nsys or in a torch.profiler trace. Off by default, and then free."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from genfast._registry import export

enabled = False
"""Read by every op before it opens a range: one attribute look-up is all that profiling costs when it is off."""

_NOTHING = contextlib.nullcontext()

on_change = None
"""Called after ``enabled`` has changed: the backends leave their hot path, which opens no ranges, while it is on."""


def enable(on: bool = True) -> bool:
    """Turn ranges on or off for this process; the previous setting comes back."""
    global enabled
    before, enabled = enabled, on
    if on_change is not None:
        on_change()
    return before


@contextlib.contextmanager
def range(name: str):
    """A named range: NVTX in the domain ``genfast`` when the package nvtx is there, and a torch.profiler record."""
    with contextlib.ExitStack() as stack:
        annotate = _nvtx()
        if annotate is not None:
            stack.enter_context(annotate(name, domain="genfast"))
        stack.enter_context(torch.profiler.record_function(name))
        yield


def op_range(family: str, text: str, *shape: int):
    """The range of one call of an op, ``text`` being ``op[backend]``; nothing when profiling is off."""
    return range(f"{family}.{text} {'x'.join(map(str, shape))}") if enabled else _NOTHING


def _nvtx():
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx.annotate


@export("package")
@contextlib.contextmanager
def profile(path: str | Path | None = None):
    """Mark every op with a range named ``family.op[backend] shape``; write a Chrome trace to ``path`` if one is given.

    Under ``nsys profile`` leave ``path`` out: the NVTX ranges (domain ``genfast``, package ``nvtx``) are what nsys
    shows. With a path, torch.profiler records the block, CPU and where there is one GPU, and writes a JSON trace
    that chrome://tracing and Perfetto read.
    """
    before = enable()
    try:
        if path is None:
            yield None
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        profiler.start()
        try:
            yield profiler
        finally:
            # Also after an exception: a script that ends with sys.exit() still leaves its trace.
            profiler.stop()
            profiler.export_chrome_trace(str(path))
    finally:
        enable(before)
