"""The kernels bench: what is wrong is said and not timed, what is counted is what moves, every op has a case of every preset."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from megatronish.bench import kernel_ops, kernel_peers, kernel_plots, limits, show
from megatronish.bench.cli import app
from megatronish.bench.kernel_op import BenchOp
from megatronish.bench.kernel_ops import OPS
from megatronish.bench.kernel_shapes import DIMENSIONS, presets, shapes_of
from megatronish.bench.kernel_table import fastest
from megatronish.bench.kernels import KernelsBench, measure, plot, render, summary
from megatronish.errors import UserError
from megatronish.kernels import registry
from megatronish.kernels.compare import results_and_gradients
from megatronish.kernels.registry import Implementation

SHAPES = """
attention: {S: 16, B: 1, H: 2, G: 1, K: 8}
rms_norm: [{T: 8, D: 16}, {T: 8, D: 32}]
gelu: {T: 4, F: 8}
cross_entropy: {T: 6, V: 20}
linear_cross_entropy: {T: 6, D: 8, V: 20, C: 2}
optimizer_step: {N: 1000}
adamw_16bit: {N: 1000}
"""
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def short_limits() -> Iterator[None]:
    """A copy of 64 MiB in each turn would take most of the time."""
    with patch.dict(limits._COPY_BYTES, cpu=1 << 20), patch.dict(limits._MATRIX, {("cpu", 4): 64}):
        yield


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shapes") / "shapes.yaml"
    path.write_text(SHAPES)
    return str(path)


@pytest.fixture(scope="module")
def result(shapes: str) -> dict[str, Any]:
    found = measure(KernelsBench(shapes=shapes, rounds=2, device=CPU))
    return json.loads(json.dumps(found, allow_nan=False))


def _texts(table: Any) -> str:
    return "\n".join(str(cell) for column in table.columns for cell in column.cells) + str(table.caption)


def test_every_body_that_can_run_here_is_right_and_timed(result: dict[str, Any]) -> None:
    ran = {(row["op"], row["implementation"]) for row in result["rows"] if row["milliseconds"] is not None}
    assert {(op, "torch") for op in ("attention", "rms_norm", "gelu", "cross_entropy", "linear_cross_entropy")} <= ran
    assert {("optimizer_step", "reference"), ("optimizer_step", "torch-fused"), ("attention", "sdpa-flash")} <= ran
    assert not result["wrong"] and all(row["error"] is None or row["error"] <= 1 for row in result["rows"] if row["kind"] == "body")
    assert {row["pass"] for row in result["rows"] if row["op"] == "attention"} == {"forward", "backward"}
    assert all(len(row["all_milliseconds"]) == 2 for row in result["rows"] if row["milliseconds"] is not None)
    assert result["limits"]["matrix_tflops"] > 0 and result["limits"]["copy_gigabytes_per_second"] > 0


def test_what_did_not_run_is_said_with_its_reason(result: dict[str, Any]) -> None:
    reasons = {item["implementation"]: item["reason"] for item in result["missing"]}
    assert "on CPU" in reasons["cuda"] and set(result["asked"]) == {"torch-compile", "deepspeed", "triton-tma"}
    ran = {row["implementation"] for row in result["rows"]}
    assert not ran & set(result["asked"])


def test_the_table_the_pictures_and_show_have_all_that_was_timed(result: dict[str, Any], tmp_path: Path) -> None:
    text = _texts(render(result))
    assert all(row["implementation"] in text for row in result["rows"])
    names = {file.name for file in plot(result, tmp_path / "plots")}
    assert names == {f"kernels-{what}.{kind}" for what in ("limit", "roofline", "sizes") for kind in ("svg", "png")}
    assert all((tmp_path / "plots" / name).stat().st_size > 1000 for name in names)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(result))
    assert _texts(show.show(file)[0]) == text
    file.write_text(
        json.dumps({"suite": "gpu", "device": "G", "date": "D", "parts": {"kernels": result, "of tomorrow": {"ok": True}}})
    )
    parts = show.show(file)
    assert parts[0] == "gpu suite, G, D" and _texts(parts[2]) == text and any('"ok": true' in str(part) for part in parts)


def test_a_wrong_body_is_reported_and_not_timed(shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = Implementation(lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh") * 1.001)
    monkeypatch.setitem(registry._ops["gelu_backward"].bodies, "triton", body)
    right = Implementation(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    monkeypatch.setitem(registry._ops["gelu"].bodies, "triton", right)
    file = tmp_path / "out.json"
    ran = CliRunner().invoke(app, ["kernels", "--op", "gelu", "--shapes", shapes, "--rounds", "1", "--json", str(file)])
    assert ran.exit_code == 1 and "WRONG: gelu backward: triton" in ran.output
    assert "gelu T 4 F 8: 1 of 1" in ran.stderr and f"wrote {file}; `megatronish bench show {file}` prints it" in ran.stdout
    rows = {(r["implementation"], r["pass"]): r for r in json.loads(file.read_text())["rows"]}
    assert rows["triton", "backward"]["status"] == "WRONG" and rows["triton", "backward"]["error"] > 1
    assert not rows["triton", "backward"]["all_milliseconds"] and rows["triton", "backward"]["milliseconds"] is None
    assert rows["triton", "forward"]["status"] == "ok" and rows["triton", "forward"]["milliseconds"] > 0
    assert rows["torch", "backward"]["milliseconds"] > 0


def test_a_body_that_gives_no_numbers_or_raises_is_not_timed_either(shapes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setitem(registry._ops["gelu"].bodies, "triton", Implementation(lambda x: x * torch.nan))
    monkeypatch.setitem(registry._ops["gelu"].bodies, "cuda", Implementation(raises))
    found = measure(KernelsBench(ops=("gelu",), shapes=shapes, rounds=1, device=CPU))
    rows = {(r["implementation"], r["pass"]): r for r in found["rows"]}
    assert rows["triton", "forward"]["reason"] == "not finite" and "gelu forward: triton" in found["wrong"]
    assert rows["cuda", "forward"]["status"] == "failed" and rows["cuda", "forward"]["reason"] == "RuntimeError: no kernel image"
    assert rows["cuda", "forward"]["milliseconds"] is None and "WRONG" in _texts(render(found))


def test_an_optimizer_that_does_another_step_is_wrong(shapes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["optimizer_step"]
    twice = kernel_peers.Contender("twice", lambda weights, gradients: lambda: weights.sub_(2e-3 * gradients.sign()))
    monkeypatch.setitem(OPS, "optimizer_step", replace(op, peers=(twice,)))
    found = measure(KernelsBench(ops=("optimizer_step",), impls=("twice", "native"), shapes=shapes, rounds=1, device=CPU))
    assert {row["implementation"]: row["status"] for row in found["rows"]} == {"native": "ok", "twice": "WRONG"}


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_op_has_a_case_of_every_preset_and_counts_the_bytes_that_go_in_and_out(name: str) -> None:
    shapes = shapes_of(name)
    assert list(shapes) == list(DIMENSIONS) == list(OPS)
    for op in OPS.values():
        names = [contender.name for contender in op.contenders()]
        assert len(names) == len(set(names))
        for dims in shapes[op.name]:
            assert tuple(dims) == DIMENSIONS[op.name]
            small = op.small(dims, 1 << 22)
            assert op.widest(small) <= 1 << 22 and all(1 <= small[name] <= dims[name] for name in dims)
            assert all(small[name] >= min(dims[name], 32) for name in ("S", "T", "V", "D") if name in dims)
            assert small.keys() == dims.keys() and small.get("H", 1) % small.get("G", 1) == 0
            with FakeTensorMode():
                arguments = op.make(dims, torch.bfloat16, "cpu")
                if op.errors is None and op.name not in ("cross_entropy", "linear_cross_entropy"):
                    results, gradients = results_and_gradients(op.function, arguments, differentiable=op.differentiable)
            if op.errors is None and op.name not in ("cross_entropy", "linear_cross_entropy"):
                _check_bytes(op, dims, arguments, results, gradients)


def test_every_choice_of_a_config_is_measured_by_some_op() -> None:
    choices = {name for name in registry.choices() if not name.endswith("_for_tests")}
    assert choices <= {choice for op in OPS.values() for choice in op.choices}


def test_the_readme_lists_every_op_with_its_dimensions_and_every_preset(tmp_path: Path) -> None:
    text = (Path(kernel_ops.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| (.+) \| ([A-Z](?:, [A-Z])*) \|$", text, re.MULTILINE)
    assert {op: tuple(letters.split(", ")) for ops, letters in rows for op in ops.split(", ")} == DIMENSIONS
    sentence = text[text.index("`--shapes` takes a preset") :]
    assert set(presets()) == set(re.findall(r"[\w-]+", sentence[: sentence.index(" or a\n")])) & set(presets())
    file = tmp_path / "shapes.yaml"
    file.write_text(sentence.split("```yaml\n")[1].split("```")[0])
    assert len(shapes_of(str(file))["attention"]) == 2


def test_one_that_is_named_and_ran_in_no_case_is_one_line(shapes: str) -> None:
    ran = CliRunner().invoke(app, ["kernels", "--op", "attention", "--shapes", shapes, "--impl", "sdpa-cudnn"])
    assert isinstance(ran.exception, UserError) and not ran.stdout.strip()
    assert re.fullmatch(r"--impl sdpa-cudnn: cannot run here: .*; leave it out", str(ran.exception))


def _check_bytes(op: BenchOp, dims: Any, arguments: Any, results: list[Tensor], gradients: list[Tensor]) -> None:
    """Statistics of rows, tables and documents are counted or not, and are small."""
    flat = [b for a in arguments for b in (a if isinstance(a, list) else [a]) if isinstance(b, Tensor)]
    work = op.work(dims, 2)
    forward = sum(x.numel() * x.element_size() for x in (*flat, *results))
    assert work["forward"].bytes == pytest.approx(forward, rel=0.04)
    if "backward" in work:  # upstream gradients, and their like; what is read again, unless only the tables are kept
        moved = sum(x.numel() * x.element_size() for x in (*results, *gradients))
        kept = op.name not in ("split_rotary", "dropout")
        again = sum(arguments[i].numel() * 2 for i in op.differentiable) if kept else 0
        out = results[0].numel() * 2 if op.name.startswith("attention") else 0
        if op.name.endswith("_add") or op.name.startswith("add_"):  # two gradients are one tensor; a sum is kept, not its parts
            again -= 2 * arguments[0].numel() * 2
        if op.name == "split_rotary":
            again = sum(table.numel() * 4 for table in arguments[1:3])
        assert work["backward"].bytes == pytest.approx(moved + again + out, rel=0.04)


def test_flops_are_those_that_torch_counts() -> None:
    dims = {"S": 64, "B": 2, "H": 4, "G": 4, "K": 16}
    work = OPS["attention_full"].work(dims, 4)
    causal = OPS["attention"].work(dims, 4)
    arguments = OPS["attention_full"].make(dims, torch.float32, "cpu")

    def attend(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> Tensor:
        scores = torch.einsum("sbhk,tbhk->bhst", query, key)
        return torch.einsum("bhst,tbhk->sbhk", scores.softmax(-1), value)

    with FlopCounterMode(display=False) as forward:
        results_and_gradients(attend, arguments)
    with FlopCounterMode(display=False) as both:
        results_and_gradients(attend, arguments, differentiable=(0, 1, 2))
    assert work["forward"].flops == forward.get_total_flops() == 2 * causal["forward"].flops
    # Plain backward has four products; flash-style ones make the scores again.
    assert work["backward"].flops == (both.get_total_flops() - forward.get_total_flops()) * 5 / 4 == 2 * causal["backward"].flops

    sizes = {"T": 24, "D": 16, "V": 40, "C": 2}
    loss = OPS["linear_cross_entropy"]
    eager = next(c for c in loss.contenders() if c.name == "torch-eager")
    with FlopCounterMode(display=False) as counted:
        eager.bind(*loss.make(sizes, torch.float32, "cpu"))()
    assert loss.work(sizes, 4)["forward+backward"].flops == counted.get_total_flops()


@pytest.mark.parametrize("op, left_out", [("attention_window", 5 / 2), ("attention_documents", 64 / 2), ("attention_full", 0)])
def test_pairs_of_masks_are_counted_as_the_mask_has_them_but_for_half_a_diagonal(op: str, left_out: float) -> None:
    sizes = {"S": 64, "B": 1, "H": 1, "G": 1, "K": 8, "W": 5, "L": 8}
    dims = {name: sizes[name] for name in DIMENSIONS[op]}
    q, k, _, *mask = OPS[op].make(dims, torch.float64, "cpu")
    value = torch.eye(64, dtype=torch.float64)[:, None, None]  # the output is the weights
    weights = kernel_ops.KERNELS["masked_attention"].reference(q, k, value, *mask)
    assert OPS[op].work(dims, 8)["forward"].flops / (4 * 8) == int((weights > 0).sum()) - left_out


@pytest.mark.parametrize(
    "bench, line",
    [
        (KernelsBench(ops=("atention",)), "--op atention: no such op; ops are attention, "),
        (KernelsBench(ops=("gelu",), impls=("cuddn",)), "--impl cuddn: these ops have no such implementation; they have torch"),
        (KernelsBench(shapes="llama9"), "--shapes llama9: no file, and no preset; presets are small"),
        (KernelsBench(dtype="int3"), "--dtype int3: use one of bf16"),
        (KernelsBench(tutorial=Path("nothing.py")), "--tutorial nothing.py: no Python file"),
    ],
)
def test_what_makes_no_sense_is_one_line(bench: KernelsBench, line: str) -> None:
    with pytest.raises(UserError) as error:
        measure(replace(bench, device=CPU))
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, line",
    [
        ("gelus: {T: 1, F: 1}", "gelus is no op; ops are attention"),
        ("gelu: {T: 1}", "gelu: {T: 1} must give T, F, such as {T: 8192, F: 14336}"),
        ("gelu: {T: 1, F: 0}", "gelu: F=0 must be a whole number from 1 up"),
        ("attention: {S: 1, B: 1, H: 3, G: 2, K: 8}", "attention: H=3 is not a multiple of G=2; use a divisor of 3"),
        ("split_rotary: {S: 1, B: 1, H: 2, G: 2, K: 7}", "split_rotary: K=7 is odd, but elements turn in pairs; use 8"),
        ("gelu: []", "gives no sizes; name an op and its sizes, such as rms_norm: {T: 8192, D: 4096}"),
    ],
)
def test_a_file_of_shapes_says_what_is_wrong_with_it(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        shapes_of(str(file))
    assert str(error.value).startswith(f"{file}: {line}")


def test_out_of_time_no_case_is_begun_and_all_are_named(shapes: str) -> None:
    found = measure(KernelsBench(ops=("gelu", "rms_norm"), shapes=shapes, device=CPU), seconds=0.0)
    assert sorted(found["left_out"]) == ["gelu T 4 F 8", "rms_norm T 8 D 16", "rms_norm T 8 D 32"]
    assert not found["rows"] and "out of time" in _texts(render(found)) and plot(found, Path("nowhere")) == []


def test_the_tutorial_is_a_peer_in_the_layout_that_it_wants(shapes: str, tmp_path: Path) -> None:
    file = tmp_path / "06-fused-attention.py"
    file.write_text(
        "import torch\n"
        "def attention(q, k, v, causal, scale):\n"
        "    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()\n"
        "    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)\n"
    )
    sizes = tmp_path / "s.yaml"
    sizes.write_text("attention: [{S: 128, B: 2, H: 2, G: 2, K: 8}, {S: 128, B: 1, H: 2, G: 1, K: 8}]")
    bench = KernelsBench(("attention",), ("triton-tutorial",), str(sizes), rounds=1, device=CPU, tutorial=file)
    rows = measure(bench)["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "refused", "refused"] and rows[2]["reason"] == "grouped heads"
    file.write_text("x = 1")
    with pytest.raises(UserError, match="has no function `attention`"):
        measure(bench)


def test_the_fastest_is_the_one_with_the_least_time_over_all_that_it_did() -> None:
    def row(op: str, which: str, name: str, ms: float | None) -> dict[str, Any]:
        return {"op": op, "pass": which, "implementation": name, "milliseconds": ms, "kind": "body"}

    rows = [row("gelu", "forward", "torch", 1.0), row("gelu", "forward", "triton", 0.5), row("gelu", "forward", "cuda", 0.1)]
    rows += [row("gelu", "backward", "torch", 1.0), row("gelu", "backward", "triton", 1.2), row("gelu", "backward", "cuda", None)]
    found = {"rows": rows, "device_kind": "cuda", "wrong": []}
    assert fastest(found) == {"gelu": "triton"}
    assert summary(found)[1].endswith("to force these: kernels.gelu=triton")
    rows += [{**row("gelu", "forward", "peer", 0.2), "kind": "peer"}, {**row("gelu", "backward", "slow", 1.3), "kind": "peer"}]
    assert summary(found)[0] == "fastest of ours: gelu triton; a peer is faster in: gelu (peer, 2.5 x)"


def test_a_busy_machine_is_said(result: dict[str, Any]) -> None:
    line = "the machine is busy (load 1.1 on 2 cores): these numbers mean little"
    assert line in _texts(render({**result, "load": 1.1, "cores": 2}))
    assert "busy" not in _texts(render({**result, "load": 0.9, "cores": 2}))


def test_a_bar_that_is_cut_carries_its_value(result: dict[str, Any]) -> None:
    row = next(row for row in result["rows"] if row["milliseconds"] is not None)
    for share, shown in ((7.89, True), (0.89, False)):
        texts = kernel_plots._shares({**result, "rows": [{**row, "fraction_of_limit": share}]}).axes[0].texts
        assert any(text.get_text().strip() == f"{share:.3g}" for text in texts) is shown


@pytest.mark.parametrize("file", sorted(show.RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_every_result_in_the_package_can_be_shown(file: Path) -> None:
    assert show.show(Path(file.name))
    assert file.name in _texts(show.listing())


def test_what_is_no_result_is_one_line(tmp_path: Path) -> None:
    for text, line in [
        ("{", "is not JSON"),
        ('{"bench": "bread"}', "which no bench knows"),
        ('{"bench": "step"}', "not a result of step"),
        ('[{"choice": "gelu", "implementation": "torch"}]', "is a run's choice of kernels, no bench result"),
    ]:
        file = tmp_path / "x.json"
        file.write_text(text)
        with pytest.raises(UserError, match=line):
            show.show(file)
    with pytest.raises(UserError, match="no such file"):
        show.show(tmp_path / "nothing.json")
