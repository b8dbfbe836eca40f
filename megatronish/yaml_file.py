"""YAML 1.2 to plain Python values, with the place of every key. No tag can name a Python object; nothing is executed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatronish.errors import UserError

_PREFIX = "tag:yaml.org,2002:"
KeyPath = tuple[str, ...]


@dataclass
class Document:
    """A mapping read from YAML, and `file:line` of each of its keys."""

    values: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)


def read_yaml_file(path: Path) -> Document:
    """A YAML file whose top level is a mapping. Raises UserError with file:line:column."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    document = Document({})
    node = _compose(text, str(path))
    if node is None:
        raise UserError(f"{path}:1:1: the file is empty; a config needs at least the sections name, model, data, optim and train")
    if not isinstance(node, MappingNode):
        raise UserError(f"{_place(node, str(path))}: must be a mapping of sections (model:, data:, ...), found {_kind(node)}")
    document.values = _mapping(node, str(path), (), document.places, ())
    return document


def read_yaml_value(text: str, source: str) -> Any:
    """One YAML value, as in `a.b=VALUE`. `source` names it in errors. Nothing at all is null."""
    node = _compose(text, source)
    return None if node is None else _construct(node, source, (), {}, ())


def _compose(text: str, source: str) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        reason = " ".join(str(error.problem or error.context).split())
        advice = "; indent with spaces" if "'\\t'" in reason else f" ({error.context})" if error.context and error.problem else ""
        raise UserError(f"{where}: not YAML: {reason}{advice}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None


def _place(node: Node, source: str) -> str:
    return f"{source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _kind(node: Node) -> str:
    return "a mapping" if isinstance(node, MappingNode) else "a list" if isinstance(node, SequenceNode) else repr(node.value)


def _mapping(node: MappingNode, source: str, path: KeyPath, places: dict[KeyPath, str], above: tuple[int, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    first_at: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode) or str(key_node.tag) == _PREFIX + "merge":
            raise UserError(f"{_place(key_node, source)}: a key must be a plain word, found {_kind(key_node)}")
        key = str(key_node.value)
        if key in values:
            raise UserError(f"{_place(key_node, source)}: key {key!r} is given twice, first on line {first_at[key]}; keep one")
        first_at[key] = key_node.start_mark.line + 1
        places[(*path, key)] = f"{source}:{first_at[key]}"
        values[key] = _construct(value_node, source, (*path, key), places, above)
    return values


def _construct(node: Node, source: str, path: KeyPath, places: dict[KeyPath, str], above: tuple[int, ...]) -> Any:
    tag = str(node.tag)
    if id(node) in above:
        raise UserError(f"{_place(node, source)}: an anchor refers to itself")
    if isinstance(node, MappingNode) and tag == _PREFIX + "map":
        return _mapping(node, source, path, places, (*above, id(node)))
    if isinstance(node, SequenceNode) and tag == _PREFIX + "seq":
        return [_construct(item, source, path, {}, (*above, id(node))) for item in node.value]
    kind = tag.removeprefix(_PREFIX)
    if not isinstance(node, ScalarNode) or kind not in ("null", "bool", "int", "float", "str", "timestamp"):
        raise UserError(f"{_place(node, source)}: the tag {tag.replace(_PREFIX, '!!')} is not allowed; write a plain value")
    return _scalar(node, kind, source)


def _scalar(node: ScalarNode, kind: str, source: str) -> str | int | float | bool | None:
    if kind in ("str", "timestamp"):  # 2024-01-01 is a name here, not a date
        return str(node.value)
    if kind == "null":
        return None
    try:
        value = YAML(typ="safe", pure=True).constructor.construct_object(node)
    except (ValueError, YAMLError) as error:
        raise UserError(f"{_place(node, source)}: {node.value!r} is not a {kind}: {' '.join(str(error).split())}") from None
    return {"bool": bool, "int": int, "float": float}[kind](value)
