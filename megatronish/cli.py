"""`megatronish VERB`. A verb's module is imported when the verb runs, so that `--help` answers at once.

A UserError is one `error:` line a problem on stderr and exit code 2; a run that stopped itself one line and 77; an interrupt 130
(launch/README.md has the table).
"""

from __future__ import annotations

import importlib
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import megatronish
from megatronish.errors import BAD_INPUT, FAULT, RunStopped, UserError, exit_code_of

if TYPE_CHECKING:
    pass

# Without rich markup the help needs no rich: a third of the time.
OPTIONS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "no_args_is_help": True,
    "add_completion": False,
}
# Everything after the verb, `--help` too, belongs to the verb's own command line.
PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(name="megatronish", help="Train language models with tensor, pipeline and data parallelism.", **OPTIONS)
config_app = typer.Typer(help="Print, check and describe run configs.", **OPTIONS)
app.add_typer(config_app, name="config")

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file; configs/ holds some.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="For example optim.lr=1e-4 train.steps=20")]


def _device_kind(kind: str) -> str:
    if kind not in ("cuda", "cpu"):
        raise UserError(f"--device {kind}: must be cuda or cpu")
    return kind


DeviceKind = Annotated[str, typer.Option(metavar="cuda|cpu", callback=_device_kind, help="cuda: ranks talk by NCCL; cpu: by gloo.")]
Processes = Annotated[int | None, typer.Option("--nproc", min=1, help="Start this many local processes, one a rank.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and what is native.")] = False) -> None:
    if version:
        native = importlib.import_module("megatronish.native")
        typer.echo(f"megatronish {megatronish.__version__}\n{native.describe()}")
        raise typer.Exit()


@config_app.command("print")
def print_config(
    config: ConfigFile,
    overrides: Overrides = None,
    run_folder: Annotated[bool, typer.Option("--run-folder", help="Print the run's folder alone, for scripts.")] = False,
) -> None:
    """Print the resolved config: base files merged, overrides applied, defaults filled in."""
    loader = importlib.import_module("megatronish.config_loader")
    resolved = loader.load_config(config, overrides or [])
    if run_folder:
        typer.echo(importlib.import_module("megatronish.run_folder").RunFolder.of(resolved).path)
    else:
        typer.echo(loader.to_yaml(resolved), nl=False)


@config_app.command("check")
def check_config(
    config: ConfigFile,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(min=1, help="Number of ranks the run will have.")] = None,
    require_data: Annotated[bool, typer.Option("--require-data", help="Files that are not here are an error.")] = False,
) -> None:
    """Check a config, every problem at once: the fields, how they go together with each other and with the number of ranks, and the
    data and the tokenizer, where they are on this machine."""
    resolved = importlib.import_module("megatronish.config_loader").load_config(config, overrides or [], world_size=world)
    for line in importlib.import_module("megatronish.constraints").warnings(resolved, world):
        typer.echo(f"warning: {line}", err=True)
    importlib.import_module("megatronish.deepspeed_settings").check_engine(resolved, world)
    missing = resolved.data.missing_files()
    if missing and require_data:
        raise UserError(f"{', '.join(missing)}: not on {socket.gethostname()}")
    if not missing and resolved.data.order == "permutation":  # the other order writes an index
        importlib.import_module("megatronish.surroundings").open_datasets(resolved)
    summary = importlib.import_module("megatronish.config_summary").summary(resolved, world)
    typer.echo(f"{config}: ok: {summary}")
    if missing:
        typer.echo(f"not looked at, since they are not here: {', '.join(missing)}")


@config_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a config file, for editors: `# yaml-language-server: $schema=FILE` on its first line."""
    import json

    typer.echo(json.dumps(importlib.import_module("megatronish.config_loader").json_schema(), indent=2))


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, nproc: Processes = None) -> None:
    """Train, or resume: running the same command again goes on from the newest checkpoint that verifies.

    Example: megatronish train configs/demo_cpu.yaml train.steps=20 --nproc 8
    """
    # Until the rank listens (observe/post_mortem.py), seconds from now: SIGUSR2 would end the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signals = importlib.import_module("megatronish.end_signals").EndSignals()
    signals.listen()
    try:
        _finish(importlib.import_module("megatronish.train").main(str(config), overrides or [], nproc, signals))
    except (UserError, RunStopped, typer.Exit, ModuleNotFoundError):
        raise
    except Exception:  # as a rank of many ends: a restart may cure it
        importlib.import_module("traceback").print_exc()
        raise typer.Exit(FAULT) from None


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo_cpu.")],
    data: Annotated[str, typer.Option(metavar="PREFIX", help="PREFIX.bin and PREFIX.idx hold the text.")],
    overrides: Overrides = None,
    nproc: Processes = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Read only this many of the run's global batches.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Perplexity, bits per byte and per token of a run's newest checkpoint on a set of tokens.

    Every process is a replica unless the layout is given; the result does not depend on it.

    Example: megatronish eval runs/demo_cpu --data runs/demo-data/heldout --nproc 4 parallel.tensor=2
    """
    evaluate_main = importlib.import_module("megatronish.evaluate").main
    _finish(evaluate_main(str(run), data, nproc, overrides or [], batches, str(json_file) if json_file else None))


