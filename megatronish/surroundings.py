"""What a run reads and touches beside its ranks: data, tokenizer, folder, disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict

from torch import Tensor

from megatronish.checkpoint.storage import FileStorage, Storage
from megatronish.config import Config
from megatronish.data.gpt_dataset import TokenDataset, TrainingDataset
from megatronish.data.open import open_sets
from megatronish.data.tokenizer import load_tokenizer
from megatronish.errors import Problems
from megatronish.life import Life
from megatronish.observe.start_clock import StartClock
from megatronish.observe.wandb_run import require_wandb
from megatronish.run_folder import RunFolder
from megatronish.text_measure import TextMeasure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatronish.assemble import Assembly


@dataclass(frozen=True)
class Datasets:
    """What a run reads."""

    train: TrainingDataset
    validation: TokenDataset | None
    measure: TextMeasure | None
    """Counts the bytes of the validation text, where a tokenizer is given."""
    tokenizer: Tokenizer | None = None
    """Where samples are to be drawn."""


def open_datasets(config: Config) -> Datasets:
    """Open both sets; UserError, a line a problem, if they do not fit the config or a package that it needs is missing."""
    require_wandb(config.observe.wandb_project)
    data, problems = config.data, Problems()
    num_samples = config.batch_schedule.consumed_after(config.num_steps)
    cache = RunFolder.of(config).path / "order"
    train, validation = open_sets(config, num_samples=num_samples, cache=cache, problems=problems)
    measure = problems.attempt("data.tokenizer", partial(_open_measure, config))
    problems.raise_all()
    assert train is not None
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer is not None and config.observe.sample_interval else None
    return Datasets(train, validation, measure, tokenizer)


def _open_measure(config: Config) -> TextMeasure | None:
    """UserError unless the tokenizer is the one that made the sets, and the model knows all its tokens."""
    data = config.data
    if data.tokenizer is None:
        return None
    measure = TextMeasure.load(data.tokenizer, vocab_size=config.model.vocab_size)
    sources = [data.train] if isinstance(data.train, str) else [source.prefix for source in data.train]
    for prefix in (*sources, *([data.validation] if data.validation else [])):
        measure.check_made(prefix)
    return measure


@dataclass(frozen=True)
class Surroundings:
    """What a run touches beside its ranks. A rehearsal gives a disk that keeps nothing, and no thread."""

    folder: RunFolder
    log: logging.Logger
    token: str
    """Names this launch of the run."""
    storage: Storage = field(default_factory=FileStorage)
    prefetch: Literal["thread", "none"] = "thread"
    device_copy: Callable[[Tensor], Tensor] | None = None
    """None: to the mesh's device."""
    ranks_per_host: int = 1
    clock: StartClock = field(default_factory=StartClock)
    adapt: Callable[[Assembly], None] | None = None
    """What a rehearsal changes in what was built."""

    told: Callable[[], bool] = lambda: False
    """Whether this process was asked, by a signal, to save and end."""
    life: Life | None = None
    """Of the rank that writes."""
    is_requeued: bool = False
    """A launcher started this life by itself: nobody has taken back a request made before."""

    @property
    def keeps_files(self) -> bool:
        """False in a rehearsal."""
        return isinstance(self.storage, FileStorage)


class Share(TypedDict):
    """Which samples of each global batch are this rank's, how they are read, and how they get to its device."""

    data_rank: int
    data_size: int
    separate_documents: bool
    device_copy: Callable[[Tensor], Tensor]
