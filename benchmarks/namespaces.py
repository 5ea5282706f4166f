"""``python -m benchmarks.namespaces``: gradients reduced between hosts on a slow network, DDP beside DDP with our hook.

Root only: it makes the hosts, network namespaces joined by links of 1 Gbit/s (``hosts.py``), one rank with one thread
in each, and takes them down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.hosts import Hosts, Unavailable
from benchmarks.namespaces_rank import TORCH_HOOK
from genfast.gradient_wire import WIRES

ROOT = Path(__file__).resolve().parent.parent
BARS = {"bf16": 1.9, "int8": 3.5, "fp8_e4m3": 3.5}
WIDTH, QUICK_WIDTH = 1024, 128


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if all was measured and every bar met, 1 if not, 2 where there can be no such hosts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.namespaces", description=__doc__.split("``: ")[1])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rate", default="1gbit", help="of each link and direction (default 1gbit)")
    parser.add_argument(
        "--wires", nargs="+", choices=(*WIRES, TORCH_HOOK), default=list(BARS), metavar="WIRE",
        help=f"of {', '.join(WIRES)}, {TORCH_HOOK} (PyTorch's hook); default {' '.join(BARS)}",
    )  # fmt: skip
    parser.add_argument("--bucket-mb", type=float, help="DDP's bucket_cap_mb under our hook (default: DDP's)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds: shows that all runs")
    options = parser.parse_args(arguments)
    if min(options.hosts) < 2 or max(options.hosts) > 64:
        parser.error("--hosts must be from 2 to 64")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    width, rounds = (QUICK_WIDTH, 2) if options.quick else (WIDTH, options.rounds)
    print(f"torch {torch.__version__}, Gloo, {os.cpu_count()} cores, links of {options.rate}, one thread per rank")
    found, good = [], True
    for count in options.hosts:
        try:
            measured = run(count, options.rate, options.wires, width, rounds, options.bucket_mb)
        except Unavailable as error:
            print(f"python -m benchmarks.namespaces {error}", file=sys.stderr)
            return 2
        found.append(measured)
        good &= show(measured, options.quick)
    if options.json is not None:
        facts = dict(torch=torch.__version__, cores=os.cpu_count(), load=report.load(), rate=options.rate)
        options.json.write_text(json.dumps({"environment": facts, "runs": found}, indent=1) + "\n")
        print(f"figures: {options.json}")
    return 0 if good or options.quick else 1


def run(count: int, rate: str, wires: list[str], width: int, rounds: int, bucket_mb: float | None) -> dict:
    """What the ranks of ``count`` hosts have measured."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # torch warns that addresses have no names: there is no name server on this network.
    ours = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = {**os.environ, "PYTHONPATH": path, **ours}
    with tempfile.TemporaryDirectory() as folder, Hosts(count, rate) as hosts:
        out = Path(folder, "found.json")
        ranks = []
        for rank in range(count):
            command = [sys.executable, "-m", "benchmarks.namespaces_rank", f"--rank={rank}", f"--hosts={count}",
                       f"--width={width}", f"--rounds={rounds}", f"--address={hosts.addresses[0]}", f"--out={out}",
                       "--wires", *wires]  # fmt: skip
            command += [] if bucket_mb is None else [f"--bucket-mb={bucket_mb}"]
            ranks.append(hosts.start(rank, command, env=environment, stdin=subprocess.PIPE))
        while any(codes := [process.poll() for process in ranks]) or None in codes:
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                raise RuntimeError(f"rank {failed[0]} of {count} ended with {codes[failed[0]]}: see above")
            time.sleep(0.1)
        return json.loads(out.read_text())


def show(measured: dict, quick: bool) -> bool:
    """Print a table; whether bars and bits are as they must be."""
    hosts, parameters = measured["hosts"], measured["parameters"]
    print(
        f"\n{hosts} hosts, {parameters:,} parameters; backward alone {1e3 * measured['backward_s']:.0f} ms, an "
        f"exchange of nothing {1e3 * measured['latency_s']:.2f} ms"
    )
    row = "{:<11} {:>9} {:>7} {:>8} {:>11} {:>10} {:>14} {:>8} {:>9}   {}"
    print(
        row.format(
            "", "step ms", "ratio", "bar", "MB sent by", "wire GB/s", "effective GB/s", "same", "error", "work ms"
        )
    )
    print(row.format("", "", "", "", "each host", "", "as fp32", "bits", "", "pack + reduce + unpack"))
    good = True
    for name, v in sorted(measured["variants"].items(), key=lambda item: item[0] != "ddp"):
        bar, same = BARS.get(name), v["bitwise"] and v.get("bitwise_after", True)
        good &= same and (bar is None or v["ratio"] >= bar)
        share = 2 * (hosts - 1) / hosts / v["step_s"] / 1e9
        work = v.get("work")
        print(
            row.format(
                "DDP default" if name == "ddp" else name,
                f"{1e3 * v['step_s']:.1f}",
                f"{v['ratio']:.2f}x" if "ratio" in v else "",
                "" if bar is None or quick else f"{bar}x{'' if v['ratio'] >= bar else ' MISS'}",
                f"{v['sent_bytes'] / 1e6:.2f}",
                f"{share * parameters * bytes_per_value(name):.4f}",
                f"{share * parameters * 4:.4f}",
                "yes" if same else "NO",
                f"{v['error']:.1e}",
                "" if work is None else " + ".join(f"{1e3 * work[k]:.0f}" for k in ("pack_s", "reduce_s", "unpack_s")),
            ),
            flush=True,
        )
    return good


def bytes_per_value(variant: str) -> float:
    """On the wire, scales included."""
    if variant in ("ddp", TORCH_HOOK):
        return 4 if variant == "ddp" else 2
    wire = WIRES[variant]
    return wire.dtype.itemsize + (0 if wire.largest is None else 4 / 256)


if __name__ == "__main__":
    sys.exit(main())
