"""A byte-level BPE tokenizer: train, load, and count the bytes behind its tokens.

Byte-level (Radford et al. 2019): every token stands for a fixed run of bytes, so the bytes behind any run of ids are a sum over a
table, and bits per byte need no text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatronish.data.documents import plan_segments, read_segment
from megatronish.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatronish.data.gpt_dataset import GPTDataset

END_OF_TEXT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>")
_MIN_VOCABULARY = 257  # every byte, and the end of a text
_COUNT_BLOCK = 1 << 20


def train_tokenizer(paths: Sequence[Path], *, vocab_size: int, out: Path) -> int:
    """Learn a BPE of at most `vocab_size` tokens from text and jsonl files and write it to `out` (a tokenizer.json).

    Returns the number of tokens it has, less than asked for when the text has too few pairs. Deterministic. Raises UserError."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _MIN_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need {_MIN_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Errors raised inside train_from_iterator arrive as other types; keep the first.
    error: list[UserError] = []
    try:
        tokenizer.train_from_iterator(_texts(paths, error), trainer)
    except Exception:
        if error:
            raise error[0] from None
        raise
    if error:
        raise error[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{out}.tmp-{os.getpid()}")
    tokenizer.save(str(temporary))
    os.replace(temporary, out)
    return int(tokenizer.get_vocab_size())


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer.json. Text that spells a special token is encoded as the text it is. Raises UserError."""
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise UserError(f"{path}: no such tokenizer; make one with `megatronish data tokenizer train`")
    try:
        tokenizer = Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({_one_line(error)})") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, *, token: str | None = None) -> int:
    """Id of the token that ends a document: `token`, else the first of the usual names that it has. Raises UserError."""
    for name in (token,) if token else (END_OF_TEXT, *_OTHER_ENDS):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    wanted = token or ", ".join((END_OF_TEXT, *_OTHER_ENDS))
    raise UserError(f"the tokenizer has no token that ends a document ({wanted}); name one with --eod, or use --no-append-eod")


def vocabulary_fingerprint(tokenizer: Tokenizer) -> int:
    """64 bits of which id each token has: sets made by two tokenizers go together only where it is the same."""
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return xxhash.xxh3_64_intdigest(json.dumps(vocabulary).encode())


def set_vocabulary(prefix: str) -> int | None:
    """The fingerprint of the vocabulary that made a set, as PREFIX.json has it; None where that file does not say."""
    try:
        return int(json.loads(Path(f"{prefix}.json").read_text())["vocabulary"], 16)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """int64 [largest id + 1]: bytes of text behind each token; 0 for special tokens.

    Raises UserError for a tokenizer that is not byte-level: its tokens stand for no fixed bytes."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    if not _is_byte_level(state.get("decoder")):
        raise UserError("bits per byte need a byte-level tokenizer (one with a ByteLevel decoder)")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, index in vocabulary.items():
        lengths[index] = len(token)  # the byte-level alphabet has one character for each byte
    for added in state["added_tokens"]:
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return lengths


def count_bytes(ids: NDArray[np.integer[Any]], lengths: NDArray[np.int64]) -> int:
    """Bytes of text behind `ids`."""
    return int(lengths[ids].sum())


def split_bytes(dataset: GPTDataset, lengths: NDArray[np.int64], *, num_samples: int | None = None) -> int:
    """Bytes behind the targets of a split's first `num_samples` samples (all when None), the denominator of bits per byte.

    Targets are all tokens of those samples but the split's first. Reads them all, in bounded memory."""
    stop = 1 + (len(dataset) if num_samples is None else min(num_samples, len(dataset))) * dataset.sequence_length
    if len(lengths) < dataset.vocab_size:
        lengths = np.concatenate((lengths, np.zeros(dataset.vocab_size - len(lengths), np.int64)))
    dataset_stream = dataset.stream
    return sum(count_bytes(dataset_stream[i : min(i + _COUNT_BLOCK, stop)], lengths) for i in range(1, stop, _COUNT_BLOCK))


def _texts(paths: Sequence[Path], error: list[UserError]) -> Iterator[str]:
    try:
        for segment in plan_segments(paths):
            yield from read_segment(segment)
    except UserError as caught:
        error.append(caught)
        raise


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(_is_byte_level(part) for part in decoder.get("decoders", []))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
