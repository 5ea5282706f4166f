#!/usr/bin/env bash
# Build, verify, test and benchmark genfast on a GPU machine that has no network, in at most 9 minutes.
#
#   benchmarks/gpu.sh [FAMILY ...]      leaves its files in $OUT, or in benchmarks/results if OUT is not set
#
# All families by default, each case measured for a moment only, without the drop-ins; those named at length, against
# their bars. Their share of the time is equal, and one that runs out of it takes none from the others.
#
# Needs Python with torch, triton, pybind11, ninja, pytest and hypothesis, and nvcc for the CUDA backend; what else is
# missing (diffusers, matplotlib) is named by the benchmark. PYTHON chooses the interpreter. A stage that fails or runs
# out of time is reported and the next one starts all the same; the exit code is then 1.
#
# Files: gpu_bench_FAMILY.json, .txt and .png (rows, table, plot), gpu_compile.txt (registers and spills),
# gpu_verify.txt, gpu_stages.txt (verdicts and times) and gpu_log.txt (everything that was printed).

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out" || exit 1
log=$out/gpu_log.txt
stages=$out/gpu_stages.txt
: >"$log"
: >"$stages"
budget=530
failures=0
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

say() { echo "$*" | tee -a "$log"; }

# stage NAME SECONDS FILE COMMAND...: run COMMAND for at most SECONDS and what is left in all, its output going to FILE.
stage() {
    local name=$1 limit=$2 file=$3 begin=$SECONDS left status verdict
    shift 3
    left=$((budget - SECONDS))
    [ "$limit" -le "$left" ] || limit=$left
    say "== $name: $*"
    if [ "$limit" -lt 5 ]; then
        status=124
    else
        timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$file" | tee -a "$log"
        status=${PIPESTATUS[0]}
    fi
    case $status in
        0) verdict=ok ;;
        124 | 137) verdict="OUT OF TIME" ;;
        *) verdict="FAILED (exit code $status)" ;;
    esac
    [ "$status" -eq 0 ] || failures=$((failures + 1))
    say "== $name: $verdict, $((SECONDS - begin)) s"
    echo "$name: $verdict, $((SECONDS - begin)) s" >>"$stages"
}

stage machine 20 /dev/null "$python" -c '
import torch
assert torch.cuda.is_available(), "torch finds no GPU here"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuda", torch.version.cuda)'
# The machine may be a container whose Python belongs to its system packages; this one command is told to go ahead.
stage build 120 /dev/null env PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
stage verify 70 "$out/gpu_verify.txt" "$python" -c 'import sys, genfast; sys.exit(not genfast.verify())'
families=("$@") quick=()
if [ $# -eq 0 ]; then
    quick=(--quick)
    read -ra families < <("$python" -c 'from genfast.backends import FAMILIES; print(*FAMILIES)' 2>>"$log")
fi
parts=$("$python" -c 'import sys, genfast.backends as b; print(*(p for f in sys.argv[1:] for p in b.parts(f)))' \
    "${families[@]}" 2>>"$log")
files=(tests/test_random.py)
for part in $parts; do
    for file in tests/test_*"$part"*.py; do
        [ -e "$file" ] && files+=("$file")
    done
done
stage tests 130 /dev/null "$python" -m pytest -q -p no:cacheprovider "${files[@]}"
for family in "${families[@]}"; do
    name=$out/gpu_bench_$family
    stage "bench $family" $((190 / ${#families[@]})) "$name.txt" "$python" -m benchmarks "$family" --device cuda \
        "${quick[@]}" --json "$name.json" --plot "$name.png"
done
stage compile 60 "$out/gpu_compile.txt" "$python" -m benchmarks.compile_report --quick

say "== stages"
tee -a "$log" <"$stages"
[ "$failures" -eq 0 ]
