"""Who may import whom, who may call torch.distributed, torch.cuda and .item(): read from the source's syntax trees.
And: every path and command that a README names exists."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatronish"
FILES = sorted(PACKAGE.rglob("*.py"))

# Everyone may also import itself, `errors` and the version. What is not here stands on top and may import everything.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "packages": (),
    "native": (),
    "writeback": (),
    "yaml_file": (),
    "batch_schedule": (),
    "config": ("batch_schedule", "config_section", "config_kernels"),
    "config_kernels": ("config_section",),
    "constraints": ("config", "batch_schedule"),
    "formulas": ("config",),
    "layout": (),
    "batch": (),
    "config_loader": ("config", "config_section", "constraints", "yaml_file"),
    "comm": (),
    "kernels": ("comm", "native", "packages"),
    "data": ("config", "batch", "batch_schedule", "comm", "native", "writeback"),
    "models": ("config", "layout", "batch", "kernels", "comm.random"),
    "parallel": ("config", "layout", "comm", "kernels"),
    "pipeline": ("config", "batch", "comm", "formulas"),
    "optim": ("config", "layout", "comm", "kernels"),
    "checkpoint": ("layout", "comm", "writeback", "retries"),
    "observe": ("config", "comm", "formulas", "packages"),
}
# `parallel` initialises the groups there; nothing else outside comm/ may.
MAY_CALL_DISTRIBUTED = ("parallel/rendezvous.py", "parallel/mesh.py")
# What a bench is measured against.
PEERS = {"bench/checkpoint.py": "torch.distributed.checkpoint"}
# Starting processes is not communication.
LAUNCHERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write megatronish.…"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def unit_of(path: Path) -> str:
    """The package, or the module at the top, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def forbidden_imports(path: Path, source: str) -> list[str]:
    """`file:line: ...` of every import that the table does not allow."""
    unit, found = unit_of(path), []
    if unit not in MAY_IMPORT:
        return []
    for line, name in imports(ast.parse(source)):
        if not name.startswith("megatronish."):
            continue
        target = name.removeprefix("megatronish.")
        allowed = (unit, "errors", "__version__", *MAY_IMPORT[unit])
        if not any(target == entry or target.startswith(entry + ".") for entry in allowed):
            found.append(f"{path.relative_to(ROOT)}:{line}: {unit} imports {name}; it may import {', '.join(allowed)}")
    return found


def forbidden_calls(path: Path, source: str) -> list[str]:
    """`file:line: ...` of every use of torch.distributed, torch.cuda or .item() outside comm/."""
    if unit_of(path) == "comm":
        return []
    tree, found = ast.parse(source), []
    banned = ["torch.cuda"] if path.relative_to(PACKAGE).as_posix() in MAY_CALL_DISTRIBUTED else ["torch.cuda", "torch.distributed"]
    names = list(imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.append((node.lineno, ast.unparse(node)))
            if node.attr == "item":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: .item() waits for the device; use megatronish.comm.host")
    for line, name in sorted(set(names)):
        peer = PEERS.get(path.relative_to(PACKAGE).as_posix(), "none")
        if any(name == module or name.startswith(module + ".") for module in banned) and not name.startswith((*LAUNCHERS, peer)):
            found.append(f"{path.relative_to(ROOT)}:{line}: {name} is for megatronish/comm/ alone")
    return found


def test_imports_follow_the_table() -> None:
    assert not [line for path in FILES for line in forbidden_imports(path, path.read_text())]


def test_only_comm_calls_torch_distributed_cuda_and_item() -> None:
    assert not [line for path in FILES for line in forbidden_calls(path, path.read_text())]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("optim/x.py", "from megatronish.models.llama import Llama"),
        ("optim/x.py", "from megatronish import parallel"),
        ("models/x.py", "import megatronish.comm.collectives"),
        ("config.py", "def f():\n    from megatronish.layout import Column"),
        ("comm/x.py", "import megatronish.kernels"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str) -> None:
    (line,) = forbidden_imports(PACKAGE / file, source)
    assert line.startswith(f"megatronish/{file}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("optim/x.py", "import torch.distributed as dist"),
        ("optim/x.py", "from torch import distributed"),
        ("train.py", "from torch.distributed import all_reduce"),
        ("data/x.py", "torch.cuda.synchronize()"),
        ("parallel/mesh.py", "torch.cuda.set_device(0)"),
        ("optim/x.py", "norm = total.sum().item()"),
    ],
)
def test_a_forbidden_call_is_found(file: str, source: str) -> None:
    assert any(line.startswith(f"megatronish/{file}:1: ") for line in forbidden_calls(PACKAGE / file, source))


def test_packages_have_no_import_cycles() -> None:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        targets = {name.split(".")[1] for _, name in imports(ast.parse(path.read_text())) if name.startswith("megatronish.")}
        edges.setdefault(unit_of(path), set()).update(targets - {unit_of(path)})
    done: set[str] = set()

    def visit(unit: str, above: tuple[str, ...]) -> None:
        assert unit not in above, f"import cycle: {' -> '.join((*above[above.index(unit) :], unit))}"
        if unit not in done:
            for target in sorted(edges.get(unit, ())):
                visit(target, (*above, unit))
            done.add(unit)

    for unit in sorted(edges):
        visit(unit, ())


READMES = [path for path in sorted([ROOT / "README.md", ROOT / "launch/README.md", *PACKAGE.rglob("README.md")]) if path.is_file()]
PATH = re.compile(r"`([A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)*\.(?:py|yaml|sh|sbatch|md|cu|cpp|txt|toml))`")
COMMAND = re.compile(r"(?:^ *|`|\$ )(?:\.venv/bin/)?megatronish ([a-z][^`\n]*)", re.MULTILINE)


def missing_paths(readme: Path, text: str) -> list[str]:
    """Files named in backticks that are neither relative to the README, the package nor the checkout."""
    places = (readme.parent, PACKAGE, ROOT)
    return [name for name in PATH.findall(text) if not any((place / name).exists() for place in places)]


def unknown_commands(text: str) -> list[str]:
    """`megatronish ...` lines whose verbs or options do not exist."""
    app = typer.main.get_command(importlib.import_module("megatronish.cli").app)
    modules = {verb: f"megatronish.{verb}.cli" for verb in ("data", "bench", "pipeline")}
    unknown = []
    for line in COMMAND.findall(text):
        command, known = app, True
        words = shlex.split(line.split(" #")[0], comments=False)
        for position, word in enumerate(words):
            if word in modules and position == 0:
                command = typer.main.get_command(importlib.import_module(modules[word]).app)
            elif word.startswith("-"):
                known &= word.split("=")[0] in {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
            elif hasattr(command, "commands"):
                known &= word in command.commands or not word.islower()  # VERB, CONFIG: a placeholder
                command = command.commands.get(word, command)
        if not known:
            unknown.append(line)
    return unknown


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_readme_names_only_what_exists(readme: Path) -> None:
    text = readme.read_text()
    assert not missing_paths(readme, text)
    assert not unknown_commands(text)


def test_a_readme_that_names_what_does_not_exist_is_found() -> None:
    assert missing_paths(ROOT / "README.md", "`comm/nothing.py` and `config.py`") == ["comm/nothing.py"]
    text = "megatronish nothing x\n`megatronish config check --nothing`\n`megatronish config check a.yaml --world 8`"
    assert unknown_commands(text) == ["nothing x", "config check --nothing"]
