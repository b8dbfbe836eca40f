"""`megatronish eval`: the plain model's numbers, whatever layout saved the checkpoint and whatever layout evaluates it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatronish.batch import TokenContext
from megatronish.config_loader import load_config
from megatronish.data.documents import find_files
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.data.tokenize import tokenize
from megatronish.data.tokenizer import load_tokenizer, train_tokenizer
from megatronish.parallel.mesh import build_mesh
from megatronish.verify.reference import plain_model
from tests.ranks import ranks
from tests.small_run import THREE_D, forked, losses, saved_tensors, write_run, write_tokens
from tests.test_resume import train_life

VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in float64, trained and saved by tp 2 x pp 2 x dp 2 on text, with its held-out set beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text").mkdir()
    for number in range(12):
        words = [f"{number * i % 97} times {i}" for i in range(40 + number)]
        (folder / f"text/{number:02d}.txt").write_text(", ".join(words) + ".\n")
    files = find_files([folder / "text"])
    size = train_tokenizer(files, vocab_size=VOCAB_SIZE - 5, out=folder / "tokenizer.json")
    assert size <= VOCAB_SIZE
    config = write_run(
        folder,
        model={"vocab_size": VOCAB_SIZE},
        data={"tokenizer": str(folder / "tokenizer.json")},
        train={"dtype": "float64", "steps": 6, "eval_interval": 6, "eval_steps": 1000},
    )
    for name, inputs in (("train", files[:9]), ("heldout", files[9:])):
        tokenize(inputs, tokenizer=folder / "tokenizer.json", out=folder / name)
    train_life(config, *THREE_D, world_size=8)
    return folder / "runs/tiny"


def evaluate_rank(
    rank: int, run: str, data: str, overrides: tuple[str, ...], num_batches: int | None, world: int
) -> dict[str, Any]:
    """One rank's evaluation in the pool of ranks."""
    from megatronish import evaluate
    from megatronish.assemble import mesh_shape

    request = evaluate.Request(Path(run), data, overrides, num_batches)
    config, dataset, measure = evaluate.prepare(request, world)
    mesh = build_mesh(mesh_shape(config, world), rank, device=torch.device("cpu"))
    return asdict(evaluate.evaluate_run(request, config, mesh, dataset, measure))


def evaluate_on(world: int, run: Path, *overrides: str, num_batches: int | None = None) -> dict[str, Any]:
    results = ranks(world).run(evaluate_rank, str(run), str(run.parent.parent / "heldout"), overrides, num_batches, world)
    first: dict[str, Any] = results[0]
    for other in results[1:]:
        assert other | {"bits_per_byte": None} == first | {"bits_per_byte": None}, "every rank must get the same numbers"
    return first


