"""`python -m megatronish.demo` (`make demo`): the whole route on a small model, from text that every machine with Python has.

Text -> tokenizer -> token files -> training on 8 processes -> held-out text before and after -> loss.png -> three samples. Running
it again resumes, or shows the numbers again. Arguments are overrides, as for `megatronish train`: `... -m megatronish.demo
train.steps=20`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatronish.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megatronish.config import Config

CONFIG = Path("configs") / "demo_cpu.yaml"
NUM_STAGES = 7
PROMPTS = ("def main(", "import ", "    for i in range(")
RECORD = "complete.json"
RECIPE = 1  # raised when the same names come to hold something else


def main(arguments: Sequence[str]) -> int:
    """Run the demo; the exit code. Nothing is done twice: complete data and a complete run are kept."""
    try:
        return run_demo(list(arguments))
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run it again to go on from the last checkpoint", file=sys.stderr)
        return 130


def run_demo(overrides: list[str]) -> int:
    """The seven stages, in order."""
    from megatronish.config_loader import load_config
    from megatronish.run_folder import RunFolder

    stages = Stages(_console())
    config_path = find_config()
    config = load_config(config_path, overrides)
    overrides += layout_overrides(config, _num_gpus())
    config = load_config(config_path, overrides)
    data = DemoData.of(config)
    prepare_data(data, vocab_size=config.model.vocab_size, stages=stages)
    run_dir = RunFolder.of(config).path
    code = train(config, str(config_path), overrides, stages=stages)
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        stages.say(f"training ended with exit code {code}; {run_dir / 'logs'} says why, and running this again resumes")
        return code
    with stages.stage("held-out text, before and after"):
        rows = _read_metrics(run_dir)
        stages.show(results_table(rows))
    with stages.stage("loss curve"):
        from megatronish.observe.plot import plot_loss

        plot_loss(run_dir, run_dir / "loss.png")
        stages.say(f"drew {run_dir / 'loss.png'}")
    with stages.stage("three samples of what it has learned"):
        for prompt, text in continue_prompts(run_dir):
            stages.say(f"--- {prompt!r} goes on:\n{prompt}{text}")
    stages.say(what_next(config, str(config_path), overrides))
    return 0


class Stages:
    """Numbers the stages on the terminal, with the time each took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._number = 0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Announce the next stage; say how long it took when it ends well."""
        self._number += 1
        self._console.rule(f"[bold]{self._number}/{NUM_STAGES}  {title}", align="left")
        start = time.monotonic()
        yield
        self.say(f"done in {time.monotonic() - start:.1f} s")

    def say(self, text: str) -> None:
        # soft_wrap: a path that is cut in two cannot be copied.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        self._console.print(table)


@dataclass(frozen=True)
class DemoData:
    """Where the demo's data is: what its config says. All in one folder."""

    train: Path
    """A prefix."""
    validation: Path
    """A prefix."""
    tokenizer: Path

    @staticmethod
    def of(config: Config) -> DemoData:
        """UserError if the config does not hold what the demo shows."""
        if config.data.validation is None or config.data.tokenizer is None or config.train.eval_interval == 0:
            raise UserError(
                f"data.validation={config.data.validation}, data.tokenizer={config.data.tokenizer}, "
                f"train.eval_interval={config.train.eval_interval}: the demo shows held-out bits per byte and needs all three"
            )
        if not isinstance(config.data.train, str):
            raise UserError("data.train: the demo makes its own data and needs one prefix, not a blend")
        return DemoData(Path(config.data.train), Path(config.data.validation), Path(config.data.tokenizer))

    @property
    def folder(self) -> Path:
        return self.tokenizer.parent

    @property
    def files(self) -> list[Path]:
        """Everything that training reads."""
        return [
            self.tokenizer,
            *(Path(f"{prefix}{suffix}") for prefix in (self.train, self.validation) for suffix in (".bin", ".idx", ".json")),
        ]

    def record(self, vocab_size: int) -> dict[str, Any]:
        """What complete data looks like: sizes and digests of the files, and what they were made with."""
        import xxhash

        facts = {str(path): [path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes())] for path in self.files}
        return {"recipe": RECIPE, "vocab_size": vocab_size, "files": facts}


