"""Killed anywhere, the same command goes on and gives the same files; bad lines are counted by reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.data import partial as partial_module
from megatronish.data import tokenize as module
from megatronish.data.encoders import CheckedEncoder, EncodersDisagree
from megatronish.data.indexed import IndexedDataset
from megatronish.data.tokenize import tokenize
from megatronish.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_fingerprint
from megatronish.errors import UserError

# Kills itself: after so many jobs, or before so many renamings of finished files.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from megatronish.data import documents, indexed_writer, partial, tokenize as module
corpus, tokenizer, out, kind, count = sys.argv[1:]
plan, group = module.plan_segments, module.group_jobs
module.plan_segments = lambda files, **kw: plan(files, segment_bytes=3000, **kw)
module.group_jobs = lambda segments: group(segments, job_bytes=5000)
partial._SAVE_SECONDS = 0.0
left = int(count)
def die_at_zero(*_):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
if kind == "rename":
    replace = os.replace
    def counted(source, target):
        if ".partial" not in str(target):
            die_at_zero()
        replace(source, target)
    os.replace = counted
report = module.tokenize([Path(corpus)], tokenizer=Path(tokenizer), out=out, on_progress=die_at_zero if kind == "job" else None)
print(report.documents, report.tokens)
"""


@pytest.fixture
def corpus(tmp_path, sample_text) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(sample_text * 9)
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": sample_text[i : i + i % 90]}) for i in range(300)))
    return folder


def run(corpus: Path, tokenizer: Path, out: Path, kind: str = "none", count: int = 0) -> int:
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(tokenizer), str(out), kind, str(count)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).returncode


def files_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


@pytest.mark.parametrize(("kind", "count"), [("job", 0), ("job", 3), ("job", 9), ("rename", 0), ("rename", 1), ("rename", 2)])
def test_a_killed_command_goes_on_and_gives_the_same_files(corpus, tokenizer_path, tmp_path, kind, count):
    assert run(corpus, tokenizer_path, tmp_path / "whole") == 0
    out = tmp_path / "set"
    assert run(corpus, tokenizer_path, out, kind, count) == -9
    assert (tmp_path / "set.partial").is_dir()
    assert not (tmp_path / "set.idx").exists() or kind == "rename"
    assert run(corpus, tokenizer_path, out) == 0
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (tmp_path / "set.partial").exists()


def test_going_on_does_not_do_the_work_again(corpus, tokenizer_path, tmp_path, monkeypatch):
    plan, group, encode, jobs = module.plan_segments, module.group_jobs, module.encode_job, []
    monkeypatch.setattr(module, "plan_segments", lambda files, **kw: plan(files, segment_bytes=3000, **kw))
    monkeypatch.setattr(module, "group_jobs", lambda segments: group(segments, job_bytes=5000))
    monkeypatch.setattr(partial_module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "encode_job", lambda job, *rest: jobs.append(job) or encode(job, *rest))
    total = len(list(module.group_jobs(module.plan_segments(module.find_files([corpus])))))

    def interrupt(done: int, size: int) -> None:
        if len(jobs) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "set", on_progress=interrupt)
    tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "set", workers=1)
    assert 5 < total == len(jobs) == len(set(jobs))


@pytest.fixture
def interrupted(corpus, tokenizer_path, tmp_path):
    """A set whose making was interrupted."""

    def interrupt(done: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "set", on_progress=interrupt)
    return tmp_path / "set"


def test_changed_inputs_tokenizers_and_settings_are_named(interrupted, corpus, tokenizer_path, tmp_path, sample_text):
    def again(**changes):
        return tokenize([corpus], **{"tokenizer": tokenizer_path, "out": interrupted, **changes})

    (tmp_path / "other.txt").write_text(sample_text)
    train_tokenizer([tmp_path / "other.txt"], vocab_size=280, out=tmp_path / "other.json")
    with pytest.raises(UserError, match=r"set\.partial holds .* but tokenizer was \w+, now \w+; .*delete .*set\.partial"):
        again(tokenizer=tmp_path / "other.json")
    with pytest.raises(UserError, match="but end of text was 0, now None"):
        again(append_eod=False)
    with pytest.raises(UserError, match="but on bad line was stop, now skip"):
        again(on_bad_line="skip")
    with pytest.raises(UserError, match=r"but .*b\.jsonl was among its inputs"):
        again(globs=["*.txt"])
    os.utime(corpus / "a.txt", ns=(1, 1))
    with pytest.raises(UserError, match=r"but .*a\.txt has changed: it was written again"):
        again()
    with open(corpus / "a.txt", "a") as file:
        file.write("x")
    with pytest.raises(UserError, match=r"but .*a\.txt has changed: \d+ bytes, then \d+"):
        again()


