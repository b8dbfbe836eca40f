"""`megatronish bench ...`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from megatronish.bench import tables
from megatronish.bench.progress import progress, wrote
from megatronish.errors import UserError
from megatronish.json_file import writable, write_json

app = typer.Typer(
    help="Measure parts against their reference and their limit.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)


ConfigFile = Annotated[Path, typer.Argument(help="The shape and layout; its data is not read.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as parallel.tensor=4")]


def _writable(path: Path | None) -> Path | None:
    return None if path is None else writable(path)


def _folder(path: Path | None) -> Path | None:
    """A folder that is there or can be made: UserError before anything is measured."""
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--plot {path}: no folder can be made there ({error.strerror}); name one of yours") from None
    return path


JsonFile = Annotated[Path | None, typer.Option("--json", callback=_writable, help="Write the numbers here as well.")]


def _print(parts: tables.Parts) -> None:
    from rich.console import Console

    console = Console(width=132)
    for part in parts:
        console.print(part, highlight=False, markup=not isinstance(part, str), soft_wrap=isinstance(part, str))


@app.command()
def preflight(
    config: ConfigFile = Path("configs/gpt3_175b.yaml"),
    overrides: Overrides = None,
    in_full: Annotated[bool, typer.Option("--in-full", help="Rehearse every rank and microbatch too, and compare.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Seconds of a rehearsal of all ranks; with --in-full, whether what it inferred is what running everything gives (exit code 1
    if not).

    Example: megatronish bench preflight configs/gpt3_175b.yaml model.num_layers=8 --in-full
    """
    from rich.progress import Progress

    measure = importlib.import_module("megatronish.bench.preflight").measure
    loaded = importlib.import_module("megatronish.config_loader").load_config(config, overrides or [])
    parallel = loaded.parallel
    world = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    with Progress(transient=True) as progress:
        task = progress.add_task("ranks", total=world * (2 if in_full else 1))
        result = measure(loaded, world, in_full=in_full, tell=lambda part: progress.advance(task, len(part.log_of)))
    _print(tables.preflight(result))
    if json_file is not None:
        write_json(json_file, result)
    if not result["sound"] or not result.get("in_full", {"equal": True})["equal"]:
        raise typer.Exit(1)


