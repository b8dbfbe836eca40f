"""The page and the trace say what was recorded. The page is opened in a real browser, where there is one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatronish.assemble import mesh_shape
from megatronish.comm.history import Call
from megatronish.parallel.mesh import MeshShape
from megatronish.pipeline.lower import Step
from megatronish.pipeline.schedules import Forward
from megatronish.pipeline.timeline import idle_of
from megatronish.preflight.findings import Finding
from megatronish.preflight.job import Job
from megatronish.preflight.page_data import in_words
from megatronish.preflight.rehearse import Microbatches, rehearse
from megatronish.preflight.report import ADVICE, LIMITS, ReportFacts, page_data, write_report
from megatronish.preflight.stages import read_stages
from megatronish.preflight.trace import UNIT, trace_events, write_trace
from megatronish.preflight.traffic import handed_bytes, sent_bytes, traffic_of
from tests.parallel.parity import Case
from tests.preflight.browser import Browser, browser, find_browser
from tests.preflight.made_jobs import ACTIVATION, made_job

SMALL = MeshShape(pp=4, dp=2, tp=2)
TEXT = (
    "rank 9 [pp2 dp0 tp1] skips all_reduce (sum) of 4 x float32 on tp at megatronish/trainer.py:68 train_step (train step 1 B3), "
    "which rank 8 [pp2 dp0 tp0] does; </script><b>&amp;"
)


def facts_of(job: Job, **more: Any) -> ReportFacts:
    facts = ReportFacts("tiny.yaml", job, num_nodes=2, gpus_per_node=8, device_kind="cuda", num_actions_run=8, seconds=1.5)
    certificate = {"resolved config": "0123456789abcdef", "date": "2026-11-26"}
    return replace(facts, certificate=certificate, proved=("28 calls match",), **more)


def rehearsed_job(case: Case, microbatches: Microbatches) -> Job:
    """Every rank of it runs."""
    config, world_size = case.config(), case.world_size
    made = [rehearse(config, rank=rank, world_size=world_size, microbatches=microbatches) for rank in range(world_size)]
    shape = mesh_shape(config, world_size)
    return Job(shape, [one.log for one in made], range(world_size), [one.groups for one in made], num_run=world_size)


def skip_a_forward(steps: list[list[Step]]) -> None:
    steps[2].remove(Forward(5))


@pytest.mark.parametrize(("schedule", "num_chunks"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 2)])
def test_recorded_actions_give_the_timeline_of_the_schedule(schedule: str, num_chunks: int) -> None:
    stages = read_stages(made_job(SMALL, 8, schedule=schedule, num_chunks=num_chunks))
    assert stages.step == 2
    assert stages.idle_share == idle_of(schedule, 4, 8, num_chunks=num_chunks)  # a quotient of the same integers
    assert [len(stage.steps) for stage in stages.stages] == [16 * num_chunks] * 4
    assert all(stage.stuck_at is None for stage in stages.stages)


@pytest.mark.parametrize("microbatches", ["all", "two of each phase"])
@pytest.mark.parametrize(
    "case", [Case(pp=2, num_microbatches=6), Case(pp=2, tp=2, schedule=("interleaved", 2), num_microbatches=4)], ids=str
)
def test_a_rehearsal_gives_the_timeline_of_its_schedule(case: Case, microbatches: Microbatches) -> None:
    job = rehearsed_job(case, microbatches)
    stages, config = read_stages(job), case.config()
    assert all(stage.stuck_at is None for stage in stages.stages)
    parallel = config.parallel
    assert stages.idle_share == idle_of(parallel.schedule, case.pp, case.num_microbatches, num_chunks=parallel.num_chunks)
    assert page_data(facts_of(job))["schedule"]["idle"] == stages.idle_share


def test_the_timeline_ends_where_an_input_is_never_made() -> None:
    stages = read_stages(made_job(SMALL, 8, change=skip_a_forward)).stages
    assert stages[3].stuck_at == Forward(5)
    assert max(step.action.microbatch for step in stages[3].steps if step.end is not None) == 4
    assert stages[0].steps[0].start == 0


def test_volumes_follow_their_definitions() -> None:
    x = {"num_elements": 1000, "dtype": "bfloat16"}
    expected = {"all_reduce": 3000, "reduce_scatter": 1500, "all_gather": 6000, "send": 2000, "receive": 0}
    for operation, sent in expected.items():
        call = Call(operation, "tp", **x)  # type: ignore[arg-type]
        assert handed_bytes(call) == 2000
        assert sent_bytes(call, 4) == sent, operation
    assert sent_bytes(Call("barrier", "tp"), 4) == handed_bytes(Call("barrier", "tp")) == 0


def test_what_is_sent_by_place_adds_up_to_what_ranks_send() -> None:
    job = made_job(SMALL, 8)
    data = page_data(facts_of(job))["communication"]
    total = sum(use["total"] for use in data["uses"])
    assert total == sum(within + across for _, within, across in data["reach"])
    for matrix in data["matrices"]:
        assert total == sum(sum(flat[2::3]) for flat in matrix["cells"].values()), matrix["level"]
    # Each of 4 pipelines sends 8 activations over 3 edges, and as many gradients back; ranks 0 to 7 are stages 0 and 1.
    (pipeline,) = (entry for entry in data["reach"] if entry[0] == "pp")
    assert pipeline[1:] == [4 * 2 * 16 * 2 * ACTIVATION, 4 * 16 * 2 * ACTIVATION]
    steps = traffic_of(job).of_rank(0, "train step 1").uses, traffic_of(job).of_rank(0, "train step 2").uses
    assert steps[0] == steps[1]


def test_a_tensor_group_that_leaves_its_node_is_a_warning() -> None:
    job = made_job(MeshShape(pp=2, tp=4), 2)
    assert page_data(facts_of(job))["warnings"] == []
    (warning,) = page_data(replace(facts_of(job), gpus_per_node=2))["warnings"]
    assert "parallel.tensor=4" in warning and "spans 2 nodes" in warning


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace_has_every_action_in_order(tmp_path: Path, name: str) -> None:
    job = made_job(SMALL, 8)
    number = write_trace(tmp_path / name, job)
    raw = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(raw) if name.endswith("gz") else raw)["traceEvents"]
    assert len(events) == number
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["ts"] for event in slices] == sorted(event["ts"] for event in slices)
    for stage in read_stages(job).stages:
        mine = [event for event in slices if (event["pid"], event["tid"]) == (stage.stage, 0)]
        expected = [(str(step.action), (step.start or 0) * UNIT, (step.end or 0) * UNIT) for step in stage.steps]
        assert [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in mine] == expected
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        f"stage {stage}, {job.name(4 * stage)}" for stage in range(4)
    }


def test_slices_of_a_thread_lie_beside_or_inside_each_other() -> None:
    open_until: dict[tuple[int, int], list[int]] = {}
    for event in trace_events(made_job(SMALL, 8, schedule="interleaved", num_chunks=2)):
        if event["ph"] != "X":
            continue
        ends = open_until.setdefault((event["pid"], event["tid"]), [])
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        assert not ends or event["ts"] + event["dur"] <= ends[-1], event
        ends.append(event["ts"] + event["dur"])


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        pytest.skip("no browser: install chromium, or run tests/install_tools.sh as root")
    with browser(executable) as opened:
        yield opened


def opened(chrome: Browser, tmp_path: Path, facts: ReportFacts, *, is_dark: bool = False) -> Browser:
    write_report(tmp_path / "report.html", facts)
    chrome.open(tmp_path / "report.html", is_dark=is_dark)
    return chrome


def texts_of(chrome: Browser, selector: str) -> list[str]:
    return list(chrome.evaluate(f"[...document.querySelectorAll('{selector}')].map(node => node.textContent)"))


def point_at(chrome: Browser, *, stage: int, share: float) -> str:
    """Move the mouse to a place of a stage's row, `share` of the way from left to right; what the page then says."""
    where = chrome.evaluate(
        f"""(() => {{ const row = document.querySelector('#stages [data-stage="{stage}"]'); row.scrollIntoView({{block: 'center'}});
        const canvas = document.querySelector('.stack canvas').getBoundingClientRect(), box = row.getBoundingClientRect();
        return [canvas.left + {share} * canvas.width, box.top + box.height / 2]; }})()"""
    )
    chrome.move_mouse(*where)
    return str(chrome.evaluate("document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText"))


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_the_page_of_a_sound_job_opens_in_a_browser(chrome: Browser, tmp_path: Path, is_dark: bool) -> None:
    page = opened(chrome, tmp_path, facts_of(made_job(SMALL, 8)), is_dark=is_dark)
    assert page.evaluate("document.querySelector('#verdict h1').textContent") == "✓ Sound"
    text = page.evaluate("document.body.innerText")
    for part in ("4 run + 12 inferred = 16", "0123456789abcdef", "28 calls match", "reduce_scatter", *LIMITS):
        assert part in text, part
    assert texts_of(page, "#stages li") == [f"stage {stage}" for stage in range(4)]
    assert page.evaluate("document.querySelector('#problems')") is None
    # 33 units: the first of stage 0 is a forward that every group takes part in; the last of stage 3 is idle time.
    said = point_at(page, stage=0, share=0.5 / 33)
    assert said.startswith("stage 0: forward of microbatch 0\n") and "2 all_gather on tp" in said
    assert f"then sends {in_words(2 * ACTIVATION)} to stage 1" in said and said.endswith("\nrun")
    assert "stage 3: forward of microbatch 1\n" in point_at(page, stage=3, share=6.5 / 33)
    assert point_at(page, stage=3, share=32.5 / 33).startswith("stage 3: idle\nunits 27 to 33")
    middle = point_at(page, stage=1, share=0.5)
    page.evaluate("document.querySelector('button[aria-label=\"zoom in\"]').click()")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert point_at(page, stage=1, share=0.5) == middle
    assert point_at(page, stage=3, share=0.99).startswith("stage 3: backward of microbatch 7")  # 60 % of 33 units: 6.6 to 26.4
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("file://")] == []


