"""bench data: both variants run, and make the same files."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from megatronish.bench import data as module
from megatronish.bench.cli import app
from megatronish.bench.data import LIMIT, DataBench, measure, require_same_files

pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed (a test extra)")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folders = (tmp_path_factory.mktemp(name) for name in ("disk", "memory"))
    return measure(DataBench(*folders, 1, 64, 1_000_000, 1, 2))


def test_both_variants_make_the_same_files_and_every_rate_is_there(result):
    assert result["same_files"] is True
    assert set(result["median"]) == {"read", "write in memory", "write", "tokenize"}
    assert LIMIT in result["median"]["write"]
    for part, rates in result["rounds"].items():
        assert all(len(values) == 1 and values[0] > 0 for values in rates.values())
        ours, theirs = (rates[name][0] for name in ("megatronish", "megatron-core"))
        assert result["ratio"][part] == pytest.approx(theirs / ours if part == "read" else ours / theirs)
    json.dumps(result)


def test_files_that_differ_are_an_error(tmp_path):
    for name in ("ours", "theirs", "text", "text-theirs"):
        for suffix in ("bin", "idx"):
            (tmp_path / f"{name}.{suffix}").write_bytes(b"same")
    require_same_files(tmp_path)
    (tmp_path / "text.idx").write_bytes(b"Same")
    with pytest.raises(RuntimeError, match=r"text\.idx and text-theirs\.idx differ"):
        require_same_files(tmp_path)


def test_the_command_prints_a_table_and_writes_the_numbers(tmp_path, result, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda bench, on_round: result)
    folders = ["--folder", str(tmp_path / "disk"), "--memory", str(tmp_path / "memory")]
    run = CliRunner().invoke(app, ["data", "--rounds", "1", *folders, "--json", str(tmp_path / "data.json")])
    assert run.exit_code == 0, run.output
    assert not list((tmp_path / "disk").iterdir())
    assert "text to .bin and .idx, 2 workers" in run.output.replace("\n", " ")
    assert json.loads((tmp_path / "data.json").read_text()) == result
