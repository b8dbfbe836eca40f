"""How the batch scripts answer the exit codes of a run, on the real cluster, with a stand-in for the trainer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.stand_in import write_stand_in

pytestmark = pytest.mark.timeout(600)
TASKS = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
TRAIN = """\
# What is left to end with; `76+` saves first.
read -r code rest < "$run/codes"
echo "$rest" > "$run/codes"
echo "$life ${SLURM_ARRAY_TASK_ID:-}" >> "$run/begun"
[ "${code%+}" = "$code" ] || save "${SLURM_RESTART_COUNT:-0}"
exit "${code%+}"
"""


def start(cluster: Cluster, root: Path, folder: Path, codes: str, **variables: str) -> tuple[int, Path, Path]:
    """A job whose lives end with `codes`; its number, log and run folder."""
    folder.mkdir()
    run, log = folder / "run", folder / "job.log"
    python = write_stand_in(folder / "python", run, TRAIN)
    (run / "codes").write_text(codes + "\n")
    command = (*TASKS, f"--output={log}", "launch/slurm/pretrain.sbatch", "config.yaml")
    return cluster.submit(*command, cwd=root, PYTHON=str(python), **variables), log, run


def test_exit_codes_end_or_requeue_a_job(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    # Codes of its lives -> (how the job ends, its exit code, restarts).
    cases = {
        "2": ("FAILED", "2:0", "0"),
        "77": ("FAILED", "77:0", "0"),
        "78": ("FAILED", "78:0", "0"),
        "79": ("FAILED", "79:0", "0"),
        "75+ 76+ 1+ 0": ("COMPLETED", "0:0", "3"),  # what is no code of ours is a fault
        "76 76 76 76": ("FAILED", "77:0", "2"),  # three lives that failed and saved nothing
        "75 75 75 75 0": ("COMPLETED", "0:0", "4"),  # preempted, not failed
        "76+ 76 76 76": ("FAILED", "77:0", "3"),  # the first has
    }
    jobs = {codes: start(cluster, root, tmp_path / str(number), codes) for number, codes in enumerate(cases)}
    for codes, expected in cases.items():
        number, log, run = jobs[codes]
        ended = cluster.wait(number)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == expected, f"{codes}: {log.read_text()}"
        assert len((run / "begun").read_text().splitlines()) == int(expected[2]) + 1


def test_an_element_of_a_sweep_is_requeued_and_the_others_are_not(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    run, sweep = tmp_path / "run", tmp_path / "sweep.txt"
    # The second element, the last: its job number alone is that of the whole array.
    train = TRAIN.replace("$run/codes", "$run/codes-$SLURM_ARRAY_TASK_ID")
    python = write_stand_in(tmp_path / "python", run, train)
    for element, codes in ((1, "0"), (2, "75+ 0")):
        (run / f"codes-{element}").write_text(codes + "\n")
    sweep.write_text("name=a optim.lr=1e-4\nname=b optim.lr=3e-4\n")
    job = cluster.submit(
        "--array=1-2", *TASKS, f"--output={tmp_path}/%a.log", "launch/slurm/array_sweep.sbatch", "config.yaml", str(sweep),
        cwd=root, PYTHON=str(python),
    )  # fmt: skip
    ended = [cluster.wait(f"{job}_{element}") for element in (1, 2)]
    assert [(one["JobState"], one["Restarts"]) for one in ended] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    assert f"job {job}_2: out of time, saved; back into the queue" in (tmp_path / "2.log").read_text()
    assert sorted((run / "begun").read_text().split("\n")) == ["", "1 1", "1 2", "2 2"]


FAILS_FIRST = """\
# The first rank leaves what a rank leaves that says why it failed: on the node of the first life, in lives up to {until}.
[ "$SLURM_PROCID" -eq 0 ] || exit 0
[ -s "$run/bad" ] || echo "$SLURMD_NODENAME" > "$run/bad"
echo "$SLURMD_NODENAME" >> "$run/begun"
[ "$(cat "$run/bad")" = "$SLURMD_NODENAME" ] && [ "$life" -le {until} ] || exit 0
save "${{SLURM_RESTART_COUNT:-0}}"
PYTHONPATH={root} {python} -c "
from pathlib import Path
from megatronish import failures
launch = 'slurm-$SLURM_JOB_ID.${{SLURM_STEP_ID}}_${{SLURM_RESTART_COUNT:-0}}'
failures.leave(Path('$run'), failures.now(0, 1, launch, where='train step 7', error='a broken GPU', code=76, lost_peer=False))"
exit 76
"""


def test_a_node_whose_rank_fails_first_twice_in_a_row_is_left_out(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    python = write_stand_in(tmp_path / "python", run, FAILS_FIRST.format(root=root, python=sys.executable, until=100))
    command = (*TASKS, f"--output={log}", "--exclude=node004", "launch/slurm/pretrain.sbatch", "config.yaml")
    ended = cluster.wait(cluster.submit(*command, cwd=root, PYTHON=str(python)))
    bad, nodes = (run / "bad").read_text().strip(), (run / "begun").read_text().split()
    assert (ended["JobState"], ended["Restarts"], nodes[:2]) == ("COMPLETED", "2", [bad, bad]), log.read_text()
    assert nodes[2] not in (bad, "node004") and f"without {bad}, whose rank failed first" in log.read_text()


def test_what_was_right_in_the_first_life_may_be_right_again(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    # The check finds something wrong in the second life: a mount that is missing on its node.
    run, log = tmp_path / "run", tmp_path / "job.log"
    python = write_stand_in(tmp_path / "python", run, TRAIN)
    (run / "codes").write_text("75+ 0\n")
    check = '"config check") [ "${SLURM_RESTART_COUNT:-0}" -ne 1 ] || { echo "error: no such set" >&2; exit 2; }; exit 0 ;;'
    python.write_text(python.read_text().replace('"config check") exit 0 ;;', check))
    command = (*TASKS, f"--output={log}", "launch/slurm/pretrain.sbatch", "config.yaml")
    ended = cluster.wait(cluster.submit(*command, cwd=root, PYTHON=str(python)))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), log.read_text()
    assert (run / "begun").read_text().split() == ["1", "2"]


def test_a_python_that_is_not_there_is_one_line(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    command = (*TASKS, f"--output={log}", "launch/slurm/pretrain.sbatch", "config.yaml")
    ended = cluster.wait(cluster.submit(*command, cwd=root, PYTHON="/nowhere/python"))
    assert ended["ExitCode"] == "2:0" and "set PYTHON, or run `make setup`" in log.read_text(), log.read_text()


def test_a_node_that_no_other_can_replace_stays(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    python = write_stand_in(tmp_path / "python", run, FAILS_FIRST.format(root=root, python=sys.executable, until=2))
    command = ("--nodes=4", *TASKS[1:], f"--output={log}", "launch/slurm/pretrain.sbatch", "config.yaml")
    ended = cluster.wait(cluster.submit(*command, cwd=root, PYTHON=str(python)))
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), log.read_text()
