"""Checkpoints that a run cannot go on from, through the command line: exit code 2, one line a problem: given, needed, what to do.

Damaged files are in tests/test_resume.py and tests/checkpoint/test_verify.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_verify import edit
from tests.ranks import ranks
from tests.small_run import error_lines, write_run, write_tokens
from tests.test_train import command_line

Change = Callable[[dict[str, Any]], object]


def run_command(*arguments: str) -> tuple[int, str]:
    """`megatronish ARGUMENTS`: (exit code, standard error)."""
    ((code, stderr),) = ranks(1).run(command_line, list(arguments), {})
    assert "Traceback" not in stderr, stderr
    return code, stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_run(folder, train={"steps": 2}, optim={"warmup_steps": 0}, checkpoint={"interval": 1})
    code, stderr = run_command("train", str(config))
    assert code == 0, stderr
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def resume(trained: Path, folder: Path, *overrides: str) -> tuple[int, str]:
    return run_command("train", str(trained / "config.yaml"), f"run_root={folder}/runs", "train.steps=3", *overrides)


def newest(folder: Path) -> Path:
    return folder / "runs/tiny/checkpoints/step-00000002"


def in_state(**values: Any) -> Change:
    """Entries of the manifest's state; None takes one away."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["state"].update(values)
        for name in [name for name, value in values.items() if value is None]:
            del manifest["state"][name]

    return change


