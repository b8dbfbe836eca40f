"""`megatronish generate RUN --prompt TEXT`: continue text with a run's checkpoint, whatever layout saved it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatronish.assemble import cut_model, mesh_shape
from megatronish.checkpoint.load import Checkpoint, find_checkpoints, newest_loadable, open_checkpoint
from megatronish.checkpoint.manifest import checkpoint_name
from megatronish.checkpoint.verify import verify_checkpoint
from megatronish.comm import streams
from megatronish.comm.groups import world_group
from megatronish.config import Config
from megatronish.data.tokenizer import load_tokenizer
from megatronish.errors import UserError
from megatronish.evaluate import evaluation_config, fill_weights
from megatronish.generate.decode import Continuation, Generator, Limits
from megatronish.generate.sampling import Sampling
from megatronish.generate.text import TextStream, continued_text, encode_prompts, end_token, read_prompts_file
from megatronish.json_file import writable, write_json
from megatronish.kernel_choices import use_saved
from megatronish.local_launch import end_with_launcher, must_launch, run_local
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.parallel.rendezvous import connect, disconnect, find_place
from megatronish.rank_failure import RankGuard
from megatronish.run_folder import RunFolder
from megatronish.startup import config_facts, require_agreement, version_facts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Request:
    """What is to be continued, with what, how."""

    run: Path
    prompts: tuple[str, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 100
    step: int | None = None
    """Of the checkpoint; None: the newest that verifies."""
    overrides: tuple[str, ...] = ()
    json_file: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A request with what its run's folder holds, read and checked."""

    request: Request
    config: Config
    tokenizer: Tokenizer
    prompts: list[list[int]]


@dataclass(frozen=True)
class Sample:
    """One prompt and what followed."""

    prompt: str
    text: str
    """What was generated, without the prompt."""
    tokens: list[int]
    """Of `text`."""
    finish: str


def main(request: Request, nproc: int | None, arguments: Sequence[str]) -> int:
    """Generate in this process, or in `nproc` new ones that share the matrices, started with `arguments`; the exit code.

    UserError for bad input, before anything is started."""
    place = find_place()
    if must_launch(place, nproc):
        prepare(request, nproc or 1)
        return run_local(list(arguments), nproc or 1)
    end_with_launcher(place)
    with RankGuard(place) as guard:
        prepared = prepare(request, place.world_size)
        config = prepared.config
        guard.run_folder = request.run
        streams.set_numerics(cpu_threads=config.train.cpu_threads, deterministic=config.train.deterministic)
        timeout = config.parallel.timeout_seconds
        device = connect(place, collective_seconds=timeout)
        facts = config_facts(config) | version_facts() | {"prompts": repr((prepared.prompts, request.sampling, request.max_tokens))}
        require_agreement(facts, world=world_group(device_kind=device.type), device=device)
        mesh = build_mesh(mesh_shape(config, place.world_size), place.rank, device=device, timeout_seconds=timeout)
        use_saved(config, request.run, device)
        printer = Printer(prepared) if mesh.rank == 0 else None
        step, samples = generate(prepared, mesh, printer)
        if request.json_file is not None and mesh.rank == 0:
            write_json(request.json_file, report(request, step, samples))
        disconnect()
    return 0


def prepare(request: Request, world_size: int) -> Prepared:
    """Read what the run's folder holds. UserError without a tokenizer or a checkpoint, or for prompts that cannot go on."""
    folder = RunFolder(request.run)
    if not folder.config_file.is_file():
        raise UserError(f"{request.run} is not the folder of a run: there is no {folder.config_file}; give RUN_ROOT/NAME of a run")
    steps = [int(path.name.removeprefix("step-")) for path in find_checkpoints(folder.checkpoints)]
    if not steps:
        raise UserError(f"{request.run} has no checkpoint yet: {folder.checkpoints} is empty; wait for its first")
    if request.step is not None and request.step not in steps:
        raise UserError(f"--step {request.step}: {request.run} has checkpoints of steps {', '.join(map(str, sorted(steps)))}")
    if request.json_file is not None:
        writable(request.json_file)
    if not request.prompts:
        raise UserError("there is nothing to continue: give --prompt TEXT, or --prompts-file FILE")
    config = evaluation_config(folder.config_file, (f"parallel.tensor={world_size}", *request.overrides), world_size)
    if config.data.tokenizer is None:
        raise UserError(f"{request.run} has no data.tokenizer to read prompts with; add data.tokenizer=FILE to this command")
    tokenizer = load_tokenizer(config.data.tokenizer)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is below the {size} tokens of data.tokenizer={config.data.tokenizer}"
        )
    return Prepared(
        request, config, tokenizer, encode_prompts(tokenizer, request.prompts, max_positions=config.model.max_positions)
    )


