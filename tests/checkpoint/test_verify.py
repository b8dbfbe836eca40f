from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megatronish import retries
from megatronish.checkpoint import newest_loadable, open_checkpoint, verify, verify_checkpoint
from megatronish.comm import Group, single_process_group
from megatronish.errors import Fault, UserError
from tests.checkpoint.support import SHAPES, Layout, on_threads, read_all, same, save, save_all, values_of

LAYOUT = Layout(2, 2)


def shard(path: Path, rank: int) -> Path:
    return path / f"rank-{rank:05d}.safetensors"


def flip_last_bit(path: Path) -> None:
    shard(path, 1).write_bytes((data := shard(path, 1).read_bytes())[:-1] + bytes([data[-1] ^ 1]))


def flip_header_bit(path: Path) -> None:
    data = bytearray(shard(path, 1).read_bytes())
    data[20] ^= 0x10
    shard(path, 1).write_bytes(data)


def truncate(path: Path) -> None:
    shard(path, 1).write_bytes(shard(path, 1).read_bytes()[:-3])


def lengthen(path: Path) -> None:
    shard(path, 1).write_bytes(shard(path, 1).read_bytes() + b"xyz")


def delete(path: Path) -> None:
    shard(path, 1).unlink()


def directory_instead(path: Path) -> None:
    shard(path, 1).unlink()
    shard(path, 1).mkdir()


def swap(path: Path) -> None:
    shard(path, 1).rename(path / "x")
    shard(path, 2).rename(shard(path, 1))
    (path / "x").rename(shard(path, 2))


def from_the_step_before(path: Path) -> None:
    shutil.copyfile(shard(path.with_name("step-00000010"), 1), shard(path, 1))


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-40])


def change_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    assert '"consumed_samples": 160' in text
    (path / "manifest.json").write_text(text.replace('"consumed_samples": 160', '"consumed_samples": 161'))


def manifest_of_another_program(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


def newer_format(path: Path) -> None:
    edit(path, lambda manifest: manifest.update(format_version=2))


def directory_renamed(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-00000010"), path)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """A manifest changed by a program that knows the format: its digest is right."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["manifest_digest"]
    change(manifest)
    body = json.dumps(manifest)[:-1].encode() + b",\n"
    seal = f'"manifest_digest": "{xxhash.xxh3_128_hexdigest(body)}"}}\n'
    (path / "manifest.json").write_bytes(body + seal.encode())


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_last_bit, r"rank-00001.safetensors was changed since it was saved: its digest differs"),
    "flipped bit in a header": (flip_header_bit, r"rank-00001.safetensors was changed"),
    "truncated": (truncate, r"rank-00001.safetensors is truncated: \d+ bytes, \d+ were saved"),
    "lengthened": (lengthen, r"rank-00001.safetensors is too long: \d+ bytes, \d+ were saved"),
    "deleted": (delete, r"rank-00001.safetensors is missing"),
    "unreadable": (directory_instead, r"rank-00001.safetensors"),
    "swapped": (
        swap,
        r"rank-00001.safetensors was swapped: it has the content of rank-00002.safetensors; rank-00002.safetensors was swapped",
    ),
    "an older shard": (from_the_step_before, r"rank-00001.safetensors was changed"),
    "no manifest": (remove_manifest, r"has no manifest.json"),
    "truncated manifest": (truncate_manifest, r"manifest.json is not valid JSON"),
    "changed manifest": (change_manifest, r"manifest.json was changed since it was written"),
    "other manifest": (manifest_of_another_program, r"is not the manifest of a megatronish checkpoint"),
    "newer format": (newer_format, r"format_version 2, this program reads up to 1: use a newer"),
    "renamed directory": (directory_renamed, r"its manifest is of step 10"),
}


@pytest.mark.parametrize("num_readers", [1, 3])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_on_every_rank_and_the_checkpoint_before_is_used(tmp_path: Path, damage: str, num_readers: int) -> None:
    for step in (10, 20):
        save_all(tmp_path, step, LAYOUT)
    act, words = DAMAGE[damage]
    act(tmp_path / "step-00000020")

    def rank(group: Group) -> tuple[int, list[str]]:
        lines: list[str] = []
        checkpoint = newest_loadable(tmp_path, world=group, log=lines.append)
        assert checkpoint is not None
        assert same(read_all(checkpoint), values_of(SHAPES, checkpoint.step))
        return checkpoint.step, lines

    results = on_threads(num_readers, rank)
    assert results == [results[0]] * num_readers
    step, lines = results[0]
    assert step == 10
    assert lines[0].startswith("REFUSED") and "step-00000020" in lines[0] and re.search(words, lines[0])
    assert "using checkpoint" in lines[1] and "step-00000010" in lines[1]


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage != "renamed directory"])
def test_verify_refuses_all_damage_and_passes_what_was_saved(tmp_path: Path, damage: str) -> None:
    for step in (10, 20):
        save_all(tmp_path, step, LAYOUT)
    path, world = tmp_path / "step-00000020", single_process_group()
    verify_checkpoint(path, world=world)
    act, words = DAMAGE[damage]
    act(path)
    with pytest.raises(UserError, match=words if damage != "swapped" else "rank-00001.safetensors was swapped"):
        verify_checkpoint(path, world=world)


