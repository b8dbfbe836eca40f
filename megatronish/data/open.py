"""A config's sets, opened: which are mixed, split and in which order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatronish.config import Config, DataConfig
from megatronish.data.blend import BlendedDataset
from megatronish.data.gpt_dataset import GPTDataset, Split, TokenDataset, TrainingDataset
from megatronish.data.megatron_order import MegatronBlend, MegatronOrder
from megatronish.errors import Problems


def open_sets(
    config: Config, *, num_samples: int, cache: Path | None, problems: Problems
) -> tuple[TrainingDataset | None, TokenDataset | None]:
    """(training set, held-out set). O(1) reads, but for `data.order: megatron`, whose index for `num_samples` samples is built and
    kept in `cache`. What does not fit the config goes to `problems`, and is None here."""
    data = config.data
    open_set = partial(GPTDataset, sequence_length=data.sequence_length, vocab_size=config.model.vocab_size)
    validation: TokenDataset | None = None
    if data.validation is not None:
        validation = problems.attempt("data.validation", partial(open_set, data.validation))
    if not isinstance(data.train, str):
        return _open_blend(config, open_set, num_samples=num_samples, cache=cache, problems=problems), validation
    split: Split = "train" if data.validation_fraction > 0 else "all"
    open_part = partial(open_set, data.train, validation_fraction=data.validation_fraction)
    dataset = problems.attempt("data.train", partial(open_part, split=split))
    if dataset is not None and data.validation_fraction > 0:
        validation = problems.attempt("data.validation_fraction", partial(open_part, split="validation"))
    if dataset is not None and data.order == "megatron":
        return MegatronOrder(dataset, num_samples=num_samples, seed=config.train.seed, cache=cache), validation
    return dataset, validation


def _open_blend(
    config: Config, open_set: Callable[[str], GPTDataset], *, num_samples: int, cache: Path | None, problems: Problems
) -> TrainingDataset | None:
    assert not isinstance(config.data.train, str)
    parts = [
        problems.attempt(f"data.train.{number}.prefix", partial(open_set, source.prefix))
        for number, source in enumerate(config.data.train)
    ]
    sources = [part for part in parts if part is not None]
    if len(sources) < len(parts):
        return None
    weights = [source.weight for source in config.data.train]
    if config.data.order == "megatron":
        return MegatronBlend(sources, weights, num_samples=num_samples, seed=config.train.seed, cache=cache)
    return problems.attempt("data.train", lambda: BlendedDataset(sources, weights))


def describe_train(data: DataConfig) -> str:
    """`data.train` and its order, in one line."""
    sources = data.train if isinstance(data.train, str) else ", ".join(f"{s.prefix} x {s.weight:g}" for s in data.train)
    order = "" if data.order == "permutation" else f" in data.order={data.order} (which depends on the length of the run)"
    return f"data.train={sources}{order}"
