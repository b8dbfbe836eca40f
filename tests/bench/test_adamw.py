"""The AdamW bench: every variant is checked before it is timed, a wrong one stops it, and what is printed is what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatronish.bench import adamw
from megatronish.errors import UserError

BENCH = adamw.AdamWBench(parameters=5000, rounds=2, threads=1)


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its build takes minutes."""
    monkeypatch.setattr(adamw, "deepspeed_adam", lambda: (None, "not asked for"))


def test_the_table_and_the_picture_show_every_variant(tmp_path: Path) -> None:
    result = adamw.measure(BENCH)
    names = [f"{row['group']}: {row['name']}" for row in result["variants"]]
    assert {"adamw: megatronish", "adamw: torch fused", "whole step: megatronish", "whole step: torch"} <= set(names)
    assert all(len(row["all_milliseconds"]) == 2 for row in result["variants"])
    assert [row["ours_is_faster_by"] for row in result["variants"] if row["name"] == "megatronish"] == [1.0, 1.0]
    table = adamw.render(result)
    assert table.row_count == len(names) + 1 and list(table.columns[-1].cells)[-1] == "not asked for"
    assert [file.stat().st_size > 1000 for file in adamw.plot(result, tmp_path)] == [True, True]


def test_a_variant_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = adamw.adamw_

    def wrong(*tensors: Any, numbers: adamw.AdamWNumbers, **more: Any) -> None:
        right(*tensors, numbers=adamw.AdamWNumbers(numbers.lr, 0.8, numbers.beta2, numbers.eps, numbers.weight_decay), **more)

    monkeypatch.setattr(adamw, "adamw_", wrong)
    with pytest.raises(UserError, match="adamw: megatronish is off by"):
        adamw.measure(BENCH)


def test_too_little_memory_is_one_line_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "free_bytes", lambda: 1_300_000_000)
    adamw.require_memory(9_000_000)
    with pytest.raises(UserError, match=r"need 13 GB together and 1\.3 GB are free; give at most 10000000$"):
        adamw.require_memory(100_000_000)


def test_what_is_compiled_already_is_not_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(adamw, "find_package", lambda name: object())
    assert adamw.must_compile_deepspeed()
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert not adamw.must_compile_deepspeed()
