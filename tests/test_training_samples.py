"""Samples while training: the same text on every layout, and what `megatronish generate --greedy` says of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatronish.generate.command import Request, generate, prepare
from megatronish.generate.sampling import Sampling
from megatronish.parallel.mesh import MeshShape, build_mesh
from tests.generate.test_command import write_text_run
from tests.small_run import THREE_D
from tests.test_resume import train_life

PROMPTS = ("4 times", "88", "times 3 é, 91 times 4 é, 12")
ASKED = ("observe.sample_interval=4", f"observe.sample_prompts={json.dumps(PROMPTS)}", "train.steps=6", "data.sequence_length=32")


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples")
    train_life(write_text_run(path), "name=one", *ASKED)
    return path


INTERLEAVED = ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.num_chunks=2")


@pytest.mark.parametrize(("layout", "world_size"), [(THREE_D, 8), (INTERLEAVED, 2)], ids=["tp2-pp2-dp2", "interleaved"])
def test_any_layout_writes_the_texts_of_one_process(layout: tuple[str, ...], world_size: int, folder: Path) -> None:
    stderr = train_life(folder / "config.yaml", f"name=on-{world_size}", *layout, *ASKED, world_size=world_size)
    rows = rows_of(folder / f"runs/on-{world_size}")
    assert rows == rows_of(folder / "runs/one")
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, prompt) for step in (4, 6) for prompt in PROMPTS]
    assert "step 4: sample: " + json.dumps(PROMPTS[0] + rows[0]["text"], ensure_ascii=False) in stderr


def test_they_are_the_greedy_continuation_of_the_checkpoint(folder: Path) -> None:
    request = Request(folder / "runs/one", PROMPTS, Sampling(temperature=0), max_tokens=16)
    step, samples = generate(prepare(request, 1), build_mesh(MeshShape(), 0, device=torch.device("cpu")))
    assert step == 6
    for row, sample in zip(rows_of(folder / "runs/one")[3:], samples, strict=True):
        # Training goes on over an end of text.
        assert row["text"].startswith(sample.text) and (row["text"] == sample.text or sample.finish == "end of text")


def test_a_life_that_goes_back_writes_no_step_twice(folder: Path) -> None:
    run = folder / "runs/one"
    before = rows_of(run)
    with open(run / "samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 8, "prompt": "x", "text": "of a life that was killed"}) + "\n")
    train_life(folder / "config.yaml", "name=one", *ASKED, "train.steps=8")
    rows = rows_of(run)
    assert rows[: len(before)] == before and [row["step"] for row in rows[len(before) :]] == [8, 8, 8]
