"""Build of the native modules: one ninja file, one module per instruction set, no torch.

Every ``csrc/cpu/*.cpp`` is compiled once per instruction set into ``genfast._cpu_SET``; ``csrc/cuda`` becomes
``genfast._cuda`` when nvcc is there. A module that cannot be built is left out and the reason is kept in
``genfast/_build_info.json``, where ``genfast doctor`` finds it: the package then works through the other backends.

Environment, at build time only: ``GENFAST_NATIVE=0`` (no native module), ``GENFAST_SANITIZE=address,undefined``,
``CXX``, ``TORCH_CUDA_ARCH_LIST``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
ISA_FLAGS = {
    "base": "-march=x86-64",
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
    "amx": f"{AVX512} -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16",
}
"""Instruction sets with a module of their own. Another set is one more line here, one in genfast/backends.py, and its
detection in csrc/cpu/module.cpp."""

CUDA_ARCHS = "8.0;9.0;10.0+PTX"


def version() -> str:
    text = (ROOT / "genfast" / "__init__.py").read_text()
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


def _sources(*patterns: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))


class Plan:
    """The ninja file and what it is expected to make.

    Paths inside the checkout are relative to it, ``folder`` too: ninja runs there, and a checkout in a folder with a
    space in its name builds like any other.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.modules: dict[str, Path] = {}
        self.missing: dict[str, str] = {}
        self.flags: dict[str, str] = {}
        self.compiler = ""
        self.lines: list[str] = []
        if os.environ.get("GENFAST_NATIVE", "1") == "0":
            self.missing = dict.fromkeys(("cpu", "cuda"), "it was built with GENFAST_NATIVE=0")
            return
        tools = self._tools()
        if tools is None:
            return
        folders = ("csrc", tools["pybind11"], sysconfig.get_path("include"))
        self.includes = " ".join(f"-I{shlex.quote(folder)}" for folder in folders)
        sanitize = os.environ.get("GENFAST_SANITIZE", "")
        self.common = f"-std=c++17 -fPIC -fvisibility=hidden {self.includes}"
        if sanitize:
            self.optimise = f"-O1 -g -fno-omit-frame-pointer -fsanitize={sanitize} -fno-sanitize-recover=undefined"
            self.link = f"-fsanitize={sanitize}"
        else:
            self.optimise, self.link = "-O3", "-s"
        self._cpu()
        self._cuda()

    def _tools(self) -> dict[str, str] | None:
        cxx = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if cxx is None or shutil.which(shlex.split(cxx)[0]) is None:
            self.missing = dict.fromkeys(("cpu", "cuda"), f"no C++ compiler was found ({cxx or 'c++, g++, clang++'})")
            return None
        try:
            import ninja
            import pybind11
        except ImportError as error:
            self.missing = dict.fromkeys(("cpu", "cuda"), f"the build needs {error.name} (`pip install {error.name}`)")
            return None
        self.compiler = cxx
        self.ninja = shutil.which("ninja") or str(Path(ninja.BIN_DIR) / "ninja")
        return {"pybind11": pybind11.get_include()}

    def _cpu(self) -> None:
        self.lines += [
            "ninja_required_version = 1.5",
            f"builddir = {self.folder}",
            f"cxx = {self.compiler}",
            "rule cxx",
            "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            "  command = $cxx -shared $in -o $out $libs",
            "  description = $out",
        ]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for isa, isa_flags in ISA_FLAGS.items() if x86 else (("base", ""),):
            name = f"_cpu_{isa}"
            # Contraction is off so that the one rounding of an fma happens where the source says fma and nowhere else.
            flags = (
                f"{self.common} {self.optimise} -fno-math-errno -ffp-contract=off {isa_flags} -DGENFAST_MODULE={name}"
            )
            self._module(name, "cxx", _sources("csrc/cpu/*.cpp"), flags, f"{self.link} -ldl")

    def _cuda(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
        nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if os.environ.get("GENFAST_SANITIZE"):
            self.missing["cuda"] = "sanitizers are for the CPU modules"
            return
        if nvcc is None:
            self.missing["cuda"] = "nvcc was not found on the PATH or under /usr/local/cuda"
            return
        gencode = self._gencode(nvcc)
        if not gencode:
            self.missing["cuda"] = f"{nvcc} supports none of the architectures asked for"
            return
        # nvcc compiles the host file and links too: it knows where its headers and its static runtime are.
        self.lines += [
            f"nvcc = {nvcc}",
            "rule nvcc",
            "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule nvlink",
            "  command = $nvcc -shared -cudart static $in -o $out $libs",
            "  description = $out",
        ]
        # Contraction off, as on the CPU: the kernels write their fused multiply-adds out.
        flags = (
            f"-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden {gencode} "
            f"{self.includes} -DGENFAST_MODULE=_cuda"
        )
        sources = _sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp")
        self._module("_cuda", "nvcc", sources, flags, "", link="nvlink")

    @staticmethod
    def _gencode(nvcc: str) -> str:
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS).replace(" ", ";").split(";")
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        parts = []
        for entry in filter(None, wanted):
            number = entry.removesuffix("+PTX").replace(".", "")
            if f"sm_{number}" in known:
                parts.append(f"-gencode=arch=compute_{number},code=sm_{number}")
                if entry.endswith("+PTX"):
                    parts.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return " ".join(parts)

    def _object(self, name: str, rule: str, source: Path, flags: str) -> Path:
        target = self.folder / name / f"{source.stem}{source.suffix.replace('.', '_')}.o"
        self.lines += [f"build {target}: {rule} {source}", f"  flags = {flags.replace('$', '$$')}"]
        return target

    def _module(self, name: str, rule: str, sources: list[Path], flags: str, libs: str, link: str = "link") -> None:
        objects = [self._object(name, rule, source, flags) for source in sources]
        self.flags[name] = flags
        self.modules[name] = self.folder / f"{name}{SUFFIX}"
        self.lines += [f"build {self.modules[name]}: {link} {' '.join(map(str, objects))}", f"  libs = {libs}"]

    def run(self) -> dict[str, Path]:
        """Build what can be built; the finished modules by name."""
        if not self.modules:
            return {}
        folder = ROOT / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        # -k 0: a module that fails (an old compiler without AVX-512, say) must not take the others with it.
        command = [self.ninja, "-C", str(ROOT), "-f", str(self.folder / "build.ninja"), "-k", "0"]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
            code, log = result.returncode, result.stdout + result.stderr
        except OSError as error:
            code, log = 1, f"error: ninja did not start: {error}"
        (folder / "build.log").write_text(log)
        if code != 0:
            sys.stderr.write(log[-8000:])
        made = {}
        for name, path in self.modules.items():
            report = self._failure(name, log) if code != 0 else None
            if report is None and (ROOT / path).exists():
                made[name] = ROOT / path
            else:
                first = next((line for line in (report or "").splitlines() if "error" in line), None)
                reason = first.strip() if first else f"see {self.folder}/build.log"
                self.missing[name.removeprefix("_")] = f"it did not compile: {reason}"
        if not any(name.startswith("_cpu") for name in made):
            self.missing["cpu"] = self.missing["cpu_base"]
        return made

    def _failure(self, name: str, log: str) -> str | None:
        """What a failed build said about one module; None if nothing, so that the module is good."""
        # Ninja leaves an older module in place when its objects fail to compile, so its being there proves nothing.
        pattern = r"^FAILED: (?:\[code=\d+\] )?(\S+).*\n.*\n((?:(?!\[\d+/\d+\] |FAILED: |ninja: ).*\n?)*)"
        failed = re.findall(pattern, log, re.MULTILINE)
        if not failed:  # ninja itself did not run
            return log
        mine = [
            text for target, text in failed if target.startswith((f"{self.folder / name}/", str(self.modules[name])))
        ]
        return "".join(mine) if mine else None

    def info(self, made: dict[str, Path]) -> dict:
        info = {"version": version(), "modules": sorted(made), "missing": self.missing}
        if made:
            first = subprocess.run([*shlex.split(self.compiler), "--version"], capture_output=True, text=True).stdout
            info["compiler"] = first.splitlines()[0] if first else self.compiler
            info["flags"] = {name: " ".join(self.flags[name].replace(self.includes, "").split()) for name in made}
            info["sanitize"] = os.environ.get("GENFAST_SANITIZE", "")
        return info


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a process that has the old one loaded keeps it, a new one never sees half."""
    if path.exists() and path.read_bytes() == content:
        return
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


class BuildNative(build_ext):
    """``build_ext`` that runs the plan and puts the finished modules beside the package."""

    def run(self) -> None:
        sanitized = "-sanitize" if os.environ.get("GENFAST_SANITIZE") else ""
        plan = Plan(Path("build") / f"native-{sys.implementation.cache_tag}{sanitized}")
        made = plan.run()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / "genfast"
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob(f"_c*{SUFFIX}"):
            if old.name.removesuffix(SUFFIX) not in made:
                old.unlink()
        for path in made.values():
            _replace(target / path.name, path.read_bytes())
        _replace(target / "_build_info.json", (json.dumps(plan.info(made), indent=2) + "\n").encode())
        for module, reason in plan.missing.items():
            print(f"genfast: the {module} module is not built: {reason}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    name="genfast",
    version=version(),
    description="Fused kernels for generative models: diffusion samplers, discrete diffusion, VQ, gradient buckets",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `genfast/kernels` is a link to `kernels`: one place for the Triton sources, one package when installed.
    packages=find_packages(include=["genfast", "genfast.*"]),
    package_data={"genfast": ["_build_info.json", "py.typed"]},
    ext_modules=[Extension("genfast._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
    install_requires=["torch>=2.7", "numpy"],
    extras_require={
        "triton": ["triton>=3.3"],
        "nvtx": ["nvtx"],
        "demo": ["scikit-learn", "pillow", "tqdm"],
        "bench": ["diffusers", "matplotlib"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "scipy", "diffusers"],
    },
    entry_points={"console_scripts": ["genfast = genfast.cli:main"]},
    zip_safe=False,
)