def plain_losses(run: Path) -> torch.Tensor:
    """[samples, S]: the loss of every target token of the held-out set, by the plain model with the saved weights."""
    config = load_config(run / "config.yaml")
    model = plain_model(config)
    saved = saved_tensors(run, config.num_steps)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[f"master/{name}"])
    dataset = GPTDataset(run.parent.parent / "heldout", sequence_length=16, vocab_size=VOCAB_SIZE)
    tokens = torch.from_numpy(dataset.tokens(np.arange(len(dataset))))
    S, B = 16, len(tokens)
    with torch.no_grad():
        context = TokenContext(torch.arange(S)[:, None].expand(S, B), torch.arange(B))
        logits = model(tokens[:, :-1].T, context)[..., :VOCAB_SIZE]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].T.flatten(), reduction="none")
    return losses.view(S, B).T


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ()),
        (1, ("train.micro_batch_size=3",)),
        (3, ()),
        (4, ("parallel.tensor=4", "parallel.sequence=true")),
        (4, ("parallel.pipeline=4",)),
        (8, ("parallel.tensor=2", "parallel.pipeline=2")),
    ],
    ids=str,
)
def test_every_layout_gives_the_plain_models_numbers(world: int, overrides: tuple[str, ...], run: Path) -> None:
    expected = plain_losses(run)
    result = evaluate_on(world, run, *overrides)
    assert (result["samples"], result["tokens"], result["step"]) == (len(expected), expected.numel(), 6)
    # float64: sums of thousands of terms in another order.
    assert result["nats_per_token"] == pytest.approx(expected.mean().item(), rel=1e-12)
    assert result["bits_per_token"] == pytest.approx(expected.mean().item() / math.log(2), rel=1e-12)
    assert result["perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-11)


def test_bits_per_byte_is_over_the_bytes_of_the_target_text(run: Path) -> None:
    result = evaluate_on(2, run)
    dataset = GPTDataset(run.parent.parent / "heldout", sequence_length=16, vocab_size=VOCAB_SIZE)
    targets = dataset.stream[1 : 1 + len(dataset) * 16].tolist()
    text = load_tokenizer(run.parent.parent / "tokenizer.json").decode(targets, skip_special_tokens=True)
    bits = result["nats_per_token"] * result["tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-12)


def test_it_agrees_with_the_evaluation_that_training_wrote(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = next(row for row in rows if row["step"] == 6 and "eval_loss" in row)
    result = evaluate_on(1, run)
    assert result["nats_per_token"] == pytest.approx(written["eval_loss"], rel=1e-12)
    assert result["bits_per_byte"] == pytest.approx(written["eval_bits_per_byte"], rel=1e-12)
    assert losses(run).keys() == set(range(1, 7))


@pytest.mark.parametrize("world", [1, 3])
def test_batches_are_the_runs_own_whatever_the_layout(world: int, run: Path) -> None:
    result = evaluate_on(world, run, num_batches=2)
    assert result["samples"] == 2 * 8
    assert result["nats_per_token"] == pytest.approx(plain_losses(run)[:16].mean().item(), rel=1e-12)


def test_weights_in_another_dtype_are_the_saved_ones_rounded(run: Path) -> None:
    exact, rounded = evaluate_on(1, run), evaluate_on(1, run, "train.dtype=bfloat16")
    # bfloat16 keeps 8 bits: weights and activations are off by up to 0.4 % each; the loss of some 5.7 nats by far less than 5 %.
    assert rounded["nats_per_token"] != exact["nats_per_token"]
    assert rounded["nats_per_token"] == pytest.approx(exact["nats_per_token"], rel=0.05)


def test_the_command_prints_a_table_and_writes_json_and_nothing_in_the_run(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    data = str(run.parent.parent / "heldout")
    result = forked("eval", str(run), "--data", data, "parallel.tensor=2", "--json", str(tmp_path / "out.json"), nproc=2)
    assert result.returncode == 0, result.stderr
    numbers, expected = json.loads((tmp_path / "out.json").read_text()), evaluate_on(1, run)
    assert numbers.keys() == expected.keys()
    for name in ("nats_per_token", "bits_per_token", "perplexity", "bits_per_byte"):
        assert numbers[name] == pytest.approx(expected[name], rel=1e-10)
    for shown in ("perplexity", "bits per byte", "nats per token", "bits per token", f"{expected['tokens']:,}", "step 6"):
        assert shown in result.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def no_run(folder: Path) -> list[str]:
    return [str(folder / "nowhere"), "--data", str(folder / "heldout")]


def no_checkpoint(folder: Path) -> list[str]:
    (folder / "young").mkdir()
    (folder / "young/config.yaml").write_text((folder / "config.yaml").read_text())
    return [str(folder / "young"), "--data", str(folder / "heldout")]


def tokens_outside_the_vocabulary(folder: Path) -> list[str]:
    write_tokens(folder / "other", seed=3, num_documents=20, bad_token=(4, 2, 999))
    return [str(folder / "runs/tiny"), "--data", str(folder / "other"), "--nproc", "2"]


def no_such_data(folder: Path) -> list[str]:
    return [str(folder / "runs/tiny"), "--data", str(folder / "nothing"), "--nproc", "2"]


def a_layout_that_does_not_fit(folder: Path) -> list[str]:
    return [str(folder / "runs/tiny"), "--data", str(folder / "heldout"), "--nproc", "3", "parallel.tensor=2"]


def another_shape(folder: Path) -> list[str]:
    return [str(folder / "runs/tiny"), "--data", str(folder / "heldout"), "model.mlp_size=64"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (no_run, ["nowhere is not the folder of a run", "config.yaml"]),
        (no_checkpoint, ["young has no checkpoint yet", "checkpoint.interval"]),
        (tokens_outside_the_vocabulary, ["token 999 in document 4 at offset 2", "vocabulary of 320", "model.vocab_size"]),
        (no_such_data, ["nothing: no such set"]),
        (a_layout_that_does_not_fit, ["3 ranks", "parallel.tensor=2"]),
        (another_shape, ["does not fit this run"]),
    ],
)
def test_bad_input_is_said_once_with_exit_code_2(arguments: Callable[[Path], list[str]], words: list[str], run: Path) -> None:
    result = forked("eval", *arguments(run.parent.parent))
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    first = [line for line in result.stderr.splitlines() if words[0] in line]
    assert len(first) == 1 and first[0].startswith("error: "), result.stderr
    assert all(word in first[0] for word in words)
