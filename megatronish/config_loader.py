"""YAML files, `base:` files and `a.b=c` overrides -> Config; every problem at once, one a line, each with its key and its place."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from megatronish.config import Config
from megatronish.config_section import Section
from megatronish.constraints import find_problems
from megatronish.errors import UserError
from megatronish.yaml_file import Document, KeyPath, read_yaml_file, read_yaml_value

COMMAND_LINE = "command line"
AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Config:
    """Read, merge, validate and check a config; `world_size` (ranks) when it is known.

    Raises UserError with one line a problem: all problems of the fields and, as far as the fields allow, of their relations.
    """
    document = merge_files(Path(path), ())
    for override in overrides:
        _apply_override(document, override)
    # A section whose keys are all commented out is an empty section.
    for name in SECTIONS:
        if name in document.values and document.values[name] is None:
            document.values[name] = {}
    try:
        config = Config.model_validate(document.values)
    except ValidationError as error:
        details = one_a_mistake(error.errors(include_url=False))
        lines = [_describe(detail, document, str(path)) for detail in details]
        partial = _partial_config(document.values, details)
        problems = find_problems(partial, world_size, partial=True)
    else:
        lines, problems = [], find_problems(config, world_size)
    lines += [f"{problem.message}{_where(document, problem.keys)}" for problem in problems]
    if lines:
        raise UserError("\n".join(lines))
    return config


def config_of(values: Any, place: str) -> Config:
    """The config of `values` that a program wrote at `place`, a checkpoint say. UserError, one line a problem: another version of
    this program may have written other keys."""
    if not isinstance(values, dict):
        raise UserError(f"{place}: a config must be a mapping of sections, found {_short(values)}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        details = one_a_mistake(error.errors(include_url=False))
        raise UserError("\n".join(_describe(detail, Document(values), place) for detail in details)) from None


def to_yaml(config: Config) -> str:
    """The resolved config: every field, defaults included. Loads back to an equal Config."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file, for editors. With `base:` no key is required."""
    schema = Config.model_json_schema()
    required_below = {}
    for name, section in SECTIONS.items():
        required = schema["$defs"][section.__name__].pop("required", [])
        if required:
            required_below[name] = {"required": required}
    schema["properties"]["base"] = {
        "description": "A config file to start from, or a list of them, later ones over earlier; paths are relative to this file.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "required": [],
        "if": {"not": {"required": ["base"]}},
        "then": {"required": schema["required"], "properties": required_below},
    }


def merge_files(path: Path, including: tuple[Path, ...]) -> Document:
    """The file over its base files, which are relative to it. `including`: the files that lead here; a cycle is refused."""
    resolved = path.resolve()
    if resolved in including:
        chain = " -> ".join(p.name for p in (*including[including.index(resolved) :], resolved))
        raise UserError(f"{path}: base files include each other: {chain}; remove one `base:`")
    own = read_yaml_file(path)
    if "base" not in own.values:
        return own
    bases, place = own.values.pop("base"), own.places.pop(("base",))
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"base={bases!r}: must be a file name or a list of them ({place})")
    merged = Document({})
    for name in names:
        base_path = path.parent / name
        if not base_path.is_file():
            raise UserError(
                f"base={name!r}: there is no file {base_path}; base files are relative to the file that names them ({place})"
            )
        _merge(merged, merge_files(base_path, (*including, resolved)))
    _merge(merged, own)
    return merged


def _merge(under: Document, over: Document) -> None:
    _merge_values(under.values, over.values)
    under.places.update(over.places)


def _merge_values(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge_values(under[key], value)
        else:
            under[key] = value


def _apply_override(document: Document, override: str) -> None:
    dotted, equals, text = override.partition("=")
    path = tuple(dotted.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"{override!r}: an override must look like section.key=value, for example optim.lr=1e-4 ({COMMAND_LINE})")
    value: Any = read_yaml_value(text, f"{COMMAND_LINE}: {dotted}")
    for key in reversed(path):
        value = {key: value}
    places = {path[: i + 1]: COMMAND_LINE for i in range(len(path))}
    _merge(document, Document(value, places))


def _sections() -> dict[str, type[Section]]:
    return {
        name: info.annotation
        for name, info in Config.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    }


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation, and what it is made of."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _parts(part)


def _nested(annotation: Any) -> Iterator[type[Section]]:
    """The sections inside an annotation."""
    yield from (part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, Section))


SECTIONS = _sections()
FIELD_NAMES = set(Config.model_fields) | {
    name
    for section in SECTIONS.values()
    for model in (section, *(nested for info in section.model_fields.values() for nested in _nested(info.annotation)))
    for name in model.model_fields
}


def all_keys() -> Iterator[str]:
    """Every key of a config, dotted."""
    for name in Config.model_fields:
        section = SECTIONS.get(name)
        yield from (f"{name}.{key}" for key in section.model_fields) if section else (name,)


def _where(document: Document, keys: Sequence[str]) -> str:
    """` (file:line)` of the first of `keys` that is written somewhere, or nothing."""
    for key in keys:
        place = document.places.get(tuple(key.split(".")))
        if place:
            return f" ({place})"
    return ""