@app.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(min=1, help="Number of ranks the run will have, if parallel.data is open.")] = None,
    max_ranks: Annotated[int, typer.Option(min=1, help="Local processes at most; every axis above 1 stays above 1.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there too.")] = None,
) -> None:
    """Does the layout of a config compute what one process computes? Loss, every gradient, the norm, updates, save and load, on a
    small model with the config's own layout folded to local processes. Exit code 1 names the first wrong parameter and the likely
    axis.

    Example: megatronish verify configs/llama3_70b.yaml
    """
    command = importlib.import_module("megatronish.verify.command")
    _finish(command.main(str(config), overrides or [], world, max_ranks, str(json_file) if json_file else None))


@app.command()
def preflight(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the job.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and ranks, of a node.")] = 8,
    world: Annotated[int | None, typer.Option(min=1, help="Ranks, instead of --nodes. [default: as the config says]")] = None,
    device: DeviceKind = "cuda",
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="Run every rank; none is inferred.")] = False,
    all_microbatches: Annotated[bool, typer.Option("--all-microbatches", help="Run every microbatch; none is inferred.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="For report and certificate. [default: RUN/preflight]")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="A Chrome trace of one step (.json or .gz).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there too.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Ranks to run at a time. [default: one a core]")] = None,
) -> None:
    """Rehearse every rank of a job without a GPU and match all their communication: would it hang? Runs the trainer's own code for
    two steps, evaluation and a save. Exit code 1 names the first divergent call, or the circle of waits.

    Example: megatronish preflight configs/gpt3_175b.yaml --nodes 128 --gpus-per-node 8
    """
    command = importlib.import_module("megatronish.preflight.command")
    options = command.Options(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        world=world,
        device_kind=device,
        every_rank=all_ranks,
        every_microbatch=all_microbatches,
        out=out,
        trace=trace,
        json_file=json_file,
        processes=processes,
    )
    _finish(command.main(str(config), overrides or [], options))


@app.command()
def submit(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and ranks, of a node.")] = 8,
    cpus_per_gpu: Annotated[int, typer.Option(min=1, help="CPU cores of a rank.")] = 8,
    time: Annotated[str, typer.Option(help="The job's time limit; it saves and queues itself again before.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="As sbatch's.")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch's.")] = None,
    exclude: Annotated[str | None, typer.Option(help="As sbatch's.")] = None,
    spares: Annotated[int, typer.Option(min=0, help="More nodes, left free until one is lost.")] = 0,
    option: Annotated[list[str] | None, typer.Option("--sbatch", metavar="--X=Y", help="Any other option of sbatch.")] = None,
    device: DeviceKind = "cuda",
    no_preflight: Annotated[bool, typer.Option("--no-preflight", help="Do not rehearse the job first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and let Slurm check it; submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm: check the config, rehearse the job unless it has a certificate, copy code and config into the run
    folder, and queue launch/slurm/pretrain.sbatch with its values filled in.

    Example: megatronish submit configs/gpt3_175b.yaml --nodes 128 --partition gpu --dry-run
    """
    command = importlib.import_module("megatronish.submit")
    request = command.Request(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_gpu=cpus_per_gpu,
        time=time,
        partition=partition,
        account=account,
        exclude=exclude,
        spares=spares,
        options=tuple(option or ()),
        device_kind=device,
        preflight=not no_preflight,
        dry_run=dry_run,
    )
    _finish(command.main(str(config), overrides or [], request))


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo_cpu.")]) -> None:
    """A run's job, step, loss, tokens a second, restarts and last checkpoint.

    Example: megatronish status runs/demo_cpu
    """
    _finish(importlib.import_module("megatronish.status").main(run))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo_cpu.")],
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to continue, one or several; required without --prompts-file.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(metavar="FILE", help="More prompts, one a line.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation, in tokens.")] = 100,
    temperature: Annotated[float | None, typer.Option(help="Below 1: likelier tokens; 0: only the likeliest. [default: 1]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens that hold this share.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    step: Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step; else the newest that verifies.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Cut the matrices over this many local processes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write texts and tokens there too.")] = None,
) -> None:
    """Continue text with a run's newest checkpoint, whatever layout saved it.

    Example: megatronish generate runs/demo_cpu --prompt "def main(" --temperature 0.8 --top-p 0.95
    """
    command = importlib.import_module("megatronish.generate.command")
    options = command.Options(
        run=run,
        prompts=tuple(prompt or ()),
        prompts_file=prompts_file,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        greedy=greedy,
        step=step,
        overrides=tuple(overrides or ()),
        json_file=json_file,
    )
    _finish(command.run(options, nproc))


@app.command("why-hung")
def why_hung(run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo_cpu.")]) -> None:
    """Which rank holds up a job that hangs, in which call, at which line, and who waits for whom; or which one failed first.

    Reads RUN/post_mortem/, where every rank writes its last calls and its stacks: when it has communicated nothing for
    observe.hang_seconds, when it fails, and on SIGUSR2 (kill -USR2 of `megatronish train`; scancel --signal=USR2 JOB). A rank that
    cannot write is evidence too. Exit code 1: nobody can be named, for example since the job is only slow.

    Example: megatronish why-hung runs/demo_cpu
    """
    _finish(importlib.import_module("megatronish.preflight.why_hung").main(run))


@app.command("export")
def export_model(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo_cpu.")],
    hf: Annotated[Path, typer.Option("--hf", metavar="DIR", help="A new folder, for Hugging Face's transformers.")],
    step: Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step; else the newest that verifies.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; else as the run computes.")] = None,
) -> None:
    """Write a checkpoint, whatever layout saved it, as a model that transformers loads: weights, config and tokenizer.

    Example: megatronish export runs/demo_cpu --hf exported/demo
    """
    if dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: must be bfloat16 or float32")
    _finish(importlib.import_module("megatronish.interop.export").main(str(run), str(hf), step, dtype))


@app.command("import")
def import_model(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="config.json and safetensors of a Llama or GPT-2.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="The new run's folder; its last part is the run's name.")],
    overrides: Overrides = None,
) -> None:
    """Make a run at step 0 of a model of transformers, to evaluate or to train on. Nothing of its folder is executed.

    Example: megatronish import exported/demo --out runs/tuned data.train=runs/demo-data/train data.sequence_length=256
    """
    _finish(importlib.import_module("megatronish.interop.import_model").main(str(folder), str(out), overrides or []))


@app.command(context_settings=PASS_ON, add_help_option=False)
def data(context: typer.Context) -> None:
    """Train tokenizers, tokenize text, inspect sets of tokens."""
    _sub_app("megatronish.data.cli", context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def pipeline(context: typer.Context) -> None:
    """Draw pipeline schedules."""
    _sub_app("megatronish.pipeline.cli", context)


@app.command(context_settings=PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure parts against their reference and their limit."""
    _sub_app("megatronish.bench.cli", context)


def main() -> None:
    """Entry point of the `megatronish` command."""
    try:
        app(prog_name="megatronish", args=_without_local_rank(sys.argv[1:]))
    except (UserError, RunStopped) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(exit_code_of(error))
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed for {sys.executable}: run `make setup` in the checkout", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)


def _without_local_rank(arguments: list[str]) -> list[str]:
    """Take out the `--local_rank=N` that deepspeed puts before everything else, and older launchers anywhere. UserError if the
    environment says another."""
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            rest = arguments[position + 1 :]
            if not equals and rest:
                value, rest = rest[0], rest[1:]
            if not value.isdecimal():
                raise UserError(f"{name} {value}: must be a number >= 0")
            importlib.import_module("megatronish.parallel.rendezvous").find_place(local_rank=int(value))
            return arguments[:position] + rest
    return arguments


def _finish(outcome: int | None) -> None:
    raise typer.Exit(outcome or 0)


def _sub_app(module: str, context: typer.Context) -> None:
    """Run the typer app `app` of `module` on the arguments after the verb."""
    sub_app = importlib.import_module(module).app
    typer.main.get_command(sub_app).main(args=context.args, prog_name=context.command_path)


if __name__ == "__main__":
    main()
