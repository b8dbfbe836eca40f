"""Reading configs: base files, overrides, the schema, and bad input: a mistake is one line with key, value and place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatronish.config_loader import all_keys, json_schema, load_config, to_yaml
from megatronish.errors import UserError
from megatronish.yaml_file import read_yaml_file

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GOOD = """\
name: small
model:
  num_layers: 4
  hidden_size: 64
  num_heads: 8
  mlp_size: 128
  vocab_size: 100
data:
  train: corpus
  sequence_length: 32
optim:
  lr: 1e-3
train:
  steps: 100
  global_batch_size: 8
  micro_batch_size: 1
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def errors_of(path: Path, overrides: list[str] | None = None, world: int | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides or [], world_size=world)
    return str(caught.value).splitlines()


# (what replaces a line of GOOD, or is appended; patterns that its one line of error must hold)
BAD_FILES = {
    "unknown key": ("  lr: 1e-3", "  lr: 1e-3\n  lrr: 1", ["optim.lrr: unknown key; did you mean optim.lr?", r"good\.yaml:13\)"]),
    "key of another section": ("  steps: 100", "  steps: 100\n  lr: 3", [r"train\.lr: unknown key; did you mean optim\.lr\?"]),
    "unknown section": ("name: small", "name: small\nmodle: {}", [r"modle: unknown key; did you mean model\?", r"good\.yaml:2\)"]),
    "text for a number": ("  lr: 1e-3", "  lr: fast", [r"optim\.lr=fast: must be a number", r"good\.yaml:12\)"]),
    "quoted number": ("  lr: 1e-3", "  lr: '1e-3'", [r"optim\.lr='1e-3': must be a number"]),
    "float for an integer": ("  steps: 100", "  steps: 1e2", [r"train\.steps=100\.0: must be an integer; write 100"]),
    "true for an integer": ("  steps: 100", "  steps: true", [r"train\.steps=true: must be an integer"]),
    "yes for true": ("optim:", "parallel:\n  sequence: yes\noptim:", [r"parallel\.sequence=yes: must be true or false"]),
    "zero lr": ("  lr: 1e-3", "  lr: 0", [r"optim\.lr=0: must be > 0 "]),
    "negative lr": ("  lr: 1e-3", "  lr: -1.0", [r"optim\.lr=-1\.0: must be > 0 \(.*good\.yaml:12\)"]),
    "NaN": ("  lr: 1e-3", "  lr: .nan", [r"optim\.lr=nan: must be finite"]),
    "infinity": ("  lr: 1e-3", "  lr: .inf", [r"optim\.lr=inf: must be finite"]),
    "beyond int64": (
        "  steps: 100",
        "  steps: 9223372036854775808",
        [r"train\.steps=9223372036854775808: must be <= 9223372036854775807"],
    ),
    "zero interval": ("optim:", "checkpoint: {interval: 0}\noptim:", [r"checkpoint\.interval=0: must be >= 1"]),
    "negative seed": ("  steps: 100", "  steps: 100\n  seed: -1", [r"train\.seed=-1: must be >= 0"]),
    "unknown choice": (
        "  lr: 1e-3",
        "  lr: 1e-3\n  schedule: cosin",
        [r"optim\.schedule=cosin: must be one of .*wsd.*did you mean cosine\?"],
    ),
    "unknown dtype": (
        "  steps: 100",
        "  steps: 100\n  dtype: float8",
        [r"train\.dtype=float8: must be one of float32, bfloat16, float16, float64"],
    ),
    "section is not a mapping": ("optim:", "observe: 3\noptim:", [r"observe=3: must be a mapping with the keys log_interval"]),
    "missing key": ("  mlp_size: 128\n", "", [r"model\.mlp_size: required, but not given: Width F", r"good\.yaml:2\)"]),
    "bad name": ("name: small", "name: a/b", [r"name=a/b: must begin with a letter or digit"]),
    "empty path": ("  train: corpus", "  train: ''", [r"data\.train='': must not be empty"]),
    "duplicate key": ("  lr: 1e-3", "  lr: 1e-3\n  lr: 2e-3", [r"good\.yaml:13:3: key 'lr' is given twice, first on line 12"]),
    "tab": ("  lr: 1e-3", "\tlr: 1e-3", [r"good\.yaml:12:1: not YAML: .*indent with spaces"]),
    "unclosed bracket": ("  train: corpus", "  train: [corpus", [r"good\.yaml:\d+:\d+: not YAML: "]),
    "python object": (
        "name: small",
        "name: !!python/object/apply:os.system [echo]",
        [r"good\.yaml:1:7: the tag !!python/object/apply:os\.system"],
    ),
    "own tag": ("name: small", "name: !thing x", [r"good\.yaml:1:7: the tag !thing is not allowed"]),
    "merge key": ("name: small", "name: small\n<<: {}", [r"good\.yaml:2:1: a key must be a plain word"]),
    "anchor to itself": ("name: small", "name: &a [*a]", [r"good\.yaml:1:\d+: an anchor refers to itself"]),
    "two documents": (
        "  micro_batch_size: 1\n",
        "  micro_batch_size: 1\n---\na: 1\n",
        [r"good\.yaml:\d+:\d+: not YAML: .*another document"],
    ),
    "missing base": (
        "name: small",
        "base: nothing.yaml\nname: small",
        [r"base='nothing\.yaml': there is no file .*nothing\.yaml", r":1\)"],
    ),
    "base is a number": ("name: small", "base: 3\nname: small", [r"base=3: must be a file name or a list"]),
    "base of itself": ("name: small", "base: good.yaml\nname: small", [r"include each other: good\.yaml -> good\.yaml"]),
    "heads over tensor ranks": (
        "optim:",
        "parallel: {tensor: 3, data: 1}\noptim:",
        [r"parallel\.tensor=3 does not divide model\.num_heads=8"],
    ),
    "key/value heads over tensor ranks": (
        "  vocab_size: 100",
        "  vocab_size: 100\n  num_kv_heads: 2\nparallel: {tensor: 4, data: 1}",
        [r"parallel\.tensor=4 does not divide model\.num_kv_heads=2"],
    ),
    "no vocabulary multiple": (
        "  vocab_size: 100",
        "  vocab_size: 100\n  vocab_multiple: 0",
        [r"model\.vocab_multiple=0: must be >= 1"],
    ),
    "no loss scale": (
        "  steps: 100",
        "  steps: 100\n  dtype: float16\n  loss_scale: 0",
        [r"train\.loss_scale=0: must be >"],
    ),
    "infinite loss scale": ("  steps: 100", "  steps: 100\n  loss_scale: .inf", [r"train\.loss_scale=inf: must be finite"]),
    "hidden over heads": (
        "  num_heads: 8",
        "  num_heads: 10",
        [r"model\.hidden_size=64 is not divisible by model\.num_heads=10", ":5\\)"],
    ),
    "neither steps nor tokens": ("  steps: 100\n", "", [r"train\.steps and train\.tokens: neither is given"]),
    "warm-up beyond the end": (
        "  lr: 1e-3",
        "  lr: 1e-3\n  warmup_steps: 200",
        [r"optim\.warmup_steps=200 .* 100 steps", r":13\)"],
    ),
    "too few microbatches": (
        "optim:",
        "parallel: {pipeline: 4, data: 4}\noptim:",
        [r"global_batch_size=8 makes 2 microbatches .* parallel\.pipeline=4"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_mistake_in_a_file_is_one_line_with_key_value_and_place(case: str, good: Path) -> None:
    old, new, patterns = BAD_FILES[case]
    assert GOOD.count(old) == 1
    good.write_text(GOOD.replace(old, new))
    (line,) = errors_of(good)
    for pattern in patterns:
        assert re.search(pattern, line), line


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_is_one_line(text: str, good: Path) -> None:
    good.write_text(text)
    (line,) = errors_of(good)
    assert "empty" in line or "found" in line


@pytest.mark.parametrize(("text", "pattern"), [("- a\n", "found a list"), ("3\n", "found '3'"), ("a\0b: 1\n", "not YAML: ")])
def test_what_is_not_a_mapping_is_one_line(text: str, pattern: str, good: Path) -> None:
    good.write_text(text)
    (line,) = errors_of(good)
    assert pattern in line


def test_bytes_that_are_not_utf8_and_missing_files_are_one_line(good: Path, tmp_path: Path) -> None:
    good.write_bytes(b"name: \xff\n")
    assert errors_of(good) == [f"{good}: byte 6 is not UTF-8; save the file as UTF-8"]
    assert errors_of(tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: no such file"]
    (line,) = errors_of(tmp_path)
    assert "cannot be read" in line


def test_an_empty_config_lists_every_section_that_it_lacks(good: Path) -> None:
    good.write_text("{}\n")
    assert [line.split(":")[0] for line in errors_of(good)] == ["name", "model", "data", "optim", "train"]


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("optim.lr", "'optim.lr': an override must look like section.key=value"),
        ("=3", "an override must look like"),
        (".lr=3", "an override must look like"),
        ("optim.lr=-1", r"optim\.lr=-1: must be > 0 \(command line\)"),
        ("optim.warmup=5", r"optim\.warmup: unknown key; did you mean optim\.warmup_steps\?"),
        ("seed=1", r"seed: unknown key; did you mean train\.seed\?"),
        ("optim.lr.x=1", r"optim\.lr=\{'x': 1\}: must be a number"),
        ("model.num_layers=!!python/name:os.system x", "the tag !!python/name:os.system is not allowed"),
        ("model=3", "model=3: must be a mapping with the keys"),
        ("data.train=[", "command line: data.train:1:.*not YAML"),
    ],
)
def test_a_mistake_in_an_override_is_one_line(override: str, pattern: str, good: Path) -> None:
    (line,) = errors_of(good, [override])
    assert re.search(pattern, line), line


def test_two_mistakes_are_two_lines_fields_and_relations_together(good: Path) -> None:
    lines = errors_of(good, ["optim.lr=-1", "model.num_heads=10", "train.sed=3", "parallel.tensor=5"], world=5)
    assert [line.split("=")[0].split(":")[0] for line in lines] == ["optim.lr", "train.sed", "model.hidden_size", "parallel.tensor"]


def test_a_relation_to_a_wrong_field_is_left_out_not_guessed(good: Path) -> None:
    # num_heads is wrong: whether it divides anything cannot be said; the batch still can.
    lines = errors_of(good, ["model.num_heads=many", "parallel.data=3"])
    assert [line.split("=")[0] for line in lines] == ["model.num_heads", "train.global_batch_size"]


def test_the_command_line_exits_with_2_and_one_line_without_a_traceback(good: Path) -> None:
    command = [sys.executable, "-m", "megatronish.cli", "config", "check", str(good), "optim.lr=-1", "train.steps=0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: optim.lr=-1: must be > 0 (command line)",
        "error: train.steps=0: must be >= 1 (command line)",
    ]


def test_the_last_of_file_and_overrides_wins_and_sections_merge(good: Path, tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("base: good.yaml\nname: over\nmodel: {num_heads: 4}\noptim: {beta1: 0.8}\n")
    config = load_config(tmp_path / "over.yaml", ["optim.beta1=0.7", "data.tokenizer=t.json", "optim.beta1=0.6"])
    assert (config.name, config.model.num_heads, config.model.hidden_size) == ("over", 4, 64)
    assert (config.optim.beta1, config.optim.lr, config.data.tokenizer) == (0.6, 1e-3, "t.json")


def test_base_files_are_relative_nest_and_later_ones_win(good: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("base: ../good.yaml\noptim: {lr: 2, weight_decay: 0.5}\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 3}\n")
    (tmp_path / "top.yaml").write_text("base: [sub/a.yaml, b.yaml]\nname: top\n")
    config = load_config(tmp_path / "top.yaml")
    assert (config.name, config.optim.lr, config.optim.weight_decay) == ("top", 3, 0.5)


def test_two_files_may_share_a_base_but_a_cycle_is_named(good: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: good.yaml\n")
    (tmp_path / "b.yaml").write_text("base: [good.yaml, a.yaml]\nname: b\n")
    assert load_config(tmp_path / "b.yaml").name == "b"
    good.write_text("base: b.yaml\n" + GOOD)
    (line,) = errors_of(tmp_path / "b.yaml")
    assert "b.yaml -> good.yaml -> b.yaml" in line


def test_an_error_names_the_file_that_set_the_value(good: Path, tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("base: good.yaml\nmodel:\n  num_layers: -2\n")
    assert errors_of(tmp_path / "over.yaml") == [f"model.num_layers=-2: must be >= 1 ({tmp_path}/over.yaml:3)"]
    good.write_text(GOOD.replace("lr: 1e-3", "lr: -3"))
    (tmp_path / "over.yaml").write_text("base: good.yaml\n")
    assert errors_of(tmp_path / "over.yaml") == [f"optim.lr=-3: must be > 0 ({good}:12)"]


def test_values_are_yaml_1_2(good: Path) -> None:
    good.write_text(GOOD.replace("lr: 1e-3", "lr: 1e-4").replace("name: small", "name: 2024-01-01"))
    config = load_config(good, ["data.tokenizer=on", "optim.min_lr=1E-5", "run_root='3'"])
    assert (config.optim.lr, config.optim.min_lr) == (1e-4, 1e-5)
    assert (config.name, config.data.tokenizer, config.run_root) == ("2024-01-01", "on", "3")


def test_a_section_whose_keys_are_commented_out_is_its_defaults(good: Path) -> None:
    good.write_text(GOOD + "checkpoint:\n  # interval: 3\n")
    assert load_config(good).checkpoint.keep == 3


def test_a_value_set_to_null_goes_back_to_not_given(good: Path) -> None:
    config = load_config(good, ["train.steps=", "train.tokens=5000"])
    assert config.train.steps is None and config.num_steps == 20


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_resolved_config_loads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["optim.lr=3.3e-4", "run_root='1e5'"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    assert set(read_yaml_file(tmp_path / "resolved.yaml").values) == {key.split(".")[0] for key in all_keys()}


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """A validator for the part of JSON schema that ours uses; an unknown keyword fails."""
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = {**target, **{key: rule for key, rule in schema.items() if key != "$ref"}}
    types = {
        "integer": int,
        "number": (int, float),
        "string": str,
        "boolean": bool,
        "array": list,
        "object": dict,
        "null": type(None),
    }
    found: list[str] = []
    for keyword, rule in schema.items():
        match keyword:
            case "type":
                ok = isinstance(value, types[rule]) and not (isinstance(value, bool) and rule in ("integer", "number"))
            case "minimum":
                ok = not isinstance(value, int | float) or value >= rule
            case "maximum":
                ok = not isinstance(value, int | float) or value <= rule
            case "exclusiveMinimum":
                ok = not isinstance(value, int | float) or value > rule
            case "exclusiveMaximum":
                ok = not isinstance(value, int | float) or value < rule
            case "minLength":
                ok = not isinstance(value, str) or len(value) >= rule
            case "pattern":
                ok = not isinstance(value, str) or re.search(rule, value) is not None
            case "enum":
                ok = value in rule
            case "anyOf":
                ok = any(not violations(value, option, root) for option in rule)
            case "not":
                ok = bool(violations(value, rule, root))
            case "required":
                ok = not isinstance(value, dict) or set(rule) <= set(value)
            case "items":
                ok = not isinstance(value, list) or not any(violations(item, rule, root) for item in value)
            case "additionalProperties":
                ok = rule is not False or set(value) <= set(schema["properties"])
            case "properties":
                for key in rule.keys() & (value.keys() if isinstance(value, dict) else set()):
                    found += violations(value[key], rule[key], root, f"{path}.{key}")
                ok = True
            case "if":
                ok = bool(violations(value, rule, root)) or not violations(value, schema["then"], root)
            case "$schema" | "$defs" | "title" | "description" | "default" | "then":
                ok = True
            case _:
                raise AssertionError(f"keyword {keyword}")
        if not ok:
            found.append(f"{path}: {keyword}")
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_configs(path: Path) -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert violations(read_yaml_file(path).values, schema, schema) == []


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("lr: 1e-3", "lrr: 1", ".optim: additionalProperties"),
        ("lr: 1e-3", "lr: 0", ".optim.lr: exclusiveMinimum"),
        ("steps: 100", "steps: 1.5", ".train.steps: anyOf"),
        ("  mlp_size: 128\n", "", ": if"),
        ("name: small\n", "", ": if"),
        ("name: small\n", "base: 3\nname: small\n", ".base: anyOf"),
        ("lr: 1e-3", "lr: 1e-3\n  schedule: x", ".optim.schedule: enum"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(old: str, new: str, where: str, good: Path) -> None:
    schema = json.loads(json.dumps(json_schema()))
    good.write_text(GOOD)
    assert violations(read_yaml_file(good).values, schema, schema) == []
    good.write_text(GOOD.replace(old, new))
    assert where in violations(read_yaml_file(good).values, schema, schema)
    errors_of(good)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.recompute=nne", "parallel.recompute=nne: must be one of none, selective, full; did you mean none?"),
        ("parallel.recompute=[full,nne]", "parallel.recompute.1=nne: must be one of none, selective, full; did you mean none?"),
        ("parallel.stage_layers=[4,x]", "parallel.stage_layers.1=x: must be an integer"),
        ("parallel.stage_layers=8", "parallel.stage_layers=8: must be a list"),
        ("observe.profile_steps=[1,2,3]", "observe.profile_steps=[1, 2, 3]: must have 2 values, not 3"),
        ("data.train=[{prefix: a, weight: 0.0}]", "data.train.0.weight=0.0: must be > 0"),
        ("data.train=7", "data.train=7: must be text"),
        ("train.batch_ramp=4", "train.batch_ramp=4: must be a mapping with the keys start, increment, samples"),
        (
            "train.batch_ramp={start: 2, increment: 2, samples: 8, sample: 8}",
            "train.batch_ramp.sample: unknown key; did you mean train.batch_ramp.samples?",
        ),
    ],
)
def test_a_mistake_inside_a_value_of_several_types_is_one_line(root: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(root / "configs" / "demo_cpu.yaml", [override])
    assert str(caught.value) == f"{message} (command line)"
