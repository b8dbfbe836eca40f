"""`megatronish preflight` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatronish.config_loader import load_config
from megatronish.preflight.certificate import find_certificate
from megatronish.preflight.command import Options, main
from megatronish.trainer import Trainer
from tests.small_run import THREE_D, clean_environment, command, write_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def preflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("preflight", *arguments), capture_output=True, text=True, env=clean_environment(), timeout=280, check=False
    )


def test_a_sound_job_ends_with_0_a_certificate_and_a_page(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    done = preflight(str(config), *THREE_D, "--nodes", "2", "--gpus-per-node", "4", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["ok"] and result["ranks_run"] + result["ranks_inferred"] == result["world_size"] == 8
    for text in ("8 ranks = pipeline 2 x data 2 x tensor 2", "sound: ", "certificate: ", "limits: ", "report.html"):
        assert text in done.stdout
    folder = tmp_path / "runs" / "tiny" / "preflight"
    assert "<html" in (folder / "report.html").read_text()
    loaded = load_config(config, list(THREE_D), world_size=8)
    assert find_certificate(folder, loaded, world_size=8, device_kind="cuda") is not None
    # It holds for this job alone.
    assert find_certificate(folder, loaded, world_size=8, device_kind="cpu") is None
    other = load_config(config, [*THREE_D, "optim.lr=0.02"], world_size=8)
    assert find_certificate(folder, other, world_size=8, device_kind="cuda") is None


def test_a_job_that_would_hang_ends_with_1_and_names_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    join = Trainer.join_scalars

    def faulty(self: Trainer, local_loss: Any) -> Any:
        return (local_loss, local_loss) if self.mesh.index("dp") == self.mesh.index("tp") == 1 else join(self, local_loss)

    monkeypatch.setattr(Trainer, "join_scalars", faulty)
    options = Options(world=8, out=tmp_path / "out", processes=1, json_file=tmp_path / "out.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "certificate.json").write_text("what an earlier rehearsal said")
    assert main(str(write_run(tmp_path)), list(THREE_D), options) == 1
    said = capsys.readouterr().out
    assert "NOT SOUND" in said and "loss and gradient norm" in said and "trainer.py" in said
    assert not (tmp_path / "out" / "certificate.json").exists()
    (finding, *_) = json.loads((tmp_path / "out.json").read_text())["findings"]
    assert set(finding["culprits"]) == {3, 7}, finding


def test_a_rank_that_fails_is_named_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = Trainer.count_targets

    def faulty(self: Trainer, batch: Any) -> Any:
        assert self.mesh.index("tp") != 1, "planted"
        return count(self, batch)

    monkeypatch.setattr(Trainer, "count_targets", faulty)
    assert main(str(write_run(tmp_path)), list(THREE_D), Options(world=8, out=tmp_path / "out", processes=1)) == 1
    assert "rank 1 [pp0 dp0 tp1] fails in its rehearsal" in (said := capsys.readouterr().out)
    assert "AssertionError: planted" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "2", "--world", "9"), "--world 9, but --nodes 2 x --gpus-per-node 8 = 16"),
        (("--nodes", "3", "--gpus-per-node", "1"), "parallel.tensor=2"),
        (("--device", "tpu"), "--device tpu: must be cuda or cpu"),
        (("--world", "8", "model.num_heads=7"), "model.num_heads=7"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = preflight(str(write_run(tmp_path)), "parallel.tensor=2", "parallel.pipeline=2", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_help_teaches() -> None:
    said = preflight("--help").stdout
    assert "Example: megatronish preflight configs/gpt3_175b.yaml --nodes 128" in said and sys.executable not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo_cpu", "gpt2_124m", "llama3_8b"])
def test_shipped_configs_are_sound_on_every_rank(name: str, tmp_path: Path) -> None:
    assert main(str(CONFIGS / f"{name}.yaml"), [], Options(out=tmp_path)) == 0