def generate(prepared: Prepared, mesh: Mesh, printer: Printer | None = None) -> tuple[int, list[Sample]]:
    """(step of the checkpoint, a sample for each prompt). Collective over the job; every rank gets the same."""
    request, config, tokenizer = prepared.request, prepared.config, prepared.tokenizer
    with closing(choose_checkpoint(request, mesh)) as checkpoint:
        cut = cut_model(config, mesh)
        fill_weights(checkpoint, config, cut)
        step = checkpoint.step
    model, tp = config.model, mesh.groups["tp"]
    generator = Generator(
        cut.model, vocab_size=model.vocab_size, padded_vocab_size=model.padded_vocab_size, tp=tp, device=mesh.device
    )
    limits = Limits(request.max_tokens, model.max_positions, end_token(tokenizer))
    samples: list[Sample] = []
    for first in range(0, len(prepared.prompts), _PROMPTS_AT_ONCE):
        prompts = prepared.prompts[first : first + _PROMPTS_AT_ONCE]
        on_token = None if printer is None else printer.on_token
        if printer is not None:
            printer.begin()
        numbers = range(first, first + len(prompts))
        texts = generator.run(prompts, numbers=numbers, sampling=request.sampling, limits=limits, on_token=on_token)
        for number, prompt, text in zip(numbers, prompts, texts, strict=True):
            continued = continued_text(tokenizer, prompt, text.tokens)
            samples.append(Sample(request.prompts[number], continued, text.tokens, text.finish))
            if printer is not None:
                printer.show(number, samples[-1], text)
    return step, samples


def choose_checkpoint(request: Request, mesh: Mesh) -> Checkpoint:
    """That of the step asked for, verified, or the newest that verifies. Collective over the job."""
    root, world = RunFolder(request.run).checkpoints, mesh.groups["world"]
    if request.step is not None:
        path = root / checkpoint_name(request.step)
        verify_checkpoint(path, world=world, device=mesh.device)
        return open_checkpoint(path)
    checkpoint = newest_loadable(root, world=world, log=_tell if mesh.rank == 0 else _keep_quiet, device=mesh.device)
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {root} any more")
    return checkpoint


class Printer:
    """One prompt: its text as it grows. Several: each when it is done, with a line above that says which. Rates go to standard
    error."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._stream: TextStream | None = None
        self._started = time.perf_counter()
        self._num_tokens = 0

    def begin(self) -> None:
        """A new batch of prompts starts."""
        if len(self._prepared.prompts) == 1:
            self._stream = TextStream(self._prepared.tokenizer, self._prepared.prompts[0])
            self._started = time.perf_counter()
            print(self._prepared.request.prompts[0], end="", flush=True)

    def on_token(self, place: int, token: int) -> None:
        """A token has been chosen."""
        self._num_tokens += 1
        if self._stream is not None:
            print(self._stream.add(token), end="", flush=True)

    def show(self, number: int, sample: Sample, text: Continuation) -> None:
        """The prompt `number` is done."""
        count = len(self._prepared.prompts)
        if self._stream is not None:
            print(self._stream.rest(), flush=True)
        else:
            print(f"--- prompt {number + 1} of {count}: {len(text.tokens)} tokens, then {text.finish}")
            print(sample.prompt + sample.text, flush=True)
        if number + 1 == count:
            seconds = time.perf_counter() - self._started
            _tell(f"{self._num_tokens} tokens in {seconds:.1f} s, {self._num_tokens / seconds:,.1f} tokens/s")


def report(request: Request, step: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """What --json writes."""
    return {
        "run": str(request.run),
        "step": step,
        "max_tokens": request.max_tokens,
        "sampling": asdict(request.sampling),
        "samples": [asdict(sample) for sample in samples],
    }


@dataclass(frozen=True)
class Options:
    """The command line, as it was typed."""

    run: Path
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    max_tokens: int = 100
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    greedy: bool = False
    step: int | None = None
    overrides: tuple[str, ...] = ()
    json_file: Path | None = None


def run(options: Options, nproc: int | None) -> int:
    """The command; its exit code. UserError for options that contradict each other."""
    if options.greedy:
        given = {"--temperature": options.temperature, "--top-k": options.top_k, "--top-p": options.top_p}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--greedy takes the likeliest token, {name} {value} is about drawing one: give one of the two")
    temperature = 0.0 if options.greedy else 1.0 if options.temperature is None else options.temperature
    sampling = Sampling(temperature, options.top_k, options.top_p, options.seed)
    from_file = () if options.prompts_file is None else tuple(read_prompts_file(options.prompts_file))
    request = Request(
        run=options.run,
        prompts=(*options.prompts, *from_file),
        sampling=sampling,
        max_tokens=options.max_tokens,
        step=options.step,
        overrides=options.overrides,
        json_file=options.json_file,
    )
    return main(request, nproc, arguments_of(options))


def arguments_of(options: Options) -> list[str]:
    """The command line again, for the processes of --nproc."""
    given = {
        "--prompts-file": options.prompts_file,
        "--max-tokens": options.max_tokens,
        "--temperature": options.temperature,
        "--top-k": options.top_k,
        "--top-p": options.top_p,
        "--seed": options.seed,
        "--step": options.step,
        "--json": options.json_file,
    }
    prompts = [f"--prompt={prompt}" for prompt in options.prompts]
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    return ["generate", str(options.run), *prompts, *named, *(["--greedy"] if options.greedy else []), *options.overrides]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _keep_quiet(line: str) -> None:
    """Every rank learns the same verdict; one says it."""
