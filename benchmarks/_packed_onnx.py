"""A prepacked encoder in ONNX Runtime: attention through its own operator against Attention under a packed mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _harness import Benchmark, interleave

import thresher

LENGTHS = {
    "8 of 256": [256] * 8,
    "mixed": [30, 60, 100, 17, 300, 5, 40, 90],
    "one long": [512] + [32] * 15,
}


def run(bench: Benchmark, folder: Path, model: torch.nn.Module, rounds: int) -> None:
    """Rows and a claim for MiniLM, packing in the graph, one thread."""
    example = batch([5, 9])
    sessions = {}
    for form, runtime in (("own operator", "ort"), ("mask", "portable")):
        path = folder / f"{runtime}.onnx"
        thresher.export_onnx(model, example, path, "exact", runtime=runtime, check=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        sessions[form] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    least = float("inf")
    for label, lengths in LENGTHS.items():
        given = {k: v.numpy() for k, v in batch(lengths).items()}
        forms = {form: (lambda s=s: s.run(None, given)) for form, s in sessions.items()}  # noqa: B023
        real = given["attention_mask"].astype(bool)
        own, masked = (forms[f]()[0][real] for f in ("own operator", "mask"))
        worst = float(np.abs(own - masked).max() / np.abs(masked).max())
        times = interleave(forms, rounds=rounds)
        for form, timing in times.items():
            bench.row(
                section="packed", model="minilm", method=label, form=form, worst=worst, **timing.fields()
            )
        least = min(least, times["mask"].cpu_min / times["own operator"].cpu_min)
    bench.claim(
        "Prepacked MiniLM in ONNX Runtime: least speed of its own attention over a mask", least, ">= 1"
    )


def batch(lengths: list[int]) -> dict[str, Any]:
    """Random tokens of these lengths, padded on the right."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1000, 20000, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
