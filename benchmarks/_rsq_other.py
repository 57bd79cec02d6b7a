"""Rows of benchmarks/rsq.py that another package makes: llm-compressor's GPTQ, run in an environment of its own.

Its pins differ from ours, so $THRESHER_LLMCOMPRESSOR names the Python of an environment that has it
(`pip install llmcompressor`); without it the row is skipped and the record says so.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thresher.tools import models

PYTHON = "THRESHER_LLMCOMPRESSOR"
NAME, BITS = "llm-compressor3", 3
ABSENT = (
    f"The row {NAME} needs ${PYTHON}, the Python of an environment with llm-compressor, and it is not set."
)


def row(
    tokens: Path, weights: Path, judge: Callable[..., dict[str, float]], seed: int
) -> dict[str, Any] | None:
    """Quantise by llm-compressor on the tokens of a file and judge the result; None where it cannot run.

    weights: what it wrote is kept there, and read where it is there already.
    """
    from safetensors.torch import load_file

    python = os.environ.get(PYTHON)
    if not python and not weights.exists():
        return None
    wall, spent = time.perf_counter(), _children()
    if not weights.exists():
        script = Path(__file__).with_name("_rsq_llmcompressor.py")
        command = [
            str(python),
            str(script),
            str(models.smollm2_directory()),
            str(tokens),
            str(weights),
            str(BITS),
        ]
        subprocess.run(command, check=True)
    measured = {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(_children() - spent, 1)}
    found = load_file(weights)
    model, _ = models.smollm2()
    model.config.use_cache = False
    missing = model.load_state_dict(found, strict=False)
    if missing.unexpected_keys or not found:
        raise RuntimeError(
            f"llm-compressor wrote weights that the model does not have: {missing.unexpected_keys[:3]}."
        )
    with torch.no_grad():
        judged = judge(lambda window: model(window).logits)
    stored = sum(w.numel() * BITS / 8 + w.shape[0] * 4 for w in found.values())
    return {
        "row": NAME,
        "seed": seed,
        "bits": round(8 * stored / sum(w.numel() for w in found.values()), 3),
        **judged,
        "mb": round(stored / 1e6, 1),
        **(measured if measured["cpu_s"] else {}),
        "tokens": torch.load(tokens).numel(),
    }


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
