"""1,024 ranks in full, every microbatch, against what a few of them stand for: `make full-width`, some minutes on two idle cores.

Its last result is in megatronish/bench/results/.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from megatronish.bench.preflight import measure
from megatronish.config_loader import load_config
from megatronish.json_file import write_json

# A layer a stage, and three microbatches a stage: every phase of the schedule, on every rank of the job.
SMALLER = ["model.num_layers=8", "train.global_batch_size=384"]


@pytest.mark.full_width
@pytest.mark.timeout(7200)
def test_a_thousand_ranks_do_what_a_few_stand_for(root: Path) -> None:
    config = load_config(root / "configs" / "gpt3_175b.yaml", SMALLER)
    result = measure(config, 1024, in_full=True)
    assert result["sound"]
    assert result["ranks_run"] + result["ranks_inferred"] == result["in_full"]["ranks_run"] == 1024
    assert result["in_full"]["equal"]
    results = root / "megatronish" / "bench" / "results"
    write_json(results / f"preflight-1024-ranks-{datetime.date.today().isoformat()}.json", result)
