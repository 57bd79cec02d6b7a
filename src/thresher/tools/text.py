"""A user's own text, and batches of it as a model takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from . import models

_SUFFIXES = (".txt", ".md", ".jsonl", ".json")


def read(path: Path) -> list[str]:
    """The texts of a file: one a line, the `text` of each line of a .jsonl file, or the strings of a .json list; of a
    directory, those of all such files in it. Empty lines are left out. Raises ArgumentError where there is none."""
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        else:
            files = [path]
        found = [text for file in files for text in _of_file(file) if text.strip()]
    except OSError as error:
        raise ArgumentError(
            "--data",
            f"{str(path)!r}: {error.strerror}",
            "a file of texts, or a folder of them",
            "Check the path.",
        ) from None
    if not found:
        raise ArgumentError("--data", f"{str(path)!r}, which holds no text",
                            "a .txt file with one text a line, or a .jsonl file with a `text` in each line",
                            "Name another file.")  # fmt: skip
    return found


def _of_file(path: Path) -> Iterator[str]:
    try:
        whole = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError("--data", f"{str(path)!r}, which is no UTF-8 text at byte {error.start}",
                            "text in UTF-8", "Convert it, for example with iconv.") from None  # fmt: skip
    if path.suffix == ".json":
        yield from (_text(path, 1, entry) for entry in _json(path, 1, whole, list))
    elif path.suffix == ".jsonl":
        for number, line in enumerate(whole.splitlines(), 1):
            if line.strip():
                yield _text(path, number, _json(path, number, line, object))
    else:
        yield from whole.splitlines()


def _json(path: Path, number: int, text: str, kind: type) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(
            "--data", f"{str(path)!r}, line {number}: {error}", "JSON", "Correct that line."
        ) from None
    if not isinstance(found, kind):
        raise ArgumentError(
            "--data", f"{str(path)!r}: a {type(found).__name__}", "a list of texts", "Write [...]."
        )
    return found


def _text(path: Path, number: int, entry: Any) -> str:
    found = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(found, str):
        raise ArgumentError("--data", f"{str(path)!r}, line {number}: no text",
                            'a string, or an object with a "text"', "Correct that line.")  # fmt: skip
    return found


def batch(
    model: Any, tokenizer: Any, rows: int, longest: int, texts: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """What to call the model with: `rows` texts, padded to the longest of them.

    texts: those from `rows * seed` on, again from the start where they run out, cut to `longest` tokens; None for
        Python's reference, in rows of mixed lengths up to `longest`.
    An encoder-decoder is given the same text to write as to read, behind its start token.
    """
    longest = min(longest, room(model, tokenizer))
    if texts is None:
        made = dict(models.mixed_length_batch(tokenizer, rows, seed, max_len=longest))
    else:
        chosen = [texts[(rows * seed + i) % len(texts)] for i in range(rows)]
        made = dict(tokenizer(chosen, padding=True, truncation=True, max_length=longest, return_tensors="pt"))
    ids = made["input_ids"]
    check_known(model, ids)
    shifted = written(model, ids)
    if shifted is not None:
        mask = made.get("attention_mask")
        made["decoder_input_ids"] = shifted
        if mask is not None:
            made["decoder_attention_mask"] = torch.cat((torch.ones_like(mask[:, :1]), mask[:, :-1]), 1)
    accepted = _parameters(model)
    return {name: value for name, value in made.items() if name in accepted}


def written(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """What an encoder-decoder is given to write where it reads `ids` [rows, length]: the same behind its start token; None
    for other models."""
    config = model.config
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    start = getattr(config, "decoder_start_token_id", None)
    start = start if start is not None else getattr(config, "bos_token_id", None) or 0
    return torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), 1)


def check_known(model: Any, ids: torch.Tensor) -> None:
    """Raise ArgumentError for token ids that the model has no embedding of."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and int(ids.max()) >= known:
        raise ArgumentError("model", f"a tokenizer that writes token {int(ids.max())}",
                            f"one for the model's {known} tokens", "Save the model's own tokenizer beside it.")  # fmt: skip


def room(model: Any, tokenizer: Any) -> int:
    """How many tokens a row may have: what the tokenizer and the table of positions allow."""
    limits = [int(min(getattr(tokenizer, "model_max_length", 1 << 30), 1 << 30))]
    for name in ("max_position_embeddings", "n_positions", "max_source_positions"):
        stated = getattr(model.config, name, None)
        if isinstance(stated, int) and stated > 0:
            limits.append(stated)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:  # RoBERTa counts from behind its pad
            limits.append(module.num_embeddings - padding - 1)
    return min(limits)


def _parameters(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)
