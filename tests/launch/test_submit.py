"""`megatronish submit`: the script that is queued, and what Slurm's controller says of the largest shipped configs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.errors import UserError
from megatronish.submit import Request, find_template, render, seconds_of
from tests.launch.cluster import Cluster
from tests.launch.conftest import SmallRun
from tests.small_run import error_lines, megatronish


def submit(cluster: Cluster, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "megatronish", "submit", *arguments, "--no-preflight", "--dry-run")
    return cluster.command(*command, cwd=root, timeout=120)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("10", 600), ("1:30", 90), ("24:00:00", 86_400), ("1-0", 86_400), ("2-3:4", 183_840), ("0-0:10:5", 605), ("UNLIMITED", None)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


def test_a_short_job_is_told_in_its_last_quarter_and_not_at_its_start() -> None:
    def signal(time: str, *options: str) -> str | None:
        return Request(1, time=time, options=options).directives("a", Path("log")).get("signal")

    assert signal("10:00") == "B:USR1@150" and signal("1") == "B:USR1@60" and signal("24:00:00") is None
    assert signal("10:00", "--signal=B:USR1@30") == "B:USR1@30"


def test_values_replace_the_templates_and_new_ones_are_added(tmp_path: Path) -> None:
    request = Request(nodes=16, time="2:00:00", account="a b", options=("--exclusive=user", "--reservation=night", "--no-kill"))
    directives = request.directives("name", tmp_path / "job-%j.log")
    script = render(find_template(), directives, {"PYTHON": "/opt/my python"}, ["/runs/x/config.yaml"])
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for line in ("nodes=16", "time=2:00:00", "account='a b'", "exclusive=user", "reservation=night", "no-kill", "gpus-per-node=8"):
        assert lines.count(f"#SBATCH --{line}") == 1, lines
    keys = [line.split("=")[0] for line in lines]
    assert len(set(keys)) == len(keys) and "#SBATCH --requeue" in lines and "#SBATCH --signal=B:USR1@600" in lines
    assert "\nexport PYTHON='/opt/my python'\n[ $# -ge 1 ] || set -- /runs/x/config.yaml\n" in script
    assert script.endswith(find_template().splitlines()[-1] + "\n")
    (tmp_path / "script.sbatch").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "script.sbatch")], check=False).returncode == 0


@pytest.mark.parametrize("option", ["reservation", "-N4", "--Nodes=3", "--x=a\nb"])
def test_what_is_no_option_of_sbatch_is_refused(option: str) -> None:
    with pytest.raises(UserError, match="must be a long option of sbatch"):
        Request(nodes=1, options=(option,)).directives("name", Path("log"))


@pytest.mark.parametrize(("config", "nodes", "spares"), [("gpt3_175b", 128, 2), ("gpt_1t", 384, 0)])
def test_the_controller_takes_the_largest_configs(config: str, nodes: int, spares: int, cluster: Cluster, root: Path) -> None:
    command = (f"configs/{config}.yaml", "--nodes", str(nodes), "--spares", str(spares), "--partition", "big")
    done = submit(cluster, root, *command)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"to start at .* on nodes gpu\[0001-0{nodes + spares}\] in partition big", done.stderr)
    lines = done.stdout.splitlines()
    assert {f"#SBATCH --nodes={nodes + spares}", "#SBATCH --partition=big"} <= set(lines)
    # An allocation that outlives a node, and ranks that leave some free.
    assert [line for line in lines if line in ("#SBATCH --no-kill", "export SPARES=2")] == (
        ["#SBATCH --no-kill", "export SPARES=2"] if spares else []
    )
    assert not (root / "runs" / config / "submit").exists()


def test_fewer_spares_than_none_are_refused(root: Path) -> None:
    done = megatronish("submit", str(root / "configs/gpt3_175b.yaml"), "--nodes", "128", "--spares", "-1", "--dry-run")
    assert done.returncode == 2 and "'--spares': Input should be greater than or equal to 0" in done.stderr


def test_what_the_controller_refuses_is_said(cluster: Cluster, root: Path) -> None:
    done = submit(cluster, root, "configs/gpt3_175b.yaml", "--nodes", "128", "--partition", "big", "--time", "30-00:00:00")
    assert done.returncode == 1 and "time limit" in done.stderr


def test_a_number_of_ranks_that_the_config_has_not_is_one_line(root: Path) -> None:
    done = megatronish("submit", str(root / "configs/gpt3_175b.yaml"), "--nodes", "100", "--dry-run")
    (line,) = error_lines(done.stderr)
    assert done.returncode == 2 and "1024 ranks, but there are 800" in line


def test_without_slurm_one_line_says_so(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = megatronish(
        "submit", str(root / "configs/gpt2_124m.yaml"), "--nodes=1", "--dry-run", "--no-preflight", PATH=str(tmp_path)
    )
    (line,) = error_lines(done.stderr)
    assert done.returncode == 2 and "there is no sbatch on this machine" in line


def test_status_of_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    done = megatronish("status", str(tmp_path))
    (line,) = error_lines(done.stderr)
    assert done.returncode == 2 and "is not the folder of a run" in line


def test_a_job_is_rehearsed_before_it_is_queued_and_not_again(cluster: Cluster, pair_run: SmallRun, tmp_path: Path) -> None:
    command = (
        sys.executable, "-m", "megatronish", "submit", str(pair_run.config), f"run_root={tmp_path}",
        "--nodes=1", "--gpus-per-node=2", "--device=cpu", "--dry-run",
    )  # fmt: skip
    first, second = (cluster.command(*command, cwd=tmp_path, timeout=200) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "sound" in first.stderr and "has a certificate of" in second.stderr
    # What --dry-run prints is a script.
    assert first.stdout.startswith("#!/bin/bash") and re.sub(r"\d{8}-\d{6}", "", first.stdout) == re.sub(
        r"\d{8}-\d{6}", "", second.stdout
    )


@pytest.mark.slow_faults
@pytest.mark.parametrize(("config", "nodes"), [("gpt3_175b", 128), ("gpt_1t", 384)])
def test_the_largest_configs_pass_every_check_before_the_queue(
    config: str, nodes: int, cluster: Cluster, root: Path, tmp_path: Path
) -> None:
    command = (
        sys.executable,
        "-m",
        "megatronish",
        "submit",
        f"configs/{config}.yaml",
        f"run_root={tmp_path}",
        "--nodes",
        str(nodes),
    )
    done = cluster.command(*command, "--partition", "big", "--dry-run", cwd=root, timeout=800)
    assert done.returncode == 0 and "sound" in done.stderr, done.stderr
    assert re.search(rf"to start at .* on nodes gpu\[0001-0{nodes}\] in partition big", done.stderr)
