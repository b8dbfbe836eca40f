"""A config.json of the transformers library, read as data: a key is used, checked, known to change nothing, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatronish.errors import UserError

# What says how a model is stored, called or sampled from, not what it computes.
_HARMLESS = """
_attn_implementation _name_or_path architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
id2label is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores
pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_return_dict
"""
HARMLESS = frozenset(_HARMLESS.split())
_MISSING = object()


class ForeignConfig:
    """Takes keys one by one; `finish` refuses what nobody has asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._seen: set[str] = set()

    def take(self, key: str, *, default: Any = _MISSING) -> Any:
        """The value as it stands."""
        self._seen.add(key)
        value = self._values.get(key, default)
        if value is _MISSING:
            raise UserError(f"config.json has no {key}, which {self._values.get('model_type')} needs")
        return value

    def integer(self, key: str, *, default: Any = _MISSING) -> int:
        """A whole number of at least 1."""
        value = self.take(key, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"config.json: {key}={value!r} must be a whole number of at least 1")
        return value

    def number(self, key: str, *, default: Any = _MISSING) -> float:
        """Any finite number."""
        value = self.take(key, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise UserError(f"config.json: {key}={value!r} must be a number")
        return float(value)

    def boolean(self, key: str, *, default: Any = _MISSING) -> bool:
        """true or false."""
        value = self.take(key, default=default)
        if not isinstance(value, bool):
            raise UserError(f"config.json: {key}={value!r} must be true or false")
        return value

    def must_be(self, key: str, *allowed: Any, default: Any) -> None:
        """UserError unless it is one of the values that this program computes."""
        value = self.take(key, default=default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            known = " or ".join(repr(one) for one in allowed if one is not None) or "nothing"
            raise UserError(f"config.json: {key}={value!r} is another model than this program computes, which is {key}={known}")

    def ignore(self, *keys: str) -> None:
        """They change nothing."""
        self._seen.update(keys)

    def finish(self) -> None:
        """UserError for keys that are neither used nor known to change nothing."""
        unknown = sorted(set(self._values) - self._seen - HARMLESS)
        if unknown:
            raise UserError(
                f"config.json has keys that this program does not know and that may change what the model computes: "
                f"{', '.join(unknown[:10])}; remove them from a copy if they do not"
            )