def why_not_complete(data: DemoData, vocab_size: int) -> str | None:
    """None if the data is there and whole, else the reason to make it (again)."""
    path = data.folder / RECORD
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        return f"{data.folder} holds no complete data yet"
    except ValueError:
        return f"{path} is damaged"
    missing = [file for file in data.files if not file.is_file()]
    if missing:
        return f"{missing[0]} is missing"
    found = data.record(vocab_size)
    if not isinstance(recorded, dict) or recorded.get("files", {}).keys() != found["files"].keys():
        return f"{path} is of other files"
    changed = [name for name, facts in found["files"].items() if recorded["files"][name] != facts]
    if changed:
        return f"{changed[0]} is not as it was written"
    return None if recorded == found else f"{data.folder} was made for a vocabulary of {recorded.get('vocab_size')}"


def prepare_data(data: DemoData, *, vocab_size: int, stages: Stages, root: Path | None = None) -> None:
    """Corpus, tokenizer, token files: three stages. Skipped when whole, else all redone; the record is written last.

    `root`: folder of the Python files to read, by default the standard library."""
    from megatronish.data.corpus import standard_library
    from megatronish.data.tokenize import tokenize
    from megatronish.data.tokenizer import train_tokenizer

    with stages.stage("corpus: the sources of Python's standard library"):
        reason = why_not_complete(data, vocab_size)
        if reason is not None:
            stages.say(f"{reason}: making it")
            (data.folder / RECORD).unlink(missing_ok=True)
            corpus = standard_library(root=root)
            held_out = f"{len(corpus.validation)} files, {sum(path.stat().st_size for path in corpus.validation) / 1e6:.2f} MB"
            stages.say(f"{len(corpus.train) + len(corpus.validation)} files, {corpus.num_bytes / 1e6:.1f} MB; held out: {held_out}")
    with stages.stage(f"tokenizer: byte-level BPE of {vocab_size:,} tokens"):
        if reason is not None:
            learned = train_tokenizer(corpus.train, vocab_size=vocab_size, out=data.tokenizer)
            stages.say(f"learned {learned:,} tokens -> {data.tokenizer}")
    with stages.stage("token files"):
        if reason is None:
            stages.say(f"{data.folder} is complete; nothing to do in stages 1 to 3")
            return
        for paths, prefix in ((corpus.train, data.train), (corpus.validation, data.validation)):
            # The last ones may be of another vocabulary, which `tokenize` would not overwrite.
            Path(f"{prefix}.json").unlink(missing_ok=True)
            # One process: the encoder has threads, and starting workers takes longer than this text.
            report = tokenize(paths, tokenizer=data.tokenizer, out=prefix)
            stages.say(f"{report.documents} documents, {report.tokens / 1e6:.2f} M tokens -> {prefix}.bin, .idx")
        temporary = data.folder / f"{RECORD}.tmp-{os.getpid()}"
        temporary.write_text(json.dumps(data.record(vocab_size), indent=2) + "\n")
        os.replace(temporary, data.folder / RECORD)


def train(config: Config, config_path: str, overrides: list[str], *, stages: Stages) -> int:
    """Train, or resume, in as many processes as the layout has; 0 at once when the run is complete."""
    from megatronish.run_folder import RunFolder

    num_ranks, folder = _num_ranks(config), RunFolder.of(config)
    parallel = config.parallel
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {parallel.data or 1}"
    with stages.stage(f"training: {num_ranks} processes, {layout}, ZeRO {parallel.zero_stage}"):
        if is_trained(config, folder.path):
            stages.say(f"{folder.path} has its {config.num_steps} steps; delete it to train again")
            return 0
        if any(folder.checkpoints.glob("step-*")):
            stages.say(f"{folder.path} is there: going on from its newest checkpoint")
        from megatronish.train import main as train_main

        return train_main(config_path, overrides, num_ranks)


def is_trained(config: Config, run_dir: Path) -> bool:
    """Whether the run has its last checkpoint and the evaluation after its last step, and was of this very config."""
    from megatronish.config_loader import load_config

    checkpoint = run_dir / "checkpoints" / f"step-{config.num_steps:08d}"
    evaluated = [row["step"] for row in _read_metrics(run_dir) if "eval_loss" in row]
    if not checkpoint.is_dir() or config.num_steps not in evaluated:
        return False
    try:
        return load_config(run_dir / "config.yaml", []) == config
    except UserError:
        return False  # written by another version: training itself decides


