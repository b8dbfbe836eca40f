"""Builds the native modules: `_cpu` with the C++ compiler, `_cuda` with nvcc. Needs neither torch nor a GPU.

Without a compiler the package still installs; every operation then runs in Python. What was built, and why the rest was not, is
written to `megatronish/native_build.json`; `python -m megatronish.native` prints it. `MEGATRONISH_CUDA=0` leaves the CUDA part out,
`=1` makes its failure an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CUDA_ARCHS = ("80", "90a", "100")
FUSED = ("attention", "norms")
"""CUDA sources that may use fused multiply-add; the others round as their CPU code does."""


def find_nvcc() -> str | None:
    """Path of nvcc: CUDA_HOME first, then PATH, then the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in candidates if path.is_file()), None)


def cuda_arch_flags(nvcc: str) -> list[str]:
    """Machine code for each of CUDA_ARCHS that this nvcc knows, and PTX of the newest for the devices that follow."""

    def said(option: str) -> str:
        return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout

    # nvcc 13.0 lists no architecture with "a" there; its help names them all.
    listed, named = said("--list-gpu-arch").split(), re.findall(r"compute_\w+", said("--help"))
    archs = []
    for arch in CUDA_ARCHS:
        plain = arch.rstrip("a")
        if f"compute_{plain}" in listed:
            archs.append(arch if f"compute_{arch}" in (*listed, *named) else plain)
    if not archs:
        raise CompileError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # PTX of an architecture with "a" runs on that alone.
    newest = archs[-1].rstrip("a")
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def reason_of(error: Exception) -> str:
    """One short line: a failed command by its program and exit status, anything else by its text."""
    text = " ".join(str(error).split())
    command = re.search(r"ommand '\['?([^', ]+)'.*(exit status \d+)", text)
    return f"{command[1]} failed ({command[2]})" if command else text[:400]


class BuildNative(build_ext):
    """Builds what can be built and records what could not, with the reason."""

    record: dict[str, str]

    def run(self) -> None:
        self.record = {}
        wanted = os.environ.get("MEGATRONISH_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"MEGATRONISH_CUDA={wanted!r}: must be 0 (leave out), 1 (require) or unset (build where nvcc is)")
        super().run()
        for name, outcome in self.record.items():
            print(f"megatronish._{name}: {outcome}")
        here = Path(__file__).resolve().parent
        root = here if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_lib)
        path = root / "megatronish" / "native_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.record, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition("_")[2]
        # An object of one module must not be taken for the other's: both compile bindings.cpp.
        self.build_temp = str(Path(self.build_temp).parent / f"{Path(self.build_temp).name.split('+')[0]}+{name}")
        try:
            if name == "cuda":
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:
            # A module of an earlier build must not stand in for the one that failed.
            for folder in (Path(self.get_ext_fullpath(ext.name)).parent, Path(__file__).resolve().parent / "megatronish"):
                (folder / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
            self.record[name] = f"not built: {reason_of(error)}"
            if name == "cuda" and os.environ.get("MEGATRONISH_CUDA") == "1":
                raise SystemExit(f"MEGATRONISH_CUDA=1, but the CUDA part was {self.record[name]}") from error
            # Extensions are optional: setuptools goes on after a CompileError.
            raise CompileError(str(error)) from error
        self.record[name] = "built"

    def build_cuda(self, ext: Extension) -> None:
        """Kernels and bindings, side by side, then one module with a static CUDA runtime."""
        if os.environ.get("MEGATRONISH_CUDA") == "0":
            raise CompileError("MEGATRONISH_CUDA=0")
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *cuda_arch_flags(nvcc)]
        if os.environ.get("CXX"):
            command.append(f"-ccbin={os.environ['CXX']}")
        command += [f"-D{macro}={value}" for macro, value in ext.define_macros]
        command += [f"-I{folder}" for folder in [*ext.include_dirs, sysconfig.get_paths()["include"]]]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda source: self.compile_cuda(command, Path(source)), ext.sources))
        self.run_nvcc([nvcc, "-shared", "-cudart=static", *objects, "-o", str(output)])

    def compile_cuda(self, command: list[str], source: Path) -> str:
        """The object file; what ptxas says of registers and spills goes to build/cuda, where a test reads it."""
        target = Path(self.build_temp) / f"{source.stem}.o"
        exact = [] if source.stem in FUSED else ["--fmad=false"]
        texts = [path.read_text() for path in [source, *sorted(source.parent.glob("*.h"))]]
        said = self.run_nvcc([*command, "-Xptxas=-v", *exact, "-c", str(source), "-o", str(target)])
        if source.suffix == ".cu":
            report = Path(__file__).resolve().parent / "build" / "cuda" / f"{source.stem}.ptxas"
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(hashlib.sha256("".join(texts).encode()).hexdigest() + "\n" + said)
        return str(target)

    def run_nvcc(self, command: list[str]) -> str:
        """What it printed; CompileError with that where it fails."""
        print(" ".join(command), flush=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise CompileError(f"nvcc ended with {result.returncode}: {(result.stderr or result.stdout)[-2000:]}")
        return result.stdout + result.stderr


def extensions() -> list[Extension]:
    """The two modules; neither stops the installation when it cannot be built."""
    import pybind11  # present while building, not while installing from a wheel

    shared = {"include_dirs": ["csrc", pybind11.get_include()], "language": "c++", "optional": True}
    # -ffp-contract=off: no fused multiply-add, so every instruction set, and the GPU, rounds alike.
    cpu_flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    return [
        Extension(
            "megatronish._cpu",
            ["csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("adamw", "bpe", "dropout", "gather", "order"))],
            define_macros=[("MEGATRONISH_CPU", "1")],
            depends=["csrc/cpu/bpe.h", "csrc/cpu/cpu.h"],
            extra_compile_args=cpu_flags,
            extra_link_args=["-pthread"],
            **shared,
        ),
        Extension(
            "megatronish._cuda",
            ["csrc/bindings.cpp", *(f"csrc/cuda/{name}.cu" for name in ("adamw", "attention", "norms"))],
            define_macros=[("MEGATRONISH_CUDA", "1")],
            depends=[f"csrc/cuda/{name}.h" for name in ("cuda", "device", "mma")],
            **shared,
        ),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