def test_a_progress_that_is_not_all_on_the_disk_is_not_believed(interrupted, corpus, tokenizer_path, tmp_path):
    (tmp_path / "set.partial" / "tokens").write_bytes(b"")
    tokenize([corpus], tokenizer=tokenizer_path, out=interrupted)
    tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "whole")
    assert files_of(interrupted) == files_of(tmp_path / "whole")


def test_two_processes_do_not_write_one_set(corpus, tokenizer_path, tmp_path):
    with partial_module.PartialSet(tmp_path / "set", {"inputs": []}), pytest.raises(UserError, match="another process is writing"):
        tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "set")


BAD = {
    "bad JSON": b'{"text": oops}',
    "not an object": b'["text"]',
    "no text": b'{"content": "x"}',
    "text is null": b'{"text": null}',
    "text is no string": b'{"text": 5}',
    "invalid UTF-8": b'{"text": "\xff"}',
    "too long": b'{"text": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_counted_by_reason_and_the_rest_is_written(tokenizer_path, tmp_path, workers):
    lines = [b'{"text": "fine"}', b'{"text": ""}']
    for number, line in enumerate(BAD.values(), 1):
        lines += [line, b'{"text": "fine %d"}' % number] * number
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    out = tmp_path / f"set{workers}"
    report = tokenize(
        [tmp_path / "a.jsonl"], tokenizer=tokenizer_path, out=out, workers=workers, on_bad_line="skip", max_line_bytes=1 << 20
    )
    assert report.skipped == {reason: number for number, reason in enumerate(BAD, 1)}
    assert report.empty_documents == 1
    assert report.first_skipped["bad JSON"].startswith(f"{tmp_path}/a.jsonl:3:10: not JSON")
    assert report.first_skipped["not an object"].startswith(f"{tmp_path}/a.jsonl:5:1: ")
    tokenizer, dataset = load_tokenizer(tokenizer_path), IndexedDataset(out)
    found = [tokenizer.decode(dataset.document(i)[:-1].tolist()) for i in range(dataset.num_documents)]
    assert found == ["fine", *(f"fine {number}" for number in range(1, 8) for _ in range(number))]
    written = json.loads(Path(f"{out}.json").read_text())
    assert written["skipped"] == report.skipped and written["documents"] == len(found)
    assert written["vocabulary"] == f"{vocabulary_fingerprint(tokenizer):016x}"


def test_only_bad_lines_are_refused(tokenizer_path, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n{}\n")
    with pytest.raises(UserError, match=r"no text in 1 files, 0 empty documents and 2 lines left out"):
        tokenize([tmp_path / "a.jsonl"], tokenizer=tokenizer_path, out=tmp_path / "set", on_bad_line="skip")
    assert not list(tmp_path.glob("set*"))


def test_the_command_prints_a_table_of_what_it_left_out(tokenizer_path, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": null}\n{}\n')
    command = [sys.executable, "-m", "megatronish", "data", "tokenize", str(tmp_path / "a.jsonl")]
    command += ["--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "set"), "--on-bad-line", "skip"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert "1 documents" in result.stdout
    for words in ("text is null", "no text", "a.jsonl:2:2", "a.jsonl:3:1"):
        assert words in result.stderr


def test_an_encoder_that_differs_from_the_library_gives_way_loudly(corpus, tokenizer_path, tmp_path, monkeypatch):
    tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "whole")

    def compare(self, texts):
        raise EncodersDisagree("other ids for the text 'x'")

    monkeypatch.setattr(CheckedEncoder, "compare", compare)
    with pytest.warns(UserWarning, match="other ids for the text 'x'; starting over with the library"):
        tokenize([corpus], tokenizer=tokenizer_path, out=tmp_path / "set")
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
