"""``python -m benchmarks.scaling_model``: what gradients on other wires would save on many GPUs, modelled.

    T_bucket = T_pack + alpha(n) + k (n - 1)/n S / B + T_unpack        k = 2: there and back
    step = max(backward, overlapped communication) + T_last bucket

S is a bucket's bytes on the wire, B the bandwidth of one rank's link in bytes per second, alpha(n) what an exchange of
nothing costs. Buckets overlap with each other: while one is on the wire, another is packed or unpacked, so of those
before the last the slower of the two counts. With ``--fit FILE`` (of ``benchmarks.namespaces --json``) B is fitted to
the steps of 2 hosts, and the steps of 4 are predicted and compared with those measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.namespaces import bytes_per_value
from genfast.gradient_wire import WIRES

GPUS = [2**k for k in range(3, 13)]
BANDWIDTHS = 50e9, 400e9
K = 2


@dataclass(frozen=True)
class Inputs:
    """Of one kind of machine and one wire; times in seconds, of kernels per value of a gradient."""

    buckets: tuple[int, ...]
    """Values of each bucket, in the order in which they are ready."""
    value_bytes: float
    backward: float
    pack: float
    unpack: float
    """With the sum over the ranks."""
    bandwidth: float
    launch: float
    """Of alpha(n) = launch + message * messages(n)."""
    message: float
    tree: bool = False
    """Messages of an exchange one after the other: 2 log2(n) in a tree, as NCCL all-reduces, else n - 1 to and fro."""

    def alpha(self, ranks: int) -> float:
        return self.launch + self.message * (2 * math.ceil(math.log2(ranks)) if self.tree else 2 * (ranks - 1))


def wire_time(inputs: Inputs, ranks: int, values: int) -> float:
    """alpha(n) + k (n - 1)/n S/B."""
    return inputs.alpha(ranks) + K * (ranks - 1) / ranks * values * inputs.value_bytes / inputs.bandwidth


def bucket_time(inputs: Inputs, ranks: int, values: int) -> float:
    """T_bucket."""
    return values * (inputs.pack + inputs.unpack) + wire_time(inputs, ranks, values)


def step_time(inputs: Inputs, ranks: int) -> float:
    """Of a backward pass with the reduction of its gradients."""
    *before, last = inputs.buckets
    overlapped = sum(max(wire_time(inputs, ranks, v), v * (inputs.pack + inputs.unpack)) for v in before)
    return max(inputs.backward, overlapped) + bucket_time(inputs, ranks, last)


def fitted(inputs: Inputs, ranks: int, measured: float) -> Inputs:
    """With the bandwidth at which the model takes as long as was measured."""
    low, high = 1.0, 1e15
    if (
        not step_time(replace(inputs, bandwidth=high), ranks)
        < measured
        < step_time(replace(inputs, bandwidth=low), ranks)
    ):
        raise ValueError(f"no bandwidth explains a step of {measured:g} s on {ranks} ranks: the rest takes longer")
    for _ in range(200):
        middle = math.sqrt(low * high)
        slower = step_time(replace(inputs, bandwidth=middle), ranks) > measured
        low, high = (middle, high) if slower else (low, middle)
    return replace(inputs, bandwidth=math.sqrt(low * high))


def inputs_of(run: dict, variant: str) -> Inputs:
    """Inputs, but for the bandwidth, as ``benchmarks.namespaces`` measured them on one number of hosts.

    DDP's own copies are not timed there: they count as part of what the bandwidth explains.
    """
    measured = run["variants"][variant]
    values, hosts = run["parameters"], run["hosts"]
    buckets = measured.get("buckets") or next(v["buckets"] for v in run["variants"].values() if "buckets" in v)
    work = measured.get("work", {"pack_s": 0.0, "reduce_s": 0.0, "unpack_s": 0.0})
    return Inputs(
        tuple(buckets), bytes_per_value(variant), run["backward_s"], work["pack_s"] / values,
        (work["reduce_s"] + work["unpack_s"]) / values, math.inf, 0.0, run["latency_s"] / (2 * (hosts - 1)),
    )  # fmt: skip


def check(runs: list[dict], fit_at: int = 2, predict_at: int = 4) -> dict[str, tuple[float, float, float]]:
    """Per variant: the fitted bandwidth, the predicted step, and the miss, (predicted - measured) / measured.

    Kernels and backward pass are those of 2 hosts, made slower by what the backward pass alone is slower on 4: these
    hosts share the cores of one machine, and that is not what the model is about.
    """
    by_hosts = {run["hosts"]: run for run in runs}
    missing = {fit_at, predict_at} - set(by_hosts)
    if missing:
        raise ValueError(f"the file has no figures of {', '.join(map(str, sorted(missing)))} hosts")
    few, many = by_hosts[fit_at], by_hosts[predict_at]
    slower = many["backward_s"] / few["backward_s"]
    found = {}
    for variant, v in few["variants"].items():
        if variant not in many["variants"]:
            continue
        inputs = fitted(inputs_of(few, variant), fit_at, v["step_s"])
        crowded = replace(
            inputs, backward=inputs.backward * slower, pack=inputs.pack * slower, unpack=inputs.unpack * slower
        )
        predicted, measured = step_time(crowded, predict_at), many["variants"][variant]["step_s"]
        found[variant] = inputs.bandwidth, predicted, predicted / measured - 1
    return found


def gpu_inputs(options, variant: str, bandwidth: float) -> Inputs:
    """Of GPUs: kernels at the bandwidth of their memory, which reads and writes each value and its code once."""
    bucket = max(1, int(options.bucket_mb * 2**20 / 4))
    full, rest = divmod(int(options.parameters), bucket)
    size = bytes_per_value(variant)
    feedback = 8 if variant in WIRES and WIRES[variant].largest is not None else 0
    passed = options.memory_gbs * 1e9
    # A chunk is read once for every rank, 1/n of a bucket each; its sum is written.
    pack, unpack = (4 + size + feedback) / passed, (2 * size + 4 + size) / passed
    if variant == "ddp":
        pack = unpack = 8 / passed  # into the bucket, divided, and out of it
    return Inputs(
        (bucket,) * full + ((rest,) if rest else ()), size, options.backward_ms / 1e3, pack, unpack, bandwidth,
        options.launch_us / 1e6, options.message_us / 1e6, tree=variant == "ddp",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_model", description=__doc__.split("``: ")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--fit", type=Path, metavar="FILE", help="figures of benchmarks.namespaces, of 2 and 4 hosts")
    for name, default, what in (
        ("parameters", 1e9, "of the model"),
        ("backward-ms", 100.0, "of a backward pass alone"),
        ("bucket-mb", 25.0, "of a bucket in float32"),
        ("memory-gbs", 2500.0, "GB/s of a GPU's memory, for the kernels"),
        ("launch-us", 20.0, "of every exchange, however small"),
        ("message-us", 2.0, "of each message that waits for the one before"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{what} (default {default:g})")
    options = parser.parse_args(arguments)
    for name in ("parameters", "backward_ms", "bucket_mb", "memory_gbs"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if options.parameters < 1 or min(options.launch_us, options.message_us) < 0:
        parser.error("--parameters must be at least 1, --launch-us and --message-us at least 0")
    if options.fit is not None:
        try:
            runs = json.loads(options.fit.read_text())["runs"]
            print("fitted at 2 hosts, then predicted for 4")
            for variant, (bandwidth, predicted, miss) in check(runs).items():
                measured = next(r for r in runs if r["hosts"] == 4)["variants"][variant]["step_s"]
                print(
                    f"  {variant:<10} B {bandwidth / 1e9:.4f} GB/s; 4 hosts: modelled {1e3 * predicted:.0f} ms, "
                    f"measured {1e3 * measured:.0f} ms, miss {miss:+.1%}"
                )
        except (OSError, KeyError, ValueError) as error:
            print(f"python -m benchmarks.scaling_model: --fit {options.fit}: {error}", file=sys.stderr)
            return 2
    given = {name: getattr(options, name) for name in vars(options) if name != "fit"}
    print("inputs, none of them measured:", ", ".join(f"{name} {value:g}" for name, value in given.items()))
    print("DDP's all-reduce in a tree or ring of NCCL's: 2 log2(n) messages; ours: n - 1 there and n - 1 back")
    variants = ("ddp", "bf16", "int8", "fp8_e4m3")
    for bandwidth in BANDWIDTHS:
        print(f"\n{bandwidth / 1e9:g} GB/s per wire: ms of a step, and how many times faster than DDP in fp32")
        for ranks in GPUS:
            steps = {v: step_time(gpu_inputs(options, v, bandwidth), ranks) for v in variants}
            cells = "  ".join(f"{v} {1e3 * t:8.2f} ({steps['ddp'] / t:.2f}x)" for v, t in steps.items())
            print(f"modelled  {ranks:>5} GPUs  {cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
