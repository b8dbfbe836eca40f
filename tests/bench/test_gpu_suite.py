"""The suite: parts are processes with their share of the time; one that fails or hangs is recorded and the rest goes on; what was
measured by then is in the file."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from megatronish.bench import gpu_suite, suite_parts, suite_tables
from megatronish.bench.gpu_suite import PARTS, Part, Suite, run_suite, suite_of
from megatronish.bench.show import show
from megatronish.bench.suite_calls import call_all
from megatronish.bench.suite_part import Request
from megatronish.errors import UserError
from megatronish.kernels.registry import bodies_of
from megatronish.kernels.table import KERNELS
from tests.bench import suite_stand_ins

STAND_INS = "tests.bench.suite_stand_ins"


def is_running(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shown(file: Path) -> str:
    out = StringIO()
    for part in show(file):
        Console(file=out, width=200).print(part)
    return out.getvalue()


def test_a_part_that_fails_or_hangs_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    right: Any = gpu_suite.run_part

    def run_part(target: str, *more: Any) -> dict[str, Any]:
        return right(target.replace("megatronish.bench.suite_parts", STAND_INS), *more)

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    names = {"first": "fails", "second": "hangs", "third": "works"}
    suite = Suite({name: Part(f"{STAND_INS}:{function}", 1) for name, function in names.items()}, "cpu", 30, tmp_path / "r.json")
    file, result = run_suite(suite, told.append)
    parts = json.loads(file.read_text())["parts"]
    assert parts == result["parts"] and list(parts) == list(names)
    assert parts["first"]["error"] == "RuntimeError: the card fell out" and parts["first"]["half"] == 1
    assert parts["second"]["error"].startswith("not done after") and not is_running(parts["second"]["child"])
    assert "error" not in parts["third"]
    assert result["suite"] == "gpu" and result["device"] == "2 Cores of X"
    assert "third: half way" in told and any(line.startswith("second: failed: not done") for line in told)
    text = shown(file)
    assert "failed: first: RuntimeError: the card fell out" in text and "limit" in text


def test_limits_and_training_on_cpu_are_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("cpu", tmp_path / "out.json", 60)
    suite_parts.limits(request)
    found = json.loads(request.out.read_text())
    assert found["matrix_tflops"]["bfloat16"] > 0 and found["copy_gigabytes_per_second"] > 0 and found["launch_microseconds"] > 0

    seen = {}

    def measure(bench: Any, on_round: Any) -> dict[str, Any]:
        seen[bench.config.name] = bench
        if bench.config.name == "gpt3_175b":
            raise RuntimeError("out of memory\nand more")
        return {"tokens_per_second": {"megatronish": 1234.0}, "parameters": 1e5}

    monkeypatch.setattr(suite_parts.step, "measure", measure)
    with pytest.raises(SystemExit):
        suite_parts.training(request)
    found = json.loads(request.out.read_text())
    names = {name.partition(", shrunk to ")[0]: row.get("error", "") for name, row in found["models"].items()}
    assert names == {"gpt2_124m": "", "gpt_1.3b": "out of memory", "llama3_8b, 4 layers": ""}
    assert all(name.endswith(" M parameters for CPU") for name in found["models"])
    lines = [*map(str, suite_tables.training(found)), *suite_tables.summary({"parts": {"training": found}})]
    assert any("1,234 tokens/s" in line for line in lines)
    assert not any("matrix rate" in line or "ratio" in line or " x " in line for line in lines)
    assert all(bench.num_ranks == 1 and not bench.compiled and bench.seconds < 60 for bench in seen.values())


def test_kernels_are_measured_op_by_op_and_what_is_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(bench: Any, on_case: Any, seconds: float, on_result: Any) -> dict[str, Any]:
        (op,) = bench.ops
        if op == "swiglu":
            on_result(of_op("swiglu, its first case"))
            raise RuntimeError("the card fell out")
        return of_op(op)

    def of_op(op: str) -> dict[str, Any]:
        missing = [{"implementation": "cuda", "reason": "tensors on CPU", "ops": [op]}]
        lists = {"rows": [op], "left_out": [], "wrong": [], "missing": missing, "asked": ["deepspeed"]}
        return {"bench": "kernels", **lists, "limits": {"matrix_tflops": 1.0 if op == "rms_norm" else 3.0, "copy": None}}

    monkeypatch.setattr("megatronish.bench.kernel_ops.OPS", dict.fromkeys(("rms_norm", "square_sum", "adamw", "swiglu")))
    monkeypatch.setattr("megatronish.bench.kernels.measure", measure)
    request = Request("cpu", tmp_path / "out.json", 100)
    with pytest.raises(RuntimeError):
        suite_parts.kernels(request)
    kept = json.loads(request.out.read_text())
    assert kept["rows"] == ["rms_norm", "square_sum", "swiglu, its first case"] and kept["asked"] == ["deepspeed"]
    assert kept["missing"] == [{"implementation": "cuda", "reason": "tensors on CPU", "ops": kept["rows"]}]
    assert kept["limits"]["matrix_tflops"] == pytest.approx(7 / 3) and kept["limits"]["copy"] is None


def test_what_cannot_run_on_cpu_is_skipped_and_is_no_failure(tmp_path: Path) -> None:
    names = ("sanitizer", "unproven")
    suite = Suite({name: PARTS[name] for name in names}, "cpu", 60, tmp_path / "r.json")
    told: list[str] = []

    def run_part(target: str, *more: Any) -> dict[str, Any]:
        function = target.partition(":")[2]
        request = Request("cpu", tmp_path / function, 60)
        getattr(suite_parts if function in names else suite_stand_ins, function)(request)
        return json.loads(request.out.read_text())  # type: ignore[no-any-return]

    with patch.object(gpu_suite, "run_part", run_part):
        file, result = run_suite(suite, told.append)
    assert not any("error" in part for part in result["parts"].values())
    assert "sanitizer: skipped: compute-sanitizer needs a GPU" in told
    assert "skipped: compute-sanitizer needs a GPU" in shown(file) and "skipped: these bodies need a GPU" in shown(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_how_to_try_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        suite_parts.describe(Request("auto", tmp_path / "out.json", 60))
    assert ended.value.code == 2
    line = "no GPU is visible to this torch; --device cpu tries the suite at small sizes"
    assert capsys.readouterr().err.strip() == line
    with patch.object(gpu_suite, "run_part", lambda *given: {"error": line}), pytest.raises(UserError, match=f"^{line}$"):
        run_suite(suite_of([]), print)


def test_models_of_the_suite_are_what_they_are_called() -> None:
    sizes = {}
    for name, (file, settings) in suite_parts.MODELS.items():
        bench = suite_parts.training_bench(name, file, settings, on_gpu=True, seconds=100)
        assert bench.compiled and bench.config.train.dtype == "bfloat16" and bench.config.parallel.recompute == "none"
        sizes[name] = suite_parts.formulas.num_parameters(bench.config.model) / 1e9
    assert sizes["gpt2_124m"] == pytest.approx(0.124, rel=0.01) and sizes["gpt_1.3b"] == pytest.approx(1.3, rel=0.02)
    # Llama 3 8B has 0.218 G in a layer, and 1.05 G in embedding and projection.
    assert sizes["llama3_8b, 4 layers"] == pytest.approx(4 * 0.218 + 1.05, rel=0.01)


def test_a_body_that_is_wrong_or_breaks_is_told_from_one_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "rms_norm": "off by 1.0e+00 on a small case, allowed 1e-6",
        "swiglu": "CompilationError: at 1:0",
        "gelu": "tensors on CPU",
    }
    monkeypatch.setattr("megatronish.bench.suite_calls.why_not", lambda kernel, *rest: said.get(kernel.name))
    rows = {row["op"]: row for row in call_all(["torch", "native"], ["float32"], torch.device("cpu"))}
    assert rows["rms_norm"]["wrong"] and rows["swiglu"]["wrong"] and not rows["gelu"]["wrong"] and rows["gelu"]["refused"]
    assert not rows["adamw"]["wrong"] and not rows["adamw"]["refused"]


def test_every_op_with_several_bodies_is_called_and_right() -> None:
    rows = list(call_all(["torch", "native"], ["float32"], torch.device("cpu")))
    assert {row["op"] for row in rows} == {name for name, row in KERNELS.items() if len(bodies_of(row.chosen_as)) > 1}
    assert not any(row["wrong"] or row["refused"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "kernels,nothing"], "--parts nothing: no such part; there are limits, kernels"),
        (["--minutes", "0"], "--minutes 0: must be above 0, and at most a day"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        suite_of(arguments)


def test_the_command_line_chooses_parts_in_the_suites_order() -> None:
    suite = suite_of(["--parts", "training,limits", "--minutes", "2"])
    assert list(suite.parts) == ["limits", "training"] and suite.seconds == 120 and suite.parts["limits"] is PARTS["limits"]
