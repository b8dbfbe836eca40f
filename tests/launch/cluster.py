"""A throw-away Slurm cluster for the tests, started by cluster.sh."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

SCRIPT = Path(__file__).parent / "cluster.sh"
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


class Cluster:
    """Commands run as on a login node. Polls scontrol: `sbatch --wait` looks only every half minute."""

    def __init__(self, base: Path, *options: str) -> None:
        self.base = base
        self.run("stop")
        started = self.run("start", *options, timeout=400)
        if started.returncode != 0:
            self.stop()
        assert started.returncode == 0, started.stderr

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """`cluster.sh BASE ARGUMENTS`."""
        # Output goes through files: a daemon that inherits a pipe would keep it open.
        with open(self.base / "out", "w+") as out, open(self.base / "err", "w+") as err:
            done = subprocess.run(
                [str(SCRIPT), str(self.base), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=timeout,
                check=False,
            )
            out.seek(0), err.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, out.read(), err.read())

    def environment(self, **variables: str) -> dict[str, str]:
        """This process's with the cluster's commands first, without a job's variables."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "PATH": f"{self.base}/bin:{os.environ['PATH']}", **variables}

    def command(self, *arguments: str, cwd: Path, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of Slurm."""
        environment = self.environment(**variables)
        return subprocess.run(arguments, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> int:
        """`sbatch ARGUMENTS`; the job's number."""
        done = self.command("sbatch", "--parsable", *arguments, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What scontrol says of a job."""
        text = self.command("scontrol", "-o", "show", "job", str(number), cwd=self.base).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: int | str, *, states: Sequence[str] = ENDED, seconds: float = 600) -> dict[str, str]:
        """Until the job is in one of the states."""
        end = time.monotonic() + seconds
        while (job := self.job(number)).get("JobState") not in states:
            assert time.monotonic() < end, f"job {number} is {job.get('JobState')} ({job.get('Reason')}) after {seconds:g} s"
            time.sleep(0.2)
        return job

    def stop(self) -> None:
        """End everything."""
        self.run("stop")


def processes(folder: Path) -> dict[int, tuple[str, list[bytes]]]:
    """Node and command line of every process, of any node, whose command line names `folder`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if any(str(folder).encode() in word for word in words):
                node = re.search(rb"(?:^|\0)SLURMD_NODENAME=(\w+)", (entry / "environ").read_bytes())
                found[int(entry.name)] = (node[1].decode() if node else "", words)
    return found