@app.command()
def step(
    config: ConfigFile = Path("configs/demo_cpu.yaml"),
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Local processes of the layout; each has a GPU where there are GPUs.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant runs; medians are reported.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each variant in a round.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the peer on CPU; default: all cores.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="The peer goes through torch.compile.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Tokens/s of a layout on local processes against the Hugging Face model in one process, in one interleaved run; model FLOPs
    against a matrix product of the same run.

    Example: megatronish bench step configs/demo_cpu.yaml parallel.tensor=4 parallel.data=1 --nproc 8
    """
    from rich.progress import Progress

    from megatronish.observe.flops import num_cores

    step_bench: Any = importlib.import_module("megatronish.bench.step")
    loader = importlib.import_module("megatronish.config_loader")
    loaded = loader.load_config(config, overrides or [], world_size=nproc)
    bench = step_bench.StepBench(loaded, nproc, rounds, steps, threads or num_cores(), compiled)
    with Progress(transient=True) as progress:
        task = progress.add_task("rounds", total=rounds)
        result = step_bench.measure(bench, lambda number: progress.update(task, completed=number + 1))
    _print(tables.step(result))
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def memory(
    config: ConfigFile = Path("configs/demo_cpu.yaml"),
    overrides: Overrides = None,
    dp: Annotated[list[int] | None, typer.Option(min=1, help="A number of data ranks; may be repeated. Default: 1 2 4.")] = None,
) -> None:
    """Bytes of optimizer state and gradients on each rank, counted on the tensors that the trainer allocates, for ZeRO 0, 1 and 2.

    Example: megatronish bench memory configs/demo_cpu.yaml --dp 1 --dp 8
    """
    from rich.console import Console

    table: Any = importlib.import_module("megatronish.bench.memory")
    loaded = importlib.import_module("megatronish.config_loader").load_config(config, overrides or [])
    Console(width=120).print(table.render(table.optimizer_state_table(loaded, dp or [1, 2, 4])))


@app.command()
def checkpoint(
    gib: Annotated[float, typer.Option(min=0.01, help="Size of the state, all ranks together.")] = 1.0,
    nproc: Annotated[int, typer.Option(min=1, help="Processes that save and load together.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant runs; medians are reported.")] = 5,
    folder: Annotated[Path, typer.Option(help="On the disk to measure; what is written there is removed.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """Saves and loads of a training state against torch.distributed.checkpoint, and an asynchronous save's stall against a memcpy.

    Example: megatronish bench checkpoint --gib 0.25 --nproc 1 --rounds 3
    """
    from rich.progress import Progress

    checkpoint_bench: Any = importlib.import_module("megatronish.bench.checkpoint")
    bench = checkpoint_bench.CheckpointBench(gib, nproc, rounds, folder)
    with Progress(transient=True) as progress:
        task = progress.add_task("rounds of saves, then of loads", total=2 * rounds)
        result = checkpoint_bench.measure(bench, lambda number: progress.advance(task))
    _print(tables.checkpoint(result))
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def data(
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant runs; medians are reported.")] = 5,
    samples: Annotated[int, typer.Option(min=32, help="Samples that each variant reads in a round.")] = 8000,
    tokens: Annotated[int, typer.Option(min=1_000_000, help="Tokens of the set that is written, then read.")] = 64_000_000,
    megabytes: Annotated[int, typer.Option(min=1, help="Text that is tokenized in a round, in MB.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes that encode, for both variants.")] = 2,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; by default one is learned from the text.")] = None,
    folder: Annotated[Path, typer.Option(help="On the disk to measure; what is written there is removed.")] = Path("runs"),
    memory: Annotated[Path, typer.Option(help="On a file system in memory; the files there are removed.")] = Path("/dev/shm"),
    json_file: JsonFile = None,
) -> None:
    """Read samples, write token files and tokenize text against megatron-core, in one interleaved run; the files must be equal.

    Example: megatronish bench data --rounds 5 --json data.json
    """
    from rich.console import Console
    from rich.progress import Progress

    bench: Any = importlib.import_module("megatronish.bench.data")
    scratch = importlib.import_module("megatronish.bench.workers").scratch_folder
    with scratch(folder, "--folder") as disk, scratch(memory, "--memory") as shm, Progress(transient=True) as progress:
        task = progress.add_task("rounds", total=rounds)
        sizes = bench.DataBench(disk, shm, rounds, samples, tokens, megabytes, workers, tokenizer)
        result = bench.measure(sizes, lambda number: progress.update(task, completed=number + 1))
    Console(width=132).print(bench.render(result))
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def adamw(
    parameters: Annotated[int, typer.Option(min=1000, help="Of each variant; a hundred million take 13 GB in all.")] = 100_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant runs; medians are reported.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every variant; default: all cores.")] = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(callback=_folder, help="Write a picture to this folder, as SVG and PNG.")] = None,
) -> None:
    """AdamW and the whole optimizer step on CPU against torch and DeepSpeed's CPUAdam, checked against float64 first.

    Example: megatronish bench adamw --parameters 10000000 --plot plots
    """
    from megatronish.observe.flops import num_cores

    bench: Any = importlib.import_module("megatronish.bench.adamw")
    bench.require_memory(parameters)
    if bench.must_compile_deepspeed():
        typer.echo("DeepSpeed's CPUAdam is compiled first, once: that takes minutes", err=True)
    with progress() as tell:
        sizes = bench.AdamWBench(parameters, rounds, threads or num_cores())
        result = bench.measure(sizes, lambda number: tell("round", number, rounds))
    _print([bench.render(result)])
    pictures = [] if plot is None else bench.plot(result, plot)
    if json_file is not None:
        write_json(json_file, result)
    _print([*wrote(json_file, pictures)])


@app.command()
def collectives(
    layout: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] KEY=VALUE", help="Such as parallel.tensor=2")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many local processes, one a rank.")] = None,
    min_kib: Annotated[float, typer.Option(min=0.001, help="Smallest message.")] = 4,
    max_kib: Annotated[float | None, typer.Option(help="Largest message. [default: 256 MiB on GPUs, 4 MiB on CPU]")] = None,
    factor: Annotated[int, typer.Option(min=2, help="From one size to the next.")] = 4,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; both by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each case runs; medians are reported.")] = 7,
    seconds: Annotated[float, typer.Option(min=0, help="No round begins after this time, but for the first.")] = 120,
    json_file: Annotated[Path | None, typer.Option("--json", help="Rank 0 writes the numbers here as well.")] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=_folder, help="Rank 0 writes a picture to this folder, as SVG and PNG.")
    ] = None,
) -> None:
    """All-reduce, reduce-scatter, all-gather and send/receive along each axis of a layout, in algorithm and bus bandwidth, checked
    first: with --nproc, or as a rank under torchrun, srun, mpirun or deepspeed.

    Example: megatronish bench collectives parallel.tensor=2 --nproc 4
    """
    run: Any = importlib.import_module("megatronish.bench.collectives_run")
    sizes = (round(min_kib * 1024), None if max_kib is None else round(max_kib * 1024))
    dtypes = tuple(dtype or ("float32", "bfloat16"))
    options = run.Options(tuple(layout or ()), *sizes, factor, dtypes, rounds, seconds, json_file, plot)
    raise typer.Exit(run.main(options, nproc))


@app.command()
def pipeline(
    stages: Annotated[int, typer.Option(min=2, max=64, help="Stages, one local process each.")] = 4,
    microbatches: Annotated[int, typer.Option(min=1, help="Microbatches of a step.")] = 8,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of a stage of the interleaved schedule.")] = 2,
    unit_ms: Annotated[float, typer.Option(min=1, help="Length of a chunk's forward; a backward takes twice as long.")] = 100.0,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each schedule; medians are reported.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Idle time of every schedule with equal sleeping stages on real processes, against the formula.

    Example: megatronish bench pipeline --stages 4 --microbatches 8 --chunks 2
    """
    from rich.progress import Progress

    bench: Any = importlib.import_module("megatronish.bench.pipeline")
    schedules = importlib.import_module("megatronish.pipeline.schedules").SCHEDULES
    benches = [
        bench.PipelineBench(name, stages, microbatches, chunks if row.has_chunks else 1, unit_ms / 1000, rounds)
        for name, row in schedules.items()
    ]
    with Progress(transient=True) as progress:
        task = progress.add_task("schedules", total=len(benches))
        results = bench.measure(benches, lambda number: progress.advance(task))
    _print(tables.pipeline(results))
    if json_file is not None:
        write_json(json_file, results)


@app.command()
def history(
    config: ConfigFile = Path("configs/demo_cpu.yaml"),
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Local CPU processes of the layout.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Steps that are measured; medians are reported.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """What it costs that every rank keeps its last calls for `megatronish why-hung`, as a share of a step.

    Example: megatronish bench history configs/demo_cpu.yaml --nproc 8
    """
    bench: Any = importlib.import_module("megatronish.bench.history")
    loaded = importlib.import_module("megatronish.config_loader").load_config(config, overrides or [], world_size=nproc)
    result = bench.measure(loaded, nproc, rounds)
    _print(tables.history(result))
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def startup(
    config: ConfigFile = Path("configs/demo_cpu.yaml"),
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each number of ranks is started; medians are reported.")] = 3,
    folder: Annotated[Path, typer.Option(help="For run folders; what is written there is removed.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """From a process's start to its first step, by phase, on 1, 4 and 8 local ranks, and what that says of 1,024.

    Example: megatronish bench startup --rounds 1
    """
    from rich.progress import Progress

    bench: Any = importlib.import_module("megatronish.bench.startup")
    scratch = importlib.import_module("megatronish.bench.workers").scratch_folder
    loaded = importlib.import_module("megatronish.config_loader").load_config(config, overrides or [])
    with scratch(folder, "--folder") as place, Progress(transient=True) as progress:
        task = progress.add_task("starts", total=rounds * len(bench.LAYOUTS))
        request = bench.StartupBench(str(config), tuple(overrides or ()), loaded, rounds, place.resolve())
        result = bench.measure(request, lambda: progress.advance(task))
    _print(tables.startup(result))
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="An op; may be repeated. Default: all that the shapes have.")] = None,
    impl: Annotated[list[str] | None, typer.Option(help="An implementation; may be repeated. Default: all that can run.")] = None,
    shapes: Annotated[
        str, typer.Option(help="small, small-sizes, gpt2-124m, llama3-8b, llama3-70b, gpt3-175b, sizes, or a file. [by device]")
    ] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32. [by device]")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often each implementation has its turn; medians are reported.")] = 7,
    seconds: Annotated[float | None, typer.Option(min=0, help="Begin no further case after so long.")] = None,
    tutorial: Annotated[Path | None, typer.Option(help="Triton's 06-fused-attention.py, as a peer.")] = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(callback=_folder, help="Write pictures to this folder, as SVG and PNG.")] = None,
) -> None:
    """Which kernel to use, and how far it is from the limit: every implementation of every op, here.

    Each is compared with float64 first: one that is off is WRONG, and is not timed (exit code 1 if it is one of ours). Then all
    take turns, beside a matrix product and a copy, which are the limits. On a GPU the default is bf16 at the shapes of llama3-8b,
    on CPU fp32 at small ones. --shapes sizes gives lines over sizes in the pictures. A file of shapes is YAML, for each op its
    sizes:

    attention: [{S: 4096, B: 1, H: 32, G: 8, K: 128}]

    rms_norm: {T: 8192, D: 4096}

    Example: megatronish bench kernels --op attention --op rms_norm --plot plots --json kernels.json
    """
    bench: Any = importlib.import_module("megatronish.bench.kernels")
    asked = bench.KernelsBench(tuple(op or ()), tuple(impl or ()), shapes, dtype, rounds, tutorial=tutorial)
    with progress() as tell:
        result = bench.measure(asked, tell, seconds=seconds)
    bench.require_named(asked.impls, result)
    _print([bench.render(result), *bench.summary(result)])
    pictures = [] if plot is None else bench.plot(result, plot)
    if json_file is not None:
        write_json(json_file, result)
    _print([*wrote(json_file, pictures)])
    if result["wrong"]:
        raise typer.Exit(1)


@app.command()
def show(
    file: Annotated[Path | None, typer.Argument(help="A result, by path or by its name in the list.")] = None,
) -> None:
    """Print a result that was kept; without FILE, list those that come with the package.

    Example: megatronish bench show adamw-cpu-2026-11-27.json
    """
    module: Any = importlib.import_module("megatronish.bench.show")
    _print([module.listing()] if file is None else module.show(file))
