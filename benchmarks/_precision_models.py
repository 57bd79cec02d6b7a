"""Programs and batches of text that the benchmark of precision judges and times."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.tools import models

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import captures

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}


BATCH = 32


def captured(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: str) -> tuple[Any, list[Any]]:
    """A model as it runs in that dtype, as a Program, and its inputs."""
    model = model.to(DTYPES.get(dtype, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        program = captures.dynamo(model, inputs)
    return program, captures.arguments(program, inputs)


def texts(count: int, order: str) -> list[dict[str, torch.Tensor]]:
    """Batches of Python's language reference, as MiniLM reads it. order: "arrival" or "sorted"."""
    _, tokenizer = models.minilm()
    chosen = list(models.texts())[:count]
    if order == "sorted":
        chosen.sort(key=lambda t: len(tokenizer(t, truncation=True, max_length=256)["input_ids"]))
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    return [
        dict(tokenizer(p, padding=True, truncation=True, max_length=256, return_tensors="pt")) for p in parts
    ]


def each(form: Callable[..., Any], batches: Sequence[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            form(**batch)
