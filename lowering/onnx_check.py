"""Runs an exported model and compares it with what the Program gave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_MOST = 1 << 28  # bytes of a model that the reference evaluator, which is slow, is still tried on


def runner(path: str | Path) -> tuple[str, Callable[[Mapping[str, torch.Tensor]], Any]] | str:
    """What can run a model here, ONNX Runtime before ONNX's own reference, or why nothing can."""
    reasons = []
    try:
        import onnxruntime
    except ImportError:
        reasons.append("onnxruntime is not installed")
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # where it fuses blocked DequantizeLinear with MatMul it would round activations to int8 by default
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as reason:
            reasons.append(f"ONNX Runtime on the CPU: {str(reason).splitlines()[0]}")
        else:
            return "onnxruntime", lambda inputs: session.run(None, {k: _array(v) for k, v in inputs.items()})
    if Path(path).stat().st_size > _MOST:
        return f"{'; '.join(reasons)}; onnx.reference: the model is too large to be run in Python"
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(str(path))
    except Exception as reason:
        return f"{'; '.join(reasons)}; onnx.reference: {reason}"
    return "onnx.reference", lambda inputs: evaluator.run(None, {k: _array(v) for k, v in inputs.items()})


def compare(
    path: str | Path, calls: Sequence[tuple[Mapping[str, torch.Tensor], Sequence[Any], torch.Tensor | None]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """One record for each call, and notes about what could not be run.

    calls: inputs by name, the Program's results, and a bool [B, S] mask of real tokens: results of a packed
    program are undefined elsewhere. None compares all.
    """
    found = runner(path)
    if isinstance(found, str):
        return [], [f"The file was checked but not run. {found}."]
    engine, run = found
    records: list[dict[str, Any]] = []
    for inputs, expected, real in calls:
        sizes = {name: list(t.shape) for name, t in inputs.items()}
        try:
            actual = run(inputs)
        except Exception as reason:
            return records, [f"{engine} failed at sizes {sizes}: {str(reason).splitlines()[0]}"]
        worst = (0.0, 0.0)
        for a, e in zip(actual, expected, strict=True):
            if isinstance(e, torch.Tensor) and e.numel():
                worst = max(worst, difference(torch.from_numpy(np.asarray(a)), e, real), key=lambda w: w[1])
        records.append({"engine": engine, "sizes": sizes, "absolute": worst[0], "relative": worst[1]})
    return records, []


def difference(
    actual: torch.Tensor, expected: torch.Tensor, real: torch.Tensor | None
) -> tuple[float, float]:
    """Largest difference, absolute and relative to the largest expected value; infinite where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf"), float("inf")
    if real is not None:
        for batch, sequence in ((0, 1), (0, 2)):  # [B, S, ...], or keys and values [B, H, S, D]
            if (
                expected.dim() > max(2, sequence)
                and expected.shape[sequence] == real.shape[1]
                and expected.shape[batch] == real.shape[0]
            ):
                actual, expected = (t.movedim((batch, sequence), (0, 1))[real] for t in (actual, expected))
                break
        else:
            actual, expected = actual[real[:, 0]], expected[real[:, 0]]
    actual, expected = actual.double(), expected.double()
    if not expected.numel():
        return 0.0, 0.0
    gap = (actual - expected).abs()
    gap = torch.where(actual == expected, 0.0, gap)  # equal infinities
    largest = expected[expected.isfinite()].abs().max().clamp_min(1e-30) if expected.isfinite().any() else 1.0
    worst = float(gap.max())
    return worst, float(gap.max() / largest)


def _array(tensor: torch.Tensor) -> np.ndarray:
    with contextlib.suppress(TypeError):
        return tensor.detach().cpu().numpy()
    return tensor.detach().float().cpu().numpy()
