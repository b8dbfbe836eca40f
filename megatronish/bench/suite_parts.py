"""What the suite measures, part by part; each is a function of a Request, in a process of its own.

On CPU every part runs the same code on sizes that take seconds.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatronish import __version__, formulas, native
from megatronish.bench import step
from megatronish.bench.step_peer import matrix_tflops
from megatronish.bench.suite_part import Request
from megatronish.bench.workers import processor_name
from megatronish.comm import streams
from megatronish.config_loader import load_config
from megatronish.errors import UserError
from megatronish.observe.flops import num_cores

_PACKAGES = ("triton", "transformers", "flash-attn", "liger-kernel", "transformer-engine", "deepspeed")
_ROOT = Path(__file__).resolve().parents[2]
"""The checkout, which has the configs and setup.py."""
_ONE_DEVICE = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.data=1",
    "parallel.sequence=false",
    "parallel.recompute=none",
    "data.validation_fraction=0",
    "train.eval_interval=0",
    "train.dtype=bfloat16",
    "train.tokens=100000000000",
)
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpt2_124m": ("gpt2_124m.yaml", ("train.micro_batch_size=16", "train.global_batch_size=64")),
    "gpt_1.3b": (
        "gpt3_175b.yaml",
        # GPT-3 XL with 16 heads of 128.
        (
            *("model.num_layers=24", "model.hidden_size=2048", "model.num_heads=16", "model.mlp_size=8192"),
            *("train.micro_batch_size=4", "train.global_batch_size=16"),
        ),
    ),
    "llama3_8b, 4 layers": ("llama3_8b.yaml", ("model.num_layers=4", "train.micro_batch_size=1", "train.global_batch_size=4")),
}
"""Name -> config and what is set over it. Ours and the peer must fit one GPU of 80 GB together."""
_SMALL = (
    *("model.num_layers=1", "model.hidden_size=64", "model.num_heads=2", "model.mlp_size=128", "model.vocab_size=512"),
    *("data.sequence_length=64", "train.micro_batch_size=1", "train.global_batch_size=2", "train.dtype=float32"),
)
_SMALL_HEADS = {"llama3_8b, 4 layers": ("model.num_kv_heads=1",)}
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def describe(request: Request) -> None:
    """The device and the versions. Without the GPU that was asked for: exit code 2, with a line."""
    kind = "cpu" if request.device_kind == "cpu" else "cuda"
    if kind == "cuda" and not streams.num_gpus():
        print("no GPU is visible to this torch; --device cpu tries the suite at small sizes", file=sys.stderr)
        sys.exit(2)
    found: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    versions = {
        "megatronish": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    request.save(
        {
            "device": streams.device_name(streams.choose_device(0, 1)) if kind == "cuda" else processor_name(),
            "device_kind": kind,
            "versions": {**versions, "python": platform.python_version(), **found},
            "native": native.describe().splitlines(),
        }
    )


def limits(request: Request) -> None:
    """What the device can do: products of matrices by dtype, a copy, and how often the host can launch something small."""
    device = streams.choose_device(0, 1)
    result: dict[str, Any] = {"bench": "limits", "device": streams.device_name(device), "matrix_tflops": {}, "published_tflops": {}}
    for dtype in ("bfloat16", "float16", "float32"):
        if not request.on_gpu and dtype == "float16":
            continue  # CPUs make it up from float32
        rates = [matrix_tflops(device, dtype, num_cores()) for _ in range(7 if request.on_gpu else 1)]
        result["matrix_tflops"][dtype] = statistics.median(rates)
        result["published_tflops"][dtype] = formulas.peak_tflops(result["device"], dtype)
        request.save(result)
    size = 1 << 30 if request.on_gpu else 1 << 24
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    # Read and written.
    result["copy_bytes"] = size
    result["copy_gigabytes_per_second"] = (
        2 * size / _median_seconds(lambda: target.copy_(source), device, 10 if request.on_gpu else 1) / 1e9
    )
    one = torch.zeros(1, device=device)
    result["launch_microseconds"] = _median_seconds(lambda: one.add_(1), device, 1000) * 1e6
    request.save(result)


def _median_seconds(call: Any, device: torch.device, calls: int) -> float:
    """Of one call, back to back; the median of seven such rows."""
    rows = []
    for _ in range(8):
        begun = streams.wall_time(device)
        for _ in range(calls):
            call()
        rows.append((streams.wall_time(device) - begun) / calls)
    return statistics.median(rows[1:])


def training(request: Request) -> None:
    """Our trainer against the compiled Hugging Face model, by model; what one of them cannot do does not stop the others."""
    result: dict[str, Any] = {"bench": "training", "models": {}}
    for number, (model, (file, settings)) in enumerate(MODELS.items()):
        share, name = request.seconds_left / (len(MODELS) - number), model
        try:
            bench = training_bench(model, file, settings, on_gpu=request.on_gpu, seconds=share)
            if not request.on_gpu:
                name += f", shrunk to {formulas.num_parameters(bench.config.model) / 1e6:.1g} M parameters for CPU"
            request.tell(f"{name}: {share:.0f} s")
            row = step.measure(bench, lambda done, name=name: request.tell(f"{name}: round {done + 1}"))
            result["models"][name] = {**row, "shrunk": not request.on_gpu}
        except (RuntimeError, UserError) as error:
            result["models"][name] = {"error": str(error).partition("\n")[0]}
        request.save(result)
    if failed := [f"{name}: {row['error']}" for name, row in result["models"].items() if "error" in row]:
        print("; ".join(failed), file=sys.stderr)
        sys.exit(1)


def training_bench(name: str, file: str, settings: tuple[str, ...], *, on_gpu: bool, seconds: float) -> step.StepBench:
    """The bench of a row of MODELS; on CPU of one small layer, and with a peer that is not compiled, which takes minutes."""
    path = _ROOT / "configs" / file
    if not path.is_file():
        raise UserError(f"{path} is not there: run from a checkout, installed with `make setup`")
    small = () if on_gpu else (*_SMALL, *_SMALL_HEADS.get(name, ()))
    config = load_config(path, [*_ONE_DEVICE, *settings, *small], world_size=1)
    # The last rounds begin before the time is over, and processes need some to end.
    return step.StepBench(config, 1, 5 if on_gpu else 2, 3 if on_gpu else 1, num_cores(), compiled=on_gpu, seconds=0.8 * seconds)


def kernels(request: Request) -> None:
    """Every op but the optimizer's against every peer that is installed."""
    _kernels(request, lambda op: not _is_optimizer(op))


