"""A stand-in for Python under the shipped batch scripts, for what no real trainer is needed for: a thousand ranks, or how the
script answers an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPT = """\
#!/bin/bash
run={run}
case "$3 $4" in
"--version ") exit 0 ;;
"config check") exit 0 ;;
"config print") echo "$run"; exit 0 ;;
"train "*) ;;
*) exec {python} "$@" ;;
esac
before=()
[ ! -f "$run/lives/$SLURM_JOB_ID.suspects" ] || mapfile -t before < "$run/lives/$SLURM_JOB_ID.suspects"
life=$((${{#before[@]}} + 1))
save() {{ mkdir -p "$run/checkpoints/step-$(printf %08d "$1")"; }}
{train}
"""


def write_stand_in(path: Path, run: Path, train: str) -> Path:
    """An executable that finds every config right, whose run folder is `run`, and whose ranks do `train`: bash that knows $run,
    $life (1 for the first), and `save STEP`."""
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(_SCRIPT.format(run=run, python=sys.executable, train=train))
    path.chmod(0o755)
    return path
