"""The command ``genfast``: doctor, ops, verify, bench, demo, profile."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command; the result is the exit status."""
    from genfast import __version__

    parser = argparse.ArgumentParser(prog="genfast", description="Fused kernels for generative models.")
    parser.add_argument("--version", action="version", version=f"genfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("doctor", help="which backends are there, and why anything is missing")

    ops = commands.add_parser("ops", help="the public names")
    ops.add_argument("--json", action="store_true", help="as JSON")

    verify = commands.add_parser("verify", help="check every kernel against its reference on this machine")
    verify.add_argument("families", nargs="*", help="families to check (all by default)")
    verify.add_argument("--backend", action="append", help="check this backend only (may be repeated)")
    verify.add_argument("--quick", action="store_true", help="a third of the cases")

    for name, text in (
        ("bench", "run the benchmarks (in a checkout)"),
        (
            "demo",
            "train, sample and draw digits, with a codebook with --vq, write text with --text, or --ddp on 2 ranks",
        ),
    ):
        commands.add_parser(name, help=text, add_help=False)

    profile = commands.add_parser(
        "profile", help="run a Python script or module with every op marked: genfast profile [-o FILE] -- script.py ..."
    )
    profile.add_argument("-o", "--output", help="the report: FILE.nsys-rep under nsys, else a JSON trace")
    profile.add_argument("target", nargs=argparse.REMAINDER, help="-- script.py ARG ... or -- -m module ARG ...")

    # bench and demo parse their own arguments.
    known, rest = parser.parse_known_args(argv)
    if rest and known.command not in ("bench", "demo"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run = {
        "doctor": _doctor,
        "ops": _ops,
        "verify": _verify,
        "bench": lambda _: _bench(rest),
        "demo": lambda _: _demo(rest),
        "profile": _profile,
    }[known.command]
    try:
        status = run(known)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # `genfast ops | head` has read enough. Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _doctor(_) -> int:
    from genfast.doctor import report

    for line in report():
        print(line)
    return 0


def _ops(arguments) -> int:
    from genfast._registry import PUBLIC

    rows = [(e.group, e.name, e.summary) for e in sorted(PUBLIC.values(), key=lambda e: (e.group, e.name))]
    if arguments.json:
        print(json.dumps([dict(zip(("group", "name", "summary"), row)) for row in rows], indent=2))
        return 0
    widths = [max(len(row[k]) for row in rows) for k in (0, 1)]
    for group, name, summary in rows:
        print(f"{group:<{widths[0]}}  {name:<{widths[1]}}  {summary}")
    return 0


def _verify(arguments) -> int:
    from genfast import BackendUnavailable, verify

    try:
        good = verify(arguments.families or None, backends=arguments.backend, quick=arguments.quick)
    except (ValueError, BackendUnavailable) as error:
        print(f"genfast verify: {error}", file=sys.stderr)
        return 2
    return 0 if good else 1


def _bench(rest: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").exists():
        print("genfast bench: the benchmarks are in the repository; run it from a checkout", file=sys.stderr)
        return 2
    # The command may have been started in any folder, and paths among its arguments are relative to that one.
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return subprocess.call([sys.executable, "-m", "benchmarks", *rest], env={**os.environ, "PYTHONPATH": path})


def _demo(rest: list[str]) -> int:
    from genfast.demo import main as demo

    return demo(rest)


def _profile(arguments) -> int:
    target = arguments.target[1:] if arguments.target[:1] == ["--"] else arguments.target
    if target and re.fullmatch(r"python[\d.]*", os.path.basename(target[0])):
        target = target[1:]
    wrong = _why_not_python(target)
    if wrong:
        print(f"genfast profile: {wrong}", file=sys.stderr)
        return 2
    if target[0] != "-m" and not os.path.isfile(target[0]):
        target = [shutil.which(target[0]), *target[1:]]
    nsys = shutil.which("nsys")
    output = arguments.output or ("genfast-profile" if nsys else "genfast-profile.json")
    runner = [sys.executable, "-m", "genfast.profiling_run"]
    if nsys:
        if importlib.util.find_spec("nvtx") is None:
            print(
                "genfast profile: nsys will show no ranges without the package nvtx (pip install nvtx)", file=sys.stderr
            )
        command = [nsys, "profile", "--trace=cuda,nvtx,osrt", f"--output={output}", "--force-overwrite=true"]
        return subprocess.call([*command, *runner, "-", *target])
    print(f"genfast profile: nsys is not on the PATH; writing a torch.profiler trace to {output}", file=sys.stderr)
    return subprocess.call([*runner, output, *target])


def _why_not_python(target: list[str]) -> str | None:
    """What is wrong with the target of ``genfast profile``, or None: ranges exist in Python processes only."""
    if not target or target == ["-m"]:
        return "say what to run: genfast profile -- script.py ... or genfast profile -- -m module ..."
    if target[0] == "-m":
        return None
    if target[0].startswith("-"):
        return f"expected a script or -m and a module; got the option {target[0]!r}"
    path = target[0] if os.path.isfile(target[0]) else shutil.which(target[0])
    if path is None:
        return f"there is no script and no command {target[0]!r}"
    with open(path, "rb") as file:
        if not path.endswith(".py") and b"python" not in file.readline(200):
            return f"{path} is not a Python program, and only those have ranges"
    return None
