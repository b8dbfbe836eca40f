"""The native encoder gives the ids of the tokenizers library: for any text, any vocabulary of its kind, or it is not used."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatronish import native
from megatronish.data import encoders as module
from megatronish.data.corpus import standard_library
from megatronish.data.encoders import (
    CheckedEncoder,
    EncodersDisagree,
    LibraryEncoder,
    NativeEncoder,
    character_classes,
    make_encoder,
    why_not_native,
)
from megatronish.data.tokenizer import load_tokenizer, train_tokenizer

needs_native = pytest.mark.skipif(getattr(native.cpu, "BpeEncoder", None) is None, reason="native module not built")


def same(ours, theirs) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """3,000 tokens learned from Python sources and from text in other alphabets."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text("naïve 東京 東京都 привет мир 😀😀 ١٢٣ ½ Ⅷ can't we'll  I'd\u00a0\u3000x\n\n\t" * 50)
    train_tokenizer([folder / "a.txt", *standard_library().train[:60]], vocab_size=3000, out=folder / "tokenizer.json")
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def pair(tokenizer):
    return NativeEncoder(tokenizer), LibraryEncoder(tokenizer)


# White space and marks at which the expression turns, letters of several scripts, numbers that are not digits, unassigned ones.
TURNS = st.sampled_from(
    "'srtvemdlaS  \n\t\r\x0b\x0c\x1c\x85\xa0\u2028\u3000\u200b\ufeff9²½Ⅷ٣éß東日😀\u0301\u0378\U000e0001\U0010ffff_-.\x00"
)


@needs_native
@settings(max_examples=1500, deadline=None)
@given(text=st.text(TURNS, max_size=40) | st.text(max_size=60))
@example(text="")
@example(text="'''ss 's'S 'll're'v'l 've' d")
def test_any_text_gives_the_ids_of_the_library(pair, text):
    assert same(pair[0].encode([text, text + " ", text]), pair[1].encode([text, text + " ", text]))


@needs_native
def test_long_words_give_the_ids_of_the_library(pair):
    generator = random.Random(0)
    words = ["a" * 1000, "=" * 3000, " " * 500 + "x", "ab" * 77, "\n" * 49, "東京" * 40, "é" * 24]
    words += ["".join(generator.choices("etaoin_s", k=n)) for n in (23, 24, 25, 47, 48, 49, 50, 400)]
    texts = [*words, *(f" {word}" for word in words), " ".join(words), "".join(words)]
    assert same(pair[0].encode(texts), pair[1].encode(texts))


@needs_native
def test_the_demos_corpus_gives_the_ids_of_the_library(pair):
    files = standard_library().train
    texts = [path.read_text() for path in files[:: max(1, len(files) // 100)]]
    assert same(pair[0].encode(texts), pair[1].encode(texts))


@needs_native
def test_every_character_gives_the_ids_of_the_library(pair):
    points = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]
    generator = random.Random(1)
    for order in ("sorted", "shuffled"):
        if order == "shuffled":
            generator.shuffle(points)
        text = "".join(map(chr, points))
        texts = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        assert same(pair[0].encode(texts), pair[1].encode(texts)), order


def test_the_classes_of_characters_are_those_of_the_librarys_expressions():
    classes = character_classes()
    points = np.array([*range(0xD800), *range(0xE000, sys.maxunicode + 1)])
    for value, pattern in ((1, r"\p{L}+"), (2, r"\p{N}+"), (3, r"\s+")):
        found = np.zeros(sys.maxunicode + 1, bool)
        for start, stop in module._matches(pattern, "".join(map(chr, points))):
            found[points[start:stop]] = True
        np.testing.assert_array_equal(classes == value, found)


@needs_native
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_list_of_merges_gives_the_ids_of_the_library(tmp_path_factory, seed):
    """Merges in any order of priority, such as no training gives: results before their parts, several ways to one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    generator = random.Random(seed)
    characters = module._byte_characters()
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokens, merges = list("abcĠ"), []
    for _ in range(30):
        merge = (generator.choice(tokens), generator.choice(tokens))
        if merge not in merges and len("".join(merge)) < 9:
            merges.append(merge)
            tokens.append("".join(merge))
            vocabulary.setdefault("".join(merge), len(vocabulary))
    generator.shuffle(merges)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.encode_special_tokens = True
    texts = ["".join(generator.choices("abc ", k=generator.randrange(90))) for _ in range(30)]
    assert same(NativeEncoder(made).encode(texts), LibraryEncoder(made).encode(texts))


def changed(tokenizer, **changes):
    """The tokenizer with parts of its JSON replaced."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    model = changes.pop("model", {})
    state.update(changes)
    state["model"].update(model)
    made = Tokenizer.from_str(json.dumps(state))
    made.encode_special_tokens = True
    return made


PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
OTHER_KINDS = {
    "normalizer": ({"normalizer": {"type": "NFC"}}, "normalizer"),
    "prefix space": ({"pre_tokenizer": PREFIXED}, "pre-tokenizer"),
    "no regex": ({"pre_tokenizer": {**PREFIXED, "add_prefix_space": False, "use_regex": False}}, "pre-tokenizer"),
    "white space": ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer"),
    "dropout": ({"model": {"dropout": 0.1}}, "dropout"),
    "whole words": ({"model": {"ignore_merges": True}}, "ignore_merges"),
    "no bytes": ({"model": {"vocab": {"a": 0, "<|endoftext|>": 1}, "merges": []}}, "single bytes"),
}


@needs_native
@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_of_tokenizers_go_to_the_library(tokenizer, name):
    changes, word = OTHER_KINDS[name]
    made = changed(tokenizer, **changes)
    assert word in str(why_not_native(made))
    assert isinstance(make_encoder(made), LibraryEncoder)


@needs_native
def test_tokens_added_to_the_text_go_to_the_library(tokenizer):
    made = changed(tokenizer)
    made.add_tokens(["def f"])
    assert "def f" in str(why_not_native(made))
    made = changed(tokenizer)
    made.encode_special_tokens = False
    assert "special" in str(why_not_native(made))


@needs_native
def test_the_native_encoder_is_compared_with_the_library_on_the_text_itself(tokenizer, monkeypatch):
    encoder = make_encoder(tokenizer)
    assert isinstance(encoder, CheckedEncoder)
    wrong = character_classes().copy()
    wrong[ord("e")] = 0
    monkeypatch.setattr(module, "character_classes", lambda: wrong)
    faulty = CheckedEncoder(tokenizer)
    faulty.encode(["plain"] * 300)
    texts = ["plain"] * 400
    texts[512 - 300] = "the text"
    with pytest.raises(EncodersDisagree, match="the text"):
        faulty.encode(texts)
