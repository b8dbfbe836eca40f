"""One case of the parity check: a layout on real gloo ranks against the plain model in one process, float64.

The machinery is `megatronish.verify`'s; the reference uses nothing of `parallel/`, `pipeline/` or `optim/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatronish.config import Config
from megatronish.verify.compare import differences
from megatronish.verify.layout_run import RankResult, run_layout
from megatronish.verify.reference import Reference, train_reference
from tests.ranks import ranks

NUM_STEPS = 2
DIMENSIONS = {"hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "mlp_size": 48}

MAX_POSITIONS = 20
"""More than the 16 of a sample: some rows of the table get no gradient."""


@dataclass(frozen=True)
class Case:
    """A layout, and what else may change the way a step is computed."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero_stage: int = 1
    sequence: bool = False
    recompute: str | tuple[str, ...] = "none"
    vocab_size: int = 101
    vocab_multiple: int = 7
    """101 is padded to 105 rows, which neither tp 2 nor tp 4 divides; the last rank's have the padding."""
    bucket_mib: float = 0.02
    """Of float64: about 2,600 elements, so that there are many buckets and several parameters share some."""
    num_microbatches: int = 3
    schedule: tuple[str, int] = ("1f1b", 1)
    """(parallel.schedule, parallel.num_chunks)"""
    stage_layers: tuple[int, ...] | None = None
    dtype: str = "float64"
    architecture: str = "llama"
    dropout: float = 0.0
    documents: bool = False
    num_layers: int = 4
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    tie_embeddings: bool = False
    more: tuple[tuple[str, Any], ...] = ()
    """Other keys of the model."""
    loss_chunks: int = 1
    """Of the layout: the one-process case has 1."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        flags = f"-zero{self.zero_stage}" + ("-sequence" if self.sequence else "")
        flags += ("" if self.recompute == "none" else f"-{self.recompute}") + (f"-dropout{self.dropout}" if self.dropout else "")
        flags += "-documents" if self.documents else ""
        flags += "" if self.schedule[0] == "1f1b" else f"-{self.schedule[0]}{self.schedule[1]}"
        flags += "" if self.stage_layers is None else f"-layers{'.'.join(map(str, self.stage_layers))}"
        model = "" if self.architecture == "llama" else f"{self.architecture}-"
        flags += "-tied" if self.tie_embeddings else ""
        flags += "" if self.loss_chunks == 1 else f"-lc{self.loss_chunks}"
        return f"{model}{self.layout}{flags}-v{self.vocab_size}-b{self.bucket_mib}-m{self.num_microbatches}"

    @property
    def layout(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}"

    @property
    def plain(self) -> Case:
        """The one-process case with the same global batch and model."""
        return Case(
            num_microbatches=self.num_microbatches * self.dp,
            vocab_size=self.vocab_size,
            vocab_multiple=self.vocab_multiple,
            dtype=self.dtype,
            architecture=self.architecture,
            dropout=self.dropout,
            documents=self.documents,
            num_layers=self.num_layers,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            tie_embeddings=self.tie_embeddings,
            more=self.more,
        )

    def config(self) -> Config:
        """The run of this case; the global batch is the same for every layout with the same product of dp and microbatches."""
        return Config.model_validate(
            {
                "name": "parity",
                "model": {
                    "architecture": self.architecture,
                    "vocab_size": self.vocab_size,
                    "vocab_multiple": self.vocab_multiple,
                    "dropout": self.dropout,
                    "num_layers": self.num_layers,
                    "tie_embeddings": self.tie_embeddings,
                    "max_positions": MAX_POSITIONS if self.architecture == "gpt2" else None,
                    **DIMENSIONS,
                    **dict(self.more),
                },
                "parallel": {
                    "tensor": self.tp,
                    "pipeline": self.pp,
                    "data": self.dp,
                    "sequence": self.sequence,
                    "zero_stage": self.zero_stage,
                    "recompute": self.recompute,
                    "schedule": self.schedule[0],
                    "num_chunks": self.schedule[1],
                    "stage_layers": self.stage_layers,
                },
                "data": {"train": "none", "sequence_length": 16, "separate_documents": self.documents},
                # A clip norm well below the gradient's: the norm decides the update. A large lr makes a wrong update show.
                "optim": {"lr": 0.01, "min_lr": 0.005, "clip_norm": 0.1, "bucket_mib": self.bucket_mib, "warmup_steps": 0},
                "train": {
                    "steps": NUM_STEPS,
                    "global_batch_size": 2 * self.num_microbatches * self.dp,
                    "micro_batch_size": 2,
                    "dtype": self.dtype,
                    "seed": 7,
                    "label_smoothing": self.label_smoothing,
                    "z_loss": self.z_loss,
                    "loss_chunks": self.loss_chunks,
                },
            }
        )


def run_rank(rank: int, case: Case) -> RankResult:
    """Train NUM_STEPS steps on this rank of the case's layout."""
    return run_layout(rank, case.config())


@cache
def reference(case: Case) -> Reference:
    """Train the plain model in this process. The layout of the case is not looked at, but for the size of the global batch."""
    return train_reference(case.config())


def check(case: Case, tolerance: float, *, run: Callable[[int, Case], RankResult] = run_rank) -> float:
    """Assert that every gradient, the norms, losses and every updated parameter equal the plain model's; the message names what
    does not. `run` is the function that each rank runs. Returns the largest relative error."""
    largest = 0.0
    for difference in differences(ranks(case.world_size).run(run, case), reference(case.plain)):
        assert difference.error < tolerance, f"{difference.what} is off by {difference.error:.1e}"
        largest = max(largest, difference.error)
    return largest
