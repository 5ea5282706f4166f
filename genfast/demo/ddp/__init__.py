"""``genfast demo --ddp``: the digits denoiser on 2 local ranks, its gradients on every wire.

torchrun starts ``worker.py`` once on both ranks, which trains one model per wire on halves of the batches that the
single process sees whole; dropout is off, so that nothing but the wire makes a difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from genfast.demo.ddp.train import Curve
from genfast.gradient_wire import WIRES

RANKS = 2
SINGLE, BUILT_IN = "one process", "DDP's own"
METHODS = (SINGLE, BUILT_IN, *WIRES)
STEPS = 500


def run(arguments, methods: tuple[str, ...] = METHODS) -> dict[str, Curve]:
    """The demo: ``steps`` (None for the default), ``seed``, ``out`` and ``quick``; what each method came to."""
    from genfast.demo.ddp import pictures

    steps = STEPS if arguments.steps is None else arguments.steps
    if arguments.quick:
        steps = max(1, steps // 10)
    curves = train_all(steps, arguments.seed, methods)
    print(
        f"the digits denoiser, {steps} steps; {RANKS} ranks, Gloo, loopback, one thread each; one process: one thread"
    )
    print("loss: the mean of the last tenth of the steps; bytes: sent by a rank for its gradients, by the layout")
    row = "{:<12} {:>9} {:>13} {:>12} {:>9} {:>13}"
    print(row.format("", "loss", "to 1 process", "bytes / step", "step ms", "same bits"))
    for name, curve in curves.items():
        print(
            row.format(
                name,
                f"{curve.final:.5f}",
                "" if name == SINGLE else f"{curve.final / curves[SINGLE].final - 1:+.3%}",
                f"{curve.sent_bytes:,}",
                f"{curve.step_ms:.2f}",
                "" if name == SINGLE else "yes" if curve.same_bits else "NO",
            )
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures.draw(curves, arguments.out / "ddp.png")
    print(f"\npicture: ddp.png in {arguments.out}/")
    return curves


def train_all(steps: int, seed: int, methods: tuple[str, ...]) -> dict[str, Curve]:
    """By torchrun, on all ranks at once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "curves.json")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
            f"--nproc-per-node={RANKS}", "-m", "genfast.demo.ddp.worker", f"--steps={steps}", f"--seed={seed}",
            f"--out={out}", "--methods", *methods,
        ]  # fmt: skip
        root = str(Path(__file__).resolve().parents[3])  # where this genfast is, installed or not
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment = {**os.environ, **settings, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return {name: Curve(**curve) for name, curve in json.loads(out.read_text()).items()}
