"""What `thresher.quantize` takes as data, as batches: strings, token ids, or what the model is called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer.importance import shift_sequences
from thresher.passes.rsq.quantizer.pieces import Batch

from .errors import ArgumentError


def batches_of(
    data: Any, tokenizer: Any, sequences: int, length: int, size: int, seed: int, config: RSQConfig
) -> Iterator[Batch]:
    """Calibration batches of `size` sequences; see `thresher.quantize` for what data may be. Raises ArgumentError."""
    if is_text(data):
        if data is None:
            from .tools.models import texts

            data = texts()
        if tokenizer is None:
            raise ArgumentError(
                "tokenizer", None, "the model's tokenizer", "Text must be tokenized; pass it."
            )
        data = cut_text(data, tokenizer, sequences, length, seed)
    if isinstance(data, str):
        raise ArgumentError("data", "one string", "a list of strings", "Write [text].")
    if isinstance(data, torch.Tensor):
        if data.dim() != 2 or data.is_floating_point() or not data.numel():
            raise ArgumentError("data", f"{data.dtype} {tuple(data.shape)}", "integer token ids [sequences, length]",
                                "Tokenize first, or pass strings.")  # fmt: skip
        tokens = shift_sequences(data.long(), config.expand) if config.expand > 1 else data.long()
        for rows in tokens.split(size):
            yield Batch({"input_ids": rows}, None, rows)
        return
    if not isinstance(data, Iterable):
        raise ArgumentError(
            "data", type(data).__name__, "strings, token ids or batches", "See quantize's help."
        )
    if config.expand > 1:
        raise ArgumentError("rsq option expand", config.expand, "1 for ready-made batches",
                            "Pass a tensor of token ids, or strings.")  # fmt: skip
    for given in data:
        if isinstance(given, torch.Tensor):
            given = {"input_ids": given}
        if not isinstance(given, Mapping) and not hasattr(given, "keys"):
            raise ArgumentError("data", f"a batch of type {type(given).__name__}", "a dict of keyword arguments",
                                "Pass what you would call the model with.")  # fmt: skip
        inputs = {k: v for k, v in dict(given).items() if isinstance(v, torch.Tensor) and k != "labels"}
        mask = inputs.get("attention_mask")
        real = mask != 0 if mask is not None and mask.dim() == 2 else None
        yield Batch(inputs, real, inputs.get("input_ids"))


def is_text(data: Any) -> bool:
    """Whether data must be tokenized: strings, or the demo's text."""
    return data is None or (
        isinstance(data, (list, tuple)) and bool(data) and all(isinstance(t, str) for t in data)
    )


def cut_text(texts: Sequence[str], tokenizer: Any, sequences: int, length: int, seed: int) -> torch.Tensor:
    """int64 [up to `sequences`, length]: windows of the texts put together, drawn without overlap. Each begins with the
    token that the tokenizer puts before every text, where it puts one: a model that knows it misses it.

    Raises ArgumentError where the texts do not fill one window.
    """
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", add_special_tokens=False, verbose=False)[
        "input_ids"
    ][0]
    first = first_token(tokenizer)
    room = length - len(first)
    windows = len(ids) // room if room > 0 else 0
    if windows == 0:
        raise ArgumentError("data", f"text of {len(ids)} tokens", f"at least one sequence of {length} tokens",
                            f"Give more text, or length={len(ids) + len(first) if len(ids) else 1}.")  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(0, len(ids) - windows * room + 1, (1,), generator=make))
    order = torch.randperm(windows, generator=make)[:sequences]
    cut = ids[offset : offset + windows * room].reshape(windows, room)[order]
    return torch.cat([torch.tensor(first, dtype=torch.int64).expand(len(cut), -1), cut], 1)


def first_token(tokenizer: Any) -> list[int]:
    """The id of the token that a tokenizer puts before every text, or nothing."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return [begin] if begin is not None and tokenizer("a")["input_ids"][0] == begin else []
