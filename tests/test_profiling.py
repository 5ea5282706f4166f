"""Ranges: on inside genfast.profile, absent and free outside."""

from __future__ import annotations

import json

import torch

import genfast
from genfast import profiling


def test_ranges_are_on_inside_and_off_outside(tmp_path, monkeypatch):
    seen = []
    real = profiling.range

    def spy(name):
        seen.append(name)
        return real(name)

    monkeypatch.setattr(profiling, "range", spy)
    x = torch.ones(2, 3)
    genfast.sampler_step([x], [2.0])
    assert seen == []
    with genfast.profile():
        genfast.sampler_step([x], [2.0])
        with genfast.backend("reference"):
            genfast.sampler_step([x], [2.0])
    assert len(seen) == 2 and seen[0].endswith("] 2x3") and seen[1] == "sampler_step.sampler_step[reference] 2x3"
    genfast.sampler_step([x], [2.0])
    assert len(seen) == 2


def test_trace_holds_the_ranges(tmp_path):
    path = tmp_path / "trace.json"
    with genfast.profile(path) as profiler:
        genfast.sampler_step([torch.ones(2, 3)], [2.0])
    assert any(e.key.startswith("sampler_step.sampler_step[") for e in profiler.key_averages())
    events = json.loads(path.read_text())["traceEvents"]
    assert any(str(e.get("name")).startswith("sampler_step.sampler_step[") for e in events)


def test_works_without_nvtx(monkeypatch):
    monkeypatch.setattr(profiling, "_nvtx", lambda: None)
    with genfast.profile():
        assert genfast.sampler_step([torch.ones(2)], [2.0]).tolist() == [2, 2]
    assert not profiling.enabled
