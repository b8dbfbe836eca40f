"""Slurm's lists of hosts, expanded by us: against a written-out list, and against scontrol where it is installed."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatronish.errors import UserError
from megatronish.parallel.nodelist import expand_counts, expand_hosts


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A bracket, and what it stands for."""
    parts, numbers = [], []
    for _ in range(draw(st.integers(1, 3))):
        first, length, width = draw(st.integers(0, 120)), draw(st.integers(0, 12)), draw(st.integers(1, 4))
        parts.append(f"{first:0{width}d}-{first + length:0{width}d}" if length else f"{first:0{width}d}")
        width = len(f"{first:0{width}d}")
        numbers += [f"{number:0{width}d}" for number in range(first, first + length + 1)]
    return f"[{','.join(parts)}]", numbers


@st.composite
def names(draw: st.DrawFn, *, suffix: bool) -> tuple[str, list[str]]:
    """One entry of a list, and the hosts that it stands for."""
    prefix = draw(st.sampled_from(["n", "node", "gpu-a", "rack1-n", "c.x", "h100_"]))
    brackets = draw(st.lists(ranges(), max_size=2))
    text, choices = prefix, [[prefix]]
    for position, (bracket, numbers) in enumerate(brackets):
        between = draw(st.sampled_from(["", "-", "n"])) if position else ""
        text, choices = text + between + bracket, [*choices, [between], numbers]
    end = draw(st.sampled_from(["", "-ib", ".cluster"])) if suffix else ""
    return text + end, ["".join(parts) + end for parts in itertools.product(*choices)]


@given(st.lists(names(suffix=True), min_size=1, max_size=4))
def test_a_list_expands_to_what_it_was_made_of(entries: list[tuple[str, list[str]]]) -> None:
    expected = [host for _, hosts in entries for host in hosts]
    assert list(expand_hosts(",".join(text for text, _ in entries))) == expected


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a configuration as scontrol wants before it looks at its arguments."""
    if shutil.which("scontrol") is None:
        pytest.skip("no scontrol: Slurm is not installed")
    path = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    path.write_text("ClusterName=none\nSlurmctldHost=localhost\nNodeName=localhost\n")
    return path


@settings(max_examples=40)
@given(st.lists(names(suffix=False), min_size=1, max_size=4))
def test_a_list_expands_as_scontrol_does(slurm_conf: Path, entries: list[tuple[str, list[str]]]) -> None:
    text = ",".join(text for text, _ in entries)
    environment = {**os.environ, "SLURM_CONF": str(slurm_conf)}
    command = ["scontrol", "show", "hostnames", text]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert list(expand_hosts(text)) == shown.stdout.split()


def test_the_first_of_a_hundred_million_hosts_is_there_at_once() -> None:
    assert next(expand_hosts("r[0001-9999]n[0001-9999]")) == "r0001n0001"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "''"),
        ("node[1-2", "not closed"),
        ("node1-2]", "character 8 does not match"),
        ("node[[1]]", "character 6 does not match"),
        ("node[2-1]", "'2-1'"),
        ("node[]", "''"),
        ("node[a-b]", "'a-b'"),
        ("node1,,node2", "''"),
    ],
)
def test_what_is_no_list_of_hosts_is_one_line(text: str, word: str) -> None:
    with pytest.raises(UserError) as caught:
        list(expand_hosts(text, variable="SLURM_STEP_NODELIST"))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"SLURM_STEP_NODELIST={text!r} is not a list of hosts") and word in line


def test_counts_of_tasks() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1] and expand_counts("8") == [8]
    with pytest.raises(UserError, match=r"SLURM_STEP_TASKS_PER_NODE='2\(x' is not a list of counts"):
        expand_counts("2(x")