def unproven(request: Request) -> None:
    """Bodies that run only where they are named, since they may wait for ever, beside those that they would replace."""
    if not request.on_gpu:
        request.save({"skipped": "these bodies need a GPU"})
        return
    from megatronish.bench.kernel_ops import OPS
    from megatronish.kernels.registry import only_by_name

    names = only_by_name(choice for op in OPS.values() for choice in op.choices)
    _kernels(request, lambda op: bool(only_by_name(OPS[op].choices)), impls=("torch", "triton", *names))


def adamw(request: Request) -> None:
    """AdamW and the whole optimizer step, likewise."""
    _kernels(request, _is_optimizer)


def _is_optimizer(op: str) -> bool:
    return op.startswith(("adamw", "optimizer"))


def _kernels(request: Request, wanted: Callable[[str], bool], *, impls: Sequence[str] = ()) -> None:
    from megatronish.bench.kernel_ops import OPS
    from megatronish.bench.kernels import KernelsBench, measure

    torch.set_num_threads(num_cores())
    names = [name for name in OPS if wanted(name)]
    device = streams.choose_device(0, 1)
    result: dict[str, Any] = {}

    def on_case(name: str, done: int, total: int) -> None:
        if name:
            request.tell(name)

    for name in names:  # case by case: what is done is kept, should a later one hang
        bench = KernelsBench(ops=[name], impls=impls, device=device, rounds=7 if request.on_gpu else 2)
        keep = partial(_keep, request, result)
        result = joined(result, measure(bench, on_case, seconds=max(0.0, request.seconds_left), on_result=keep))
        request.save(result)
    if result["wrong"]:
        print(f"wrong results: {'; '.join(result['wrong'])}", file=sys.stderr)
        sys.exit(1)


def _keep(request: Request, before: dict[str, Any], found: dict[str, Any]) -> None:
    request.save(joined(before, found))


