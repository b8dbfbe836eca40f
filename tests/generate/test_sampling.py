"""Draws: the promised distribution, and a function of seed, prompt and position alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatronish.errors import UserError
from megatronish.generate.sampling import Sampling, next_tokens, uniform

NUM_DRAWS = 40_000
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.5, 1.5, -8.0, 0.9, 1.1])


def explicit(logits: list[float], sampling: Sampling) -> list[float]:
    """The distribution by its definition: temperature, then the k likeliest, then the fewest that hold p."""
    weights = [math.exp(x / sampling.temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[: sampling.top_k]
    total = sum(weights[i] for i in order)
    kept, held = [], 0.0
    for i in order:
        if sampling.top_p is not None and kept and held >= sampling.top_p:
            break
        kept.append(i)
        held += weights[i] / total
    share = sum(weights[i] for i in kept)
    return [weights[i] / share if i in kept else 0.0 for i in range(len(weights))]


def draw(logits_V: Tensor, sampling: Sampling, *, number: int = 0, count: int = NUM_DRAWS) -> Tensor:
    """Tokens at positions 0 .. count - 1, from the same logits everywhere."""
    numbers = torch.full((count,), number)
    return next_tokens(logits_V.expand(count, -1), sampling=sampling, numbers_B=numbers, positions_B=torch.arange(count))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(top_k=1),
        Sampling(top_k=3),
        Sampling(top_k=100),
        Sampling(top_p=0.01),
        Sampling(top_p=0.6),
        Sampling(top_p=1.0),
        Sampling(temperature=0.7, top_k=5, top_p=0.8),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_the_explicit_distribution_says(sampling: Sampling) -> None:
    expected = torch.tensor(explicit(LOGITS.tolist(), sampling), dtype=torch.float64)
    counts = torch.bincount(draw(LOGITS, sampling), minlength=len(LOGITS)).double()
    assert (counts[expected == 0] == 0).all()
    # Five standard deviations of a binomial count, and one draw of rounding.
    limit = 5 * (NUM_DRAWS * expected * (1 - expected)).sqrt() + 1
    assert ((counts - NUM_DRAWS * expected).abs() <= limit).all(), (counts / NUM_DRAWS, expected)


def test_temperature_0_takes_the_likeliest() -> None:
    assert draw(LOGITS, Sampling(temperature=0), count=50).unique().tolist() == [1]


def test_a_draw_depends_on_seed_prompt_and_position_and_on_nothing_else() -> None:
    first = draw(LOGITS, Sampling(seed=5), number=3, count=200)
    assert not torch.equal(first, draw(LOGITS, Sampling(seed=6), number=3, count=200))
    assert not torch.equal(first, draw(LOGITS, Sampling(seed=5), number=4, count=200))
    # Another batch: other companions, another place.
    companions = torch.stack((torch.full_like(LOGITS, 7.0), LOGITS, LOGITS.flip(0)))
    for position in (0, 17, 199):
        among = next_tokens(
            companions,
            sampling=Sampling(seed=5),
            numbers_B=torch.tensor([8, 3, 9]),
            positions_B=torch.tensor([2, position, 2]),
        )
        assert among[1] == first[position]


def test_draws_of_neighbours_are_uniform_and_independent() -> None:
    numbers, positions = torch.arange(200)[:, None], torch.arange(200)
    u = uniform(11, numbers, positions)
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == u.numel()
    # Standard errors of a mean and of a correlation over 40,000 draws: 0.0014 and 0.005.
    assert abs(u.mean() - 0.5) < 0.006
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.5}, "--temperature -0.5"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(values: dict[str, float], words: str) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**values)  # type: ignore[arg-type]
    (line,) = str(caught.value).splitlines()
    assert line.startswith(words)