def layout_overrides(config: Config, num_gpus: int) -> list[str]:
    """On CPU, or with a GPU for each rank, none; else halve data, then pipeline, then tensor until the GPUs are enough."""
    sizes = {"data": config.parallel.data or 1, "pipeline": config.parallel.pipeline, "tensor": config.parallel.tensor}
    before = dict(sizes)
    while num_gpus and math.prod(sizes.values()) > num_gpus:
        axis = next(axis for axis, size in sizes.items() if size > 1)
        sizes[axis] //= 2
    return [f"parallel.{axis}={size}" for axis, size in sizes.items() if size != before[axis]]


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Held-out measures of the first and of the last evaluation, and what lay between. UserError without an evaluation."""
    from rich.table import Table

    evaluations = [row for row in rows if "eval_loss" in row]
    if not evaluations:
        raise UserError("the run's metrics.jsonl holds no evaluation; set train.eval_interval above 0 and delete the run folder")
    first, last = evaluations[0], evaluations[-1]
    names = {"eval_loss": "loss (nats per token)", "eval_perplexity": "perplexity", "eval_bits_per_byte": "bits per byte"}
    table = Table("held-out text", caption=_summary(rows), caption_justify="left")
    for row in (first, last):
        table.add_column(f"step {row['step']}", justify="right")
    for key, name in names.items():
        if key in first and key in last:
            table.add_row(name, *(f"{row[key]:,.3f}" for row in (first, last)))
    return table


def continue_prompts(run_dir: Path) -> list[tuple[str, str]]:
    """(prompt, what follows) of PROMPTS, from the newest checkpoint, in this process."""
    from megatronish.comm import streams
    from megatronish.generate.command import Request, generate, prepare
    from megatronish.generate.sampling import Sampling
    from megatronish.parallel.mesh import MeshShape, build_mesh

    request = Request(run_dir, PROMPTS, Sampling(temperature=0.7, top_p=0.9), max_tokens=40)
    device = streams.choose_device(0, 1)
    _, samples = generate(prepare(request, 1), build_mesh(MeshShape(), 0, device=device))
    return [(sample.prompt, sample.text) for sample in samples]


def what_next(config: Config, config_path: str, overrides: Sequence[str]) -> str:
    """Commands to go on with, for this run as `overrides` made it."""
    from megatronish.run_folder import RunFolder

    command, run_dir = _command(), RunFolder.of(config).path
    num_ranks = min(2, _num_ranks(config))
    kept = [override for override in overrides if not override.startswith(("train.steps=", "parallel."))]
    longer = " ".join([*kept, f"train.steps={2 * config.num_steps}"])
    tensorboard = Path(command).with_name("tensorboard")
    return (
        f"The run is in {run_dir}: metrics.jsonl, loss.png, logs/, tensorboard/, checkpoints/.\n"
        "Next:\n"
        f"  {command} eval {run_dir} --data {config.data.validation}   # the same numbers, from the checkpoint, in one process\n"
        f"  {command} generate {run_dir} --prompt 'class '   # more text\n"
        f"  {command} data inspect {config.data.train} --tokenizer {config.data.tokenizer}   # what it was trained on\n"
        f"  {command} train {config_path} {longer} parallel.tensor=1 parallel.pipeline=1 parallel.data={num_ranks} "
        f"--nproc {num_ranks}   # go on, on another layout\n"
        f"  {tensorboard} --logdir {run_dir / 'tensorboard'}   # the curves, live"
    )


def find_config() -> Path:
    """configs/demo_cpu.yaml here, or in the source tree that this package is in."""
    for folder in (Path(), Path(__file__).parent.parent):
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    raise UserError(f"{CONFIG}: not found; run the demo in a clone of the source tree")


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    training = [row for row in rows if "loss" in row]
    if not training:
        return ""
    speed = statistics.median(row["tokens_per_second"] for row in training)
    tokens = training[-1]["consumed_tokens"]
    return f"{training[-1]['step']} steps, {tokens / 1e6:.2f} M tokens, {speed:,.0f} tokens/s (median)"


def _read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    from megatronish.observe.metrics import read_metrics

    return read_metrics(run_dir)


def _num_ranks(config: Config) -> int:
    return config.parallel.tensor * config.parallel.pipeline * (config.parallel.data or 1)


def _num_gpus() -> int:
    from megatronish.comm.streams import num_gpus

    return num_gpus()


def _command() -> str:
    """The `megatronish` of the Python that runs this, as a path that can be typed here."""
    script = Path(sys.executable).with_name("megatronish")
    if not script.exists():
        return "megatronish"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def _console() -> Console:
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
