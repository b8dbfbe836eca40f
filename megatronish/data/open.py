"""A config's sets, opened: which are mixed, split and in which order."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatronish.config import Config, DataConfig
from megatronish.data.blend import BlendedDataset
from megatronish.data.gpt_dataset import GPTDataset, Split, TokenDataset, TrainingDataset
from megatronish.data.megatron_order import MegatronBlend, MegatronOrder


def open_sets(config: Config, *, num_samples: int, cache: Path | None) -> tuple[TrainingDataset, TokenDataset | None]:
    """(training set, held-out set). O(1) reads, but for `data.order: megatron`, whose index for `num_samples` samples is built and
    kept in `cache`. UserError if the files do not fit the config."""
    data = config.data
    split: Split = "train" if data.validation_fraction > 0 else "all"
    open_set = partial(GPTDataset, sequence_length=data.sequence_length, vocab_size=config.model.vocab_size)
    open_part = partial(open_set, validation_fraction=data.validation_fraction)
    validation: TokenDataset | None = None
    if data.validation is not None:
        validation = open_set(data.validation)
    if isinstance(data.train, str):
        if data.validation_fraction > 0:
            validation = open_part(data.train, split="validation")
        dataset = open_part(data.train, split=split)
        if data.order == "megatron":
            return MegatronOrder(dataset, num_samples=num_samples, seed=config.train.seed, cache=cache), validation
        return dataset, validation
    sources = [open_set(source.prefix) for source in data.train]
    weights = [source.weight for source in data.train]
    if data.order == "megatron":
        return MegatronBlend(sources, weights, num_samples=num_samples, seed=config.train.seed, cache=cache), validation
    return BlendedDataset(sources, weights), validation


def describe_train(data: DataConfig) -> str:
    """`data.train` and its order, in one line."""
    sources = data.train if isinstance(data.train, str) else ", ".join(f"{s.prefix} x {s.weight:g}" for s in data.train)
    order = "" if data.order == "permutation" else f" in data.order={data.order} (which depends on the length of the run)"
    return f"data.train={sources}{order}"
