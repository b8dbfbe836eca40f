"""The demo's own decisions: what it makes again, what it keeps, what it tells. (Its training is the trainer's, tested there.)"""

import json
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from megatronish import demo
from megatronish.config_loader import load_config, to_yaml
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.demo import DemoData, Stages, layout_overrides, prepare_data, why_not_complete
from megatronish.errors import UserError
from megatronish.observe.metrics import MetricsWriter

VOCABULARY = 400
CONFIG = Path(__file__).parent.parent / "configs" / "demo_cpu.yaml"


@pytest.fixture
def library(tmp_path):
    """A small standard library: 300 files of 50 to 250 bytes."""
    root = tmp_path / "library"
    root.mkdir()
    for i in range(300):
        lines = [f"def function_{i}_{k}(value):\n    return value * {k} + {i}\n" for k in range(1 + i % 5)]
        (root / f"module_{i:03d}.py").write_text("\n".join(lines))
    return root


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "runs" / "demo-data"
    return DemoData(folder / "train", folder / "heldout", folder / "tokenizer.json")


@pytest.fixture
def prepare(data, library):
    """Run the data stages; returns what they said."""

    def run(vocab_size=VOCABULARY):
        console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
        prepare_data(data, vocab_size=vocab_size, stages=Stages(console), root=library)
        return console.export_text()

    return run


def state(data):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in data.files}


def test_the_data_stages_make_sets_that_training_can_open_with_held_out_text_apart(data, prepare, library):
    text = prepare()
    assert all(f"{number}/7 " in text for number in (1, 2, 3))
    train, held_out = (GPTDataset(prefix, sequence_length=16, vocab_size=VOCABULARY) for prefix in (data.train, data.validation))
    assert len(train) > len(held_out) > 0
    assert train.fingerprint != held_out.fingerprint
    assert why_not_complete(data, VOCABULARY) is None


def test_complete_data_is_kept_as_it_is(data, prepare):
    prepare()
    before = state(data)
    assert "nothing to do" in prepare()
    assert state(data) == before


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
@pytest.mark.parametrize("index", range(5))
def test_a_damaged_file_is_named_and_everything_is_made_again_the_same(data, prepare, damage, index):
    prepare()
    before = {path: path.read_bytes() for path in data.files}
    damage(data.files[index])
    assert str(data.files[index]) in why_not_complete(data, VOCABULARY)
    assert "making it" in prepare()
    assert {path: path.read_bytes() for path in data.files} == before
    assert why_not_complete(data, VOCABULARY) is None


def test_data_that_was_not_finished_or_is_for_another_vocabulary_is_made_again(data, prepare):
    prepare()
    record = data.folder / demo.RECORD
    for damage in (Path.unlink, lambda path: path.write_text('{"recipe": 1, "fi'), lambda path: path.write_text("[]")):
        damage(record)
        assert "making it" in prepare()
    assert "made for a vocabulary of 400" in why_not_complete(data, 300)
    prepare(vocab_size=300)
    assert why_not_complete(data, 300) is None


def test_a_stop_in_the_middle_of_making_it_again_leaves_no_complete_data(data, prepare, monkeypatch):
    prepare()
    data.train.with_name("train.bin").unlink()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatronish.data.tokenize.tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert "no complete data" in why_not_complete(data, VOCABULARY)


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 3, 4, 7, 8, 16])
def test_the_layout_fits_the_gpus_and_is_a_sound_config(num_gpus):
    config = load_config(CONFIG)
    overrides = layout_overrides(config, num_gpus)
    parallel = load_config(CONFIG, overrides).parallel
    num_ranks = parallel.tensor * parallel.pipeline * parallel.data
    largest = 8 if num_gpus == 0 else max(n for n in (1, 2, 4, 8) if n <= num_gpus)
    assert num_ranks == largest
    assert (overrides == []) == (largest == 8)


@pytest.fixture
def fake_training(monkeypatch, tmp_path, library):
    """The demo in a folder of its own, with a trainer that writes what the real one writes. Returns the calls it got."""
    calls = []

    def train_main(config_path, overrides, nproc):
        calls.append((config_path, list(overrides), nproc))
        config = load_config(config_path, overrides, world_size=nproc)
        run_dir = Path(config.run_root) / config.name
        (run_dir / "checkpoints" / f"step-{config.num_steps:08d}").mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
        with MetricsWriter(run_dir, tensorboard=False, first_step=0) as writer:
            writer.write(0, {"eval_loss": 9.0, "eval_perplexity": 8103.08, "eval_bits_per_byte": 5.5})
            for step in range(1, config.num_steps + 1):
                writer.write(step, {"loss": 9 - step / 50, "tokens_per_second": 1600.0, "consumed_tokens": 4096 * step})
            writer.write(config.num_steps, {"eval_loss": 5.0, "eval_perplexity": 148.41, "eval_bits_per_byte": 3.05})
        return 0

    monkeypatch.setitem(sys.modules, "megatronish.train", types.SimpleNamespace(main=train_main))
    monkeypatch.setattr(demo, "_num_gpus", lambda: 0)
    # The fake trainer's checkpoint is an empty folder.
    monkeypatch.setattr(demo, "continue_prompts", lambda run_dir: [(prompt, f" of {run_dir}") for prompt in demo.PROMPTS])
    monkeypatch.chdir(tmp_path)
    original = demo.prepare_data
    monkeypatch.setattr(demo, "prepare_data", lambda *args, **kwargs: original(*args, **kwargs, root=library))
    return calls