def test_every_single_flipped_bit_of_a_small_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, shapes={"w": ((3,), "bfloat16")})
    world = single_process_group()
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for i in range(len(data)):
            file.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
            with pytest.raises(UserError):
                verify_checkpoint(path, world=world)
        file.write_bytes(data)
    verify_checkpoint(path, world=world)


def test_many_unsound_files_are_named_in_part_and_counted(tmp_path: Path) -> None:
    (path, *_) = save_all(tmp_path, 1, Layout(1, 6))
    for file in path.glob("rank*"):
        file.unlink()
    for error in on_threads(2, lambda group: verify_checkpoint(path, world=group)):
        assert [f"rank-{i:05d}.safetensors is missing" in str(error) for i in range(6)] == [True] * 4 + [False] * 2
        assert str(error).endswith("; and 2 more of 6 files")


def test_all_refused_is_an_error_that_lists_them_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (10, 20):
        delete(save_all(tmp_path, step, LAYOUT)[0])
    for error in on_threads(2, lambda group: newest_loadable(tmp_path, world=group, log=lambda line: None)):
        assert isinstance(error, UserError)
        assert "step-00000020: rank-00001.safetensors is missing" in str(error)
        assert "step-00000010: rank-00001.safetensors is missing" in str(error)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_gives_no_answer_is_asked_again_and_then_a_fault_on_every_rank_never_a_refusal(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        save_all(tmp_path, step, LAYOUT)
    monkeypatch.setattr(retries, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    left, open_file = [0], Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == tmp_path / "step-00000020" / name and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    lines: list[str] = []

    def newest(group: Group) -> int | None:
        checkpoint = newest_loadable(tmp_path, world=group, log=lines.append)
        return checkpoint and checkpoint.step

    left[0] = 3
    assert on_threads(2, newest) == [20, 20] and left == [0]
    left[0] = 10**9
    for error in on_threads(2, newest):
        assert isinstance(error, Fault) and name in str(error) and os.strerror(number) in str(error), error
    assert lines == []


def test_each_file_is_read_once_by_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path, *_) = save_all(tmp_path, 1, Layout(1, 5))
    read: list[str] = []
    digest = verify.file_digest

    def recorded(file: Path) -> str:
        read.append(file.name)
        return digest(file)

    monkeypatch.setattr(verify, "file_digest", recorded)
    assert on_threads(2, lambda group: verify_checkpoint(path, world=group)) == [None, None]
    assert sorted(read) == [f"rank-{i:05d}.safetensors" for i in range(5)]
    files = verify.read_manifest(path).files
    read.clear()
    verify.inspect_part(path, files, 1, 2)
    assert read == ["rank-00001.safetensors", "rank-00003.safetensors"]


def test_a_checkpoint_that_only_some_ranks_see_is_refused_by_all(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    shutil.copytree(tmp_path, tmp_path.with_name("other"))
    shutil.rmtree(tmp_path.with_name("other") / "step-00000020")

    def rank(group: Group) -> tuple[int, list[str]]:
        root, lines = tmp_path if group.index == 0 else tmp_path.with_name("other"), []
        checkpoint = newest_loadable(root, world=group, log=lines.append)
        return -1 if checkpoint is None else checkpoint.step, lines

    (step_0, lines_0), (step_1, lines_1) = on_threads(2, rank)
    assert (step_0, step_1) == (10, 10)
    assert "step-00000020: rank 1 could not use its manifest.json" in lines_0[0]
    assert "step-00000020 does not exist" in lines_1[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["files"][0]["pieces"].pop("count"), "count do not tile it: element .* lies in no piece"),
        (lambda m: m["files"][0]["pieces"]["layers.0.up"].append([0, 0, 1, 1]), "in 2 pieces"),
        (lambda m: m["files"][0]["pieces"]["layers.0.up"].append([0, 0, 1]), "malformed"),
        (lambda m: m["files"][0].update(name="../../etc/passwd"), "malformed: file entry"),
        (lambda m: m["files"].append(m["files"][0]), "listed twice"),
        (lambda m: m["tensors"]["count"].update(dtype="object"), "malformed: tensor count"),
        (lambda m: m["files"][0]["pieces"].update({"layers.0.up": [["0", 0, 6, 5]]}), "not rows of 4 integers"),
        (lambda m: m["files"][0]["pieces"].update(stranger=[[0, 1]]), "malformed"),
        (lambda m: m.pop("state"), "malformed"),
        (
            lambda m: m["tensors"].update(extra={"shape": [2], "dtype": "float32"}),
            "extra do not tile it: element .* lies in no piece",
        ),
    ],
)
def test_a_manifest_that_is_sealed_but_wrong_is_refused(tmp_path: Path, change: Callable[[dict], object], words: str) -> None:
    path = save(tmp_path, 1)
    edit(path, lambda manifest: None)
    open_checkpoint(path)
    edit(path, change)
    with pytest.raises(UserError, match=words):
        open_checkpoint(path)


def test_opening_checks_that_files_are_there_with_their_sizes(tmp_path: Path) -> None:
    (path, *_) = save_all(tmp_path, 1, LAYOUT)
    truncate(path)
    with pytest.raises(UserError, match=r"rank-00001.safetensors has \d+ bytes, \d+ were saved"):
        open_checkpoint(path)
    delete(path)
    with pytest.raises(UserError, match=r"rank-00001.safetensors: No such file"):
        open_checkpoint(path)
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "step-00000002")
