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
ISA_FLAGS = {
    "base": "-march=x86-64",
    "avx2": AVX2,
    "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512",
}
"""Instruction sets with a module of their own. Another set is one more line here, and one in genfast/backends.py."""

CUDA_ARCHS = "8.0;9.0;10.0+PTX"


def version() -> str:
    text = (ROOT / "genfast" / "__init__.py").read_text()
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


class Plan:
    """The ninja file and what it is expected to make."""

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
        self.includes = f"-I{ROOT / 'csrc'} -I{tools['pybind11']} -I{sysconfig.get_path('include')}"
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
        if cxx is None or shutil.which(cxx.split()[0]) is None:
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
            self._module(name, "cxx", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), flags, f"{self.link} -ldl")

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
        folder = ROOT / "csrc" / "cuda"
        self._module("_cuda", "nvcc", sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")]), flags, "", link="nvlink")

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
        self.lines += [f"build {target}: {rule} {source}", f"  flags = {flags}"]
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
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        # -k 0: a module that fails (an old compiler without AVX-512, say) must not take the others with it.
        command = [self.ninja, "-C", str(self.folder), "-k", "0"]
        result = subprocess.run(command, capture_output=True, text=True)
        log = self.folder / "build.log"
        log.write_text(result.stdout + result.stderr)
        if result.returncode != 0:
            sys.stderr.write(result.stdout[-8000:])
        made = {}
        for name, path in self.modules.items():
            if path.exists() and not self._stale(result, name):
                made[name] = path
            else:
                first = next((line for line in result.stdout.splitlines() if "error" in line), "see build.log")
                self.missing[name.removeprefix("_")] = f"it did not compile: {first.strip()}"
        if not any(name.startswith("_cpu") for name in made):
            self.missing["cpu"] = next(iter(self.missing.values()))
        return made

    def _stale(self, result: subprocess.CompletedProcess, name: str) -> bool:
        # Ninja leaves an older module in place when its objects fail to compile.
        failed = re.findall(r"^FAILED: (?:\[code=\d+\] )?(\S+)", result.stdout, re.MULTILINE)
        return any(f"/{name}/" in target or f"/{name}{SUFFIX}" in target for target in failed)

    def info(self, made: dict[str, Path]) -> dict:
        info = {"version": version(), "modules": sorted(made), "missing": self.missing}
        if made:
            first = subprocess.run([*self.compiler.split(), "--version"], capture_output=True, text=True).stdout
            info["compiler"] = first.splitlines()[0] if first else self.compiler
            info["flags"] = {name: self.flags[name].replace(f"{ROOT}/", "") for name in made}
            info["sanitize"] = os.environ.get("GENFAST_SANITIZE", "")
        return info


class BuildNative(build_ext):
    """``build_ext`` that runs the plan and puts the finished modules beside the package."""

    def run(self) -> None:
        sanitized = "-sanitize" if os.environ.get("GENFAST_SANITIZE") else ""
        plan = Plan(ROOT / "build" / f"native-{sys.implementation.cache_tag}{sanitized}")
        made = plan.run()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / "genfast"
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob(f"_c*{SUFFIX}"):
            old.unlink()
        for path in made.values():
            shutil.copy2(path, target / path.name)
        (target / "_build_info.json").write_text(json.dumps(plan.info(made), indent=2) + "\n")
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
    },
    entry_points={"console_scripts": ["genfast = genfast.cli:main"]},
    zip_safe=False,
)
