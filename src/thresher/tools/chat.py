"""What a chat template writes before and behind a user's words, as ids: `user_turn` of token pruning.

marks = user_turn(processor.tokenizer)
fast = thresher.compile(model, batch, transprune={"user_turn": marks})
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError

_WORDS = ("Xylophone", "Yesterday", "Zeppelin")


def user_turn(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that begin a user's turn, and those that end it, of a tokenizer or processor with a chat template.

    Found by rendering a conversation: they are what all of its user turns have in common around their words.
    Raises ArgumentError where there is no template, or one whose turns have nothing in common.
    """
    if not getattr(tokenizer, "chat_template", None) and hasattr(tokenizer, "tokenizer"):
        tokenizer = tokenizer.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise _error(tokenizer, "without a chat template")
    said = _rendered(tokenizer)
    parts: list[str] = []
    rest = said
    for word in _WORDS:
        before, found, rest = rest.partition(word)
        if not found:
            raise _error(tokenizer, "whose template leaves out what is said")
        parts.append(before)
    begin = _alike(parts[0][::-1], parts[2][::-1])[::-1]
    end = _alike(parts[1], rest)
    whole = _ids(tokenizer, said)
    marks = _ids(tokenizer, begin.strip(" ")), _ids(tokenizer, end.strip(" "))
    if not marks[0] or not all(_within(mark, whole) for mark in marks):
        raise _error(tokenizer, "whose user turns begin and end with no ids of their own")
    return marks


def _rendered(tokenizer: Any) -> str:
    """A conversation of _WORDS, said by a user, an assistant and the user again."""
    plain = [{"role": role, "content": words} for role, words in zip(("user", "assistant", "user"), _WORDS)]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    said = ""
    for turns in (plain, parts):  # templates of models that see take a turn's content as a list
        try:
            said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:
            continue
        if all(said.count(word) == 1 for word in _WORDS):
            return said
    return said


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _alike(one: str, other: str) -> str:
    """What both texts begin with."""
    length = min(len(one), len(other))
    return one[: next((i for i in range(length) if one[i] != other[i]), length)]


def _within(mark: Sequence[int], ids: Sequence[int]) -> bool:
    return any(tuple(ids[i : i + len(mark)]) == mark for i in range(len(ids) - len(mark) + 1))


def _error(tokenizer: Any, which: str) -> ArgumentError:
    return ArgumentError(
        "tokenizer",
        f"a {type(tokenizer).__name__} {which}",
        "a tokenizer or processor whose chat template marks a user's turn",
        "Give the ids themselves: transprune={'user_turn': (ids before, ids behind)}.",
    )