def joined(before: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two results of `bench kernels` on other ops of one device as one; the limits are the means over ops that were measured."""
    if not before:
        return {**more, "limits_of_ops": [more["limits"]]}
    lists = {key: before[key] + more[key] for key in ("rows", "left_out", "wrong")}
    missing = {(row["implementation"], row["reason"]): row for row in (dict(row) for row in before["missing"])}
    for row in more["missing"]:
        known = missing.setdefault((row["implementation"], row["reason"]), {**row, "ops": []})
        known["ops"] = known["ops"] + row["ops"]
    of_ops = [*before["limits_of_ops"], more["limits"]]
    rates = {key: [limits[key] for limits in of_ops if limits[key] is not None] for key in more["limits"]}
    limits = {key: statistics.mean(values) if values else None for key, values in rates.items()}
    asked = list(dict.fromkeys(before["asked"] + more["asked"]))
    return {**before, **lists, "missing": list(missing.values()), "asked": asked, "limits": limits, "limits_of_ops": of_ops}


def startup(request: Request) -> None:
    """Two starts of a process that calls every op once, the first with an empty cache of compiled kernels; and the native build."""
    body = "triton" if request.on_gpu else "torch"
    result: dict[str, Any] = {"bench": "startup of kernels", "body": body, "starts": {}}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            request.tell(f"{name} start")
            begun = time.perf_counter()
            rows = _calls(request, ["--impl", body, "--dtype", "bfloat16"], environment={"TRITON_CACHE_DIR": cache})
            seconds = {row["op"]: row["seconds"] for row in rows}
            result["starts"][name] = {"process_seconds": time.perf_counter() - begun, "first_call_seconds": seconds}
            request.save(result)
    result["native_build"] = _native_build(request) if request.on_gpu else {"reason": "left out on CPU"}
    request.save(result)


def _native_build(request: Request) -> dict[str, Any]:
    """Seconds to compile csrc/ from nothing."""
    if not (_ROOT / "setup.py").is_file() or not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file()):
        return {"reason": "no nvcc, or no checkout"}
    request.tell("native build")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-temp", f"{folder}/temp", "--build-lib", f"{folder}/lib"]
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=_ROOT, capture_output=True, text=True, timeout=max(1.0, request.seconds_left), check=False
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"not done in {time.perf_counter() - begun:.0f} s"}
        seconds = time.perf_counter() - begun
        record = Path(folder) / "lib/megatronish/native_build.json"
        outcome = json.loads(record.read_text()) if record.is_file() else {"error": done.stderr.strip()[-300:]}
    return {"seconds": seconds, "outcome": outcome}


def sanitizer(request: Request) -> None:
    """Every body of every op on its sample inputs against float64, and ours under each tool of compute-sanitizer; skipped where
    that is not."""
    tool = _compute_sanitizer() if request.on_gpu else None
    if tool is None:
        request.save({"skipped": "compute-sanitizer is not installed" if request.on_gpu else "compute-sanitizer needs a GPU"})
        return
    result: dict[str, Any] = {"bench": "sanitizer", "tools": {}}
    result["bodies"] = _calls(request, [])
    request.save(result)
    for name in SANITIZER_TOOLS:
        if request.seconds_left < 5:
            result["tools"][name] = {"error": "out of time"}
            continue
        request.tell(name)
        result["tools"][name] = _under(request, [str(tool), "--tool", name, "--error-exitcode", "99", "--print-limit", "5"])
        request.save(result)
    request.save(result)
    wrong = [f"{row['op']} {row['body']} {row['dtype']}: {row['wrong']}" for row in result["bodies"] if row["wrong"]]
    found = [f"{name}: {row['error']}" for name, row in result["tools"].items() if row.get("error")]
    if wrong or found:
        print("; ".join([*wrong, *found]), file=sys.stderr)
        sys.exit(1)


def _compute_sanitizer() -> Path | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [shutil.which("compute-sanitizer"), f"{home}/bin/compute-sanitizer", f"{home}/compute-sanitizer/compute-sanitizer"]
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def _under(request: Request, prefix: list[str]) -> dict[str, Any]:
    """Our bodies under a tool: its summary, and `error` where it found something or was not done."""
    command = [*prefix, *_calls_command(["--impl", "triton", "--impl", "cuda"])]
    # Blocks of torch's allocator have others beside them, so that what goes past the end would not be seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(1.0, request.seconds_left), check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {time.perf_counter() - begun:.0f} s"}
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
    last = lines[-1] if lines else done.stderr.strip()[-300:]
    row: dict[str, Any] = {"seconds": time.perf_counter() - begun, "summary": last}
    return row | ({"error": last, "first_lines": lines[:40]} if done.returncode else {})


def _calls_command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "megatronish.bench.suite_calls", *arguments]


def _calls(request: Request, arguments: list[str], *, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The rows of suite_calls.py, run in a process. RuntimeError if it fails."""
    device = [] if request.on_gpu else ["--device", "cpu"]
    command, timeout = _calls_command([*arguments, *device]), max(1.0, request.seconds_left)
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"suite_calls ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
