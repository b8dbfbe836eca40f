"""`megatronish generate`: one text for every layout that saved or reads the checkpoint; bad input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatronish import demo
from megatronish.data.documents import find_files
from megatronish.data.tokenize import tokenize
from megatronish.data.tokenizer import load_tokenizer, train_tokenizer
from megatronish.generate.text import TextStream, continued_text
from megatronish.parallel.mesh import build_mesh
from tests.ranks import ranks
from tests.small_run import THREE_D, error_lines, forked, megatronish, write_run
from tests.test_resume import train_life

VOCAB_SIZE = 300


def write_text_run(folder: Path) -> Path:
    """The config of a run in float64 on text, with its tokenizer and token files."""
    (folder / "text").mkdir()
    for number in range(12):
        words = [f"{number * i % 97} times {i} é" for i in range(40 + number)]
        (folder / f"text/{number:02d}.txt").write_text(", ".join(words) + ".\n", encoding="utf-8")
    files = find_files([folder / "text"])
    train_tokenizer(files, vocab_size=VOCAB_SIZE, out=folder / "tokenizer.json")
    config = write_run(
        folder,
        model={"vocab_size": VOCAB_SIZE},
        data={"tokenizer": str(folder / "tokenizer.json")},
        train={"dtype": "float64", "steps": 12, "eval_steps": 1000},
        checkpoint={"interval": 6},
    )
    for name, inputs in (("train", files[:9]), ("heldout", files[9:])):
        tokenize(inputs, tokenizer=folder / "tokenizer.json", out=folder / name)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds runs/tiny, trained by tp 2 x pp 2 x dp 2 and taken three steps further by one process as runs/moved."""
    path = tmp_path_factory.mktemp("generate")
    config = write_text_run(path)
    train_life(config, *THREE_D, world_size=8)
    return path


def generate_rank(rank: int, run: str, prompts: tuple[str, ...], world_size: int) -> tuple[int, list[list[int]]]:
    """One rank's part of a generation in the pool of ranks."""
    from megatronish.assemble import mesh_shape
    from megatronish.generate.command import Request, generate, prepare
    from megatronish.generate.sampling import Sampling

    prepared = prepare(Request(Path(run), prompts, Sampling(temperature=0.8, seed=4), max_tokens=12), world_size)
    mesh = build_mesh(mesh_shape(prepared.config, world_size), rank, device=torch.device("cpu"))
    step, samples = generate(prepared, mesh)
    return step, [sample.tokens for sample in samples]


def test_one_process_and_tensor_ranks_read_a_checkpoint_of_eight_ranks_alike(folder: Path) -> None:
    prompts = ("4 times", "88 times 3 é, 9", ",")
    (expected,) = ranks(1).run(generate_rank, str(folder / "runs/tiny"), prompts, 1)
    assert expected[0] == 12 and all(len(tokens) > 0 for tokens in expected[1])
    for world_size in (2, 4):
        assert ranks(world_size).run(generate_rank, str(folder / "runs/tiny"), prompts, world_size) == [expected] * world_size


def test_the_command_prints_each_prompt_with_its_text_and_writes_json(folder: Path) -> None:
    (folder / "prompts.txt").write_text("12 times\n7 t\n")
    arguments = ["generate", str(folder / "runs/tiny"), "--prompt", "3 times", "--prompts-file", str(folder / "prompts.txt")]
    options = ["--max-tokens", "9", "--greedy", "--json", str(folder / "out.json"), "--step", "6"]
    result = forked(*arguments, *options)
    assert result.returncode == 0, result.stderr
    written = json.loads((folder / "out.json").read_text())
    assert written["step"] == 6 and [sample["prompt"] for sample in written["samples"]] == ["3 times", "12 times", "7 t"]
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for number, sample in enumerate(written["samples"], start=1):
        count = len(sample["tokens"])
        assert (
            f"--- prompt {number} of 3: {count} tokens, then {sample['finish']}\n{sample['prompt']}{sample['text']}\n"
            in result.stdout
        )
        prompt = tokenizer.encode(sample["prompt"]).ids
        assert sample["text"] == continued_text(tokenizer, prompt, sample["tokens"])
    assert "tokens/s" in result.stderr


