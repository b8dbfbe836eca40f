"""Generation with a cache gives what the plain model gives without one; prompts in a batch do not see each other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megatronish.batch import TokenContext
from megatronish.comm.groups import single_process_group
from megatronish.config import Config, RopeScaling
from megatronish.generate.decode import Continuation, Generator, Limits
from megatronish.generate.sampling import Sampling, next_tokens
from megatronish.models import MODELS
from megatronish.verify.reference import plain_model
from tests.parallel.parity import Case

PROMPTS = [[5, 17, 3, 88, 41, 2, 9], [64], [100, 99, 98], [5, 17, 3], [7] * 12]
LIMITS = Limits(max_tokens=20)
architectures = pytest.mark.parametrize("architecture", MODELS)
# Weights so large that attention looks at single tokens: a wrong row or position changes what comes next.
WIDE = {"init_std": 0.3}
# What a new token's rotary position has to agree in with those that are kept.
YARN = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=8)
TURNED = {"partial_rotary_factor": 0.5, "rope_layout": "interleaved", "rope_scaling": YARN}


def config_of(architecture: str) -> Config:
    config = Case(architecture=architecture, vocab_size=101, vocab_multiple=7).config()
    positions = {"gpt2": {"max_positions": 64}, "llama": TURNED}[architecture]
    return config.model_copy(update={"model": config.model.model_copy(update=WIDE | positions)})


def generator(config: Config) -> Generator:
    model = config.model
    return Generator(
        plain_model(config),
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        tp=single_process_group("tp"),
        device=torch.device("cpu"),
    )


def without_cache(
    config: Config, prompt: Sequence[int], *, number: int, sampling: Sampling, num_tokens: int = LIMITS.max_tokens
) -> list[int]:
    """The plain model over the whole text so far, once for each token."""
    model, tokens = plain_model(config).eval(), list(prompt)
    for _ in range(num_tokens):
        context = TokenContext(torch.arange(len(tokens))[:, None], torch.zeros(1, dtype=torch.int64))
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[:, None], context)[-1, :, : config.model.vocab_size]
        numbers, positions = torch.tensor([number]), torch.tensor([len(tokens)])
        tokens += next_tokens(logits, sampling=sampling, numbers_B=numbers, positions_B=positions).tolist()
    return tokens[len(prompt) :]


@architectures
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=3)], ids=str)
def test_a_batch_with_a_cache_gives_what_each_prompt_alone_gives_without_one(architecture: str, sampling: Sampling) -> None:
    config = config_of(architecture)
    texts = generator(config).run(PROMPTS, numbers=range(10, 15), sampling=sampling, limits=LIMITS)
    for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True), start=10):
        assert text.tokens == without_cache(config, prompt, number=number, sampling=sampling), prompt
        assert text.finish == "max tokens"
    assert len({tuple(text.tokens) for text in texts}) == len(PROMPTS)
    assert max(len(set(text.tokens)) for text in texts) > 3


@architectures
def test_the_same_seed_gives_the_same_text_among_any_companions(architecture: str) -> None:
    sampling, made = Sampling(seed=7), generator(config_of(architecture))
    texts = made.run(PROMPTS, numbers=range(5), sampling=sampling, limits=LIMITS)
    again = made.run([PROMPTS[3], [1, 2], PROMPTS[1]], numbers=[3, 9, 1], sampling=sampling, limits=LIMITS)
    assert (again[0], again[2]) == (texts[3], texts[1])
    assert made.run(PROMPTS, numbers=range(5), sampling=Sampling(seed=8), limits=LIMITS) != texts


def test_a_text_ends_at_the_end_token_and_others_go_on() -> None:
    made = generator(config_of("llama"))
    greedy = {"numbers": range(5), "sampling": Sampling(temperature=0)}
    whole = made.run(PROMPTS, **greedy, limits=LIMITS)
    end = whole[2].tokens[4]
    cut = made.run(PROMPTS, **greedy, limits=Limits(LIMITS.max_tokens, end_token=end))
    for before, after in zip(whole, cut, strict=True):
        if end in before.tokens:
            assert after == Continuation(before.tokens[: before.tokens.index(end)], "end of text")
        else:
            assert after == before
    assert {text.finish for text in cut} == {"end of text", "max tokens"}


def test_a_text_ends_where_the_models_positions_end() -> None:
    made = generator(config_of("llama"))
    greedy = {"numbers": range(5), "sampling": Sampling(temperature=0)}
    whole = made.run(PROMPTS, **greedy, limits=LIMITS)
    cut = made.run(PROMPTS, **greedy, limits=Limits(LIMITS.max_tokens, max_positions=13))
    for prompt, before, after in zip(PROMPTS, whole, cut, strict=True):
        room = 13 - len(prompt)
        assert after == Continuation(before.tokens[:room], "max positions" if room < LIMITS.max_tokens else "max tokens")


def test_tokens_are_told_in_order_as_they_come() -> None:
    heard: list[tuple[int, int]] = []
    texts = generator(config_of("llama")).run(
        PROMPTS[:2],
        numbers=[0, 1],
        sampling=Sampling(),
        limits=Limits(6),
        on_token=lambda place, token: heard.append((place, token)),
    )
    assert heard == [(place, texts[place].tokens[i]) for i in range(6) for place in (0, 1)]
