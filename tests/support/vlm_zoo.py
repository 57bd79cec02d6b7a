"""Random tiny models of transformers that see or hear, with batches of rows of one image and more.

    model, batch = vlm_zoo.build("llava"), vlm_zoo.batch("llava", model, (1, 2))

Classes are unmodified. A row is text, an image, text, and again for each further image; rows are left-padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vlm_models import ZOO, Batch

_BESIDE = ("mm_token_type_ids", "token_type_ids")
_ROW_MEDIA = ("pixel_values", "aspect_ratio_mask", "aspect_ratio_ids")


def build(name: str) -> Any:
    """The model, with weights wide enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = ZOO[name].make().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if not parameter.any():  # gates that start shut
            torch.nn.init.constant_(parameter, 0.5)
    model.generation_config.eos_token_id = None
    return model


def batch(name: str, model: Any, rows: Sequence[int]) -> Batch:
    """Left-padded rows of so many images each; none where all rows have none."""
    entry, draw = ZOO[name], torch.Generator().manual_seed(5)
    media, tokens = entry.media(model, [max(n, 1) for n in rows]) if any(rows) else ({}, 0)
    lines = []
    for row, count in enumerate(rows):
        parts = [torch.randint(2, 100, (6 + row,), generator=draw)]
        for _ in range(count):
            parts += [torch.full((tokens,), entry.mark), torch.randint(2, 100, (7,), generator=draw)]
        lines.append(torch.cat(parts))
    width = max(map(len, lines))
    ids = torch.stack([torch.cat([torch.zeros(width - len(line), dtype=torch.long), line]) for line in lines])
    mask = torch.stack([(torch.arange(width) >= width - len(line)).long() for line in lines])
    given = {"input_ids": ids, "attention_mask": mask, **media, **entry.beside(ids)}
    if name == "Mllama" and media:
        seen = media["aspect_ratio_ids"][:, None, :, None] * mask[:, :, None, None]
        given["cross_attention_mask"] = seen.expand(-1, width, -1, 1).contiguous()
    return given


def extended(name: str, given: Batch, ids: torch.Tensor, media: bool) -> Batch:
    """A batch whose rows go on as `ids` [rows, more tokens] do, all of them text. media: with its images."""
    new = ids.shape[1] - given["input_ids"].shape[1]
    mask = torch.nn.functional.pad(given["attention_mask"], (0, new), value=1)
    found = {**(given if media else {}), "input_ids": ids, "attention_mask": mask}
    for beside in _BESIDE:
        if beside in given:
            found[beside] = torch.nn.functional.pad(given[beside], (0, new), value=ZOO[name].later)
    seen = given.get("cross_attention_mask")
    if seen is not None:
        found["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, new, -1, -1)], 1)
    return found


def row(given: Batch, rows: Sequence[int], index: int) -> Batch:
    """One row of a batch of `rows`, without its padding."""
    first, last, every = sum(rows[:index]), sum(rows[: index + 1]), sum(rows)
    start = int((given["attention_mask"][index] == 0).sum())
    width, alone = given["input_ids"].shape[1], {}
    for name, tensor in given.items():
        count = tensor.shape[0]
        if count == len(rows):
            tensor = tensor[index : index + 1]
            tensor = tensor[:, start:] if tensor.dim() > 1 and tensor.shape[1] == width else tensor
            alone[name] = tensor[:, : rows[index]] if name in _ROW_MEDIA and tensor.dim() > 1 else tensor
        else:  # images of all rows, one after the other, or their patches
            each = count // every
            alone[name] = tensor[first * each : last * each]
    return {name: tensor.contiguous() for name, tensor in alone.items()}


def padded_right(given: Batch) -> Batch:
    """The same rows with their padding on the right."""
    mask = given["attention_mask"]
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)  # real tokens first
    found = dict(given)
    for name, tensor in given.items():
        if tensor.shape[:2] == mask.shape:
            at = order.view(*order.shape, *[1] * (tensor.dim() - 2)).expand_as(tensor)
            found[name] = tensor.gather(1, at)
    return found