def rename_tensors(old: str, new: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        for names in (manifest["tensors"], *(file["pieces"] for file in manifest["files"])):
            for name in [name for name in names if name.startswith(old)]:
                names[name.replace(old, new)] = names.pop(name)

    return change


def without_tensor(name: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        for names in (manifest["tensors"], *(file["pieces"] for file in manifest["files"])):
            names.pop(name, None)

    return change


def shorten(name: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"][name]["shape"] = [31]
        (file,) = [file for file in manifest["files"] if name in file["pieces"]]
        file["pieces"][name] = [[0, 31]]

    return change


def in_config(section: str, **values: Any) -> Change:
    return lambda manifest: manifest["state"]["config"][section].update(values)


NORM = "exp_avg/final_norm.weight"
WRONG: dict[str, tuple[Change, tuple[str, ...]]] = {
    "fewer samples than its steps take": (
        in_state(consumed_samples=15),
        ("step-00000002: consumed_samples=15", "2 steps of train.global_batch_size=8 take 16", "remove it"),
    ),
    "more samples than any dataset has": (in_state(consumed_samples=10**15), ("consumed_samples=1000000000000000", "take 16")),
    "negative samples": (in_state(consumed_samples=-8), ("consumed_samples=-8", "take 16")),
    "samples as text": (in_state(consumed_samples="16"), ("consumed_samples='16'", "take 16")),
    "no number of samples": (in_state(consumed_samples=None), ("consumed_samples=None", "take 16")),
    "another step": (in_state(step=1), ("step=1 in its state, 2 in its name",)),
    "no layout": (in_state(layout=None), ("layout=None must give",)),
    "no ranks": (in_state(layout={"tp": 1, "pp": 0, "dp": 1}), ("'pp': 0", "must give the numbers of ranks")),
    "half a guard": (in_state(step_guard={"updates": 2}), ("step_guard={'updates': 2} must give good_steps, updates",)),
    "no config": (in_state(config=None), ("step-00000002: a config must be a mapping",)),
    "a key of another version": (in_config("optim", lookahead=3), ("optim.lookahead: unknown key", "step-00000002")),
    "a value of another version": (in_config("optim", schedule="cubic"), ("optim.schedule=cubic: must be one of", "step-00000002")),
    "other data": (in_state(data_fingerprint="0" * 16), ("data.train: ", "checkpoint 0000000000000000", "give that data")),
    "another model": (in_config("model", mlp_size=64), ("model.mlp_size=48: ", "holds a run with model.mlp_size=64")),
}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_contradict_the_run_are_one_line(name: str, trained: Path, folder: Path) -> None:
    change, words = WRONG[name]
    edit(newest(folder), change)
    code, stderr = resume(trained, folder)
    assert code == 2, stderr
    (line,) = error_lines(stderr)
    for word in words:
        assert word in line, line


def test_two_mistakes_give_two_lines(trained: Path, folder: Path) -> None:
    edit(newest(folder), in_state(consumed_samples=-1, step=7))
    code, stderr = resume(trained, folder)
    first, second = error_lines(stderr)
    assert code == 2 and "step=7 in its state" in first and "consumed_samples=-1" in second


TENSORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (without_tensor(NORM), (f"tensor {NORM} [32] is missing",)),
    "unexpected": (
        rename_tensors(NORM, "exp_avg/stranger"),
        (f"tensor {NORM} [32] is missing", "tensor exp_avg/stranger [32] is unexpected"),
    ),
    "another shape": (shorten(NORM), (f"tensor {NORM} has shape [31], this run needs [32]",)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_does_not_fit_is_one_line(name: str, trained: Path, folder: Path) -> None:
    change, problems = TENSORS[name]
    edit(newest(folder), change)
    code, stderr = resume(trained, folder)
    head, *lines = error_lines(stderr)
    assert code == 2 and "step-00000002 does not fit this run" in head and f"{len(problems)} problem" in head, stderr
    assert [line.removeprefix("error:").strip() for line in lines] == list(problems)


def test_the_state_of_another_optimizer_is_named_ten_and_counted(trained: Path, folder: Path) -> None:
    edit(newest(folder), rename_tensors("exp_avg_sq/", "momentum/"))
    code, stderr = resume(trained, folder)
    head, *lines = error_lines(stderr)
    count = int(head.rpartition("run, ")[2].split()[0])
    assert code == 2 and len(lines) == 11, stderr
    assert all("tensor exp_avg_sq/" in line and line.endswith("is missing") for line in lines[:10])
    assert lines[10].strip().endswith(f"and {count - 10} more") and count % 2 == 0 and count > 40


def test_another_dtype_of_the_states_is_named(trained: Path, folder: Path) -> None:
    code, stderr = resume(trained, folder, "train.dtype=float64")
    lines = error_lines(stderr)
    assert code == 2 and "is float32, this run needs float64" in lines[1], stderr


@pytest.mark.parametrize("config_is_there", [True, False], ids=["config.yaml", "checkpoints-alone"])
def test_another_architecture_is_named_by_its_key(config_is_there: bool, trained: Path, folder: Path) -> None:
    # A folder to which only checkpoints were copied says it as well: they hold the config.
    if not config_is_there:
        (folder / "runs/tiny/config.yaml").unlink()
    code, stderr = resume(trained, folder, "model.architecture=gpt2", "model.max_positions=64")
    first, second = error_lines(stderr)
    assert code == 2
    assert "model.architecture=gpt2: " in first and "holds a run with model.architecture=llama; use that value" in first
    assert "model.max_positions=64: " in second


def test_two_other_settings_of_a_run_are_two_lines(trained: Path, folder: Path) -> None:
    code, stderr = resume(trained, folder, "train.seed=99", "data.sequence_length=8")
    first, second = error_lines(stderr)
    assert code == 2 and "data.sequence_length=8: " in first and "train.seed=99: " in second


def test_other_data_is_named(trained: Path, folder: Path) -> None:
    write_tokens(folder / "others", seed=3, num_documents=60)
    code, stderr = resume(trained, folder, f"data.train={folder}/others")
    (line,) = error_lines(stderr)
    assert code == 2 and f"{folder}/others is not the data that" in line and "give that data, or another name" in line


def each(folder: Path, change: Callable[[Path], object]) -> None:
    for path in sorted((folder / "runs/tiny/checkpoints").iterdir()):
        change(path)


ALL_REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json: not a checkpoint"),
    "newer format": (
        lambda p: edit(p, lambda m: m.update(format_version=9)),
        "has format_version 9, this program reads up to 1: use",
    ),
    "other format": (lambda p: edit(p, lambda m: m.update(format="photos")), 'its "format" must be'),
    "a state that is a list": (lambda p: edit(p, lambda m: m.update(state=[])), "malformed: step"),
    "a step that is text": (lambda p: edit(p, lambda m: m.update(step="2")), "malformed: step '"),
}


@pytest.mark.parametrize("verb", ["train", "export", "eval", "generate"])
@pytest.mark.parametrize("name", ALL_REFUSED)
def test_a_run_whose_checkpoints_are_all_refused_ends_every_verb(name: str, verb: str, trained: Path, folder: Path) -> None:
    change, words = ALL_REFUSED[name]
    each(folder, change)
    run = str(folder / "runs/tiny")
    arguments = {
        "export": ["export", run, "--hf", str(folder / "hf")],
        "eval": ["eval", run, "--data", str(trained / "heldout")],
        "generate": ["generate", run, "--prompt", "a"],
    }
    code, stderr = resume(trained, folder) if verb == "train" else run_command(*arguments[verb])
    lines = error_lines(stderr)
    assert code == (2 if verb == "generate" else 78) and lines, stderr
    if verb != "generate":  # without a tokenizer it does not look for weights
        assert "no checkpoint in" in lines[0] and words in lines[1] and words in lines[2] and "start from step 0" in lines[-1], (
            stderr
        )


def test_an_interval_beyond_the_end_still_saves_the_last_step(trained: Path, folder: Path) -> None:
    # That is why such an interval is no mistake.
    code, stderr = resume(trained, folder, "checkpoint.interval=1000")
    assert code == 0 and (folder / "runs/tiny/checkpoints/step-00000003").is_dir(), stderr
