"""One row of the table, and what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatronish.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    """A config and, when it is known, the number of ranks: what a row reads."""

    config: Config
    given_world: int | None

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def data(self) -> DataConfig:
        return self.config.data

    @property
    def optim(self) -> OptimConfig:
        return self.config.optim

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.parallel.tensor * self.parallel.pipeline

    @property
    def replicas(self) -> int | None:
        """Data ranks, when they are known and the world divides into them."""
        if self.parallel.data is not None or self.given_world is None:
            return self.parallel.data
        return None if self.given_world % self.model_ranks else self.given_world // self.model_ranks

    @property
    def samples_at_once(self) -> int | None:
        """Samples of one microbatch on every data rank."""
        return None if self.replicas is None else self.train.micro_batch_size * self.replicas


@dataclass(frozen=True)
class Constraint:
    """One row. `keys[0]` is the key to change first; the message names them all."""

    name: str
    keys: tuple[str, ...]
    holds: Callable[[Layout], bool]
    message: Callable[[Layout], str]
    applies: Callable[[Layout], bool] = lambda layout: True


@dataclass(frozen=True)
class Problem:
    """A constraint that does not hold."""

    name: str
    keys: tuple[str, ...]
    message: str


def divisors_near(number: int, target: int, *, count: int = 4) -> str:
    """The divisors of `number` nearest to `target`, rising, in words: `1, 2 or 4`."""
    # Small ones and their partners: a mistyped size of 10^18 must not hold up its own error message.
    divisors = {d for low in range(1, min(math.isqrt(number), 10_000) + 1) if number % low == 0 for d in (low, number // low)}
    return _either(sorted(sorted(divisors, key=lambda d: (abs(d - target), d))[:count]))


def multiples_near(step: int, target: int) -> str:
    """The multiples of `step` on both sides of `target`, in words."""
    below = target // step * step
    return _either([m for m in (below, below + step) if m > 0])


def _either(values: list[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
