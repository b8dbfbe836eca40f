"""The command line: help is quick because nothing is imported for it; bad input is exit code 2, one line a problem."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def megatronish(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatronish.cli", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "check", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    # Half a second is the promise; what it takes to keep it is that none of these is imported (torch alone takes a second).
    heavy = {"torch", "numpy", "ruamel", "rich", "transformers", "tokenizers"}
    if arguments == ["--help"]:
        heavy.add("pydantic")  # typer itself takes it to read the arguments of a verb
    code = (
        "import sys\n"
        "from megatronish import cli\n"
        f"sys.argv[1:] = {arguments}\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"heavy = {heavy} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: " in result.stdout


def test_every_verb_is_listed_in_help() -> None:
    text = megatronish("--help").stdout
    for verb in ("train", "eval", "data", "bench", "config"):
        assert f"  {verb} " in text


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("megatronish.train", ["train", "c.yaml", "a.b=1", "--nproc", "8", "c.d=-2"], ["c.yaml", ["a.b=1", "c.d=-2"], 8]),
        ("megatronish.train", ["train", "c.yaml"], ["c.yaml", [], None]),
        # As deepspeed's launcher and older ones give it.
        ("megatronish.train", ["--local_rank=0", "train", "c.yaml", "a.b=1"], ["c.yaml", ["a.b=1"], None]),
        ("megatronish.train", ["train", "c.yaml", "--local-rank", "0", "a.b=1"], ["c.yaml", ["a.b=1"], None]),
        ("megatronish.evaluate", ["eval", "runs/x", "--data", "p", "--nproc", "2"], ["runs/x", "p", 2, [], None, None]),
        (
            "megatronish.evaluate",
            ["eval", "runs/x", "a.b=1", "--data", "p", "--batches", "3", "--json", "f"],
            ["runs/x", "p", None, ["a.b=1"], 3, "f"],
        ),
    ],
)
def test_a_verb_passes_its_arguments_on(module: str, arguments: list[str], expected: list[object]) -> None:
    code = (
        "import json, sys, types\n"
        f"stand_in = types.ModuleType({module!r})\n"
        "stand_in.main = lambda *given: print(json.dumps([word for word in given if type(word).__name__ != 'EndSignals']))\n"
        f"sys.modules[{module!r}] = stand_in\n"
        f"sys.argv[1:] = {arguments}\n"
        "from megatronish import cli\ncli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(result.stdout) == expected, result.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--local_rank=3"], "--local_rank 3, but the environment says 0 (none (one process))"),
        (["--local_rank", "x"], "--local_rank x: must be a number"),
        (["--local_rank"], "--local_rank : must be a number"),
    ],
)
def test_a_local_rank_that_the_environment_does_not_say_is_refused(option: list[str], words: str) -> None:
    result = megatronish("train", "c.yaml", *option)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {words}"), result.stderr


def test_config_print_knows_the_runs_folder(root: Path) -> None:
    result = megatronish("config", "print", str(root / "configs/demo_cpu.yaml"), "name=other", "run_root=/a b", "--run-folder")
    assert result.stdout == "/a b/other\n"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        ("UserError('a\\nb')", 2, ["error: a", "error: b"]),
        ("RunStopped('step 3')", 77, ["error: step 3"]),
        ("KeyboardInterrupt()", 130, []),
    ],
)
def test_errors_become_exit_codes_without_a_traceback(error: str, code: int, lines: list[str]) -> None:
    script = (
        "import sys, types\nfrom megatronish import cli\nfrom megatronish.errors import RunStopped, UserError\n"
        f"def fail(*given):\n    raise {error}\n"
        "stand_in = types.ModuleType('megatronish.train')\nstand_in.main = fail\nsys.modules['megatronish.train'] = stand_in\n"
        "sys.argv[1:] = ['train', 'c.yaml']\ncli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == code
    assert result.stderr.splitlines() == lines


def test_config_print_loads_back_to_the_same_config(root: Path, tmp_path: Path) -> None:
    from megatronish.config_loader import load_config

    result = megatronish("config", "print", str(root / "configs/demo_cpu.yaml"), "optim.min_lr=1e-5")
    assert result.returncode == 0, result.stderr
    (tmp_path / "resolved.yaml").write_text(result.stdout)
    config = load_config(tmp_path / "resolved.yaml")
    assert config == load_config(root / "configs/demo_cpu.yaml", ["optim.min_lr=1e-5"])
    assert config.optim.min_lr == 1e-5


def test_config_check_says_what_the_run_will_be(root: Path) -> None:
    result = megatronish("config", "check", str(root / "configs/gpt_1t.yaml"), "--world", "3072")
    assert result.returncode == 0
    for fact in ("3,072 ranks = tensor 8 x pipeline 64 x data 6", "512 microbatches"):
        assert fact in result.stdout
    assert result.stderr == ""


def test_config_check_warns_and_goes_on(root: Path) -> None:
    result = megatronish("config", "check", str(root / "configs/demo_cpu.yaml"), "parallel.zero_stage=2")
    assert result.returncode == 0 and ": ok: " in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: parallel.zero_stage=2") and "4 times the volume" in line


def test_config_check_refuses_the_wrong_number_of_ranks_in_one_line(root: Path) -> None:
    result = megatronish("config", "check", str(root / "configs/gpt_1t.yaml"), "--world", "1024")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "3072" in line and "1024" in line and "parallel.data" in line


def test_config_schema_is_json() -> None:
    schema = json.loads(megatronish("config", "schema").stdout)
    assert schema["properties"]["base"]