OVERRIDES = [f"model.vocab_size={VOCABULARY}", "train.steps=20", "name=short"]


def test_the_demo_trains_on_8_processes_and_tells_before_after_and_where(fake_training, capsys, tmp_path):
    assert demo.main(OVERRIDES) == 0
    [(config_path, overrides, nproc)] = fake_training
    assert (Path(config_path).resolve(), overrides, nproc) == (CONFIG, OVERRIDES, 8)
    text = capsys.readouterr().out
    for number in ("9.000", "5.000", "8,103.080", "148.410", "5.500", "3.050", "step 0", "step 20", "1,600 tokens/s"):
        assert number in text
    assert all(f"{number}/7 " in text for number in range(1, 8))
    assert all(f"\n{prompt} of runs/short" in text for prompt in demo.PROMPTS)
    assert "runs/short" in text and "eval runs/short --data runs/demo-data/heldout" in text
    assert (tmp_path / "runs/short/loss.png").stat().st_size > 10_000


def test_the_commands_to_go_on_with_are_sound(fake_training, capsys):
    assert demo.main(OVERRIDES) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if " train " in line]
    words = line.split("#")[0].split()
    config = load_config(Path(words[2]), words[3:-2], world_size=int(words[-1]))
    assert words[-2] == "--nproc" and config.name == "short" and config.num_steps == 40


def test_a_second_run_trains_nothing_and_shows_the_numbers_again(fake_training, capsys):
    assert demo.main(OVERRIDES) == 0
    capsys.readouterr()
    assert demo.main(OVERRIDES) == 0
    assert len(fake_training) == 1
    text = capsys.readouterr().out
    assert "has its 20 steps" in text and "148.410" in text


@pytest.mark.parametrize("incomplete", ["checkpoint", "evaluation", "config"])
def test_a_run_that_is_not_complete_goes_to_training_again(fake_training, incomplete, tmp_path, capsys):
    assert demo.main(OVERRIDES) == 0
    run_dir = tmp_path / "runs/short"
    overrides = list(OVERRIDES)
    if incomplete == "evaluation":
        rows = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_text("".join(rows[:-1]))
    if incomplete == "config":
        overrides.append("optim.lr=1e-3")
    if incomplete == "checkpoint":
        (run_dir / "checkpoints/step-00000020").rename(run_dir / "checkpoints/step-00000010")
    assert demo.main(overrides) == 0
    assert len(fake_training) == 2
    assert "going on from its newest checkpoint" in capsys.readouterr().out


def test_a_training_that_fails_gives_its_exit_code_and_no_curve(fake_training, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "megatronish.train", types.SimpleNamespace(main=lambda *args: 7))
    assert demo.main(OVERRIDES) == 7
    assert "exit code 7" in capsys.readouterr().out
    assert not (tmp_path / "runs/short/loss.png").exists()


def test_bad_overrides_are_one_line_each_and_exit_code_2(fake_training, capsys):
    assert demo.main(["optim.lr=-1", "train.stepz=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert demo.main(["train.eval_interval=0"]) == 2
    assert "train.eval_interval=0" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(fake_training, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "megatronish.train", types.SimpleNamespace(main=interrupted))
    assert demo.main(OVERRIDES) == 130
    assert "run it again" in capsys.readouterr().err


def test_a_table_needs_an_evaluation_and_leaves_out_what_was_not_measured():
    with pytest.raises(UserError, match="eval_interval"):
        demo.results_table([{"step": 1, "loss": 1.0}])
    table = demo.results_table([{"step": 0, "eval_loss": 2.0}, {"step": 5, "eval_loss": 1.0, "eval_bits_per_byte": 1.5}])
    assert table.row_count == 1


def test_the_record_names_every_file_that_training_reads(data, prepare):
    prepare()
    record = json.loads((data.folder / demo.RECORD).read_text())
    assert set(record["files"]) == {str(path) for path in data.files}
    assert {path.name for path in data.folder.iterdir()} == {path.name for path in data.files} | {demo.RECORD}