def test_the_page_of_a_faulty_job_says_what_diverges_and_what_to_change(chrome: Browser, tmp_path: Path) -> None:
    problems = (Finding("collective", TEXT, (9,), (8,)), Finding("hang", "all wait", tuple(range(10))))
    page = opened(chrome, tmp_path, facts_of(made_job(SMALL, 8, change=skip_a_forward), problems=problems))
    assert page.evaluate("document.title") == "2 problems: tiny.yaml"
    assert page.evaluate("document.querySelector('#verdict h1').textContent") == "✗ 2 problems"
    first = page.evaluate("document.querySelector('.problem').innerText")
    for part in (TEXT, ADVICE["collective"], "rank 9 [pp2 dp0 tp1]", "rank 8 [pp2 dp0 tp0]", "first to diverge"):
        assert part in first, part
    assert "4 more" in page.evaluate("document.querySelectorAll('.problem')[1].innerText")
    assert texts_of(page, "#stages .culprit") == ["stage 2"]
    assert texts_of(page, "#mark") == ["▼ the first problem is in B3 of stage 2"]
    assert "Training step 1 " in page.evaluate("document.querySelector('#schedule').innerText")
    assert point_at(page, stage=3, share=0.99).startswith("stage 3: waits for ever before F5")
    assert page.complaints() == []


def test_a_job_without_a_training_step_has_a_page(chrome: Browser, tmp_path: Path) -> None:
    job = made_job(MeshShape(dp=2), 1)
    for log in job.logs:
        log.spans[:] = [span for span in log.spans if span.moment.phase == "build"]  # type: ignore[index]
    page = opened(chrome, tmp_path, facts_of(job))
    assert "No training step was recorded" in page.evaluate("document.body.innerText")
    assert page.complaints() == []


@pytest.mark.slow
def test_a_large_job_has_a_small_page_that_answers(chrome: Browser, tmp_path: Path) -> None:
    facts = replace(facts_of(made_job(MeshShape(pp=64, dp=6, tp=8), 512)), num_nodes=384)
    page = opened(chrome, tmp_path, facts)
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert page.evaluate("document.querySelectorAll('#stages li').length") == 64
    assert "stage 40: " in point_at(page, stage=40, share=0.5)
    assert page.complaints() == []
    write_trace(tmp_path / "trace.json", facts.job)
    assert (tmp_path / "trace.json").stat().st_size < 50e6