def one_a_mistake(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """A value that fits none of several types gives pydantic an error for each; keep the one that looked deepest into it.

    A list is compared with the list type and a mapping with the section; a plain value has no depth, so the first, plain type."""
    kept: dict[tuple[str, ...], ErrorDetails] = {}
    for detail in details:
        location = _key_path(detail)
        tells = len(location) if len(location) < len(detail["loc"]) else 0  # 0: no union
        key = location[:2] if tells else (*location, detail["type"])
        if key not in kept or tells > len(_key_path(kept[key])):
            kept[key] = detail
    return list(kept.values())


def _describe(detail: ErrorDetails, document: Document, path: str) -> str:
    """One line for one error of pydantic: key=value: what it must be (place)."""
    location = _key_path(detail)
    key, kind, value = ".".join(location), detail["type"], detail["input"]
    nearest = (location[:depth] for depth in range(len(location) - (kind == "missing"), 0, -1))
    place = f" ({next((document.places[above] for above in nearest if above in document.places), path)})"
    if kind == "missing":
        return f"{key}: required, but not given: {_doc(location)}{place}"
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest(location)}{place}"
    return f"{key}={_short(value)}: {_need(detail, location)}{place}"


def _key_path(detail: ErrorDetails) -> KeyPath:
    """The part of pydantic's location that names keys and places in lists, without the names of a union's types."""
    loc = detail["loc"]
    if not loc or loc[0] not in SECTIONS:
        return tuple(str(part) for part in loc[:1])
    unknown = loc[2:][-1:] if detail["type"] == "extra_forbidden" else ()
    return (*map(str, loc[:2]), *(str(part) for part in loc[2:] if isinstance(part, int) or part in (*FIELD_NAMES, *unknown)))


def _need(detail: ErrorDetails, location: KeyPath) -> str:
    context, value, kind = detail.get("ctx", {}), detail["input"], detail["type"]
    bounds = {
        "greater_than": ("gt", ">"),
        "greater_than_equal": ("ge", ">="),
        "less_than": ("lt", "<"),
        "less_than_equal": ("le", "<="),
    }
    if kind in bounds:
        name, sign = bounds[kind]
        return f"must be {sign} {context[name]:g}" if isinstance(context[name], float) else f"must be {sign} {context[name]}"
    if kind == "literal_error":
        choices = _choices(location)
        close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        return f"must be one of {', '.join(map(str, choices))}" + (f"; did you mean {close[0]}?" if close else "")
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"must be an integer; write {int(value)}"
    if kind in ("model_type", "model_attributes_type"):
        section = next(_nested(_walk(location)[1].annotation))
        return f"must be a mapping with the keys {', '.join(section.model_fields)}"
    if kind in ("too_long", "too_short"):
        return f"must have {context.get('max_length', context.get('min_length'))} values, not {context['actual_length']}"
    fixed = {
        "tuple_type": "must be a list",
        "int_type": "must be an integer",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "finite_number": "must be finite",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "must begin with a letter or digit and hold only letters, digits, '.', '_' and '-'",
    }
    return fixed.get(kind, detail["msg"])


def _walk(location: KeyPath) -> tuple[type[BaseModel], Any]:
    """The section that the last key of `location` is in, or would be, and the field of the last key that is one."""
    model: type[BaseModel] = Config
    info: Any = None
    for depth, key in enumerate(location):
        if key in model.model_fields:
            info = model.model_fields[key]
            if depth < len(location) - 1:
                model = next(_nested(info.annotation), model)
    return model, info


def _choices(location: KeyPath) -> tuple[Any, ...]:
    literals = [part for part in _parts(_walk(location)[1].annotation) if get_origin(part) is Literal]
    return tuple(dict.fromkeys(choice for literal in literals for choice in get_args(literal)))


def _doc(location: KeyPath) -> str:
    section = SECTIONS.get(location[-1]) if len(location) == 1 else None
    if section is not None:
        missing = [name for name, info in section.model_fields.items() if info.is_required()]
        return f"a section with at least {', '.join(missing)}"
    return str(_walk(location)[1].description or "").split("\n")[0].rstrip(".")


def _suggest(location: KeyPath) -> str:
    """`; did you mean ...?`: a like name in the same section, or the same name in another."""
    key, siblings = location[-1], list(_walk(location)[0].model_fields)
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {'.'.join((*location[:-1], close[0]))}?"
    leaves: dict[str, str] = {}
    for dotted in all_keys():
        leaves.setdefault(dotted.rpartition(".")[2], dotted)
    close = difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)
    return f"; did you mean {leaves[close[0]]}?" if close else f"; known here: {', '.join(siblings)}"


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    text = (
        "null"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else value
        if isinstance(value, str)
        else repr(value)
    )
    text = repr(text) if isinstance(value, str) and (not text or text != text.strip() or not text.isprintable()) else text
    if isinstance(value, str) and _looks_like_number(value):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _partial_config(values: dict[str, Any], details: Sequence[ErrorDetails]) -> Config:
    """A Config without the fields that are wrong: reading one raises AttributeError, so constraints on it are left out."""
    bad = {_key_path(detail)[:2] for detail in details}
    top: dict[str, Any] = {}
    for name, info in Config.model_fields.items():
        section = SECTIONS.get(name)
        if (name,) in bad:
            continue
        if section is None:
            top[name] = values.get(name, info.default)
            continue
        given = values.get(name, {})
        known = {key: value for key, value in given.items() if key in section.model_fields and (name, key) not in bad}
        top[name] = _without(section.model_construct(**known), {path[1] for path in bad if len(path) == 2 and path[0] == name})
    return _without(Config.model_construct(**top), {path[0] for path in bad if len(path) == 1})


def _without(section: AnySection, keys: set[str]) -> AnySection:
    for key in keys:
        section.__dict__.pop(key, None)
    return section
