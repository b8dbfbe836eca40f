import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatronish.errors import UserError
from megatronish.observe.metrics import FILE_NAME, MetricsWriter, read_metrics


def write_life(run_dir, *, first, last, offset=0.0, tensorboard=False):
    with MetricsWriter(run_dir, tensorboard=tensorboard, first_step=first) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"loss": step + offset, "consumed_tokens": 4096 * step})


def curve(run_dir):
    return [(row["step"], row["loss"]) for row in read_metrics(run_dir)]


@given(killed_at=st.integers(1, 12), torn=st.integers(0, 60), saved=st.integers(0, 12))
def test_a_life_that_was_killed_anywhere_leaves_a_true_curve(tmp_path_factory, killed_at, torn, saved):
    """The first life writes to `killed_at`, its last `torn` bytes are lost; the second goes on from the checkpoint at `saved`."""
    saved = min(saved, killed_at - 1)
    run_dir = tmp_path_factory.mktemp("run")
    write_life(run_dir, first=0, last=killed_at)
    path = run_dir / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    torn = min(torn, len(b"".join(lines[saved + 1 :])))  # what was written before the checkpoint is there
    os.truncate(path, path.stat().st_size - torn)
    write_life(run_dir, first=saved + 1, last=15, offset=0.5)
    assert curve(run_dir) == [(s, s) for s in range(saved + 1)] + [(s, s + 0.5) for s in range(saved + 1, 16)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


CHILD = """
import sys
import time
from pathlib import Path
from megatronish.observe.metrics import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), tensorboard=True, first_step=0)
for step in range(8):
    writer.write(step, {"loss": float(step)})
print("written", flush=True)
sys.stdin.read()
"""


def test_a_sigkill_loses_nothing_that_was_written_in_file_and_tensorboard(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "written\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert curve(tmp_path) == [(step, step) for step in range(8)]
    time.sleep(1.1)  # TensorBoard orders the files of lives by the second they began in
    write_life(tmp_path, first=5, last=9, offset=0.5, tensorboard=True)
    expected = [(s, s) for s in range(5)] + [(s, s + 0.5) for s in range(5, 10)]
    assert curve(tmp_path) == expected
    assert board_curve(tmp_path / "tensorboard", "loss") == expected


def board_curve(folder: Path, tag: str):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_half_written_line_is_no_row_for_a_reader_of_a_run_that_goes_on(tmp_path):
    write_life(tmp_path, first=1, last=3)
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"step": 4, "loss": 4.')
    assert curve(tmp_path) == [(1, 1), (2, 2), (3, 3)]


def test_a_loss_that_is_not_finite_is_valid_json_and_comes_back_as_nan(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, first_step=0) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-3})
    row = json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-3}
    [read] = read_metrics(tmp_path)
    assert math.isnan(read["loss"]) and math.isnan(read["grad_norm"]) and read["lr"] == 1e-3


def test_rows_of_different_keys_keep_them_and_integers_stay_integers(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, first_step=0) as writer:
        writer.write(0, {"eval_loss": 9.0})
        writer.write(1, {"loss": 8.0, "consumed_tokens": 2**60 + 1})
    assert read_metrics(tmp_path) == [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 8.0, "consumed_tokens": 2**60 + 1}]


def test_resuming_where_nothing_is_to_cut_leaves_the_file_alone_and_no_file_beside_it(tmp_path):
    write_life(tmp_path, first=0, last=4)
    inode = (tmp_path / FILE_NAME).stat().st_ino
    MetricsWriter(tmp_path, tensorboard=False, first_step=5).close()
    assert (tmp_path / FILE_NAME).stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_without_tensorboard_it_is_not_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from megatronish.observe.metrics import MetricsWriter\n"
        f"MetricsWriter(Path({str(tmp_path)!r}), tensorboard=False, first_step=0).close()\n"
        "assert not any(name.split('.')[0] in ('tensorboard', 'torch') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written .*run_root"):
        MetricsWriter(tmp_path, tensorboard=False, first_step=0)
