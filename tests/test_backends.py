"""The choice of backend: defaults, orders, caps, and what is said when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import genfast
from genfast import backends

X = torch.ones(2, 3)


@pytest.fixture
def fresh():
    backends.reset()
    yield
    backends.reset()


def run(code: str, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda; got 'gpu'"),
        genfast.backend("gpu"),
    ):
        pass


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_order_that_cannot_be_honoured_is_an_error(name):
    if backends.missing(name, "cpu") is None:
        pytest.skip(f"{name} runs on cpu tensors here")
    with genfast.backend(name), pytest.raises(genfast.BackendUnavailable, match=f"backend '{name}' was asked for, but"):
        genfast.sampler_step([X], [2.0])


def test_orders_nest_and_end():
    with genfast.backend("reference"):
        assert backends.override() == "reference"
        with genfast.backend("cpu"):
            assert backends.override() == "cpu"
        assert backends.override() == "reference"
    assert backends.override() is None


def test_an_order_reaches_the_hot_path(monkeypatch):
    calls = []
    from genfast.reference import sampler_step as module

    real = module.sampler_step
    monkeypatch.setattr(module, "sampler_step", lambda *a, **k: calls.append(1) or real(*a, **k))
    backends._choose.cache_clear()
    table = genfast.StepTable([2.0])
    genfast.sampler_step([X], table)
    genfast.sampler_step([X], table)
    with genfast.backend("reference"):
        genfast.sampler_step([X], table)
    assert calls == [1]
    backends._choose.cache_clear()


def test_without_native_modules_plain_torch_runs_and_says_so_once(fresh, monkeypatch):
    monkeypatch.setattr(backends, "cpu_module", lambda: None)
    with pytest.warns(
        UserWarning, match="genfast runs sampler_step through plain PyTorch .cpu: the native module"
    ) as caught:
        assert genfast.sampler_step([X], [2.0]).sum() == 12
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        genfast.sampler_step([X], [2.0])


def test_environment_variables():
    code = "import genfast, torch; genfast.sampler_step([torch.ones(2)], [2.0]); print(genfast.backends.override())"
    assert run(code, GENFAST_BACKEND="reference").stdout.strip() == "reference"
    result = run(code, GENFAST_BACKEND="fast")
    assert result.returncode != 0 and "GENFAST_BACKEND must be one of" in result.stderr
    if backends.missing("cuda", "cpu"):
        assert (
            "backend 'cuda' was asked for, but it runs on cuda tensors only" in run(code, GENFAST_BACKEND="cuda").stderr
        )


@pytest.mark.parametrize("isa", backends.machine_isas())
def test_instruction_set_cap(isa):
    assert run("from genfast import backends; print(backends.cpu_isa())", GENFAST_ISA=isa).stdout.strip() == isa


def test_unknown_instruction_set():
    result = run("import genfast; genfast.randn(2, seed=1)", GENFAST_ISA="mmx")
    assert (
        result.returncode != 0
        and "GENFAST_ISA must be one of base, avx2, avx512, avx512bf16, amx; got 'mmx'" in result.stderr
    )


def test_a_module_is_missing_with_a_reason():
    assert backends.missing("reference", "xpu") is None
    assert "runs on cpu tensors only, not cuda" in backends.missing("cpu", "cuda")
    assert "it runs on cuda tensors only, not cpu" in backends.missing("cuda", "cpu")


def test_importing_genfast_is_light():
    listing = "print([m for m in ('triton', 'diffusers', 'scipy', 'matplotlib', 'tqdm') if m in sys.modules])"
    assert run(f"import sys, genfast; {listing}").stdout == run(f"import sys, torch; {listing}").stdout