def test_two_processes_print_what_one_prints(folder: Path) -> None:
    arguments = ["generate", str(folder / "runs/tiny"), "--prompt", "-5 times", "--max-tokens", "15", "--seed", "2"]
    one, two = forked(*arguments), megatronish(*arguments, "--nproc", "2")
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout == two.stdout and one.stdout.startswith("-5 times")


def test_the_demo_ends_with_three_samples(folder: Path) -> None:
    samples = demo.continue_prompts(folder / "runs/tiny")
    assert [prompt for prompt, _ in samples] == list(demo.PROMPTS) and len(samples) == 3
    assert all(text for _, text in samples) and samples == demo.continue_prompts(folder / "runs/tiny")


def without_tokenizer(folder: Path) -> list[str]:
    return ["--prompt", "x", "data.tokenizer=null"]


def nothing(folder: Path) -> list[str]:
    return []


def empty(folder: Path) -> list[str]:
    return ["--prompt", ""]


def empty_line(folder: Path) -> list[str]:
    (folder / "gap.txt").write_text("a\n\nb\n")
    return ["--prompts-file", str(folder / "gap.txt")]


def empty_file(folder: Path) -> list[str]:
    (folder / "void.txt").write_text("")
    return ["--prompts-file", str(folder / "void.txt")]


def no_file(folder: Path) -> list[str]:
    return ["--prompts-file", str(folder / "gone.txt")]


def cold(folder: Path) -> list[str]:
    return ["--prompt", "x", "--temperature", "-1", "--nproc", "2"]


def both(folder: Path) -> list[str]:
    return ["--prompt", "x", "--greedy", "--top-p", "0.5"]


def other_step(folder: Path) -> list[str]:
    return ["--prompt", "x", "--step", "7"]


def too_many_ranks(folder: Path) -> list[str]:
    return ["--prompt", "x", "--nproc", "3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (without_tokenizer, ["has no data.tokenizer", "data.tokenizer=FILE"]),
        (nothing, ["there is nothing to continue", "--prompt TEXT"]),
        (empty, ["prompt 1, '': has no tokens"]),
        (empty_line, ["gap.txt:2: an empty prompt"]),
        (empty_file, ["void.txt: holds no prompt"]),
        (no_file, ["gone.txt: No such file"]),
        (cold, ["--temperature -1.0: must be"]),
        (both, ["--greedy", "--top-p 0.5"]),
        (other_step, ["--step 7", "steps 6, 12"]),
        (too_many_ranks, ["parallel.tensor=3 does not divide"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: Callable[[Path], list[str]], words: list[str], folder: Path) -> None:
    result = forked("generate", str(folder / "runs/tiny"), *arguments(folder))
    assert result.returncode == 2, result.stderr
    (line,) = error_lines(result.stderr)
    assert result.stderr.splitlines() == [line] and all(word in line for word in words), line


def test_a_run_without_checkpoints_and_a_folder_that_is_no_run_are_one_line(folder: Path) -> None:
    (folder / "young").mkdir(exist_ok=True)
    (folder / "young/config.yaml").write_text((folder / "runs/tiny/config.yaml").read_text())
    for name, words in (("young", "has no checkpoint yet"), ("nowhere", "is not the folder of a run")):
        result = forked("generate", str(folder / name), "--prompt", "x")
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert words in line and line.startswith("error: ")


def test_text_appears_in_whole_characters(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    text = "é 🙂 ascii é"
    tokens = tokenizer.encode(text).ids
    assert len(tokens) > len(text)  # the emoji takes several tokens
    stream = TextStream(tokenizer, tokenizer.encode("3 times").ids)
    shown = [stream.add(token) for token in tokens]
    assert "".join(shown) == text and stream.rest() == ""
    assert "�" not in "".join(shown) and "" in shown
