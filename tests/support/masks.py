"""Padding masks of every kind a caller can hand over, and comparison where they say a token is real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def right(lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
    """int64 `[rows, width]`, row i starting with `lengths[i]` ones; `width` is the longest row if None."""
    columns = torch.arange(width or max(lengths))
    return (columns < torch.tensor(lengths).unsqueeze(1)).long()


def left(lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
    """Like `right`, the ones at the end of each row."""
    return right(lengths, width).flip(1)


def mixed(lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
    """Even rows padded on the right, odd rows on the left."""
    mask = right(lengths, width)
    mask[1::2] = mask[1::2].flip(1)
    return mask


def holed(lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
    """Padded on the right, and every row of four tokens or more has its third one masked out."""
    mask = right(lengths, width)
    mask[torch.tensor(lengths) >= 4, 2] = 0
    return mask


def every_kind(width: int = 12) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, mask) of all kinds at the same width, three rows each."""
    lengths = (5, 8, width)
    yield "right", right(lengths)
    yield "left", left(lengths)
    yield "mixed", mixed(lengths)
    yield "holed", holed(lengths)
    yield "empty_row", right((5, 0, width))
    yield "empty_row_left", left((width, 0, 3))
    yield "one_token_rows", right((1, width, 1, 1))
    yield "only_one_token", right((1, 0, 0), width)
    yield "all_empty", right((0, 0, 0), width)
    yield "no_padding", right((width,) * 3)
    yield "short_of_width", right((5, 2, 8), width)


def outputs(result: Any) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in a model's output: a tensor, a tuple, a ModelOutput or a KV cache."""
    if result is None:
        return []
    if isinstance(result, torch.Tensor):
        return [("", result)]
    if hasattr(result, "layers"):  # a transformers Cache
        pairs = [(layer.keys, layer.values) for layer in result.layers]
        return [(f".{i}.{name}", t) for i, kv in enumerate(pairs) for name, t in zip(("keys", "values"), kv)]
    items = result.items() if hasattr(result, "items") else enumerate(result)
    return [(f".{key}{name}", tensor) for key, value in items for name, tensor in outputs(value)]


def at_real_tokens(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that belongs to real tokens, `[real tokens, ...]`.

    `[rows, width, ...]` is indexed as it is, a KV cache `[rows, heads, width, dim]` along its third
    dimension. Anything else (a pooled output) is returned whole.
    """
    real = mask.bool()
    if tensor.shape[:2] == mask.shape:
        return tensor[real]
    if tensor.dim() == 4 and (tensor.shape[0], tensor.shape[2]) == tuple(mask.shape):
        return tensor.transpose(1, 2)[real]
    return tensor


def assert_equal_at_real_tokens(actual: Any, expected: Any, mask: torch.Tensor, atol: float = 1e-5) -> None:
    """Every output agrees within `atol` at real tokens, in shape and in dtype; names the one that does not.

    What stands at padding is not compared. NaN equals nothing: it must not reach a real token.
    """
    pairs = list(zip(outputs(actual), outputs(expected), strict=True))
    assert pairs, "nothing to compare"
    for (name, a), (_, e) in pairs:
        assert a.shape == e.shape and a.dtype == e.dtype, (name, a.shape, a.dtype, e.shape, e.dtype)
        torch.testing.assert_close(
            at_real_tokens(a, mask),
            at_real_tokens(e, mask),
            atol=atol,
            rtol=0,
            msg=lambda text, name=name: f"output {name or 'tensor'}: {text}",
        )
