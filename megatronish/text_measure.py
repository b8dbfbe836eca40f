"""Bits per byte: a loss that does not depend on the tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish.data.gpt_dataset import GPTDataset, TokenDataset
from megatronish.data.tokenizer import byte_lengths, load_tokenizer, set_vocabulary, split_bytes, vocabulary_fingerprint
from megatronish.errors import UserError


@dataclass
class TextMeasure:
    """Counts the bytes of text behind the targets of a set."""

    lengths: NDArray[np.int64]
    fingerprint: int
    """Of the tokenizer's file."""
    file: str = ""
    vocabulary: int = 0
    """64 bits of which id each token has."""
    _bytes: dict[tuple[int, int], int] = field(default_factory=dict)

    @staticmethod
    def load(tokenizer_file: str, *, vocab_size: int) -> TextMeasure:
        """From a tokenizer.json; UserError if the model has too small a vocabulary for it."""
        tokenizer = load_tokenizer(tokenizer_file)
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if size > vocab_size:
            raise UserError(f"model.vocab_size={vocab_size} is smaller than the {size} tokens of data.tokenizer={tokenizer_file}")
        fingerprint = xxhash.xxh3_64_intdigest(Path(tokenizer_file).read_bytes())
        return TextMeasure(byte_lengths(tokenizer), fingerprint, tokenizer_file, vocabulary_fingerprint(tokenizer))

    def check_made(self, prefix: str) -> None:
        """UserError if PREFIX.json says that a tokenizer with other ids made the set. Sets without that file are believed."""
        made_by = set_vocabulary(prefix)
        if made_by is not None and made_by != self.vocabulary:
            raise UserError(
                f"data.tokenizer={self.file} is not the tokenizer that made {prefix}: its vocabulary is {self.vocabulary:016x}, "
                f"that of {prefix}.json {made_by:016x}; give that tokenizer, or tokenize the text with this one"
            )

    def bits_per_byte(self, dataset: TokenDataset, loss_sum: float, num_samples: int) -> float:
        """loss_sum (nats, over the targets of the first `num_samples` samples) as bits for each byte of their text."""
        assert isinstance(dataset, GPTDataset), "synthetic tokens stand for no text"
        key = (dataset.fingerprint, num_samples)
        if key not in self._bytes:
            self._bytes[key] = split_bytes(dataset, self.lengths, num_samples=num_samples)
        return loss_sum / math.log(2.0) / self._bytes[key]
