"""Text -> token ids: the tokenizers library, or our own byte-level BPE where it can be proven to give the same.

`NativeEncoder` takes its merges and vocabulary from the tokenizer's own JSON and the classes of characters from the library's
regular expressions, so both are those of the installed version. It stands for tokenizers of GPT-2's kind only (`why_not_native`
says what is in the way of others). While it runs, `CheckedEncoder` compares it with the library on samples of the very text.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatronish import native

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LAST_PLANE = 0x40000  # no characters are, or are planned, from here to the tags and private ones, which are of no class
_CHECK_FIRST, _CHECK_EVERY, _CHECK_CHARACTERS = 16, 256, 4096

Encoded = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Ids of all texts, end to end, and how many are of each."""


class Encoder(Protocol):
    """Encodes texts one by one, without special tokens."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids and counts."""


class EncodersDisagree(Exception):
    """The native encoder gave other ids than the library; the text is named."""


class LibraryEncoder:
    """The tokenizers library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids and counts."""
        ids = [np.array(found.ids, np.int32) for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        counts = np.array([len(of_text) for of_text in ids], np.int64)
        return np.concatenate(ids) if ids else np.empty(0, np.int32), counts


class NativeEncoder:
    """GPT-2's pre-tokenizer and BPE in C++, with a table of words seen. Not for several threads at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert why_not_native(tokenizer) is None
        assert native.cpu is not None
        model = json.loads(tokenizer.to_str())["model"]
        vocabulary = model["vocab"]
        byte_ids = np.array([vocabulary[character] for character in _byte_characters()], np.int32)
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        merges = np.array([(vocabulary[a], vocabulary[b], vocabulary[a + b]) for a, b in pairs], np.int32).reshape(-1, 3)
        classes = character_classes()
        self._encoder = native.cpu.BpeEncoder(classes.ctypes.data, byte_ids.ctypes.data, merges.ctypes.data, len(merges))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids and counts."""
        parts = [text.encode() for text in texts]
        data = b"".join(parts)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        text, out = np.frombuffer(data, np.uint8), np.empty(len(data), np.int32)
        counts = np.empty(len(parts), np.int64)
        total = self._encoder.encode(text.ctypes.data, ends.ctypes.data, len(parts), out.ctypes.data, counts.ctypes.data)
        return out[:total], counts


class CheckedEncoder:
    """The native encoder, compared with the library on its first texts and on every 256th after them (their beginnings).

    Raises EncodersDisagree at the first difference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._native, self._library = NativeEncoder(tokenizer), LibraryEncoder(tokenizer)
        self._seen = 0

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids and counts."""
        numbers = range(self._seen, self._seen + len(texts))
        self._seen += len(texts)
        self.compare([text[:_CHECK_CHARACTERS] for n, text in zip(numbers, texts, strict=True) if _is_checked(n)])
        return self._native.encode(texts)

    def compare(self, texts: Sequence[str]) -> None:
        """Raise EncodersDisagree unless both encoders give the same ids."""
        ours, theirs = self._native.encode(texts), self._library.encode(texts)
        if not (np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])):
            bad = next(
                text for text in texts if not np.array_equal(self._native.encode([text])[0], self._library.encode([text])[0])
            )
            raise EncodersDisagree(f"the native encoder gives other ids than the tokenizers library for the text {bad[:80]!r}")


def make_encoder(tokenizer: Tokenizer) -> Encoder:
    """The fastest encoder for a tokenizer."""
    return LibraryEncoder(tokenizer) if why_not_native(tokenizer) else CheckedEncoder(tokenizer)


def why_not_native(tokenizer: Tokenizer) -> str | None:
    """What keeps the native encoder from standing for `tokenizer`; None if nothing does."""
    if getattr(native.cpu, "BpeEncoder", None) is None:
        return "the native module is not built"
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    model = state["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return f"its model is {model.get('type')}, not BPE"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(option):
            return f"its BPE has {option}={model[option]}"
    if not set(_byte_characters()) <= model["vocab"].keys():
        return "its vocabulary lacks single bytes"
    if state.get("normalizer") is not None:
        return "it has a normalizer"
    if not _splits_as_gpt2(state.get("pre_tokenizer")):
        return "its pre-tokenizer is not GPT-2's"
    plain = [token["content"] for token in state["added_tokens"] if not token["special"]]
    if plain or not tokenizer.encode_special_tokens:
        return f"it finds added tokens in text ({', '.join(plain[:3]) or 'special ones'})"
    return None


@functools.cache
def character_classes() -> NDArray[np.uint8]:
    """uint8 [0x110000]: 1 letter, 2 number, 3 white space, 0 anything else, as the library's regular expressions have it.

    Asked for the planes that hold characters (a fifth of a second); a test asks for all."""
    characters = np.array([*range(0xD800), *range(0xE000, _LAST_PLANE)])
    classes = np.zeros(sys.maxunicode + 1, np.uint8)
    patterns = (r"\p{L}+", r"\p{N}+", r"\s+")
    stretches = _matches("|".join(patterns), "".join(map(chr, characters)))
    # Each stretch is of one class: that of its first character, each of which stands alone here, between two others.
    firsts = "".join(f"!{chr(characters[start])}" for start, _ in stretches)
    for value, pattern in enumerate(patterns, 1):
        for place, _ in _matches(pattern, firsts):
            start, stop = stretches[place // 2]
            classes[characters[start:stop]] = value
    return classes


def _matches(pattern: str, text: str) -> list[tuple[int, int]]:
    """[start, stop) of the library's matches."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)  # removes what does not match
    return [bounds for _, bounds in split.pre_tokenize_str(text)]


def _is_checked(number: int) -> bool:
    return number < _CHECK_FIRST or number % _CHECK_EVERY == 0


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _splits_as_gpt2(state: dict[str, Any] | None) -> bool:
    if state is None:
        return False
    if state["type"] == "ByteLevel":
        return not state["add_prefix_space"] and bool(state.get("use_regex", True))
    return False
