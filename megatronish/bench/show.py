"""`megatronish bench show`: results of any bench, as the bench itself prints them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from megatronish.bench import tables
from megatronish.bench.tables import Parts
from megatronish.errors import UserError

RESULTS = Path(__file__).parent / "results"


def _module(name: str) -> Callable[[Any], Parts]:
    return lambda result: [importlib.import_module(f"megatronish.bench.{name}").render(result)]


def _kernels(result: dict[str, Any]) -> Parts:
    from megatronish.bench.kernel_table import render, summary

    return [render(result), *summary(result)]


def _several(module: str, function: str = "render") -> Callable[[Any], Parts]:
    return lambda result: getattr(importlib.import_module(f"megatronish.bench.{module}"), function)(result)


RENDER: dict[str, Callable[[Any], Parts]] = {
    "kernels": _kernels,
    "adamw": _module("adamw"),
    "data": _module("data"),
    "step": tables.step,
    "checkpoint": tables.checkpoint,
    "pipeline": lambda result: tables.pipeline(result if isinstance(result, list) else [result]),
    "startup": tables.startup,
    "history": tables.history,
    "preflight": tables.preflight,
    "collectives": _several("collectives"),
    "limits": _several("suite_tables", "limits"),
    "training": _several("suite_tables", "training"),
    "startup of kernels": _several("suite_tables", "startup"),
    "sanitizer": _several("suite_tables", "sanitizer"),
}
"""By what a result names as its `bench`."""


def name_of(result: Any, file: Path) -> str:
    """The bench that a result is of; an old one without that key is named by its file."""
    first = result[0] if isinstance(result, list) and result else result
    if isinstance(first, dict):
        if "suite" in first:
            return f"{first['suite']} suite"
        if "bench" in first:
            return str(first["bench"])
    return file.name.partition("-")[0]


def read(file: Path) -> Any:
    """A file, or the one of that name among the package's. UserError where there is none."""
    path = file if file.is_file() else RESULTS / file.name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{file}: no such file, nor a result in the package; `megatronish bench show` lists those") from None
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); name a file that --json wrote") from None


def show(file: Path) -> Parts:
    """The result in `file`, part after part where it is a suite's. UserError where no bench knows it."""
    result = read(file)
    if isinstance(result, dict) and "suite" in result:
        return suite(result, file)
    if isinstance(result, list) and result and isinstance(result[0], dict) and {"choice", "implementation"} <= result[0].keys():
        raise UserError(f"{file}: is a run's choice of kernels, no bench result; name a file that --json of a bench wrote")
    name = name_of(result, file)
    if name not in RENDER:
        raise UserError(f"{file}: a result of {name!r}, which no bench knows; known are {', '.join(RENDER)}")
    return _rendered(result, name, file)


def suite(result: dict[str, Any], file: Path) -> Parts:
    """Of all parts, those that failed too, and what to take from them."""
    from megatronish.bench.suite_tables import failure, summary

    parts: Parts = [f"{result['suite']} suite, {result.get('device')}, {result.get('date')}"]
    for name, part in result.get("parts", {}).items():
        try:
            shown = [] if "skipped" in part else _rendered(part, name, file)
        except UserError:
            if "error" not in part:
                raise
            shown = []  # it did not come far
        parts += [f"\n== {name}", *shown, *failure(part)]
    return [*parts, "", *summary(result)]


def _rendered(result: Any, name: str, file: Path) -> Parts:
    render = RENDER.get(result.get("bench", name) if isinstance(result, dict) else name)
    if render is None:
        return [json.dumps(result, indent=2)]
    try:
        return render(result)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: is not a result of {name} of this version ({type(error).__name__}: {error})") from None


def listing(folder: Path = RESULTS) -> Table:
    """The results in a folder: file, bench, device, date."""
    table = Table(
        "file", "bench", "device", "date", title=f"`megatronish bench show FILE` prints one of {folder}", title_justify="left"
    )
    for file in sorted(folder.glob("*.json")):
        result = read(file)
        first = result[0] if isinstance(result, list) else result
        device = first.get("device") or (f"{first['num_cpus']} cores" if "num_cpus" in first else "")
        table.add_row(file.name, name_of(result, file), str(device), str(first.get("date", "")))
    return table
