"""A model's parameters under Hugging Face's names, both ways. Needs torch alone: what an architecture is there is data.

A parameter of ours is fused of one or several of theirs; `fuse` and `split` of an architecture say how, all else follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatronish.config import ModelConfig
from megatronish.errors import UserError
from megatronish.models import MODELS

VOCABULARY = ("embedding.weight", "head.weight")
_MAX_NAMED = 10


@dataclass(frozen=True)
class Interop:
    """One architecture's counterpart in the transformers library."""

    model_type: str
    class_name: str
    outside: Mapping[str, tuple[str, ...]]
    """Ours -> theirs, outside of blocks. Several names: ours is fused of them, in this order."""
    in_block: Mapping[str, tuple[str, ...]]
    block_prefix: str
    """`{}` is the block's number."""
    split: Callable[[ModelConfig, str, Tensor], list[Tensor]]
    """(config, our name, ours) -> theirs, in the order of their names."""
    fuse: Callable[[ModelConfig, str, list[Tensor]], Tensor]
    """The way back."""
    write_config: Callable[[ModelConfig, int], dict[str, Any]]
    """(config, positions) -> their config.json."""
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Their config.json -> our model section; UserError for what would be another model."""
    ignored: tuple[str, ...]
    """Patterns of tensors that files of theirs may hold beside parameters: masks and tables."""

    def name_map(self, config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Our name of every parameter of the model -> theirs, in our order."""
        ours = parameter_shapes(config)
        return {name: self._theirs(name) for name in ours}

    def _theirs(self, name: str) -> tuple[str, ...]:
        if name in self.outside:
            return self.outside[name]
        _, layer, inner = name.split(".", 2)
        return tuple(self.block_prefix.format(layer) + theirs for theirs in self.in_block[inner])

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Their name -> shape of every parameter."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in parameter_shapes(config).items():
            parts = self.split(config, name, torch.empty(shape, device="meta"))
            shapes |= {theirs: tuple(part.shape) for theirs, part in zip(self._theirs(name), parts, strict=True)}
        return shapes

    def to_hugging_face(self, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our whole parameters (or their gradients) by name -> theirs, contiguous copies; the vocabulary's padding is cut off."""
        return dict(pair for name in self.name_map(config) for pair in self.parts(config, name, ours[name]))

    def parts(self, config: ModelConfig, name: str, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(their name, contiguous copy) of what one parameter of ours is to them."""
        for theirs, part in zip(self._theirs(name), self.split(config, name, ours), strict=True):
            yield theirs, part.clone(memory_format=torch.contiguous_format)

    def from_hugging_face(self, config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theirs by name -> our whole parameters; the vocabulary's padding is zeros. UserError names what is missing, unknown or of
        another shape."""
        self.check(config, {name: tuple(tensor.shape) for name, tensor in theirs.items()})
        return {
            name: self.fuse(config, name, [theirs[part] for part in their_names])
            for name, their_names in self.name_map(config).items()
        }

    def check(self, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
        """UserError unless `found`, names and shapes, is the model: the first ten differences and their number."""
        expected = self.shapes(config)
        for what, names in (("missing", set(expected) - set(found)), ("unknown", set(found) - set(expected))):
            if names:
                where = f"a {self.class_name} of model.num_layers={config.num_layers}"
                raise UserError(f"{len(names)} {what} tensors for {where}: {_first(sorted(names))}")
        wrong = [
            f"{name} has shape {list(found[name])}, the model section of the config makes it {list(shape)}"
            for name, shape in expected.items()
            if found[name] != shape
        ]
        if wrong:
            count = f"{len(wrong)} tensors of another shape: " if len(wrong) > 1 else ""
            raise UserError(count + _first(wrong, separator="; "))


def _first(texts: Iterable[str], *, separator: str = ", ") -> str:
    texts = list(texts)
    more = f" and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
    return separator.join(texts[:_MAX_NAMED]) + more


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> global shape of every parameter, in our order."""
    model = MODELS[config.architecture].module(config, dtype=torch.float32, device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def pad_rows(config: ModelConfig, tensor: Tensor) -> Tensor:
    """Zeros for the padding of the vocabulary."""
    return torch.cat((tensor, tensor.new_zeros(config.padded_vocab_size - config.vocab_size, config.hidden_size)))
