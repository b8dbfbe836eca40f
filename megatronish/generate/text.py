"""Prompts as tokens, and tokens as text that grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatronish.data.tokenizer import end_of_text_id
from megatronish.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNFINISHED = "�"  # what the decoder makes of bytes that are not whole characters yet


def read_prompts_file(path: Path) -> list[str]:
    """One prompt a line. UserError for a file that cannot be read or an empty line, which would continue nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if not lines:
        raise UserError(f"--prompts-file {path}: holds no prompt; write one a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{path}:{number}: an empty prompt; remove the line")
    return lines


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, max_positions: int | None) -> list[list[int]]:
    """Tokens of each prompt. UserError, one line a prompt, for one without tokens or without room to go on."""
    encoded = [list(tokenizer.encode(prompt, add_special_tokens=False).ids) for prompt in prompts]
    problems = []
    for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True), start=1):
        if not tokens:
            problems.append(f"prompt {number}, {prompt!r}: has no tokens; give at least one character")
        elif max_positions is not None and len(tokens) >= max_positions:
            problems.append(
                f"prompt {number} has {len(tokens)} tokens, and model.max_positions={max_positions} leaves no room to continue it; "
                f"shorten it to at most {max_positions - 1} tokens"
            )
    if problems:
        raise UserError("\n".join(problems))
    return encoded


def end_token(tokenizer: Tokenizer) -> int | None:
    """The token that ends a text; None for a tokenizer without one."""
    try:
        return end_of_text_id(tokenizer)
    except UserError:
        return None


class TextStream:
    """Tokens that come one by one -> the characters that each makes certain."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # With the prompt's last tokens before them: a decoder may treat the first token of a text in its own way.
        self._tokens = list(prompt)
        self._shown = len(self._text())

    def add(self, token: int) -> str:
        """What is new. Empty in the middle of a character."""
        self._tokens.append(token)
        text = self._text()
        return "" if text.endswith(_UNFINISHED) else self._show(text)

    def rest(self) -> str:
        """What is left at the end: a character that was never finished."""
        return self._show(self._text())

    def _show(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        return text


def continued_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` after `prompt`: what a TextStream shows of them in all."""
    stream = TextStream(tokenizer, prompt)
    return "".join(stream.add(token) for token in tokens) + stream.rest()
