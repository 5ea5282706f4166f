"""Where the tests of Triton kernels run: on a GPU, or in Triton's interpreter.

That is decided when triton is imported, so with no GPU the tests of a file run in a process of their own, which its
``test_in_the_interpreter`` starts.
"""

import os
import subprocess
import sys

import pytest
import torch

from genfast import backends

libtriton = pytest.importorskip("triton._C.libtriton")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and not hasattr(libtriton.interpreter, "fma_fp32"):
    pytest.skip("the interpreter of this Triton rounds a fused multiply-add twice", allow_module_level=True)
RUNS_HERE = HAS_GPU or backends.interpreting()
DEVICE = "cuda" if HAS_GPU else "cpu"
BACKENDS = [name for name in ("triton", "cuda") if name == "triton" or (HAS_GPU and backends.cuda_module())]


def in_the_interpreter(file):
    """A test that runs those of a file in a process that interprets Triton kernels."""

    def test():
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed" in done.stdout

    test.__test__ = not RUNS_HERE
    return test
